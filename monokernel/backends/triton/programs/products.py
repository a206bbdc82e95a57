"""Products over the active pairs of a program."""

from __future__ import annotations

import torch
from torch import Tensor

from ....columns import Columns, runs_of
from ....program import Node
from ..active import Active
from ..active.config import NO_INPUTS, product_config, product_options
from ..active.products import pairs_product, pairs_weight
from ..constants import IDENTITY, ActivationCode
from ..launch import launch
from ..target import OLD_TRITON, products
from .gradients import Gradients
from .operands import OfRows, On, Operand, act_of, compiled_act, given, tensor_of

__all__ = ["Products"]


class Products:
    """Products over the active pairs alone, of operands of a dtype or rounded to it."""

    def __init__(self, on: On, active: Active, dtype: torch.dtype) -> None:
        self.on, self.active = on, active
        self.config = product_config(dtype, active.rows.device)
        self.options = product_options(dtype, self.config)

    def up(
        self, t: Tensor, W: Tensor, σ: Node | None = None, a: Tensor | None = None,
        h_dot: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """t Wᵀ; with σ, whose input a has in all rows, σ'(a) of it in ``h_dot`` besides."""
        out = self.on.new(1, W.shape[0], W.dtype)
        act = IDENTITY if σ is None else compiled_act(act_of(σ), self.on.x.dtype)
        self._product(t, W.t(), out, False, act, a, h_dot)
        return out

    def down(self, P: Tensor, W: Tensor, held: Tensor | None, dtype: torch.dtype) -> Tensor:
        """P W of that dtype, or added to ``held`` in its memory."""
        out = self.on.new(1, W.shape[1], dtype) if held is None else held
        self._product(P, W, out, held is not None)
        return out

    def _product(
        self, left: Tensor, W: Tensor, out: Tensor, add: bool, act: ActivationCode = IDENTITY,
        a: Tensor | None = None, h_dot: Tensor | None = None,
    ) -> None:  # fmt: skip
        inputs, outputs = W.shape
        tile = self.config.fitted(outputs, alone=not add and h_dot is None)
        launch(
            pairs_product, tile.grid(self.on.count, outputs), left, self.on.dense(left), W,
            self.active.rows, self.active.total, a, *(None,) * 3, out, h_dot,
            INPUTS=inputs, OUTPUTS=outputs, W_IN=W.stride(0), W_OUT=W.stride(1), ADD=add,
            ACT=act, **NO_INPUTS, **tile.tile_of(inputs), **self.options,
        )  # fmt: skip

    def weight(
        self, grads: Gradients, place: int, p: Operand | None, q: Tensor | None,
        u_dot: Tensor | None, u: Tensor, columns: Columns | None = None,
    ) -> None:  # fmt: skip
        """dW += pᵀ u̇ + qᵀ u, u̇ in these ``columns`` alone if there are any."""
        outputs, inputs = given(grads.params[place]).shape
        if u.stride(2) != 1 and q is not None:
            u = u.contiguous()
        sums, (parts, add) = grads.weight(place, self.on.count, self.config)
        # 72 bytes on sm_90 with 256 columns that are added to float32.
        config = self.config.fitted(inputs, alone=q is None and not add)
        if OLD_TRITON and products(u.device) == "tcgen05":
            # 16 to 80 bytes with 128 columns, 8 with 64 that p and q have a part in.
            config = config.fitted(min(inputs, 64 if q is None else 32))
        launch(
            pairs_weight, (*config.grid(outputs, inputs), sums.slices), u,
            tensor_of(p), None if q is None else self.on.dense(q),
            None if p is None else self.on.dense(given(u_dot)), u, None, None, None,
            self.active.rows, self.active.total, parts, None,
            OUTPUTS=outputs, INPUTS=inputs, LEFT=left_of(p),
            RUNS=runs_of(columns) if columns else ((0, 0, inputs),),
            TANGENTS=len(columns) if columns else inputs, BELOW_ROW=u.stride(1), ACT=IDENTITY,
            FRESH=not add, SIZE=sums.offsets[-1], **NO_INPUTS, BM=config.rows, BN=config.columns,
            BR=config.inner, **self.options,
        )  # fmt: skip


def left_of(p: Operand | None) -> tuple[int, int, bool]:
    """How p lies (see ``pairs_weight``): each pair has its own row, that of its row, or all one."""
    t = tensor_of(p)
    if t is None:
        return 0, 0, False
    row = 0 if t.dim() == 2 else t.stride(1)
    return row, t.stride(-1), isinstance(p, OfRows)
