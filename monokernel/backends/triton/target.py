"""What the card is: how it multiplies, what it has, in which precision it computes.

Under Triton's interpreter CPU tensors stand for a card without limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import triton

__all__ = [
    "OLD_TRITON",
    "approximate",
    "assumed",
    "assumption",
    "compute_dtype",
    "dot_precision",
    "interpreting",
    "processors",
    "products",
    "register_limit",
]


@triton.jit
def _probe() -> None:
    pass


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter (decided when they were defined)."""
    return not isinstance(_probe, triton.JITFunction)


# Before 3.7 Triton takes out of loops what they are asked to keep, and registers run short.
OLD_TRITON = not interpreting() and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


_assumed: list[tuple[str, int]] = []


@contextmanager
def assumed(way: str, count: int = 2) -> Iterator[None]:
    """As if every device multiplied this way (see ``products``), and were a card of so many
    processors: for compiling without one, and for tests."""
    _assumed.append((way, count))
    try:
        yield
    finally:
        _assumed.pop()


def assumption() -> tuple[str, int] | None:
    """What is assumed now."""
    return _assumed[-1] if _assumed else None


def products(device: torch.device) -> str:
    """How the device multiplies: "wgmma" (Hopper) and "tcgen05" (Blackwell) read weights from
    shared memory; elsewhere each "warp" (also of consumer Blackwell) or AMD's "wave" takes them
    into registers.

    The interpreter has no registers to run out of.
    """
    if _assumed:
        return _assumed[-1][0]
    return _products(device) if device.type == "cuda" else "wgmma"


@lru_cache
def _products(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "wave"
    return {9: "wgmma", 10: "tcgen05"}.get(torch.cuda.get_device_capability(device)[0], "warp")


def approximate(dtype: torch.dtype) -> int:
    """How kernels exponentiate and divide for operands of a dtype (see ``device/activations.py``):
    in half precision 1 by NVIDIA's approximate instructions, 2 as if by those, under the
    interpreter; else 0, as Triton does."""
    if dtype not in (torch.float16, torch.bfloat16):
        return 0
    if interpreting():
        return 2
    amd = _assumed[-1][0] == "wave" if _assumed else torch.version.hip is not None
    return 0 if amd else 1


def register_limit(device: torch.device, most: int = 255) -> dict[str, int]:
    """The launch option that lets a kernel have every register, or so many; only CUDA knows it.

    Without it ptxas may spill a little to have room for one more program (168 registers and 16
    bytes of stack on sm_80).
    """
    cuda = device.type == "cuda" and torch.version.hip is None
    return {"maxnreg": most} if cuda or _assumed else {}


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 under the interpreter, so that tests meet several programs."""
    if _assumed:
        return _assumed[-1][1]
    return _processors(device) if device.type == "cuda" else 2


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of dot operands. The interpreter's bfloat16 dots are wrong, so it takes float32."""
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype


def dot_precision(dtype: torch.dtype, highest: str = "ieee") -> str:
    """``input_precision`` of the dots: float32 follows ``torch.get_float32_matmul_precision()``.

    PyTorch's own products on CUDA use TF32 at "high" as well as at "medium".
    """
    if dtype != torch.float32:
        return "ieee"
    return highest if torch.get_float32_matmul_precision() == "highest" else "tf32"
