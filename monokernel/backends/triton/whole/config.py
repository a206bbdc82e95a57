"""What the whole-network kernels are launched with: configurations are data, rules pick them.

The numbers come from ahead-of-time compiles (``tools/compile_report.py``: registers, no spill), not
from a device: none could be had.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....columns import runs_of
from ....problem import Problem
from ... import Params
from ..constants import (
    TL_DTYPES,
    ActivationCode,
    accumulator,
    activation_table,
    output_code,
    power_of_two,
)
from ..target import compute_dtype, dot_precision, interpreting

__all__ = [
    "DEEPEST",
    "SMALL_TILE",
    "WIDEST",
    "WholeConfig",
    "backward_config",
    "candidates",
    "dtypes_of",
    "forward_config",
    "padded",
    "precision_of",
    "shape_of",
    "split",
    "strict",
]

# Hidden and output widths that a whole-network kernel serves, by operand size in bytes.
WIDEST = {2: 128, 4: 64, 8: 64}
# Its linear layers. They are unrolled at compile time: beyond 8 that takes long for nothing.
DEEPEST = 8
SMALL_TILE = 32  # rows


@dataclass(frozen=True)
class WholeConfig:
    """One whole-network kernel: tiles of ``rows``, ``warps``, programs per processor.

    ``in_registers``: what is needed again stays in registers, else in scratch slots. Of the
    backward: of tiles without a violation, and all sums; the others take scratch, and have
    ``active_rows`` (``rows`` if None).
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
    active_rows: int | None = None


def forward_config(width: int, adjoint: bool, products: str, split: bool) -> WholeConfig:
    """``width`` is the padded width of the widest layer, ``products`` that of ``target.py``.

    ``split``: three TF32 products for one. What the adjoint keeps of each layer goes to scratch: in
    registers it spilled 24 to 136 bytes at widths 32 and 64 on sm_90 (168 registers without).
    In Triton 3.6 whole products of 128 ask for 512 columns of tensor memory at three hidden layers
    and for 720 at five.
    """
    shared = products in ("wgmma", "tcgen05")
    if split or (not shared and width > 32) or (products == "tcgen05" and width > 64):
        return in_steps(width, products, split)
    if width > 64:
        return WholeConfig(64, 8, 2, inner=width)
    return WholeConfig(64, 4, 2, in_registers=not adjoint)


def backward_config(
    width: int, itemsize: int, products: str, split: bool, few: bool = True, dear: bool = False,
    small: bool = False,
) -> WholeConfig:  # fmt: skip
    """``few``: at most four layers, inputs and outputs that one product takes, and no gradient of
    the inputs, with which sums in registers spill 24 to 56 bytes on sm_90. ``dear``: an activation
    takes so many registers that seven hidden layers of 64 spill 8 bytes there, unless operands of
    products go by way of memory. ``small``: a batch of too few rows for large tiles on all
    processors."""
    # Whole TF32 products at width 64 spill up to 568 bytes in Triton 3.6, with dx of 40 inputs.
    if split or products != "wgmma" or (itemsize == 4 and width > 32):
        return in_steps(width, products, split)
    if width <= 32:
        return WholeConfig(64, 4, 2, chunk=16)
    if width <= 64 and few and itemsize == 2:
        # By the model few violations are cheapest in tiles of 32 rows: at v = 5 % a program of 500
        # rows has 25. With 64 the kernel is a tenth cheaper at v = 1.
        # Batches that large tiles would leave on a few processors take small ones throughout.
        rows = SMALL_TILE if small else 128
        return WholeConfig(rows, 8, 1, inner=64, in_registers=True, active_rows=SMALL_TILE)
    if width <= 64:
        return WholeConfig(64, 4, 2, inner=64 if dear else 0, chunk=32)
    return WholeConfig(64, 8, 1, inner=64, chunk=32)


def in_steps(width: int, products: str, split: bool) -> WholeConfig:
    """Few weights at a time: where each warp holds those that it multiplies with, and where tensor
    memory holds every sum (Triton 3.7 gives it back to no other product: 864 of 512 columns)."""
    if split:  # operands twice: 64 rows spill 80 bytes on sm_90
        return WholeConfig(32, 8 if products == "warp" else 4, 1, inner=16, chunk=16)
    if width <= 32:
        return WholeConfig(64, 4, 2, inner=16, chunk=16)
    # 8 of AMD's waves have 256 registers each, and spilled 52 bytes in TF32; 4 have 512.
    return WholeConfig(64, 4 if products == "wave" else 8, 1, inner=32, chunk=32)


def candidates(config: WholeConfig) -> list[WholeConfig]:
    """What autotuning tries: the rule's choice with fewer and more programs."""
    return [replace(config, per_processor=n) for n in (config.per_processor, 1, 2, 3, 4)]


# --- what both kernels are told -------------------------------------------------------------------


def padded(n: int) -> int:
    """The padded width: the next power of two, at least the 16 that a dot takes."""
    return power_of_two(n, 16)


def shape_of(problem: Problem, dtype: torch.dtype) -> dict[str, Any]:
    """What both kernels know of the network at compile time."""
    return _shape_of(problem, activation_table(problem, dtype))


@lru_cache(maxsize=256)
def _shape_of(problem: Problem, table: tuple[ActivationCode, ...]) -> dict[str, Any]:
    hidden = max(problem.widths[1:-1], default=16)
    return {
        "WIDTHS": problem.widths,
        "ACTS": table,
        "K": problem.k,
        "RUNS": runs_of(problem.columns),
        # With one output and one column both modes are the same; the tangent's needs less.
        "ADJOINT": problem.mode == "adjoint" and not problem.k == problem.D == 1,
        "OUT": output_code(problem),
        "H": padded(hidden),
        "PD": padded(problem.D),
    }


def _asked_precision(dtype: torch.dtype) -> str:
    """At "highest", MONOKERNEL_FP32=tf32x3 lets narrow networks use three TF32 products for one.

    Triton has none such for AMD.
    """
    if dtype != torch.float32:
        return dot_precision(dtype)
    wanted = "ieee" if torch.version.hip else os.environ.get("MONOKERNEL_FP32", "ieee")
    return dot_precision(dtype, highest=wanted)


def strict(dtype: torch.dtype) -> bool:
    """Whether products are asked for that no tensor core has."""
    return dtype == torch.float32 and not interpreting() and _asked_precision(dtype) == "ieee"


def precision_of(dtype: torch.dtype) -> str:
    """As asked for; where it was raised between a forward and its backward, which one kernel then
    serves, the nearest to it that a tensor core has."""
    if strict(dtype):
        return "tf32" if torch.version.hip else "tf32x3"
    return _asked_precision(dtype)


def dtypes_of(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "C": TL_DTYPES[compute_dtype(dtype)],
        "A": accumulator(dtype),
        "PRECISION": precision_of(dtype),
    }


def split(params: Params) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(W_1, …) and (b_1, …), contiguous."""
    ws = tuple([W.contiguous() for W in params[::2] if W is not None])
    bs = tuple([None if b is None else b.contiguous() for b in params[1::2]])
    return ws, bs
