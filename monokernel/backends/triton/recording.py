"""Writes a pass down as the plan that ``csrc/replay.cpp`` runs: numbers alone.

A :class:`Recorder` sees PyTorch's operations as a dispatch mode does, and the launches in
``launch.py``. Tensors go by numbers, the operands first and then what the steps make; what a kernel
is given is a number and how many bytes behind its first element. Views that only launches see are
left out, and each tensor is dropped after its last use.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ...signs import shared_tables
from .. import operators
from .launch import Compiled

__all__ = ["DriverCall", "NotReplayableError", "Recorder", "driver_call"]


class NotReplayableError(Exception):
    """Why no plan can be written, in words."""


class Number(int):
    """In a plan's code the number of a tensor: operands first, then what the steps make."""


# As csrc/replay.cpp reads them.
EMPTY, LAUNCH, OPERATION = 0, 1, 2
NUMBER, MARGIN = -1, -2
NONE, BOOLEAN, INTEGER, REAL, TENSOR, INTEGERS, TENSORS, DEVICE, SCALAR = range(9)

ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
CODES = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.strided: 0}


class Written(NamedTuple):
    """A step: its code, the tensors that it reads and makes, and whether it changes any other."""

    code: list[int]
    reads: set[int]
    makes: list[int]
    writes: bool


class Recorder(TorchDispatchMode):
    """Meanwhile, what is allocated, computed by PyTorch's operations and launched."""

    def __init__(self, operands: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.why: str | None = None
        self._device = next(t.device for t in operands if t is not None)
        self._operands = len(operands)
        self._count = len(operands)
        # Of each storage that was met the address alone stays, so that none is another's: not its
        # memory, of which a pass has more in all than at once.
        self._met = list[StorageWeakRef]()
        self._steps: list[Written] = []
        self._names: list[str] = []
        self._by_layout: dict[tuple[object, ...], int] = {}
        self._by_storage: dict[int, tuple[int, int]] = {}  # the first with it, and where it begins
        # Where operands lie; of one that is given twice the first.
        first = dict[tuple[int, int], int]()
        for i, t in enumerate(operands):
            if t is not None and t.nbytes:
                first.setdefault((t.data_ptr(), t.data_ptr() + t.nbytes), i)
        self._places = sorted((*ends, i) for ends, i in first.items())
        for (_, end, _), (begin, _, _) in itertools.pairwise(self._places):
            if begin < end:  # which of the two a kernel is given nobody can tell
                self.why = "two operands share a part of their memory"
        for i, t in enumerate(operands):
            if t is not None:
                self._by_layout.setdefault(_layout(t), i)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self._try(self._operation, func, args, kwargs, found)
        return found

    def launched(self, *launch: Any) -> None:
        """Writes a launch down that has been made, as ``launch.noted`` tells it."""
        self._try(self._launch, *launch)

    def _try(self, write: Callable[..., None], *args: Any) -> None:
        if self.why is None:
            try:
                write(*args)
            except NotReplayableError as reason:
                self.why = str(reason)

    def _operation(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        made = list(found) if isinstance(found, (tuple, list)) else [found]
        if found is None:
            made = []
        if not all(isinstance(t, Tensor) and t.device == self._device for t in made):
            raise NotReplayableError(f"{func} gives more than tensors on the device")
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise NotReplayableError(f"{func} depends on values")
        schema, code, reads = func._schema, list[int](), set[int]()
        if func in ALLOCATIONS:
            code += [EMPTY, _dtype_code(found.dtype), *_sized(found.shape)]
            code += _sized(found.stride())
        else:
            name = len(self._names) // 2
            self._names += [schema.name, schema.overload_name]
            code += [OPERATION, name, len(schema.arguments)]
            for i, argument in enumerate(schema.arguments):
                value = (
                    args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
                )
                kind = str(argument.type)
                if kind == "Tensor" and isinstance(value, (int, float)):  # as in t + 1
                    code.append(SCALAR)
                code += self._value(value, kind, reads)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        self._steps.append(Written(code, reads, [self._made(t) for t in made], writes))

    def _value(self, value: Any, kind: str, reads: set[int]) -> list[int]:
        """An operation's argument of that kind."""
        if value is None:
            return [NONE]
        if isinstance(value, Tensor):
            return [TENSOR, self._read(value, reads)]
        if isinstance(value, bool):
            return [BOOLEAN, value]
        if isinstance(value, int):
            return [INTEGER, value]
        if isinstance(value, float):
            return [REAL, _bits("d", value)]
        if isinstance(value, torch.dtype):
            return [INTEGER, _dtype_code(value)]
        if isinstance(value, torch.device) and value == self._device:
            return [DEVICE]
        if isinstance(value, (torch.memory_format, torch.layout)) and value in CODES:
            return [INTEGER, CODES[value]]
        if isinstance(value, (list, tuple)):
            if kind == "List[Tensor]":
                return [TENSORS, *_sized([self._read(v, reads) for v in value])]
            if "List[int]" in kind:
                return [INTEGERS, *_sized(value)]
        raise NotReplayableError(f"an operation is given {value!r}")

    def _launch(
        self,
        kernel: Any,
        compiled: Compiled | None,
        programs: tuple[int, ...],
        args: Any,
        options: Any,
    ) -> None:
        call, reads = driver_call(kernel, compiled, args, options), set[int]()
        x, y, z = (*programs, 1, 1)[:3]
        code = [LAUNCH, call.function, x, y, z, call.threads, call.shared, len(call.args)]
        for value in call.args:
            if isinstance(value, Tensor):
                code += self._address(value, reads)
            else:
                code += [MARGIN if value is None else NUMBER, value or 0]
        self._steps.append(Written(code, reads, [], True))

    def _made(self, t: Tensor) -> int:
        number = Number(self._count)
        self._count += 1
        storage = t.untyped_storage()
        if storage._cdata not in self._by_storage:
            self._met.append(StorageWeakRef(storage))
            self._by_storage[storage._cdata] = number, t.data_ptr()
        self._by_layout.setdefault(_layout(t), number)
        return number

    def _read(self, t: Tensor, reads: set[int]) -> Number:
        found = self._by_layout.get(_layout(t))
        if found is None:
            raise NotReplayableError("an operation reads a tensor that is neither given nor made")
        reads.add(found)
        return Number(found)

    def _address(self, t: Tensor, reads: set[int]) -> list[int]:
        """Whose memory a kernel is given, and how far behind its first element."""
        at = t.data_ptr()
        for begin, end, number in self._places:
            if begin <= at < end:
                reads.add(number)
                return [Number(number), at - begin]
        made = self._by_storage.get(t.untyped_storage()._cdata)
        if made is not None:
            number, begin = made
            reads.add(number)
            return [Number(number), at - begin]
        if at == 0 or any(t is table for table in shared_tables()):
            return [NUMBER, at]
        raise NotReplayableError("a kernel is given a tensor that is neither given nor made")

    def plan(self, outputs: Sequence[Tensor]) -> tuple[list[int], list[str]]:
        """The code, and the operations' names and overloads in turn. Without outputs if there can
        be none."""
        read, ends = set[int](), list[Number]()
        for t in outputs:
            self._try(lambda t=t: ends.append(self._read(t, read)))
        if self.why is not None:
            return [0, 0], []
        steps = list(reversed(list(self._needed(read))))
        made = [*range(self._operands), *(n for step in steps for n in step.makes)]
        order = {n: i for i, n in enumerate(made)}
        last = dict[int, int]()
        for i, step in enumerate(steps):
            last |= dict.fromkeys([*step.reads, *step.makes], i)
        for n in ends:
            last.pop(n, None)
        code = [len(steps)]
        for i, step in enumerate(steps):
            dropped = [order[n] for n, at in last.items() if at == i]
            code += [order[c] if isinstance(c, Number) else c for c in step.code] + _sized(dropped)
        return code + _sized([order[n] for n in ends]), self._names

    def _needed(self, read: set[int]) -> Iterator[Written]:
        """From the last on: views that only launches see, which have addresses, are left out."""
        read = set(read)
        for step in reversed(self._steps):
            if step.writes or read.intersection(step.makes):
                read |= step.reads
                yield step


class DriverCall(NamedTuple):
    """A launch as the driver has it. Of the arguments a number is its bits, the margin None."""

    function: int
    threads: int
    shared: int
    args: list[Tensor | int | None]


def driver_call(
    kernel: Any, compiled: Compiled | None, args: tuple[object, ...], options: dict[str, Any]
) -> DriverCall:
    """As Triton's launcher would make it."""
    if compiled is None:
        raise NotReplayableError("Triton is asked for each launch")
    metadata = compiled.kernel.metadata
    # What takes attributes of a launch, or memory that Triton's launcher allocates.
    special = (
        "launch_cooperative_grid",
        "launch_pdl",
        "global_scratch_size",
        "profile_scratch_size",
    )
    if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in special):
        raise NotReplayableError(f"{kernel.__name__} has a launch of its own kind")
    if metadata.shared > 228 * 1024:
        raise NotReplayableError(f"{kernel.__name__} takes more shared memory than every card has")
    found: list[Tensor | int | None] = []
    types = list(compiled.kernel.src.signature.values())
    for name, kind, value in zip(kernel.arg_names, types, args, strict=False):
        _flatten(name, kind, value, found)
    found += [0, 0]  # the scratch memories
    threads = metadata.num_warps * metadata.target.warp_size
    return DriverCall(compiled.function, threads, metadata.shared, found)


FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}


def _flatten(name: str, kind: Any, value: Any, found: list[Tensor | int | None]) -> None:
    if isinstance(kind, tuple):
        for part, own in zip(kind, value, strict=True):
            _flatten(name, part, own, found)
    elif kind == "constexpr":
        return
    elif kind.startswith("*"):
        found.append(value)
    elif name == "margin" and kind == "fp32":
        found.append(None)
    elif kind in FORMATS:
        found.append(_bits(FORMATS[kind], value))
    else:
        raise NotReplayableError(f"a kernel is given a {kind}")


def _bits(form: str, value: float) -> int:
    """A number's bytes, and zeros behind them, as an int64."""
    bits: int = struct.unpack("<q", struct.pack(f"<{form}", value).ljust(8, b"\0"))[0]
    return bits


def _sized(numbers: Sequence[int]) -> list[int]:
    return [len(numbers), *numbers]


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


@cache
def _dtype_code(dtype: torch.dtype) -> int:
    library = operators.opened()
    assert library is not None
    code: int = library.mk_dtype_code(str(dtype).removeprefix("torch.").encode())
    assert code >= 0
    return code
