"""What products over the active pairs are launched with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..constants import TL_DTYPES, accumulator, power_of_two
from ..target import compute_dtype, dot_precision, processors, products

__all__ = [
    "NO_INPUTS",
    "ProductConfig",
    "candidates",
    "product_config",
    "product_options",
    "product_types",
]

# Of ``pre_activation`` where what it is of was kept.
NO_INPUTS = {"FAN": 0, "FAN_TILE": 16}


@dataclass(frozen=True)
class ProductConfig:
    """One product over the active pairs: an output tile of ``rows`` x ``columns``, inner step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def tile_of(self, inner: int) -> dict[str, int]:
        """Of a product that sums over ``inner``."""
        step = min(self.inner, power_of_two(inner, 16))
        return {"BM": self.rows, "BN": self.columns, "BK": step}

    def fitted(self, columns: int, alone: bool = False) -> ProductConfig:
        """For so many columns. A sum that is ``alone``, with no other and no epilogue beside it,
        has room for twice as many where tiles are large: an epilogue spills 48 bytes on sm_90."""
        most = 2 * self.columns if alone and self.rows == 128 else self.columns
        return replace(self, columns=min(most, power_of_two(columns, 16)))

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.rows), -(-columns // self.columns)

    def parts(self, pairs: int, weight: tuple[int, int], device: torch.device) -> int:
        """Into how many so many pairs are cut for the gradient of a weight of that shape: a program
        for each processor, but where a part would be short."""
        rows, columns = self.grid(*weight)
        return max(1, min(processors(device) // (rows * columns), -(-pairs // (32 * self.inner))))


def product_config(dtype: torch.dtype, device: torch.device) -> ProductConfig:
    """Tiles of 64 x 64; of 128 x 128, which read half as much, where operands lie in shared memory.

    Strict float32 has no tensor core; there short inner steps keep the operands of its
    multiply-adds in registers (4 warps and steps of 32 spill 456 bytes). On tensor cores 4 warps
    spill 8 to 24 bytes in the weight gradient on sm_80 and sm_100, 8 warps nothing.
    """
    ieee = dtype == torch.float32 and dot_precision(dtype) == "ieee"
    if ieee:
        return ProductConfig(64, 64, 16, 8, 2)
    if products(device) in ("wgmma", "tcgen05"):
        half = dtype.itemsize == 2  # TF32 spills 8 bytes in 128 columns with an epilogue
        return ProductConfig(128, 128, 64, 8, 3) if half else ProductConfig(128, 64, 32, 8, 3)
    # Of a tile of 64 x 64 AMD's waves have 32 x 32 each: 8 would do everything twice.
    return ProductConfig(64, 64, 32, 4 if products(device) == "wave" else 8, 3)


def candidates(config: ProductConfig) -> list[ProductConfig]:
    """What autotuning tries: the rule's choice with shallower and deeper prefetching."""
    return [replace(config, stages=n) for n in (config.stages, 2, 3, 4)]


def product_types(dtype: torch.dtype) -> dict[str, Any]:
    """In which types a kernel multiplies and adds."""
    return {
        "C": TL_DTYPES[compute_dtype(dtype)],
        "A": accumulator(dtype),
        "PRECISION": dot_precision(dtype),
    }


def product_options(dtype: torch.dtype, config: ProductConfig) -> dict[str, Any]:
    """How a kernel multiplies over the active pairs."""
    own = {"num_warps": config.warps, "num_stages": config.stages}
    return product_types(dtype) | own
