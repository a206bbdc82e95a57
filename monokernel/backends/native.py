"""The library of ``csrc/``: where it is, what it offers, and problems as it knows them.

It is plain C to the outside and is opened with ctypes, which releases the GIL; it gets raw pointers
and runs on PyTorch's own thread pool through ``torch_parallel_for`` of LibTorch's stable C
interface. So one binary serves every Python and every PyTorch from 2.10 on.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem, accumulate_dtype

__all__ = [
    "PACKAGE",
    "SIGNATURES",
    "NativeProblem",
    "check",
    "codes_of",
    "isa",
    "library",
    "missing",
    "path",
    "required",
]

Params = Sequence[Tensor | None]

LIBRARY = "_native.so"
BUILD_LOG = "_native_build.txt"  # setup.py leaves the reason here where the library was not built

# From so many bytes on, what forward saves comes from the library's pool; malloc keeps the rest.
POOL_FROM = 1 << 18

PACKAGE = Path(__file__).resolve().parent.parent


def isa() -> str | None:
    """The instruction set in use (avx512, avx2, neon or baseline), None without the library."""
    found = library()
    return None if isinstance(found, str) else found.mk_isa().decode()


def missing() -> str:
    """Why there is no library, "" if there is one."""
    found = library()
    return found if isinstance(found, str) else ""


def path() -> Path:
    """Where the library is looked for."""
    return Path(os.environ.get("MONOKERNEL_LIBRARY", PACKAGE / LIBRARY))


@cache
def library() -> ctypes.CDLL | str:
    """The library, opened once, or why there is none, which is then said once."""
    found = _open()
    if isinstance(found, str):
        instead = "on the CPU PyTorch operations serve instead"
        warnings.warn(f"monokernel: {found}; {instead}", RuntimeWarning, stacklevel=2)
    return found


def _open() -> ctypes.CDLL | str:
    if not path().exists():
        log = PACKAGE / BUILD_LOG
        why = log.read_text(encoding="utf-8").strip() if log.exists() else "it was not built"
        return f"the native kernel is missing: {why}"
    pool = _thread_pool()
    if isinstance(pool, str):
        return pool
    try:
        opened = ctypes.CDLL(str(path()))
    except OSError as error:
        return f"the native kernel could not be opened ({error})"
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(opened, name, None)
        if function is None:
            return f"the native kernel is of another version, it has no {name}"
        function.restype, function.argtypes = result, arguments
    opened.mk_use_parallel_for(pool)
    return opened


# What each function of ``csrc/c_api.h`` returns and takes.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mk_isa": (c_char_p, ()),
    "mk_use_parallel_for": (None, (c_void_p,)),
    "mk_node_names": (c_char_p, ()),
    "mk_problem_new": (
        c_int64,
        (c_void_p, c_int64, c_int64, c_void_p, c_int64, *(c_void_p,) * 4),
    ),
    "mk_problem_keep": (c_int64, (c_int64,)),
    "mk_problem_drop": (None, (c_int64,)),
    "mk_problem_shape": (None, (c_int64, c_void_p)),
    "mk_take": (c_void_p, (c_int64,)),
    "mk_give_back": (None, (c_void_p,)),
    "mk_forward": (c_int, (*(c_int64,) * 3, *(c_void_p,) * 2, c_int64, *(c_void_p,) * 5)),
    "mk_backward": (c_int, (*(c_int64,) * 3, *(c_void_p,) * 8)),
    "mk_problem_box": (
        c_int,
        (*(c_int64,) * 3, *(c_void_p,) * 4, c_double, c_void_p),
    ),
    "mk_lift": (c_int, (c_int64, c_int64, *(c_void_p,) * 6)),
    "mk_lift_backward": (c_int, (c_int64, c_int64, *(c_void_p,) * 8)),
    "mk_chain_slopes": (
        c_int,
        (
            *(c_int64, c_void_p, c_int64, c_int64, *(c_void_p,) * 2, c_int64, c_void_p),
            *(c_int64, c_int64, *(c_void_p,) * 3),
        ),
    ),
    "mk_search_new": (c_void_p, (*(c_void_p,) * 3, c_double, *(c_void_p,) * 2, c_int64, c_void_p)),
    "mk_search_split": (c_void_p, (c_void_p,)),
    "mk_search_run": (c_int, (c_void_p, c_int64, c_double, *(c_void_p,) * 3)),
    "mk_search_drop": (None, (c_void_p,)),
    "mk_activation": (None, (c_int64, c_int64, c_void_p, c_int64, *(c_void_p,) * 4)),
    "mk_switch": (None, (c_int64, c_int64)),
}


def required() -> ctypes.CDLL:
    """The library, where nothing else serves."""
    found = library()
    if isinstance(found, str):
        raise RuntimeError(f"monokernel: {found}")
    return found


@cache
def codes_of(library: ctypes.CDLL) -> dict[str, int]:
    """The library's number of each kind of node."""
    return {name: code for code, name in enumerate(library.mk_node_names().decode().split())}


def _thread_pool() -> int | str:
    """The address of PyTorch's ``torch_parallel_for``, or why it has none."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    name = f"{'' if sys.platform == 'win32' else 'lib'}torch_cpu.{suffix}"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(torch_cpu.torch_parallel_for, c_void_p).value or 0
    except (OSError, AttributeError):
        return f"PyTorch {torch.__version__} does not offer torch_parallel_for (2.10 and later do)"


def check(status: int) -> None:
    if status != 0:
        raise MemoryError("monokernel: no memory for the native kernel's scratch buffers")


class _Shape(ctypes.Structure):
    """mk_shape of ``csrc/c_api.h``."""

    _fields_ = (
        ("d", c_int64),
        ("D", c_int64),
        ("k", c_int64),
        ("params", c_int64),
        ("is_double", c_int64),
        ("summed", c_int64),
        ("bounded", c_int64),
        ("bound", c_int64),
        ("saved", c_int64 * 3),  # elements for each row of x
        ("parameters", c_void_p),
    )


class NativeProblem:
    """A problem on operands of one dtype as the library knows it, and the shapes of its calls.

    ``dtype`` is what it computes in, and what every pointer it is given points to.
    """

    def __init__(self, library: ctypes.CDLL, problem: Problem, operands: torch.dtype) -> None:
        self.library, self.dtype = library, accumulate_dtype(operands)
        D, k, hinge = problem.D, problem.k, problem.hinge
        flags = (
            self.dtype == torch.float64,
            problem.mode == "adjoint",
            hinge is not None,
            hinge is not None and hinge.squared,
            hinge is not None and hinge.elementwise,
        )
        codes, description, numbers = codes_of(library), list[int](), list[float]()
        for node in problem.nodes:
            counts = len(node.inputs), len(node.params), len(node.numbers)
            description += (codes[node.kind], node.width, *counts, *node.inputs, *node.params)
            numbers += node.numbers
        margin = signs = None
        if hinge is not None:
            given = hinge.margin if isinstance(hinge.margin, tuple) else (hinge.margin,)
            margin = (c_double * (D * k))(*_entries(given, D, k))
            signs = (c_double * (D * k))(*_entries(hinge.direction, D, k))
        self.handle = library.mk_problem_new(
            (c_int64 * len(flags))(*flags),
            problem.d,
            k,
            (c_int64 * k)(*problem.columns),
            len(problem.nodes),
            (c_int64 * len(description))(*description),
            (c_double * len(numbers))(*numbers),
            margin,
            signs,
        )
        if not self.handle:
            check(1)
        shape = _Shape()
        library.mk_problem_shape(self.handle, ctypes.byref(shape))
        a, P, derivative = shape.saved
        self.summed, self.row_size = bool(shape.summed), a + P + derivative
        self.itemsize = self.dtype.itemsize
        self._P, self._derivative = a * self.itemsize, (a + P) * self.itemsize
        count: int = shape.params
        self._pointers, self._sizes = c_void_p * count, c_int64 * count
        self._places = c_void_p * 3
        self.keys = [p for n in problem.nodes if n.kind == "dropout" for p in n.params]

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.mk_problem_drop(self.handle)

    def operand(self, t: Tensor) -> Tensor:
        """The tensor as the kernel reads it: contiguous and of this dtype."""
        return (t if t.dtype is self.dtype else t.to(self.dtype)).contiguous()

    def operands(self, params: Params) -> Params:
        return [None if t is None else self.operand(t) for t in params]

    def buffers(self, x: Tensor) -> list[Tensor]:
        """``saved_like`` in real memory, of the dtype of x, which is this one; a large buffer
        comes from the library's pool."""
        if self.row_size == 0:
            return []
        n = x.shape[0] * self.row_size
        size = n * self.itemsize
        if size < POOL_FROM:
            return [x.new_empty(n)]
        memory = self.library.mk_take(size)
        if not memory:
            check(1)
        # The tensor holds the array, the array its owner; the last one gone gives the memory back.
        array = (ctypes.c_char * size).from_address(memory)
        array.owner = _Owner(self.library, memory)
        return [torch.frombuffer(array, dtype=self.dtype)]

    def pointers(self, tensors: Params) -> Any:
        return self._pointers(*[None if t is None else t.data_ptr() for t in tensors])

    def sizes(self, tensors: Params) -> Any:
        return self._sizes(*[0 if t is None else t.numel() for t in tensors])

    def places(self, saved: Sequence[Tensor], N: int) -> ctypes.Array[c_void_p]:
        """Where the values, the P and ∂penalty/∂J begin in the one buffer."""
        base = saved[0].data_ptr() if saved else 0
        return self._places(base, base + N * self._P, base + N * self._derivative)


class _Owner:
    """A piece of the library's pool, given back when it is no longer referred to."""

    def __init__(self, library: ctypes.CDLL, memory: int) -> None:
        self._give_back, self._memory = library.mk_give_back, memory

    def __del__(self) -> None:
        self._give_back(self._memory)


def _entries(given: Sequence[float], D: int, k: int) -> list[float]:
    """The signs or margins of every output and column, row-major."""
    if len(given) == D * k:
        return list(given)
    return list(given) * (D if len(given) == k else D * k)
