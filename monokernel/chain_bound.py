"""The linear term of ``Monotone`` for a chain of layers over a bounded box, with its own backward.

A training step takes it once, on a few rows, where every operation costs its call and little else.
So value and tangents go through a layer as one matrix, an activation is evaluated once at all
points of an interval that can be extreme, and the derivative is written by hand. It is the bound of
``intervals.py`` but for rounding, which is counted by the same terms.

The arithmetic is written in what NumPy and PyTorch have in common. Where the weights are in the
processor's memory and NumPy is installed it is NumPy's, whose calls cost a third of PyTorch's.

Letters: rows R = 1 + k, the value and then k tangents, each for B boxes; ``C`` (R·B, n) are centres
and ``ρ`` radii, widened for the product to come; Z and Q are centres and radii behind the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import ACTIVATIONS, Activation
from .intervals import Interval
from .operands import has_memory
from .ranges import FAR, INF, NOISE, SMOOTH, curves

try:
    import numpy
except ImportError:  # PyTorch does without it
    numpy = None  # type: ignore[assignment]

__all__ = ["Start", "linear_term", "serves", "started"]

# What PyTorch's own backwards may be off by, in epsilons: 1 - sigmoid(a) is off by one, and is
# multiplied by an a of up to 37 before it is exactly 0.
SLOPE_NOISE = 64.0

Array = Any  # a Tensor, or NumPy's


class Start(NamedTuple):
    """The constants: what goes into the first layer, and what the term is made with."""

    boxes: int  # B
    C: Array
    ρ: Array
    sign: Array  # (D, k)
    place: Array  # (k, d), a 1 in the column of x that each tangent is of
    middle: Array  # (d,)


def started(box: Interval, sign: Tensor, place: Tensor, middle: Tensor) -> Start:
    """For boxes (B, d): NumPy's arrays where these are to be used."""
    lower, upper, _ = box
    info = torch.finfo(lower.dtype)
    g = _γ(lower.shape[1], lower.dtype)
    unit = place.unsqueeze(1).expand(-1, *lower.shape)
    C = torch.cat([(0.5 * lower + 0.5 * upper).unsqueeze(0), unit])
    r = torch.cat([(0.5 * upper - 0.5 * lower).unsqueeze(0), torch.zeros_like(unit)])
    ρ = r * (1 + g) + g * C.abs() + info.tiny
    found = C.flatten(0, 1), ρ.flatten(0, 1), sign, place, middle
    if numpy is None or C.device.type != "cpu" or not has_memory(C):
        return Start(lower.shape[0], *found)
    return Start(lower.shape[0], *(t.numpy() for t in found))


def serves(activations: Sequence[Activation]) -> bool:
    """Whether all have a σ' that is continuous, or that rises from step to step."""
    return all(map(_known, activations[:-1])) and activations[-1].kind == "identity"


@lru_cache(maxsize=1024)
def _known(σ: Activation) -> bool:
    if σ.kind in ("gelu", "gelu_tanh", "silu", "mish", "softsign", "tanh", "sigmoid", "logsigmoid"):
        return True
    if σ.kind == "softplus":
        return σ.p > 0 and σ.q >= SMOOTH
    if σ.kind == "elu":
        return σ.r > 0 and 0 <= σ.p * σ.q * σ.r <= σ.p
    return σ.kind == "relu" or (σ.kind == "leaky_relu" and 0 <= σ.p <= 1)


class _Piece:
    """An activation on arrays of ``xp``. ``places`` are -inf, inf and where σ or σ' turns: clamped
    to an interval they are all its points at which one of them can be extreme."""

    def __init__(self, σ: Activation, xp: Any, dtype: torch.dtype, device: torch.device) -> None:
        value, slope, _ = curves(σ)
        turns = [t.place for c in (value, slope) for t in c.turns if t.low == INF or t.high == -INF]
        info = torch.finfo(dtype)
        places = torch.tensor([-INF, INF, *turns], dtype=dtype, device=device).view(-1, 1, 1)
        # Of the value and of the slope: what does not grow with it.
        most = max(1.2, abs(σ.p)) if σ.kind == "elu" else 1.2
        noise = torch.tensor(
            [
                info.eps * value.absolute + value.slack + 4 * FAR * info.tiny,
                info.eps * SLOPE_NOISE * most + slope.slack,
            ],
            dtype=dtype,
            device=device,
        ).view(2, 1, 1)
        self.σ, self.spelling = σ, ACTIVATIONS[σ.kind]
        self.of_numpy = xp is numpy
        self.places, self.noise = (t.numpy() if self.of_numpy else t for t in (places, noise))
        # Its slope is a step, which says nothing of NaN.
        self.step = σ.kind in ("relu", "leaky_relu")

    def at(self, P: Array) -> tuple[Array, Array]:
        """σ and σ'."""
        a = torch.from_numpy(P) if self.of_numpy else P
        value = self.spelling.value(a, self.σ)
        slope = self.spelling.pull(torch.ones_like(a), a, self.σ)
        if self.step:
            slope = torch.add(slope, a, alpha=0)
        return (value.numpy(), slope.numpy()) if self.of_numpy else (value, slope)

    def bent(self, P: Array) -> Array:
        """σ''."""
        if not self.of_numpy:
            return self.spelling.second(P, self.σ)
        return self.spelling.second(torch.from_numpy(P), self.σ).numpy()


_piece = lru_cache(maxsize=64)(_Piece)


def _γ(n: int, dtype: torch.dtype) -> float:
    """As ``intervals.py`` has it."""
    return (n + 8) * torch.finfo(dtype).eps


def linear_term(
    start: Start, margin: float, activations: Sequence[Activation], params: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """W (D, d) and b (D,) for parameters W_1, b_1 (or None), W_2, …"""
    term: tuple[Tensor, Tensor] = _Term.apply(start, margin, activations, *params)  # type: ignore[no-untyped-call]
    return term


class _Term(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, start: Start, margin: float, activations: Sequence[Activation], *θ: Any
    ) -> tuple[Tensor, Tensor]:
        B, C, ρ, sign, place, middle = start
        xp = torch if isinstance(C, Tensor) else numpy
        dtype, device = θ[0].dtype, θ[0].device
        ε = torch.finfo(dtype).eps
        # Copies: memory that NumPy sees can never be resized again, which is how FSDP frees it.
        arrays = [t if t is None or xp is torch else t.detach().clone().numpy() for t in θ]
        layers: list[tuple[Any, _Active | None]] = []
        last = len(activations) - 1
        with _quiet(xp, device.type):
            for l, σ in enumerate(activations):
                W, b = arrays[2 * l], arrays[2 * l + 1]
                A = abs(W)
                Z, Q = C @ W.T, ρ @ A.T
                if b is not None:
                    Z[:B] += b
                Q += 2 * _γ(W.shape[1], dtype) * abs(Z)
                Z, Q = Z.reshape(-1, B, W.shape[0]), Q.reshape(-1, B, W.shape[0])
                before = C, ρ, A
                if l == last:
                    layers.append((before, None))
                    break
                piece = _piece(σ, xp, dtype, device)
                γ = _γ(W.shape[0], dtype) + 2 * NOISE * ε
                C, ρ, active = _activate(xp, piece, Z, Q, γ)
                layers.append((before, active))
            # b_c (B, D, k) by centre and radius, and the least of all boxes.
            low = sign.T[:, None] * Z[1:] - Q[1:]
            at = low.argmin(1)
            bound = low[:, 0] if B == 1 else _least(low, 1)
            if b is not None:
                bound = bound + 0 * b  # a NaN is one in every slope of its output
            gap = ((margin + 4 * ε * abs(margin)) - bound) * (1 + 4 * ε)
            lift = sign * xp.maximum(gap, 0 * gap).T
            weight = lift @ place
            bias = -(weight @ middle)
        ctx.save_for_backward(*θ)
        ctx.kept = start, xp, layers, arrays, at, sign * (gap > 0).T
        if xp is torch:
            return weight, bias
        return torch.from_numpy(weight), torch.from_numpy(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_weight: Tensor, g_bias: Tensor) -> tuple[Any, ...]:
        θ = ctx.saved_tensors  # which says so where one was changed in place
        start, xp, layers, arrays, at, lifted = ctx.kept
        B, (D, k) = start.boxes, start.sign.shape
        g_W, g_b = (g if xp is torch else g.numpy() for g in (g_weight, g_bias))
        grads: list[Any] = [None] * len(θ)
        with _quiet(xp, θ[0].device.type):
            g = g_W - g_b[:, None] * start.middle
            g = ((g @ start.place.T) * lifted).T  # of -b_c, (k, D)
            C = layers[-1][0][0]
            gQ = (0 * C[:, :1] + 0 * g[:1]).reshape(1 + k, B, D)
            gZ = gQ + 0
            if B == 1:
                gQ[1:, 0] = g
            else:
                for i in range(B):
                    gQ[1:, i] = g * (at == i)
            gZ[1:] = -start.sign.T[:, None] * gQ[1:]
            gZ, gQ = gZ.reshape(-1, D), gQ.reshape(-1, D)
            for l in range(len(layers) - 1, -1, -1):
                C, ρ, A = layers[l][0]
                W = arrays[2 * l]
                grads[2 * l] = gZ.T @ C + (gQ.T @ ρ) * xp.sign(W)
                if arrays[2 * l + 1] is not None:
                    grads[2 * l + 1] = gZ[:B].sum(0)
                if l:
                    gZ, gQ = _activated(xp, layers[l - 1][1], gZ @ W, gQ @ A, B)
        if xp is not torch:
            grads = [g if g is None else torch.from_numpy(g) for g in grads]
        return None, None, None, *grads


class _Active(NamedTuple):
    """What the backward of an activation needs."""

    piece: _Piece
    z: Array  # (B, n)
    P: Array  # (T, B, n)
    slopes: Array  # at P
    low: Array  # (2, B, n), where among P σ and σ' are least
    high: Array
    s: Array  # (B, n), centre and radius of σ'
    r: Array
    Zt: Array  # (k, B, n), the tangents
    Qt: Array
    size: Array  # |Zt|


def _activate(xp: Any, piece: _Piece, Z: Array, Q: Array, γ: float) -> tuple[Array, Array, _Active]:
    z, q, Zt, Qt = Z[0], Q[0], Z[1:], Q[1:]
    P = xp.minimum(xp.maximum(piece.places, z - q), z + q)
    values, slopes = piece.at(P)
    both = xp.concatenate((values[None], slopes[None]))
    low, high = _least(both, 1), _most(both, 1)
    middle, radius = 0.5 * (low + high), 0.5 * (high - low)
    radius += piece.noise
    size, s, r = abs(Zt), middle[1], radius[1]
    C = xp.concatenate((middle[:1], Zt * s))
    ρ = xp.concatenate((radius[:1], size * r + Qt * (abs(s) + r)))
    # Widened by what the ends, the middle and the product to come are rounded by.
    ρ *= 1 + γ
    ρ += γ * abs(C)
    n = Z.shape[-1]
    active = _Active(piece, z, P, slopes, both.argmin(1), both.argmax(1), s, r, Zt, Qt, size)
    return C.reshape(-1, n), ρ.reshape(-1, n), active


def _activated(xp: Any, a: _Active, gC: Array, gρ: Array, B: int) -> tuple[Array, Array]:
    """gZ and gQ."""
    n = gC.shape[-1]
    gC, gρ = gC.reshape(-1, B, n), gρ.reshape(-1, B, n)
    tC, tρ, s, r = gC[1:], gρ[1:], a.s, a.r
    # Of the extremes: least value and slope, then greatest, and where they are attained.
    ends = xp.concatenate((gC[:1], gC[:1], gC[:1], gC[:1]))
    ends[1::2] = (tC * a.Zt).sum(0) + (tρ * a.Qt).sum(0) * xp.sign(s)
    radius = xp.concatenate((gρ[:1], gρ[:1]))
    radius[1] = (tρ * (a.size + a.Qt)).sum(0)
    ends[:2] -= radius
    ends[2:] += radius
    at = xp.concatenate((a.low, a.high)) * (B * n) + _positions(xp, a.low[0])
    P = a.P.take(at)
    ends[::2] *= a.slopes.take(at[::2])
    ends[1::2] *= a.piece.bent(P[1::2])
    ends *= 0.5
    gZ = xp.concatenate((ends.sum(0)[None], tC * s + tρ * r * xp.sign(a.Zt)))
    gQ = xp.concatenate(((ends * xp.sign(P - a.z)).sum(0)[None], tρ * (abs(s) + r)))
    return gZ.reshape(-1, n), gQ.reshape(-1, n)


def _positions(xp: Any, a: Array) -> Array:
    """0, 1, … in the shape of a, which has whole numbers."""
    if xp is torch:
        return torch.arange(a.numel(), device=a.device).view(a.shape)
    return _numbers(a.size).reshape(a.shape)


@lru_cache(maxsize=64)
def _numbers(n: int) -> Array:
    return numpy.arange(n)


def _least(a: Array, axis: int) -> Array:
    return a.amin(axis) if isinstance(a, Tensor) else a.min(axis)


def _most(a: Array, axis: int) -> Array:
    return a.amax(axis) if isinstance(a, Tensor) else a.max(axis)


def _quiet(xp: Any, device_type: str) -> Any:
    """NumPy warns of what overflows, which bounds nothing and is no error; PyTorch would round to
    half precision under autocast, also in a backward that is called under it."""
    if xp is not torch:
        return numpy.errstate(all="ignore")
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()
