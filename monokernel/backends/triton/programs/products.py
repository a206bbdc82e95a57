"""Products over the active pairs of a program."""

from __future__ import annotations

import torch
from torch import Tensor

from ....columns import Columns, runs_of
from ..active import Active
from ..active.config import NO_INPUTS, product_config, product_options
from ..active.products import pairs_product, pairs_weight
from ..constants import IDENTITY
from ..launch import launch
from ..target import OLD_TRITON, products
from .operands import On, given

__all__ = ["Products"]


class Products:
    """Products over the active pairs alone, of operands of a dtype or rounded to it."""

    def __init__(self, on: On, active: Active, dtype: torch.dtype) -> None:
        self.on, self.active = on, active
        self.config = product_config(dtype, active.rows.device)
        self.options = product_options(dtype, self.config)

    def up(self, t: Tensor, W: Tensor) -> Tensor:
        """t Wᵀ."""
        out = self.on.new(1, W.shape[0], W.dtype)
        self._product(t, W.t(), out, False)
        return out

    def down(self, P: Tensor, W: Tensor, held: Tensor | None, dtype: torch.dtype) -> Tensor:
        """P W of that dtype, or added to ``held`` in its memory."""
        out = self.on.new(1, W.shape[1], dtype) if held is None else held
        self._product(P, W, out, held is not None)
        return out

    def _product(self, left: Tensor, W: Tensor, out: Tensor, add: bool) -> None:
        inputs, outputs = W.shape
        tile = self.config.fitted(outputs, alone=not add)
        launch(
            pairs_product, tile.grid(self.on.count, outputs), left, self.on.dense(left), W,
            self.active.rows, self.active.total, *(None,) * 4, out, None,
            INPUTS=inputs, OUTPUTS=outputs, W_IN=W.stride(0), W_OUT=W.stride(1), ADD=add,
            ACT=IDENTITY, **NO_INPUTS, **tile.tile_of(inputs), **self.options,
        )  # fmt: skip

    def weight(
        self, p: Tensor | None, q: Tensor | None, u_dot: Tensor | None, u: Tensor,
        dW: Tensor, fresh: bool, columns: Columns | None = None,
    ) -> None:  # fmt: skip
        """dW += pᵀ u̇ + qᵀ u, u̇ in these ``columns`` alone if there are any."""
        outputs, inputs = dW.shape
        if u.stride(2) != 1 and q is not None:
            u = u.contiguous()
        config = self.config.fitted(inputs, alone=q is None)
        if OLD_TRITON and products(u.device) == "tcgen05":  # 16 to 80 bytes with 128 columns
            config = config.fitted(min(inputs, 64))
        launch(
            pairs_weight, (*config.grid(outputs, inputs), 1), u,
            None if p is None else self.on.dense(p), None if q is None else self.on.dense(q),
            None if p is None else self.on.dense(given(u_dot)), u, None, None, None,
            self.active.rows, self.active.total, dW, None,
            OUTPUTS=outputs, INPUTS=inputs,
            RUNS=runs_of(columns) if columns else ((0, 0, inputs),),
            TANGENTS=len(columns) if columns else inputs, BELOW_ROW=u.stride(1), ACT=IDENTITY,
            FRESH=fresh, SIZE=0, **NO_INPUTS, BM=config.rows, BN=config.columns, BR=config.inner,
            **self.options,
        )  # fmt: skip
