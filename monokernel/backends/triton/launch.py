"""The one place where kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Launch", "launch", "recorded"]


class Launch(NamedTuple):
    """A kernel with its grid, its arguments, and its compile-time constants and options by name."""

    kernel: Any
    programs: tuple[int, ...]
    args: tuple[object, ...]
    options: dict[str, Any]


_records: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Everything that is launched meanwhile is written down, and nothing runs: for compiling
    without a card, and for tests."""
    seen: list[Launch] = []
    _records.append(seen)
    try:
        yield seen
    finally:
        _records.pop()


def launch(
    kernel: Any, programs: tuple[int, ...], on: Tensor, *args: object, **options: Any
) -> None:
    """Runs ``kernel`` on the grid ``programs``, on the device of ``on``."""
    if _records:
        _records[-1].append(Launch(kernel, programs, args, options))
        return
    elsewhere = on.is_cuda and on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if elsewhere else nullcontext():
        kernel[programs](*args, **options)
