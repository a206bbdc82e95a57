"""Products over the active pairs of a program."""

from __future__ import annotations

import torch
from torch import Tensor

from ....columns import Columns, runs_of
from ..active import Active
from ..active.config import product_config, product_options
from ..active.products import pairs_down, pairs_up, pairs_weight
from ..constants import IDENTITY
from ..launch import launch
from .operands import On, given

__all__ = ["Products"]


class Products:
    """Products over the active pairs alone, of operands of a dtype or rounded to it."""

    def __init__(self, on: On, active: Active, dtype: torch.dtype) -> None:
        self.on, self.active = on, active
        self.config = product_config(dtype)
        self.options = product_options(dtype, self.config)

    def _grid(self, columns: int) -> tuple[int, int]:
        return self.config.grid(self.on.count, columns)

    def up(self, t: Tensor, W: Tensor) -> Tensor:
        """t Wᵀ."""
        outputs, inputs = W.shape
        out = self.on.new(1, outputs, W.dtype)
        launch(
            pairs_up, self._grid(outputs), t, self.on.dense(t), W, self.active.rows,
            self.active.total, None, out, None,
            INPUTS=inputs, OUTPUTS=outputs, W_ROW=W.stride(0), ACT=IDENTITY,
            **self.config.tile, **self.options,
        )  # fmt: skip
        return out

    def down(self, P: Tensor, W: Tensor, held: Tensor | None, dtype: torch.dtype) -> Tensor:
        """P W of that dtype, or added to ``held`` in its memory."""
        outputs, inputs = W.shape
        out = self.on.new(1, inputs, dtype) if held is None else held
        P = self.on.dense(P)
        launch(
            pairs_down, self._grid(inputs), P, P, P, W, self.active.rows, self.active.total,
            None, None, None, None, out,
            OUTPUTS=outputs, INPUTS=inputs, ACT=IDENTITY, CURVED=False, ADD=held is not None,
            **self.config.tile, **self.options,
        )  # fmt: skip
        return out

    def weight(
        self, p: Tensor | None, q: Tensor | None, u_dot: Tensor | None, u: Tensor,
        dW: Tensor, fresh: bool, columns: Columns | None = None,
    ) -> None:  # fmt: skip
        """dW += pᵀ u̇ + qᵀ u, u̇ in these ``columns`` alone if there are any."""
        outputs, inputs = dW.shape
        if u.stride(2) != 1 and q is not None:
            u = u.contiguous()
        config = self.config
        launch(
            pairs_weight, config.grid(outputs, inputs), u,
            None if p is None else self.on.dense(p), None if q is None else self.on.dense(q),
            None if p is None else self.on.dense(given(u_dot)), u,
            self.active.rows, self.active.total, dW, None,
            OUTPUTS=outputs, INPUTS=inputs,
            RUNS=runs_of(columns) if columns else ((0, 0, inputs),),
            TANGENTS=len(columns) if columns else inputs, BELOW_ROW=u.stride(1), ACT=IDENTITY,
            FRESH=fresh, BM=config.rows, BN=config.columns, BR=config.inner, **self.options,
        )  # fmt: skip
