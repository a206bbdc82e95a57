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
from ..active.config import NO_INPUTS, ProductConfig, product_options, product_types
from ..active.listing import gather_inputs
from ..active.products import pairs_down, pairs_product, pairs_weight
from ..constants import IDENTITY, accumulator, activation_table
from ..device.activations import activation
from ..launch import launch
from ..reduce import Sums
from ..target import processors, register_limit
from .config import Values, kept_chain, kept_layers, tiles_of, weight_of
from .gradients import Gradients

__all__ = ["Pairs", "seed_cotangents"]


class Pairs:
    """The active pairs of a backward (see ``Active``) on their way down: p and q of a_l.

    Unless they are ``alone``, what q gives to the cotangent g of all rows goes there, and q's part
    in the gradients with it. Then q goes on by itself only where the adjoint chain of all rows is
    kept, which g is made of. Those of a block of rows go on with the ``sums`` of the blocks before.
    """

    def __init__(
        self,
        problem: Problem,
        gout: Tensor,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        config: ProductConfig,
        grads: Gradients,
        alone: bool,
        sums: Sums | None = None,
    ) -> None:
        self.problem, self.x, self.params = problem, x, params
        self.config, self.alone = config, alone
        self.a = Values.saved(problem, x, params, saved)
        self.table = activation_table(problem, x.dtype)
        self.active = list_active(problem, gout, None if problem.hinge is None else saved[-1], x)
        self.chain, self.kept = kept_chain(problem, saved), problem.keeps_adjoint
        self.a_dot, self.h_dot = self._tangents()
        self.seed, self.q = self._seeds()
        self.p = self.seed
        weights = [2 * l for l in range(problem.depth)]
        places = [p for place in weights for p in (place, place + 1)] if alone else weights
        self.fresh = sums is None
        self.sums = grads.sums(places, self._slices(), 4, x) if sums is None else sums

    @property
    def most(self) -> int:
        """Pairs, were all of them active."""
        return len(self.active.rows)

    def _slices(self) -> int:
        """Into how many the pairs are cut for a weight's gradient."""
        widest = max(self.problem.widths[1:-1], default=1)
        tile = self.config.fitted(widest, not self.alone)
        return tile.parts(self.most, (widest, widest), self.x.device)

    def _product(
        self,
        left: Tensor,
        W: Tensor,
        strides: tuple[int, int],
        shape: tuple[int, int],
        out: Tensor | None,
        above: tuple[Any, ...] = (None,) * 4,
        h_dot: Tensor | None = None,
        **of: Any,
    ) -> None:
        """left W, as ``pairs_product`` makes it."""
        inputs, outputs = shape
        tile = self.config.fitted(outputs, h_dot is None)
        launch(
            pairs_product, tile.grid(self.most, outputs), self.x, left, W, self.active.rows,
            self.active.total, *above, out, h_dot,
            INPUTS=inputs, OUTPUTS=outputs, W_IN=strides[0], W_OUT=strides[1], ADD=False,
            **({"ACT": IDENTITY} | NO_INPUTS | of), **tile.tile_of(inputs),
            **product_options(self.x.dtype, tile),
        )  # fmt: skip

    def _below(self, left: Tensor, l: int) -> Tensor:
        """left W of layer l."""
        O, I = self.problem.widths[l + 1], self.problem.widths[l]
        out = self.x.new_empty(self.most, I)
        self._product(left, weight_of(self.params, l), (I, 1), (O, I), out)
        return out

    def _tangents(self) -> tuple[list[Tensor | None], list[Tensor]]:
        """ȧ_l of every layer with a curvature, and ḣ_l of the hidden ones."""
        problem, x, L = self.problem, self.x, self.problem.depth
        a_dots: list[Tensor | None] = []
        h_dots: list[Tensor] = []
        h_dot, inputs = self.active.x_dot, problem.k
        for l in range(kept_layers(problem)):
            W, H = weight_of(self.params, l), problem.widths[l + 1]
            W = take(W, problem.columns) if l == 0 else W  # those of ẋ
            curved = not problem.activations[l].piecewise_linear
            a_dot, h_dot_in = x.new_empty(self.most, H) if curved else None, h_dot
            if l < L - 1:
                h_dot = x.new_empty(self.most, H)
                h_dots.append(h_dot)
            elif a_dot is None:
                a_dots.append(None)
                break
            of = {} if l == L - 1 else {"ACT": self.table[l], **self.a.inputs(l)}
            above = (None,) * 4 if l == L - 1 else self.a.of(l)
            self._product(
                h_dot_in, W, (1, W.stride(0)), (inputs, H), a_dot, above,
                h_dot if l < L - 1 else None, **of,
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
            seed_cotangents, (-(-p.numel() // BLOCK),), p, self.a.a[l], self.a_dot[l], seed,
            self.active.rows, self.active.total, p, q,
            D=self.problem.D, ACT=self.table[l], BLOCK=BLOCK, A=accumulator(p.dtype),
        )  # fmt: skip
        return p, q

    def layer(self, l: int, further: bool) -> None:
        """What layer l's gradients have of them; and down to the layer below."""
        self.weight(l)
        if further:
            self.down(l)

    def joining(self, l: int) -> Tensor | None:
        """q of layer l, which they are at and whose g it joins. It goes on with that, but where g
        of the layer below is no product of it: of a_L alone, times the kept chain."""
        q = self.q
        if not self.kept or l == self.problem.depth - 1:
            self.q = None
        return q

    def down(self, l: int) -> None:
        """p and q of a_{l-1} from those of a_l: a product of each that no kept chain spares."""
        σ, H, top = self.problem.activations[l - 1], self.problem.widths[l], self.problem.depth - 1
        if self.kept:
            P = weight_of(self.params, l) if l == top else self.chain[l - 1]
            seed = None if self.seed is self.active.seed else self.seed
            p = self.x.new_empty(self.most, H)
        else:
            P, seed = self._below(self.p, l), None
            p = P
        Q = None if self.q is None else self._below(self.q, l)
        q = self.x.new_empty(self.most, H) if Q is None and not σ.piecewise_linear else Q
        (tiles, columns), tile = tiles_of(self.most, H, self.a.takes_rows(l - 1))
        most = -(-8 * processors(self.x.device) // columns)
        launch(
            pairs_down, (min(tiles, most), columns), p, P, Q, self.active.rows, self.active.total,
            *self.a.of(l - 1), self.a_dot[l - 1], seed, p, q,
            H=H, KEPT=self.kept, ONE_ROW=self.kept and l == top, ACT=self.table[l - 1],
            CURVED=not σ.piecewise_linear, **self.a.inputs(l - 1), **tile,
            **product_types(self.x.dtype), **register_limit(self.x.device),
        )  # fmt: skip
        self.p, self.q = p, q

    def weight(self, l: int) -> None:
        """dW_l and, of pairs that are alone, db_l."""
        dW, db = self.sums.part(2 * l), self.sums.part(2 * l + 1)
        if dW is None and db is None:
            return
        O, I = self.problem.widths[l + 1], self.problem.widths[l]
        below = self.a.of(l - 1) if l else (self.x, None, None, None)
        # Of few outputs narrow tiles, or there would be few programs.
        tile = self.config.fitted(I if O > 64 else min(I, 64), not self.alone)
        launch(
            pairs_weight, (*tile.grid(O, I), self.sums.slices), self.p, self.p,
            self.q if self.alone else None, self.h_dot[l - 1] if l else self.active.x_dot, *below,
            self.active.rows, self.active.total, dW, db,
            OUTPUTS=O, INPUTS=I, LEFT=(O, 1, False),
            RUNS=((0, 0, I),) if l else runs_of(self.problem.columns),
            TANGENTS=I if l else self.problem.k, BELOW_ROW=I,
            ACT=self.table[l - 1] if l else IDENTITY, FRESH=self.fresh, SIZE=self.sums.offsets[-1],
            **(self.a.inputs(l - 1) if l else NO_INPUTS), BM=tile.rows, BN=tile.columns,
            BR=tile.inner, **product_options(self.x.dtype, tile),
        )  # fmt: skip

    def inputs(self, dx: Tensor, fresh: bool) -> None:
        """Adds to dx what it has of the curvatures; to nothing if ``fresh``."""
        q, d = self.q, self.problem.d
        if q is None:  # every σ'' is zero
            if fresh:
                dx.zero_()
            return
        part = self._below(q, 0)
        grid, tile = tiles_of(len(dx), d)
        launch(
            gather_inputs, grid, self.x, dx, part, self.active.place, len(dx),
            d=d, ROW=d, COLUMN=1,
            T=self.problem.D if self.problem.mode == "adjoint" else self.problem.k,
            FRESH=fresh, **tile, A=accumulator(self.x.dtype),
        )  # fmt: skip


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
