"""What launches which kernel how: configurations are data, and the rules that pick them.

The numbers come from ahead-of-time compiles (``compile_report.py``: registers, no spill), not from
a device: none could be had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "ROWS",
    "LayerConfig",
    "NetworkConfig",
    "backward_config",
    "candidates",
    "forward_config",
    "layer_candidates",
    "layer_config",
    "power_of_two",
]

# Hidden and output widths that a whole-network kernel holds in registers, by operand size in bytes:
# where products read weights from shared memory, and where each warp holds them.
WIDEST = {True: {2: 128, 4: 64, 8: 64}, False: {2: 64, 4: 32}}
# Linear layers of a whole-network kernel, by the same. They are unrolled at compile time: beyond 8
# that takes long for nothing, and where each warp holds the weights six spill at width 64.
DEEPEST = {True: 8, False: 4}


@dataclass(frozen=True)
class NetworkConfig:
    """One whole-network kernel: tiles of ``rows``, ``warps``, programs per processor.

    ``in_registers``: the forward keeps what it needs again in registers, else in scratch slots.
    ``chunk``: columns of a weight gradient that the backward computes at a time.
    ``registers``: an upper limit for the compiler, which else may spill a little to save many.
    """

    rows: int
    warps: int
    per_processor: int
    in_registers: bool = False
    chunk: int = 64
    registers: int | None = None
    stages: int = 1


def power_of_two(n: int, least: int = 16) -> int:
    """The padded width: the next power of two, at least the 16 that a dot takes."""
    return max(least, 1 << (n - 1).bit_length())


def forward_config(
    width: int, depth: int, itemsize: int, adjoint: bool, group_products: bool
) -> NetworkConfig:
    """``width`` is the padded width of the widest layer."""
    if width > 64:
        return NetworkConfig(64, 8, 2, in_registers=False)
    kept = (depth - 1) * width * itemsize if adjoint else 0  # bytes of a row
    return NetworkConfig(64, 4, 2, in_registers=kept <= (384 if group_products else 0))


def backward_config(width: int) -> NetworkConfig:
    if width <= 32:  # sm_80: 168 registers and 8 bytes of stack without the limit, else 211, none
        return NetworkConfig(64, 4, 2, chunk=16, registers=240)
    if width <= 64:
        return NetworkConfig(64, 4, 2, chunk=32)
    return NetworkConfig(64, 8, 1, chunk=64, registers=240)  # sm_100: 128 and 16 bytes without


def candidates(config: NetworkConfig) -> list[NetworkConfig]:
    """What autotuning tries: the rule's choice with fewer and more programs."""
    return [replace(config, per_processor=n) for n in (config.per_processor, 1, 2, 3, 4)]


# --- layer by layer -----------------------------------------------------------------------------

ROWS = 64  # rows of an element-wise tile of 32 columns: 2048 elements for 4 warps


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
