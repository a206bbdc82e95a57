"""Backward layer by layer: the task's by PyTorch's products, the active pairs' by our own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Problem
from ... import Params
from ..active.config import ProductConfig, candidates, product_config, product_types
from ..constants import activation_table, as_compiled
from ..device.activations import activation
from ..device.tiles import bias_row, input_tile, input_weights, of_rows
from ..launch import launch
from ..target import OLD_TRITON, dot_precision, products, register_limit
from ..tuning import tuned
from .config import (
    Values,
    kept_chain,
    reads_input,
    rows_at_once,
    slices_of,
    tiles_of,
    weight_of,
)
from .gradients import Gradients
from .pairs import Pairs

__all__ = ["backward", "layer_back"]


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where ``needs`` is false."""
    run = partial(_backward, problem, gy, gout, x, params, saved, needs)
    rule = product_config(x.dtype, x.device)
    if gout is None:
        return run(rule)
    return tuned(rule, candidates, ("pairs", as_compiled(problem), tuple(needs)), x, run)


def _backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    config: ProductConfig,
) -> list[Tensor | None]:
    """Where y has a gradient, what the pairs' curvatures give to a layer's g joins it in their
    rows: the products over all rows then serve both, and the pairs take 3 of their own, else up to
    5."""
    x, gout = x.contiguous(), None if gout is None else gout.contiguous()
    L, dx = problem.depth, None
    grads = Gradients(params, [n and p is not None for n, p in zip(needs[1:], params, strict=True)])
    lowest = 0 if needs[0] else grads.lowest
    some = x.shape[0] > 0 and lowest < L
    at_once = rows_at_once(problem, x)
    rows = pairs = None
    if some and gout is not None and at_once >= x.shape[0]:
        pairs = Pairs(problem, gout, x, params, saved, config, grads, gy is None)
    if some and gy is not None:
        rows = _Rows(problem, x, params, saved, gy.contiguous(), grads, needs[0], pairs)
    for l in range(L - 1, lowest - 1, -1):
        if pairs is not None:
            pairs.layer(l, l > lowest)
        if rows is not None:
            rows.layer(l, l > lowest)
    if rows is not None:
        rows.sums.add_up(grads.begun, add=False)
    if pairs is not None:
        pairs.sums.add_up(grads.begun, add=rows is not None)
    if needs[0] and rows is not None:
        assert rows.g is not None
        dx = torch.mm(rows.g, weight_of(params, 0))
    elif needs[0]:
        dx = torch.zeros_like(x) if gout is None or not some else torch.empty_like(x)
    if pairs is not None and dx is not None and rows is None:
        pairs.inputs(dx, fresh=True)
    if some and gout is not None and pairs is None:
        asked = problem, gout, x, params, saved, config, grads, lowest, dx, rows is None
        _in_blocks(at_once, *asked)
    return [dx, *grads.result()]


def _in_blocks(
    at_once: int,
    problem: Problem,
    gout: Tensor,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    config: ProductConfig,
    grads: Gradients,
    lowest: int,
    dx: Tensor | None,
    fresh: bool,
) -> None:
    """What the pairs give to the gradients, where those of some rows ``at_once`` are all that there
    is room for: they are alone, and take up to 5 products. Begins the gradients if ``fresh``."""
    sums = None
    for begin in range(0, len(x), at_once):
        own = slice(begin, begin + at_once)
        of_rows = gout[own] if gout.dim() else gout
        kept = [t[own] for t in saved]
        pairs = Pairs(problem, of_rows, x[own], params, kept, config, grads, True, sums)
        for l in range(problem.depth - 1, lowest - 1, -1):
            pairs.layer(l, l > lowest)
        if dx is not None:
            pairs.inputs(dx[own], fresh)
        sums = pairs.sums
        del pairs  # before the next ones take as much memory
    assert sums is not None
    sums.add_up(grads.begun, add=not fresh)


class _Rows:
    """The plain backward of all rows; g is the cotangent of a_l. Where the adjoint chain was kept
    no product is left but dW's, and those of one output and of few inputs are sums of the launch
    that makes h and g."""

    def __init__(
        self,
        problem: Problem,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        gy: Tensor,
        grads: Gradients,
        dx: bool,
        pairs: Pairs | None,
    ) -> None:
        self.problem, self.x, self.params, self.grads = problem, x, params, grads
        self.dx, self.pairs = dx, pairs
        self.a = Values.saved(problem, x, params, saved)
        self.table = activation_table(problem, x.dtype)
        self.chain = kept_chain(problem, saved)
        self.kept = problem.keeps_adjoint and problem.depth > 1
        self.first, self.top = reads_input(problem), problem.depth - 1
        places = [2 * l + 1 for l in range(self.top)]
        places += [0] if self.first else []
        places += [2 * self.top] if self.kept else []
        self.sums = grads.sums(places, slices_of(problem, x), 32, x)
        self.g: Tensor | None = gy
        if problem.activations[-1].kind != "identity":
            self.g = torch.empty_like(gy)
            self._back(self.top, gy, None, self.g, None)
        self.gy = self.g  # of a_L

    def layer(self, l: int, further: bool) -> None:
        """dW_l and db_l, and g of the layer below if it goes on ``further``."""
        g, h, wanted = self.g, self.x, self.grads.wanted
        summed = (l == self.top and self.kept) or (l == 0 and self.first)
        if wanted[2 * l + 1] and l == self.top:
            assert g is not None
            self.grads.of[2 * l + 1] = g.sum(0)
        if l > 0 and (further or wanted[2 * l]):
            self.g = P = own = None
            stored = l > 1 or self.dx or (not self.first and wanted[0])
            if further:
                P = self._above(l, g)
                self.g = self.x.new_empty(len(self.x), self.problem.widths[l]) if stored else None
            if wanted[2 * l] and not summed:
                own = h = self.x.new_empty(len(self.x), self.problem.widths[l])
            self._back(l - 1, P, self.gy if self.kept else None, self.g, own)
        if wanted[2 * l] and not summed:
            assert g is not None
            self.grads.of[2 * l] = torch.mm(g.t(), h)

    def _above(self, l: int, g: Tensor | None) -> Tensor:
        """What σ' of the layer below l is multiplied with."""
        if not self.kept:
            assert g is not None
            return torch.mm(g, weight_of(self.params, l))
        return weight_of(self.params, l) if l == self.top else self.chain[l - 1]

    def _back(
        self, l: int, P: Tensor | None, gy: Tensor | None, g: Tensor | None, h: Tensor | None
    ) -> None:
        """g = σ'(a_l)∘P, times gy if given, with the pairs' q, and h = σ(a_l)."""
        problem, part = self.problem, self.sums.part
        N, H = len(self.x), problem.widths[l + 1]
        (_, columns), tile = tiles_of(N, H, self.a.takes_rows(l))
        below_top = self.kept and l == self.top - 1
        last = part(2 * self.top) if below_top else None
        first = part(0) if l == 0 and self.first else None
        q = place = None
        if P is not None and self.pairs is not None:
            q, place = self.pairs.joining(l), self.pairs.active.place
        # Strict float32 multiplies in registers: with 168 of them it spilled 8 bytes on sm_80, and
        # with all 16 bytes on sm_90 and sm_100, where it needs no more than 168.
        # With two kinds of call Triton 3.6 spilled 8 bytes on sm_100.
        strict = self.x.dtype == torch.float32 and dot_precision(self.x.dtype) == "ieee"
        limit = {}
        if self.x.dtype == torch.float32 and products(self.x.device) == "warp":
            limit = register_limit(self.x.device)
        elif OLD_TRITON and products(self.x.device) == "tcgen05" and not strict:
            limit = register_limit(self.x.device, 168)
        launch(
            layer_back, (self.sums.slices, columns), self.x, *self.a.of(l), P, gy,
            None if q is None else place, q, g, h, part(2 * l + 1) if l < self.top else None,
            first, last, N,
            H=H, SIZE=self.sums.offsets[-1], ONE_ROW=below_top, ACT=self.table[l],
            T=problem.D if problem.mode == "adjoint" else problem.k, **self.a.inputs(l), **tile,
            **product_types(self.x.dtype), **limit,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["db", "dW", "dW_last"])
def layer_back(
    a, x, W, b, P, gy, place, q, g_out, h_out, db, dW, dW_last, N,
    H: tl.constexpr, SIZE: tl.constexpr, ONE_ROW: tl.constexpr, ACT: tl.constexpr, T: tl.constexpr,
    FAN: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g = σ'(a)∘P, times gy of the row where P is the adjoint chain of one output, and what the
    row's T pairs have at their ``place`` in q; and h = σ(a). For some columns of a slice of rows.

    The sums over those rows, slices that lie SIZE apart: db = Σ g, dW = gᵀ x; and of the layer
    above, where that is the one output, dW_last = Σ gy·h.
    """
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    tiles = tl.cdiv(N, BM)
    each = tl.cdiv(tiles, tl.num_programs(0))
    begin = tl.program_id(0) * each
    bias = tl.zeros((BM, BN), A)
    last = tl.zeros((BM, BN), A)
    weights = tl.zeros((BN, FAN_TILE), A)
    if FAN > 0:
        w, b_row = input_weights(W, b, j, H, FAN, FAN_TILE, C, A)
    for tile in range(begin, tl.minimum(begin + each, tiles)):
        n = tile * tl.full((), BM, tl.int64) + tl.arange(0, BM)
        ok = n < N
        mask = ok[:, None] & (j[None, :] < H)
        at = n[:, None] * H + j[None, :]
        if FAN > 0:
            inputs = input_tile(x, n, ok, FAN, FAN_TILE, C)
            own = tl.dot(inputs, w, input_precision=PRECISION).to(A) + b_row
        else:
            own = tl.load(a + at, mask=mask, other=0.0).to(A)
        h, slope, _curvature = activation(own, ACT)
        if h_out is not None:
            tl.store(h_out + at, h, mask=mask)
        if gy is not None:
            factor = of_rows(gy, n, ok, A)
            if dW_last is not None:
                last += tl.where(mask, h * factor, tl.zeros_like(h))
        if P is not None:
            above = bias_row(P, j, H, A) if ONE_ROW else tl.load(P + at, mask=mask, other=0.0).to(A)
            g = tl.where(mask, slope * above, tl.zeros_like(slope))
            if gy is not None:
                g *= factor
            if q is not None:
                for t in range(T):
                    one = of_rows(place + tl.full((), 1, tl.int64) * t * N, n, ok, tl.int64)
                    there = mask & (one >= 0)
                    g += tl.load(q + one * H + j[None, :], mask=there, other=0.0).to(A)
            if g_out is not None:
                tl.store(g_out + at, g, mask=mask)
            if db is not None:
                bias += g
            if dW is not None:
                weights += tl.dot(tl.trans(g.to(C)), inputs, input_precision=PRECISION).to(A)
    shift = tl.program_id(0).to(tl.int64) * SIZE
    if db is not None:
        tl.store(db + shift + j, tl.sum(bias, 0), mask=j < H)
    if dW is not None:
        i = tl.arange(0, FAN_TILE)
        inside = (j[:, None] < H) & (i[None, :] < FAN)
        tl.store(dW + shift + j[:, None] * FAN + i[None, :], weights, mask=inside)
    if dW_last is not None:
        tl.store(dW_last + shift + j, tl.sum(last, 0), mask=j < H)
