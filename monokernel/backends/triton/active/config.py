"""What products over the active pairs are launched with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..constants import TL_DTYPES, accumulator
from ..target import compute_dtype, dot_precision

__all__ = ["ProductConfig", "candidates", "product_config", "product_options"]


@dataclass(frozen=True)
class ProductConfig:
    """One product over the active pairs: an output tile of ``rows`` x ``columns``, inner step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @property
    def tile(self) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.columns, "BK": self.inner}

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.rows), -(-columns // self.columns)


def product_config(dtype: torch.dtype) -> ProductConfig:
    """The dual-accumulator kernels: two sums of a 64 x 64 tile.

    Strict float32 has no tensor core; there short inner steps keep the operands of its
    multiply-adds in registers (4 warps and steps of 32 spill 456 bytes). On tensor cores 4 warps
    spill 8 to 24 bytes in the weight gradient on sm_80 and sm_100, 8 warps nothing.
    """
    ieee = dtype == torch.float32 and dot_precision(dtype) == "ieee"
    return ProductConfig(64, 64, 16, 8, 2) if ieee else ProductConfig(64, 64, 32, 8, 3)


def candidates(config: ProductConfig) -> list[ProductConfig]:
    """What autotuning tries: the rule's choice with shallower and deeper prefetching."""
    return [replace(config, stages=n) for n in (config.stages, 2, 3, 4)]


def product_options(dtype: torch.dtype, config: ProductConfig) -> dict[str, Any]:
    """How a kernel multiplies over the active pairs."""
    return {
        "C": TL_DTYPES[compute_dtype(dtype)],
        "A": accumulator(dtype),
        "PRECISION": dot_precision(dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
