"""The table of nodes: what each kind says of its value, push, pull, curvature and parameters.

A node is v = f(u; θ), u one or more inputs (..., H_i), v (..., H), along the last axis. For a
tangent u̇ and a cotangent P its rule gives

=============  ==================================================================================
value          f(u; θ)
push           f'(u) u̇, the tangent of v; an input's tangent is None where it is zero
pull           f'(u)ᵀ P for each input
curvature      ∇_u ⟨P, f'(u) u̇⟩ for each input, None where it is zero
parameters     adds ∂/∂θ of ⟨g, f(u; θ)⟩ and of ⟨P, f'(u; θ) u̇⟩ to sums over the rows
=============  ==================================================================================

and nothing else in the package knows what a kind computes. Leading axes broadcast: tangents and
cotangents may carry one more than the values. Value, push and pull are differentiable to all
orders. What a hand-written backward calls instead (``value_now``, ``push_now``, ``pull_now``) is
the same in as few passes over memory as PyTorch has operators for, and not for autograd. Formulas
and letters are those of ``docs/mathematics.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dropout
from .activations import ACTIVATIONS, Activation
from .program import Node

__all__ = [
    "Rule",
    "Sums",
    "columns_of",
    "moving",
    "parameter_shapes",
    "rule",
    "used",
    "wrong_nodes",
]

_aten = torch.ops.aten

Tensors = Sequence[Tensor]
Maybe = Sequence[Tensor | None]
Shape = tuple[int, ...]


class Sums(Protocol):
    """Where gradients of parameters are added up; ``place`` is a parameter's among the call's."""

    def product(self, place: int, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ·right (out, in), left (..., out), right (..., in)."""

    def rows(self, place: int, t: Tensor) -> None:
        """Adds t (..., H), summed over every axis that the parameter has not."""


class Rule:
    """A kind whose Jacobian does not depend on u (no curvature) and that has no parameters."""

    arity: int | None = 1  # None: any number of inputs, one or more
    curved = False  # whether the curvature is not zero everywhere
    per_row = False  # whether what ``at_rows`` makes of its parameters has a row for each of x
    one_for_all = False  # whether a parameter of H columns may be one number (1,)
    # Whether the Jacobian depends on u. Then push, pull and curvature read u, and ``pull_now``
    # makes new memory; else they ask of u the number of columns alone, and may hand on P itself.
    varies = False
    reads_v = False  # whether they read v: for the others anything may stand in its place

    def shapes(self, node: Node, H: Sequence[int]) -> tuple[Shape, ...]:
        """The shapes of the node's parameters for inputs of widths H."""
        return ()

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        """Whether inputs of widths H, the numbers or the node's width do not fit its kind."""
        return node.width != H[0] or bool(node.numbers)

    def at_rows(self, node: Node, θ: Maybe, rows: Tensor, dtype: torch.dtype) -> Maybe:
        """What the functions below take as θ, for rows (n,) of x."""
        return θ

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        raise NotImplementedError

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        """At least one of u̇ is not None."""
        raise NotImplementedError

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        raise NotImplementedError

    def curvature(
        self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, P: Tensor, θ: Maybe
    ) -> list[Tensor | None]:
        return [None] * len(u)

    def value_now(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return self.value(node, u, θ)

    def push_now(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return self.push(node, u, v, u_dot, θ)

    def pull_now(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return self.pull(node, u, v, P, θ)

    def parameters(self, node: Node, u: Tensors, g: Tensor, θ: Maybe, sums: Sums) -> None:
        """∂/∂θ of ⟨g, f(u; θ)⟩."""

    def slope_parameters(
        self, node: Node, u: Tensors, u_dot: Maybe, P: Tensor, θ: Maybe, sums: Sums
    ) -> None:
        """∂/∂θ of ⟨P, f'(u; θ) u̇⟩."""


def _given(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


class Linear(Rule):
    """v = W u + b; θ = W (H, H_0), b (H,) or None."""

    def shapes(self, node: Node, H: Sequence[int]) -> tuple[Shape, ...]:
        return (node.width, H[0]), (node.width,)

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return bool(node.numbers)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return F.linear(u[0], _given(θ[0]), θ[1])

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return _given(u_dot[0]) @ _given(θ[0]).mT

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P @ _given(θ[0])]

    def parameters(self, node: Node, u: Tensors, g: Tensor, θ: Maybe, sums: Sums) -> None:
        sums.product(node.params[0], g, u[0])
        if θ[1] is not None:
            sums.rows(node.params[1], g)

    def slope_parameters(
        self, node: Node, u: Tensors, u_dot: Maybe, P: Tensor, θ: Maybe, sums: Sums
    ) -> None:
        sums.product(node.params[0], P, _given(u_dot[0]))


# σ'(u) ∘ P of v = σ(u), for those whose derivative is known from their value.
_BY_VALUE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": _aten.tanh_backward.default,
    "sigmoid": _aten.sigmoid_backward.default,
}


class Elementwise(Rule):
    """v = σ(u), a kind of the activation table."""

    def __init__(self, kind: str) -> None:
        self.spelling = ACTIVATIONS[kind]
        self.curved = not self.spelling.piecewise_linear
        self.varies = kind != "identity"
        self.by_value = _BY_VALUE.get(kind)
        self.reads_v = self.by_value is not None

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return node.width != H[0] or len(node.numbers) != 3

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return _σ(node).value(u[0])

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return _σ(node).first(u[0]) * _given(u_dot[0])

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [_σ(node).first(u[0]) * P]

    def curvature(
        self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, P: Tensor, θ: Maybe
    ) -> list[Tensor | None]:
        if not self.curved:
            return [None]
        bent = self.spelling.second(u[0], _known_σ(node))
        for t in (_given(u_dot[0]), P):
            bent = bent.mul_(t) if t.shape == bent.shape else bent * t
        return [bent]

    def value_now(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return self.spelling.value(u[0], _known_σ(node))

    def push_now(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return self.pull_now(node, u, v, _given(u_dot[0]), θ)[0]

    def pull_now(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        if not self.varies:
            return [P]
        if self.by_value is not None:
            return [self.by_value(*_alike(P, v))]
        return [self.spelling.pull(*_alike(P, u[0]), _known_σ(node))]


def _σ(node: Node) -> Activation:
    return Activation(node.kind, *node.numbers)


# A quarter of the time, where torch.compile does not look on (it warns of caches).
_known_σ = lru_cache(maxsize=1024)(_σ)


def _alike(t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one shape, as PyTorch's own backwards want them."""
    if t.shape == a.shape:
        return t, a
    t, a = torch.broadcast_tensors(t, a)
    return t, a


class PReLU(Rule):
    """v = u where u > 0, else θ∘u; θ (H,) or (1,)."""

    one_for_all = True
    varies = True

    def shapes(self, node: Node, H: Sequence[int]) -> tuple[Shape, ...]:
        return ((H[0],),)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return torch.where(u[0] > 0, u[0], _given(θ[0]) * u[0])

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return torch.where(u[0] > 0, _given(u_dot[0]), _given(θ[0]) * _given(u_dot[0]))

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [torch.where(u[0] > 0, P, _given(θ[0]) * P)]

    def parameters(self, node: Node, u: Tensors, g: Tensor, θ: Maybe, sums: Sums) -> None:
        sums.rows(node.params[0], torch.relu(-u[0]).neg_() * g)

    def slope_parameters(
        self, node: Node, u: Tensors, u_dot: Maybe, P: Tensor, θ: Maybe, sums: Sums
    ) -> None:
        t = _given(u_dot[0])
        sums.rows(node.params[0], (t - _aten.threshold_backward.default(t, u[0], 0)).mul_(P))

    # Selecting by a mask takes sixteen times as long as a product: it has no vector form.

    def value_now(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return F.prelu(u[0], _given(θ[0]))

    def push_now(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return self._jacobian(u[0], _given(u_dot[0]), _given(θ[0]))

    def pull_now(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [self._jacobian(u[0], P, _given(θ[0]))]

    def _jacobian(self, u: Tensor, t: Tensor, θ: Tensor) -> Tensor:
        t, u = _alike(t, u)
        positive: Tensor = _aten.threshold_backward.default(t, u, 0)
        return positive.mul_(1 - θ).addcmul_(t, θ)


class Scale(Rule):
    """v = θ∘u; θ (H,) or (1,)."""

    one_for_all = True

    def shapes(self, node: Node, H: Sequence[int]) -> tuple[Shape, ...]:
        return ((H[0],),)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return u[0] * _given(θ[0])

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return _given(u_dot[0]) * _given(θ[0])

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P * _given(θ[0])]

    def parameters(self, node: Node, u: Tensors, g: Tensor, θ: Maybe, sums: Sums) -> None:
        sums.rows(node.params[0], g * u[0])

    def slope_parameters(
        self, node: Node, u: Tensors, u_dot: Maybe, P: Tensor, θ: Maybe, sums: Sums
    ) -> None:
        sums.rows(node.params[0], P * _given(u_dot[0]))


class Dropout(Scale):
    """v = m∘u, m (N, H) the mask that ``dropout.mask`` makes of a key (8,), which is θ. Numbers:
    the probability p and which of the network's dropouts it is."""

    per_row = True
    one_for_all = False

    def shapes(self, node: Node, H: Sequence[int]) -> tuple[Shape, ...]:
        return ((dropout.KEY,),)

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        if node.width != H[0] or len(node.numbers) != 2:
            return True
        p, number = node.numbers
        return not 0 <= p <= 1 or not float(number).is_integer() or not 0 <= number < 2**31

    def at_rows(
        self, node: Node, θ: Maybe, rows: Tensor, dtype: torch.dtype
    ) -> list[Tensor | None]:
        p, number = node.numbers
        return [dropout.mask(_given(θ[0]), int(number), rows, node.width, p, dtype)]

    def parameters(self, node: Node, u: Tensors, g: Tensor, θ: Maybe, sums: Sums) -> None:
        """A mask is drawn, not trained."""

    def slope_parameters(
        self, node: Node, u: Tensors, u_dot: Maybe, P: Tensor, θ: Maybe, sums: Sums
    ) -> None:
        """A mask is drawn, not trained."""


class Shift(Rule):
    """v = u + θ; θ (H,) or (1,)."""

    one_for_all = True

    def shapes(self, node: Node, H: Sequence[int]) -> tuple[Shape, ...]:
        return ((H[0],),)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return u[0] + _given(θ[0])

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return _given(u_dot[0])

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P]

    def parameters(self, node: Node, u: Tensors, g: Tensor, θ: Maybe, sums: Sums) -> None:
        sums.rows(node.params[0], g)


class Line(Rule):
    """v = λ·u + τ, numbers λ and τ."""

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return node.width != H[0] or len(node.numbers) != 2

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        λ, τ = node.numbers
        v = u[0] if λ == 1 else λ * u[0]
        return v + τ if τ else v

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return node.numbers[0] * _given(u_dot[0])

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [node.numbers[0] * P]


class Sum(Rule):
    """v = Σ λ_i u_i, numbers λ: add, subtract, residual connections."""

    arity = None

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return set(H) != {node.width} or len(node.numbers) != len(H)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return _combination(node.numbers, u)

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        moving = [(λ, t) for λ, t in zip(node.numbers, u_dot, strict=True) if t is not None]
        return _combination([λ for λ, _ in moving], [t for _, t in moving])

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P if λ == 1 else λ * P for λ in node.numbers]


def _combination(λ: Sequence[float], t: Tensors) -> Tensor:
    total = t[0] if λ[0] == 1 else λ[0] * t[0]
    for factor, term in zip(λ[1:], t[1:], strict=True):
        total = torch.add(total, term, alpha=factor)
    return total


class Product(Rule):
    """v = u_1∘u_2: gates, GLU, cross layers."""

    arity = 2
    curved = True
    varies = True

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return set(H) != {node.width} or bool(node.numbers)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return u[0] * u[1]

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        if u_dot[0] is None:
            return u[0] * _given(u_dot[1])
        first = u_dot[0] * u[1]
        return first if u_dot[1] is None else first + u[0] * u_dot[1]

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P * u[1], P * u[0]]

    def curvature(
        self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, P: Tensor, θ: Maybe
    ) -> list[Tensor | None]:
        return [None if t is None else P * t for t in (u_dot[1], u_dot[0])]


class Expand(Rule):
    """v = u·1ᵀ, one column repeated H times."""

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return H[0] != 1 or bool(node.numbers)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return u[0].expand(*u[0].shape[:-1], node.width)

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        t = _given(u_dot[0])
        return t.expand(*t.shape[:-1], node.width)

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P.sum(-1, keepdim=True)]


class Total(Rule):
    """v = Σ_j u_j, one column."""

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return node.width != 1 or bool(node.numbers)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return u[0].sum(-1, keepdim=True)

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return _given(u_dot[0]).sum(-1, keepdim=True)

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P.expand(*P.shape[:-1], u[0].shape[-1])]


class Concat(Rule):
    """v = [u_1, u_2, …]."""

    arity = None

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return node.width != sum(H) or bool(node.numbers)

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return torch.cat(list(u), -1)

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        moving = next(t for t in u_dot if t is not None)
        parts = [
            moving.new_zeros(a.shape[-1]) if t is None else t for a, t in zip(u, u_dot, strict=True)
        ]
        rows = torch.broadcast_shapes(*(t.shape[:-1] for t in parts))
        return torch.cat([t.expand(*rows, t.shape[-1]) for t in parts], -1)

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return list(P.split([a.shape[-1] for a in u], -1))


class Columns(Rule):
    """v = u[start], u[start + step], …: slices, chunks, splits. Numbers start and step."""

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        if len(node.numbers) != 2 or not all(float(number).is_integer() for number in node.numbers):
            return True
        start, step = map(int, node.numbers)
        last = start + step * (node.width - 1)
        return start < 0 or step < 1 or (node.width > 0 and last >= H[0])

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return u[0][..., columns_of(node)]

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return _given(u_dot[0])[..., columns_of(node)]

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        start, step = map(int, node.numbers)
        width = u[0].shape[-1]
        if step == 1:
            return [F.pad(P, (start, width - start - node.width))]
        spread = P.new_zeros(*P.shape[:-1], width)
        return [torch.slice_scatter(spread, P, -1, start, start + step * node.width, step)]


def columns_of(node: Node) -> slice:
    """Which columns of u a node of that kind takes."""
    start, step = map(int, node.numbers)
    return slice(start, start + step * node.width, step)


class _Normalised(Rule):
    """x̂ = r·z, z the centred u or u itself, r = 1/sqrt(mean z² + ε); the number is ε.

    Its Jacobian r·(C - x̂x̂ᵀ/H) is symmetric (C centres). With a = C P, b = C u̇, α = ⟨x̂, a⟩ and
    β = ⟨x̂, b⟩ the curvature is -(r²/H)·C(α b + β a + x̂·(⟨a, b⟩ - 3αβ/H)).
    """

    curved = True
    varies = True
    reads_v = True
    centres: bool

    def wrong(self, node: Node, H: Sequence[int]) -> bool:
        return node.width != H[0] or len(node.numbers) != 1 or H[0] == 0

    def _centred(self, t: Tensor) -> Tensor:
        return t - t.mean(-1, keepdim=True) if self.centres else t

    def _r(self, node: Node, u: Tensor) -> Tensor:
        square = self._centred(u).square().mean(-1, keepdim=True)
        return torch.rsqrt(square + node.numbers[0])

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return self._centred(u[0]) * self._r(node, u[0])

    def _jacobian(self, node: Node, u: Tensor, v: Tensor, t: Tensor) -> Tensor:
        b = self._centred(t)
        return self._r(node, u) * (b - v * (v * b).mean(-1, keepdim=True))

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return self._jacobian(node, u[0], v, _given(u_dot[0]))

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [self._jacobian(node, u[0], v, P)]

    def curvature(
        self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, P: Tensor, θ: Maybe
    ) -> list[Tensor | None]:
        a, b = self._centred(P), self._centred(_given(u_dot[0]))
        α, β = (v * a).mean(-1, keepdim=True), (v * b).mean(-1, keepdim=True)
        bent = α * b + β * a + v * ((a * b).mean(-1, keepdim=True) - 3 * α * β)
        return [-self._r(node, u[0]).square() * bent]

    def push_now(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return self._jacobian_now(node, u[0], v, _given(u_dot[0]))

    def pull_now(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [self._jacobian_now(node, u[0], v, P)]

    def _jacobian_now(self, node: Node, u: Tensor, v: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError


class Normalise(_Normalised):
    """LayerNorm without its scale and shift."""

    centres = True

    def value_now(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return torch.native_layer_norm(u[0], (node.width,), None, None, node.numbers[0])[0]

    def _jacobian_now(self, node: Node, u: Tensor, v: Tensor, t: Tensor) -> Tensor:
        mean = u.mean(-1, keepdim=True)
        r = _rsqrt_mean_square(u - mean, node.numbers[0])
        pull = _aten.native_layer_norm_backward.default
        none, wanted = (None, None), [True, False, False]
        # PyTorch's pass takes tangents of the values' own shape: one for each row.
        parts: list[Tensor] = [
            pull(part.expand_as(u).contiguous(), u, (node.width,), mean, r, *none, wanted)[0]
            for part in (t.unbind(0) if t.dim() > u.dim() else (t,))
        ]
        found = torch.stack(parts) if len(parts) > 1 else parts[0]
        return found if found.dim() == t.dim() else found.unsqueeze(0)


class RootMeanSquare(_Normalised):
    """RMSNorm without its scale."""

    centres = False

    def value_now(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return u[0] * _rsqrt_mean_square(u[0], node.numbers[0])

    def _jacobian_now(self, node: Node, u: Tensor, v: Tensor, t: Tensor) -> Tensor:
        along = torch.linalg.vecdot(v, t).div_(node.width).unsqueeze(-1)
        return torch.addcmul(t, v, along, value=-1).mul_(_rsqrt_mean_square(u, node.numbers[0]))


def _rsqrt_mean_square(c: Tensor, ε: float) -> Tensor:
    """1 / sqrt(mean c² + ε) of each row, in one pass. Not for autograd."""
    norm: Tensor = torch.linalg.vector_norm(c, dim=-1, keepdim=True)
    return norm.square_().div_(c.shape[-1]).add_(ε).rsqrt_()


class Softmax(Rule):
    """v_i = exp(u_i) / Σ_j exp(u_j)."""

    curved = True
    varies = True
    reads_v = True

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return torch.softmax(u[0], -1)

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        return _softmax_jacobian(v, _given(u_dot[0]))

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [_softmax_jacobian(v, P)]

    def curvature(
        self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, P: Tensor, θ: Maybe
    ) -> list[Tensor | None]:
        t = _given(u_dot[0])
        α, β = (v * P).sum(-1, keepdim=True), (v * t).sum(-1, keepdim=True)
        return [_softmax_jacobian(v, P * t - β * P - α * t)]


def _softmax_jacobian(v: Tensor, t: Tensor) -> Tensor:
    return v * (t - (v * t).sum(-1, keepdim=True))


class LogSoftmax(Rule):
    """v_i = u_i - log Σ_j exp(u_j)."""

    curved = True
    varies = True
    reads_v = True

    def value(self, node: Node, u: Tensors, θ: Maybe) -> Tensor:
        return torch.log_softmax(u[0], -1)

    def push(self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, θ: Maybe) -> Tensor:
        t = _given(u_dot[0])
        return t - (v.exp() * t).sum(-1, keepdim=True)

    def pull(self, node: Node, u: Tensors, v: Tensor, P: Tensor, θ: Maybe) -> list[Tensor]:
        return [P - v.exp() * P.sum(-1, keepdim=True)]

    def curvature(
        self, node: Node, u: Tensors, v: Tensor, u_dot: Maybe, P: Tensor, θ: Maybe
    ) -> list[Tensor | None]:
        return [-P.sum(-1, keepdim=True) * _softmax_jacobian(v.exp(), _given(u_dot[0]))]


RULES: dict[str, Rule] = {
    "linear": Linear(),
    "prelu": PReLU(),
    "scale": Scale(),
    "dropout": Dropout(),
    "shift": Shift(),
    "line": Line(),
    "sum": Sum(),
    "product": Product(),
    "expand": Expand(),
    "total": Total(),
    "concat": Concat(),
    "columns": Columns(),
    "normalise": Normalise(),
    "root_mean_square": RootMeanSquare(),
    "softmax": Softmax(),
    "log_softmax": LogSoftmax(),
    **{kind: Elementwise(kind) for kind in ACTIVATIONS},
}


def rule(node: Node) -> Rule:
    """The node's row of the table."""
    return RULES[node.kind]


def wrong_nodes(d: int, nodes: tuple[Node, ...]) -> str:
    """One sentence saying what makes the nodes no program over d columns, or ""."""
    if not nodes or d < 0:
        return f"nodes: expected one or more over d >= 0 columns, got {len(nodes)} over {d}"
    widths = [d]
    for i, node in enumerate(nodes):
        of = RULES.get(node.kind)
        if of is None:
            return f"kinds: expected names of the table of nodes, got {node.kind!r}"
        inputs = node.inputs
        if not inputs or (of.arity is not None and len(inputs) != of.arity):
            return (
                f"nodes: expected {of.arity or 'some'} inputs of a {node.kind}, got {len(inputs)}"
            )
        if min(inputs) < 0 or max(inputs) > i or min(node.params, default=0) < 0:
            return f"nodes: expected node {i} to read values 0 to {i}, got {inputs}"
        H = [widths[v] for v in inputs]
        if node.width < 0 or of.wrong(node, H) or len(node.params) != len(of.shapes(node, H)):
            return f"nodes: expected what fits a {node.kind} on widths {H}, got {node}"
        widths.append(node.width)
    places = sorted({place for node in nodes for place in node.params})
    if places != list(range(len(places))):
        return f"nodes: expected parameters 0 to {len(places) - 1} to be read, got {places}"
    return ""


def parameter_shapes(d: int, nodes: tuple[Node, ...]) -> dict[int, tuple[Node, tuple[Shape, ...]]]:
    """For each place a node that reads it and the shapes that serve all nodes which do: a scale,
    shift or PReLU of H columns may be one number (1,) too."""
    widths: list[int] = [d]
    found: dict[int, tuple[Node, tuple[Shape, ...]]] = {}
    for node in nodes:
        H, of = [widths[v] for v in node.inputs], rule(node)
        for place, shape in zip(node.params, of.shapes(node, H), strict=True):
            serve: tuple[Shape, ...] = (shape,)
            if of.one_for_all and shape != (1,):
                serve += ((1,),)
            if place in found:
                serve = tuple([s for s in found[place][1] if s in serve])
            found[place] = node, serve
        widths.append(node.width)
    return found


def used(nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """The nodes that y depends on, in their order."""
    needed = {len(nodes)}
    for i in range(len(nodes) - 1, -1, -1):
        if i + 1 in needed:
            needed.update(nodes[i].inputs)
    return tuple([i for i in range(len(nodes)) if i + 1 in needed])


def moving(d: int, x2: Sequence[int], nodes: tuple[Node, ...]) -> tuple[bool, ...]:
    """Of each value, whether these columns of x reach it: others have no tangent."""
    reached = [True]
    for node in nodes:
        if node.kind == "columns" and node.inputs == (0,):
            columns = range(d)[columns_of(node)]
            reached.append(any(c in columns for c in x2))  # all others stand still
        else:
            reached.append(any(reached[v] for v in node.inputs))
    return tuple(reached)
