"""What the light kernels of programs are launched with."""

from __future__ import annotations

from ..constants import power_of_two

__all__ = ["WIDEST_ROW", "row_tile", "tile"]

ELEMENTS = 2048  # of a tile
WIDEST_ROW = 8192  # columns of a row that a light node holds in registers, of 16 warps


def tile(H: int) -> tuple[int, int]:
    """Rows and columns of an element-wise tile over (N, H)."""
    columns = min(64, power_of_two(H))
    return ELEMENTS // columns, columns


def row_tile(H: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile of whole rows of H columns."""
    columns = power_of_two(H)
    return max(1, ELEMENTS // columns), columns, min(16, max(4, columns // 512))
