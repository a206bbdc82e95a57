"""Compaction on the general path: double backward of the rows that violate, and of no others.

Where the cotangent gJ of the slopes J (B, ..., D, k) is 0, a row and an output add nothing to any
gradient. So the backward calls the module again on the rows of the *pairs* (row, output) that are
left; one reverse pass with their seeds e_d, differentiated once more, serves them all. That is
exact where a row has the same y and slopes in whatever company. A network may have random numbers,
state or rows that mix, and cannot be asked. So

* one that has hooks, drew random numbers or changed its state is not called twice;
* one that was changed between forward and backward is not called again;
* what the second call gives is compared with the first, and only rounding may lie between them.

Otherwise the gradients are those of all rows, from the graph of the first call: the task loss needs
it too, so it is still there. Rows are counted along the first dimension, so that networks that mix
the others (the steps of a sequence) are served as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel

from ..boundary import operand_dtype
from ..columns import Columns, take

__all__ = ["DENSE", "Call", "Repeat", "compacted", "slope"]

# The share of pairs from which on double backward of all rows costs less, because it shares
# products with the task loss: 0.4 was measured with eight outputs, 0.55 with one.
DENSE = 1 / 3
# Rows × outputs × parameters from which on it is worth the calls that it takes, about 1 ms. With
# one output on a CPU the step was half as dear again at 2e6, and level at 9e6. Elsewhere it was not
# measured: a call takes as long there, and a product a thousandth.
WORTHWHILE = {"cpu": 1e7}
WORTHWHILE_ELSEWHERE = 1e10
# Slopes may jump at a kink that rounding crosses, where y does not: their tolerance is loose.
SLOPES_TOLERANCE = 0.05

AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
Module = Callable[[Tensor], Tensor]  # (B, ..., d) to (B, ..., D) or (B, ...)


class Repeat(NamedTuple):
    """What it takes to call ``module``, which gave y from x, again on some rows of x (B, ..., d).

    ``columns`` are those of x in which slopes were asked for, ``wanted`` says whether x gets
    gradients. The edges are where autograd finds y and x, and in ``sources`` all that gets
    gradients: x if it is wanted, then ``leaves``.
    """

    mlp: nn.Module
    module: Module
    x: Tensor
    y: Tensor
    columns: Columns
    wanted: bool
    leaves: list[Tensor]
    state: _State
    y_edge: GradientEdge
    x_edge: GradientEdge
    sources: list[GradientEdge]
    autocast: torch.autocast


class Call:
    """Made before the module is called on x, it tells afterwards of a repetition."""

    def __init__(self, mlp: nn.Module, x: Tensor) -> None:
        self.mlp, self.x, self.node = mlp, x.detach(), get_gradient_edge(x).node
        self.state, self.random = _State.of(mlp, [self.x]), _random_state(x.device)
        self.start: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    def repeat(
        self, module: Module, y: Tensor, source: Tensor, wanted: bool, columns: Columns
    ) -> Repeat | None:
        """None where the module must not be called again, or where that does not pay, or where its
        gradients do not end in leaves: the graph of what others computed may be gone when the
        backward wants it. The ``source`` is x in autograd's graph.
        """
        x = self.x
        if self.state is None or x.dim() < 2 or not y.requires_grad:
            return None
        work = y.numel() * sum(t.numel() for t in self.mlp.parameters())
        if work < WORTHWHILE.get(x.device.type, WORTHWHILE_ELSEWHERE):
            return None
        state = _State.of(self.mlp, [x])
        if state is None or not state.same(self.state):
            return None
        if not all(map(torch.equal, self.random, _random_state(x.device))):
            return None
        leaves = _leaves(y, self.node, self.start)
        if leaves is None:
            return None
        state = _State.of(self.mlp, [x, *leaves])
        assert state is not None
        sources = [source, *leaves] if wanted else leaves
        return Repeat(
            self.mlp,
            module,
            x,
            y.detach(),
            columns,
            wanted,
            leaves,
            state,
            get_gradient_edge(y),
            get_gradient_edge(source),
            [get_gradient_edge(t) for t in sources],
            _autocast(x.device.type),
        )


def slope(
    y: Tensor | GradientEdge,
    x: Tensor | GradientEdge,
    columns: Columns,
    seed: Tensor,
    create_graph: bool,
) -> Tensor | None:
    """The reverse pass of y with this seed, in these columns; None where no differentiable path
    leads to x."""
    found = torch.autograd.grad(
        y, x, seed, create_graph=create_graph, retain_graph=True, allow_unused=True
    )[0]
    return None if found is None else take(found, columns)


def compacted(J: Tensor, repeat: Repeat, x: Tensor) -> Tensor:
    """The slopes J (B, ..., D, k), with gradients for x and for all leaves. J may have a graph of
    its own, which then serves wherever pairs alone do not."""
    out: Tensor = _Compacted.apply(repeat, J, x, *repeat.leaves)  # type: ignore[no-untyped-call]
    return out


class _Compacted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, repeat: Repeat, J: Tensor, *sources: Tensor) -> Tensor:
        ctx.repeat = repeat
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(J)
        return J.view_as(J)

    @staticmethod
    def backward(ctx: Any, gJ: Tensor | None) -> Any:
        repeat: Repeat = ctx.repeat
        nothing = (None,) * len(repeat.leaves)
        if gJ is None:
            return None, None, None, *nothing
        (J,) = ctx.saved_tensors
        grads = None
        if not torch.is_grad_enabled():  # no create_graph=True: nothing is differentiated further
            grads = _of_pairs(repeat, gJ, J)
        if grads is None and ctx.needs_input_grad[1]:
            return None, gJ, None, *nothing
        if grads is None:
            grads = _of_all(repeat, gJ)
        rest = iter(grads)
        return None, None, next(rest) if repeat.wanted else None, *rest


def _of_pairs(repeat: Repeat, gJ: Tensor, J: Tensor) -> Sequence[Tensor | None] | None:
    """Gradients of Σ gJ·J by the pairs with gJ != 0 alone; None where that is not right, or not
    worth it."""
    B, D = J.shape[0], J.shape[-2]
    active = (gJ != 0).any(-1)
    if active.dim() > 2:
        active = active.flatten(1, -2).any(1)
    rows, outputs = active.nonzero(as_tuple=True)
    if not len(rows):
        return [None] * len(repeat.sources)
    state = _State.of(repeat.mlp, [repeat.x, *repeat.leaves])
    if len(rows) > DENSE * B * D or state is None or not state.same(repeat.state):
        return None
    x = repeat.x[rows].requires_grad_()
    at = (rows, ..., outputs, slice(None))  # of J: (pairs, ..., k)
    try:
        with torch.enable_grad(), repeat.autocast:
            y = repeat.module(x)
            seed = y.new_zeros(len(rows), *J.shape[1:-1])
            seed[torch.arange(len(rows), device=rows.device), ..., outputs] = 1
            S = slope(y, x, repeat.columns, seed.reshape(y.shape), create_graph=True)
            if S is None or not _agree(repeat, y.detach(), rows, S.detach(), J[at], D):
                return None
    except Exception:  # whatever it is: it takes no other number of rows
        return None
    if not S.requires_grad:
        return [None] * len(repeat.sources)
    sources = list(repeat.sources)
    if repeat.wanted:
        sources[0] = get_gradient_edge(x)
    with repeat.autocast:
        grads = list(torch.autograd.grad(S, sources, gJ[at], allow_unused=True))
    if repeat.wanted and grads[0] is not None:
        grads[0] = torch.zeros_like(repeat.x).index_add_(0, rows, grads[0])
    return grads


def _of_all(repeat: Repeat, gJ: Tensor) -> Sequence[Tensor | None]:
    """The same by all rows, from the graph of y. Differentiable."""
    further = torch.is_grad_enabled()
    slopes, cotangents = [], []
    with torch.enable_grad(), repeat.autocast:
        for d in range(gJ.shape[-2]):
            seed = repeat.y.new_zeros(gJ.shape[:-1])
            seed[..., d] = 1
            seed = seed.reshape(repeat.y.shape)
            S = slope(repeat.y_edge, repeat.x_edge, repeat.columns, seed, True)
            if S is not None and S.requires_grad:
                slopes.append(S)
                cotangents.append(gJ[..., d, :])
        if not slopes:
            return [None] * len(repeat.sources)
        return torch.autograd.grad(
            slopes,
            repeat.sources,
            cotangents,
            create_graph=further,
            retain_graph=True,
            allow_unused=True,
        )


def _agree(repeat: Repeat, y: Tensor, rows: Tensor, S: Tensor, J: Tensor, D: int) -> bool:
    """Whether the second call gave the first one's y and slopes (pairs, ..., k), up to rounding. An
    output that is large everywhere is compared on the scale of what it varies by."""
    first = repeat.y.reshape(len(repeat.x), -1, D)
    ε = max(torch.finfo(dtype).eps for dtype in (y.dtype, J.dtype, operand_dtype(repeat.x)))
    tolerance = 4 * ε**0.5  # 1.4e-3 in float32
    spread = (first - first.mean((0, 1))).abs().amax((0, 1))
    allowed = tolerance * spread + 16 * ε * first.abs().amax((0, 1))
    error = (y.reshape(len(rows), -1, D) - first[rows]).abs()
    if not (error <= allowed).all():  # nor where one is NaN
        return False
    return bool((S - J).norm() <= max(tolerance, SLOPES_TOLERANCE) * J.norm())


class _State(NamedTuple):
    """What a call of a module reads there and may change: tensors, held so that no other can take
    their place in ``marks``, and modes."""

    tensors: list[Tensor]
    marks: list[object]

    @classmethod
    def of(cls, mlp: nn.Module, tensors: list[Tensor]) -> _State | None:
        """None where a call has effects elsewhere: hooks, and what DistributedDataParallel notes
        for the backward to come."""
        if _has_any_global_hook():
            return None
        marks: list[object] = []
        tensors = list(tensors)
        for m in mlp.modules():
            hooks = m._forward_hooks or m._forward_pre_hooks
            if hooks or m._backward_hooks or m._backward_pre_hooks:
                return None
            if isinstance(m, DistributedDataParallel):
                return None
            marks.append(m.training)
            for own in (m._parameters, m._buffers):
                tensors += [t for t in own.values() if t is not None]
        for t in tensors:
            marks += (id(t), t._version, t.requires_grad)
        return cls(tensors, marks)

    def same(self, other: _State | None) -> bool:
        return other is not None and self.marks == other.marks


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _leaves(y: Tensor, x: Node, start: int) -> list[Tensor] | None:
    """The leaves of y's graph short of x, or None where it has nodes made before ``start``. Not
    only parameters: without this a tensor in a closure would lose its gradient without a word."""
    seen = {x}
    left: list[Node | None] = [y.grad_fn]
    leaves = []
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, AccumulateGrad):
            leaves.append(node.variable)
        elif node._sequence_nr() < start:
            return None
        left += [following for following, _ in node.next_functions]
    return leaves


def _autocast(device: str) -> torch.autocast:
    """Autocast as it is now, for the backward. Without its cache, which has the first call's."""
    return torch.autocast(
        device,
        torch.get_autocast_dtype(device),
        torch.is_autocast_enabled(device),
        cache_enabled=False,
    )
