"""The operators in C++ (``csrc/boundary.cpp``, ``csrc/replay.cpp``).

They are built for one version of PyTorch and optional: without them Python does the same, more
slowly (docs/native.md, docs/triton.md).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch

from .native import PACKAGE

__all__ = ["BOUNDARY", "addresses_of", "in_words", "opened"]

BOUNDARY = "_boundary_{}_{}.so"  # for PyTorch's major and minor version


def opened() -> ctypes.CDLL | None:
    """The library, whose operators are then in ``torch.ops.monokernel``; None where it was not
    built for this PyTorch, or is not wanted (MONOKERNEL_BOUNDARY is 0)."""
    return None if os.environ.get("MONOKERNEL_BOUNDARY") == "0" else _opened()


@cache
def _opened() -> ctypes.CDLL | None:
    built = PACKAGE / _name()
    if not built.exists():
        return None
    try:
        torch.ops.load_library(built)
    except OSError:  # another build of the same version
        return None
    return ctypes.CDLL(str(built))


def _name() -> str:
    return BOUNDARY.format(*torch.__version__.split(".")[:2])


def in_words() -> str:
    """Whether eager steps go through them, in words."""
    name = _name()
    if opened() is not None:
        return name
    if os.environ.get("MONOKERNEL_BOUNDARY") == "0":
        return "not wanted (MONOKERNEL_BOUNDARY=0)"
    if not (PACKAGE / name).exists():
        built = ", ".join(sorted(p.name for p in PACKAGE.glob(BOUNDARY.format("*", "*"))))
        return f"{name} is missing, {built or 'none'} was built"
    return f"{name} could not be opened"


def addresses_of(functions: list[Any]) -> Any:
    """Functions of libraries as an array of pointers; None is a null pointer."""
    found = [None if f is None else ctypes.cast(f, ctypes.c_void_p).value for f in functions]
    return (ctypes.c_void_p * len(found))(*found)
