"""The one place where kernels are launched: it counts launches, and knows about the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...activations import ACTIVATIONS, Activation
from ...problem import Problem, accumulate_dtype

__all__ = [
    "CODES",
    "LaunchCount",
    "accumulator",
    "activation_code",
    "activation_table",
    "compute_dtype",
    "dot_precision",
    "interpreting",
    "launch",
    "processors",
    "products",
    "register_limit",
]

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


# What the kernels call an activation's kind; those that whole-network kernels serve come first.
CODES = {kind: code for code, kind in enumerate(ACTIVATIONS)}


class LaunchCount:
    """How many kernels this package has launched since the process began."""

    total = 0


# Set by ``compile_report.py``, which asks what would be launched and compiles that instead.
instead_of_launching: list[Callable[..., None]] = []


@triton.jit
def _probe() -> None:
    pass


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter (decided when they were defined)."""
    return not isinstance(_probe, triton.JITFunction)


def launch(
    kernel: Any, programs: tuple[int, ...], on: Tensor, *args: object, **options: object
) -> None:
    """Runs ``kernel`` on the grid ``programs``, on the device of ``on``."""
    if instead_of_launching:
        instead_of_launching[-1](kernel, args, options)
        return
    LaunchCount.total += 1
    elsewhere = on.is_cuda and on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if elsewhere else nullcontext():
        kernel[programs](*args, **options)


# What ``compile_report.py`` compiles for, in place of the device that is here.
instead_of_device: list[str] = []


def products(device: torch.device) -> str:
    """How the device multiplies: "wgmma" (Hopper) and "tcgen05" (Blackwell) read weights from
    shared memory; elsewhere each "warp" (also of consumer Blackwell) or AMD's "wave" takes them
    into registers.

    The interpreter has no registers to run out of.
    """
    if instead_of_device:
        return instead_of_device[-1]
    return _products(device) if device.type == "cuda" else "wgmma"


@lru_cache
def _products(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "wave"
    return {9: "wgmma", 10: "tcgen05"}.get(torch.cuda.get_device_capability(device)[0], "warp")


def register_limit(device: torch.device) -> dict[str, int]:
    """The launch option that lets a kernel have every register; only CUDA knows it.

    Without it ptxas may spill a little to have room for one more program (168 registers and 16
    bytes of stack on sm_80).
    """
    cuda = device.type == "cuda" and torch.version.hip is None
    return {"maxnreg": 255} if cuda or instead_of_device else {}


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 under the interpreter, so that tests meet several programs."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of dot operands. The interpreter's bfloat16 dots are wrong, so it takes float32."""
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype


def accumulator(dtype: torch.dtype) -> Any:
    """The accumulation dtype, in Triton's name."""
    return TL_DTYPES[accumulate_dtype(dtype)]


def dot_precision(dtype: torch.dtype, highest: str = "ieee") -> str:
    """``input_precision`` of the dots: float32 follows ``torch.get_float32_matmul_precision()``.

    PyTorch's own products on CUDA use TF32 at "high" as well as at "medium".
    """
    if dtype != torch.float32:
        return "ieee"
    return highest if torch.get_float32_matmul_precision() == "highest" else "tf32"


@lru_cache(maxsize=256)
def activation_table(problem: Problem) -> tuple[tuple[int, float, float, float], ...]:
    """The activations as the kernels take them at compile time: (code, p, q, r) for each layer."""
    return tuple(map(activation_code, problem.activations))


def activation_code(a: Activation) -> tuple[int, float, float, float]:
    return CODES[a.kind], a.p, a.q, a.r
