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
from ..active.config import ProductConfig, candidates, product_config
from ..constants import accumulator, activation_table, as_compiled
from ..device.activations import activation
from ..launch import launch
from ..tuning import tuned
from .config import kept_chain, tiles_of, weight_of
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
    rule = product_config(x.dtype)
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
    x, L, dx = x.contiguous(), problem.depth, None
    grads = Gradients(params, [n and p is not None for n, p in zip(needs[1:], params, strict=True)])
    lowest = 0 if needs[0] else grads.lowest
    rows = pairs = None
    if x.shape[0] and lowest < L:
        if gy is not None:
            rows = _Rows(problem, x, params, saved, gy.contiguous())
        if gout is not None:
            joins = rows is not None
            pairs = Pairs(problem, gout.contiguous(), x, params, saved, config, joins)
    for l in range(L - 1, lowest - 1, -1):
        if rows is not None:
            if pairs is not None:
                pairs.join(rows.g)
            rows.layer(l, l > lowest, grads)
        if pairs is not None:
            pairs.weight(l, grads)
            if l > lowest:
                pairs.down(l)
    if needs[0] and rows is not None:
        dx = torch.mm(rows.g, weight_of(params, 0))
    elif needs[0]:
        dx = torch.zeros_like(x) if pairs is None else pairs.inputs()
    return [dx, *grads.result()]


class _Rows:
    """The plain backward of all rows; g is the cotangent of a_l. Where the adjoint chain P_l was
    kept no product is left but dW's."""

    def __init__(
        self, problem: Problem, x: Tensor, params: Params, saved: Sequence[Tensor], gy: Tensor
    ) -> None:
        self.problem, self.x, self.params, self.saved, self.gy = problem, x, params, saved, gy
        self.table = activation_table(problem, x.dtype)
        self.kept = kept_chain(problem, saved)
        self.g = gy
        if problem.activations[-1].kind != "identity":
            self.g = torch.empty_like(gy)
            self._back(problem.depth - 1, gy, None, self.g, None)

    def layer(self, l: int, further: bool, grads: Gradients) -> None:
        """dW_l and db_l, and g of the layer below if it goes on ``further``."""
        g, h, H = self.g, self.x, self.problem.widths[l]
        if grads.wanted[2 * l + 1]:
            grads.of[2 * l + 1] = g.sum(0)
        if l > 0 and (further or grads.wanted[2 * l]):
            P = below = None
            if further:
                P = self.kept[l - 1] if self.kept else torch.mm(g, weight_of(self.params, l))
                self.g = below = torch.empty_like(P)
            h = self.x.new_empty(len(g), H)
            self._back(l - 1, P, self.gy if self.kept else None, below, h)
        if grads.wanted[2 * l]:
            grads.of[2 * l] = torch.mm(g.t(), h)

    def _back(
        self, l: int, P: Tensor | None, gy: Tensor | None, g: Tensor | None, h: Tensor | None
    ) -> None:
        """g = σ'(a_l)∘P, times gy if given, and h = σ(a_l)."""
        N, H = self.x.shape[0], self.problem.widths[l + 1]
        grid, tile = tiles_of(N, H)
        launch(
            layer_back, grid, self.x, self.saved[l], P, gy, g, h, N,
            H=H, ACT=self.table[l], **tile, A=accumulator(self.x.dtype),
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def layer_back(
    a,
    P,
    gy,
    g_out,
    h_out,
    N,
    H: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    A: tl.constexpr,
):
    """g = σ'(a)∘P, times gy of the row where P is the adjoint chain of one output; and h = σ(a)."""
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n[:, None] < N) & (j[None, :] < H)
    at = n[:, None] * H + j[None, :]
    h, slope, _curvature = activation(tl.load(a + at, mask=mask, other=0.0).to(A), ACT)
    if g_out is not None:
        g = slope * tl.load(P + at, mask=mask, other=0.0).to(A)
        if gy is not None:
            g *= tl.load(gy + n, mask=n < N, other=0.0).to(A)[:, None]
        tl.store(g_out + at, g, mask=mask)
    if h_out is not None:
        tl.store(h_out + at, h, mask=mask)
