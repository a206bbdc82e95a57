"""What launches which kernel how: configurations are data, and the rules that pick them.

The numbers come from ahead-of-time compiles (``compile_report.py``: registers, no spill), not from
a device: none could be had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "LIGHT_TILE",
    "ROWS",
    "WIDEST_ROW",
    "LayerConfig",
    "NetworkConfig",
    "backward_config",
    "candidates",
    "forward_config",
    "layer_candidates",
    "layer_config",
    "power_of_two",
]

# Hidden and output widths that a whole-network kernel serves, by operand size in bytes.
WIDEST = {2: 128, 4: 64, 8: 64}
# Its linear layers. They are unrolled at compile time: beyond 8 that takes long for nothing.
DEEPEST = 8


@dataclass(frozen=True)
class NetworkConfig:
    """One whole-network kernel: tiles of ``rows``, ``warps``, programs per processor.

    ``in_registers``: the forward keeps what it needs again in registers, else in scratch slots.
    ``inner``: products take their left operand by way of a scratch slot, ``inner`` columns at a
    time; 0 if it stays in registers.
    ``chunk``: input columns (of the forward), and columns of a weight gradient, at a time.
    """

    rows: int
    warps: int
    per_processor: int
    in_registers: bool = False
    inner: int = 0
    chunk: int = 64
    stages: int = 1


def power_of_two(n: int, least: int = 16) -> int:
    """The padded width: the next power of two, at least the 16 that a dot takes."""
    return max(least, 1 << (n - 1).bit_length())


def forward_config(
    width: int, depth: int, itemsize: int, adjoint: bool, products: str, split: bool
) -> NetworkConfig:
    """``width`` is the padded width of the widest layer, ``products`` that of ``launch.py``.

    ``split``: three TF32 products for one.
    """
    shared = products in ("wgmma", "tcgen05")
    if split or (not shared and width > 32):
        return in_steps(width, products, split)
    if width > 64:
        return NetworkConfig(64, 8, 2, inner=width)
    kept = (depth - 1) * width * itemsize if adjoint else 0  # bytes of a row
    return NetworkConfig(64, 4, 2, in_registers=kept <= (384 if shared else 0))


def backward_config(width: int, itemsize: int, products: str, split: bool) -> NetworkConfig:
    # Whole TF32 products at width 64 spill up to 568 bytes in Triton 3.6, with dx of 40 inputs.
    if split or products != "wgmma" or (itemsize == 4 and width > 32):
        return in_steps(width, products, split)
    if width <= 32:
        return NetworkConfig(64, 4, 2, chunk=16)
    if width <= 64:
        return NetworkConfig(64, 4, 2, chunk=32)
    return NetworkConfig(64, 8, 1, inner=64, chunk=32)


def in_steps(width: int, products: str, split: bool) -> NetworkConfig:
    """Few weights at a time: where each warp holds those that it multiplies with, and where tensor
    memory holds every sum (Triton 3.7 gives it back to no other product: 864 of 512 columns)."""
    if split:  # operands twice: 64 rows spill 80 bytes on sm_90
        return NetworkConfig(32, 8 if products == "warp" else 4, 1, inner=16, chunk=16)
    if width <= 32:
        return NetworkConfig(64, 4, 2, inner=16, chunk=16)
    # 8 of AMD's waves have 256 registers each, and spilled 52 bytes in TF32; 4 have 512.
    return NetworkConfig(64, 4 if products == "wave" else 8, 1, inner=32, chunk=32)


def candidates(config: NetworkConfig) -> list[NetworkConfig]:
    """What autotuning tries: the rule's choice with fewer and more programs."""
    return [replace(config, per_processor=n) for n in (config.per_processor, 1, 2, 3, 4)]


# --- layer by layer -----------------------------------------------------------------------------

ROWS = 64  # rows of an element-wise tile of 32 columns: 2048 elements for 4 warps
LIGHT_TILE = 2048  # elements of a tile of a program's light nodes
# Columns of a row that a light node holds in registers, of 16 warps.
WIDEST_ROW = 8192


@dataclass(frozen=True)
class LayerConfig:
    """One product over the active pairs: an output tile of ``rows`` x ``columns``, inner step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def layer_config(ieee: bool) -> LayerConfig:
    """The dual-accumulator kernels: two sums of a 64 x 64 tile.

    Strict float32 has no tensor core; there short inner steps keep the operands of its
    multiply-adds in registers (4 warps and steps of 32 spill 456 bytes). On tensor cores 4 warps
    spill 8 to 24 bytes in the weight gradient on sm_80 and sm_100, 8 warps nothing.
    """
    return LayerConfig(64, 64, 16, 8, 2) if ieee else LayerConfig(64, 64, 32, 8, 3)


def layer_candidates(config: LayerConfig) -> list[LayerConfig]:
    """What autotuning tries: the rule's choice with shallower and deeper prefetching."""
    return [replace(config, stages=n) for n in (config.stages, 2, 3, 4)]
