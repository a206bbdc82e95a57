"""The active pairs' way through the layers: their tangents up, their seeds and cotangents down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....columns import runs_of, take
from ....problem import Problem
from ... import Params
from ..active import BLOCK, list_active
from ..active.config import ProductConfig, product_options
from ..active.listing import gather_inputs
from ..active.products import pairs_down, pairs_up, pairs_weight
from ..constants import IDENTITY, accumulator, activation_table
from ..device.activations import activation
from ..launch import launch
from .config import kept_chain, kept_layers, tiles_of, weight_of
from .gradients import Gradients

__all__ = ["Pairs", "seed_cotangents"]


class Pairs:
    """The active pairs of a backward (see ``Active``) on their way down: p and q of a_l.

    ``joins``: what q gives to the cotangent g of all rows goes there, and q's part in the gradients
    with it. Then q goes on by itself only where the P of all rows are kept, which g is made of.
    """

    def __init__(
        self,
        problem: Problem,
        gout: Tensor,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        config: ProductConfig,
        joins: bool,
    ) -> None:
        self.problem, self.x, self.params, self.saved = problem, x, params, saved
        self.config, self.joins = config, joins
        self.active = list_active(problem, gout, None if problem.hinge is None else saved[-1], x)
        self.kept = kept_chain(problem, saved)
        self.a_dot, self.h_dot = self._tangents()
        self.p, self.q = self._seeds()

    @property
    def dots(self) -> dict[str, Any]:
        return product_options(self.x.dtype, self.config)

    @property
    def most(self) -> int:
        """Pairs, were all of them active."""
        return len(self.active.rows)

    def grid(self, columns: int) -> tuple[int, int]:
        return self.config.grid(self.most, columns)

    def _tangents(self) -> tuple[list[Tensor], list[Tensor]]:
        """ȧ_l and ḣ_l of every layer (ḣ_l of the hidden ones)."""
        problem, x, L = self.problem, self.x, self.problem.depth
        M, table = self.most, activation_table(problem, x.dtype)
        a_dots: list[Tensor] = []
        h_dots: list[Tensor] = []
        h_dot, inputs = self.active.x_dot, problem.k
        for l in range(kept_layers(problem)):
            W, H = weight_of(self.params, l), problem.widths[l + 1]
            W = take(W, problem.columns) if l == 0 else W  # those of ẋ
            a_dot = x.new_empty(M, H)
            below, h_dot_in = None, h_dot
            if l < L - 1:
                h_dot = x.new_empty(M, H)
                h_dots.append(h_dot)
                below = self.saved[l]
            launch(
                pairs_up, self.grid(H), x, h_dot_in, W, self.active.rows, self.active.total, below,
                a_dot, h_dot if l < L - 1 else None,
                INPUTS=inputs, OUTPUTS=H, W_ROW=W.stride(0), ACT=table[l],
                **self.config.tile, **self.dots,
            )  # fmt: skip
            a_dots.append(a_dot)
            inputs = H
        return a_dots, h_dots

    def _seeds(self) -> tuple[Tensor, Tensor | None]:
        """p_L and q_L."""
        σ, l, seed = self.problem.activations[-1], self.problem.depth - 1, self.active.seed
        if σ.kind == "identity":
            return seed, None
        p = torch.empty_like(seed)
        q = None if σ.piecewise_linear else torch.empty_like(seed)
        launch(
            seed_cotangents, (-(-p.numel() // BLOCK),), p, self.saved[l], self.a_dot[l], seed,
            self.active.rows, self.active.total, p, q,
            D=self.problem.D, ACT=activation_table(self.problem, self.x.dtype)[l], BLOCK=BLOCK,
            A=accumulator(p.dtype),
        )  # fmt: skip
        return p, q

    def join(self, g: Tensor) -> None:
        """g += q in the pairs' rows."""
        if self.q is not None:
            self._gather(g, self.q, fresh=False)
        if not self.kept:
            self.q = None

    def _gather(self, g: Tensor, q: Tensor, fresh: bool) -> None:
        """g (N, H) += q of the pairs in its rows; g begins at 0 if ``fresh``."""
        (N, H), problem = g.shape, self.problem
        grid, tile = tiles_of(N, H)
        launch(
            gather_inputs, grid, self.x, g, q, self.active.place, N,
            d=H, ROW=H, COLUMN=1, T=problem.D if problem.mode == "adjoint" else problem.k,
            FRESH=fresh, **tile, A=accumulator(self.x.dtype),
        )  # fmt: skip

    def down(self, l: int) -> None:
        """p and q of a_{l-1} from those of a_l."""
        σ, H = self.problem.activations[l - 1], self.problem.widths[l]
        p = self.x.new_empty(self.most, H)
        q = None if self.q is None and σ.piecewise_linear else torch.empty_like(p)
        launch(
            pairs_down, self.grid(H), p, self.p, self.q, weight_of(self.params, l),
            self.active.rows, self.active.total, self.saved[l - 1], self.a_dot[l - 1],
            self.kept[l - 1] if self.kept else None, p, q,
            OUTPUTS=self.problem.widths[l + 1], INPUTS=H,
            ACT=activation_table(self.problem, self.x.dtype)[l - 1],
            CURVED=not σ.piecewise_linear, ADD=False, **self.config.tile, **self.dots,
        )  # fmt: skip
        self.p, self.q = p, q

    def weight(self, l: int, grads: Gradients) -> None:
        """dW_l and db_l, added to what the rows left."""
        q = None if self.joins else self.q
        fresh = not self.joins
        dW = grads.begun(2 * l)
        db = grads.begun(2 * l + 1) if fresh else None
        if dW is None and db is None:
            return
        O, I = self.problem.widths[l + 1], self.problem.widths[l]
        launch(
            pairs_weight, self.config.grid(O, I), self.p, self.p, q,
            self.h_dot[l - 1] if l else self.active.x_dot, self.saved[l - 1] if l else self.x,
            self.active.rows, self.active.total, dW, db,
            OUTPUTS=O, INPUTS=I, RUNS=((0, 0, I),) if l else runs_of(self.problem.columns),
            TANGENTS=I if l else self.problem.k, BELOW_ROW=I,
            ACT=activation_table(self.problem, self.x.dtype)[l - 1] if l else IDENTITY, FRESH=fresh,
            BM=self.config.rows, BN=self.config.columns, BR=self.config.inner, **self.dots,
        )  # fmt: skip

    def inputs(self) -> Tensor:
        """dx, of the curvatures alone."""
        dx, q = torch.empty_like(self.x), self.q
        if q is None:  # every σ'' is zero
            return dx.zero_()
        part = self.x.new_empty(self.most, self.problem.d)
        launch(
            pairs_down, self.grid(self.problem.d), self.x, q, q, weight_of(self.params, 0),
            self.active.rows, self.active.total, None, None, None, None, part,
            OUTPUTS=self.problem.widths[1], INPUTS=self.problem.d, ACT=IDENTITY,
            CURVED=False, ADD=False, **self.config.tile, **self.dots,
        )  # fmt: skip
        self._gather(dx, part, fresh=True)
        return dx


@triton.jit
def seed_cotangents(
    a, a_dot, s, rows, total, p_out, q_out, D: tl.constexpr, ACT: tl.constexpr,
    BLOCK: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """With an activation after the last layer: p_L = σ'∘s, q_L = σ''∘ȧ_L∘s of the active pairs."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < tl.load(total).to(tl.int64) * D
    n = tl.load(rows + i // D, mask=ok, other=0).to(tl.int64)
    _h, slope, curvature = activation(tl.load(a + n * D + i % D, mask=ok, other=0.0).to(A), ACT)
    seed = tl.load(s + i, mask=ok, other=0.0).to(A)
    tl.store(p_out + i, slope * seed, mask=ok)
    if q_out is not None:
        tl.store(
            q_out + i, curvature * tl.load(a_dot + i, mask=ok, other=0.0).to(A) * seed, mask=ok
        )
