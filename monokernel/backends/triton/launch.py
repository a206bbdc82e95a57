"""The one place where kernels are launched.

Triton finds the compiled kernel of a launch anew each time, by its arguments and constants, and
looks at every global that the kernel's source reads: 50 µs for one with many. Here it is asked once
for each kind of launch, and what it answered is called from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import make_backend
from triton.runtime import driver

__all__ = ["Compiled", "Launch", "direct", "launch", "noted", "recorded", "watched"]


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
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            compiled = _run(kernel, programs, args, options)
    else:
        compiled = _run(kernel, programs, args, options)
    note = getattr(_notes, "note", None)
    if note is not None:
        note(kernel, compiled, programs, args, options)


_notes = threading.local()


@contextmanager
def noted(note: Callable[..., None] | None) -> Iterator[None]:
    """Each launch of this thread is told meanwhile, once it is made: the kernel, what Triton
    compiled (None where that is not known), grid, arguments and options. With None none is."""
    before = getattr(_notes, "note", None)
    _notes.note = note
    try:
        yield
    finally:
        _notes.note = before


def watched() -> bool:
    """Whether somebody wants to see the launches: a profiler by Triton's hooks, or ``recorded``."""
    return bool(_records) or _hooks()


# --- what Triton compiled before ------------------------------------------------------------------


class Compiled(NamedTuple):
    """A compiled kernel, its launcher, and what stands for its constants in the arguments."""

    kernel: Any
    run: Any
    function: Any
    packed_metadata: Any
    constants: tuple[object, ...]


_compiled: dict[tuple[object, ...], Compiled] = {}


def direct() -> bool:
    """Whether this Triton is one of those whose launcher is known: of any other each launch is its
    own."""
    return (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


if direct():
    from triton._C.libtriton import native_specialize_impl as specialised
else:
    specialised = None


@lru_cache
def _target(device: int) -> Any:
    """Triton's description of how the current device, which is this one, is compiled for."""
    return make_backend(driver.active.get_current_target())


def _hooks() -> bool:
    """Whether somebody looks on, a profiler say: hooks are Triton's business."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _run(
    kernel: Any, programs: tuple[int, ...], args: tuple[object, ...], options: dict[str, Any]
) -> Compiled | None:
    """``kernel[programs](*args, **options)`` on the current device and stream, and what was
    launched if that is known.

    A kind of launch is what Triton itself takes for one: which arguments are there, their types,
    what is a multiple of 16 or 1, and every constant. (Of arguments that a kernel is not to be
    specialised on it is finer.)
    """
    own = isinstance(kernel, triton.JITFunction) and not kernel.pre_run_hooks
    if specialised is None or not own or _hooks():
        kernel[programs](*args, **options)
        return None
    active = driver.active
    device = active.get_current_device()
    kind = specialised(_target(device), args, False, True, True)
    key = (id(kernel), device, kind, *options, *options.values())
    found = _compiled.get(key)
    if found is None:
        made = kernel[programs](*args, **options)
        constants = tuple([options[name] for name in kernel.arg_names[len(args) :]])
        found = Compiled(made, made.run, made.function, made.packed_metadata, constants)
        _compiled[key] = found
        return found
    x, y, z = (*programs, 1, 1)[:3]
    stream = active.get_current_stream(device)
    found.run(
        x, y, z, stream, found.function, found.packed_metadata, None, None, None,
        *args, *found.constants,
    )  # fmt: skip
    return found
