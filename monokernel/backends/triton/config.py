"""What launches which kernel how: configurations are data, and the rules that pick them.

The numbers come from ahead-of-time compiles (``compile_report.py``: registers, no spill), not from a
device: none could be had.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NetworkConfig", "backward_config", "forward_config", "power_of_two"]

# Hidden and output widths that a whole-network kernel holds in registers, by operand size in bytes.
WIDEST = {2: 128, 4: 64, 8: 64}
# Layers are unrolled at compile time: beyond this, compile time grows for nothing.
DEEPEST = 8


@dataclass(frozen=True)
class NetworkConfig:
    """One whole-network kernel: tile of ``rows``, ``warps``, and where things stay between layers.

    ``kept_in_registers``: activations needed on the way back (else a scratch slot in L2);
    ``sums_in_registers``: weight gradients (else the program's slice of the partial sums).
    """

    rows: int
    warps: int
    per_processor: int
    kept_in_registers: bool
    sums_in_registers: bool = False
    stages: int = 1


def power_of_two(n: int, least: int = 16) -> int:
    """The padded width: the next power of two, at least the 16 that a dot takes."""
    return max(least, 1 << (n - 1).bit_length())


def forward_config(H: int, depth: int, itemsize: int, adjoint: bool) -> NetworkConfig:
    kept = (depth - 1) * H * itemsize if adjoint else 0
    return NetworkConfig(64, 4, 2, kept_in_registers=kept <= 64 * 2 * 3)


def backward_config(H: int, depth: int, itemsize: int) -> NetworkConfig:
    if H <= 64:
        return NetworkConfig(
            64,
            4,
            2,
            kept_in_registers=False,
            sums_in_registers=depth * H * H <= 3 * 64 * 64,
        )
    return NetworkConfig(64, 8, 1, kept_in_registers=False, sums_in_registers=False)
