"""What one call asks of a backend, as plain data.

A :class:`Problem` holds every static fact of a call (shapes, activations, mode, hinge), no tensor.
Every backend with a hand-written backward serves the same four functions of it (see
``backends/handwritten.py``, their readable twin). The letters are those of ``docs/mathematics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .activations import Activation

__all__ = [
    "Hinge",
    "Mode",
    "Packed",
    "Problem",
    "accumulate_dtype",
    "capturing",
    "cheaper_mode",
    "direction_table",
    "nan_rule",
    "pack",
    "shared_direction_table",
    "unpack",
]

Mode = Literal["tangent", "adjoint"]


class Hinge(NamedTuple):
    """The penalty on the slopes J (N, D, k): w·h(margin - direction·J), h = relu or relu².

    ``direction`` is row-major with 1, k or D·k entries in {-1, 0, 1}. Entries of direction 0 never
    count. With ``elementwise`` the penalty is (N, D, k), otherwise its sum, a scalar.
    """

    direction: tuple[int, ...] = (1,)
    margin: float = 0.0
    squared: bool = False
    elementwise: bool = False


class Problem(NamedTuple):
    """A chain of L linear layers, its mode and its hinge.

    ``widths`` is (d, H_1, …, D), L + 1 numbers; ``activations`` has one entry for each linear layer
    (identity where none follows); the monotone inputs x2 are the last ``k`` columns of x (N, d).
    With ``hinge`` None the second output is the Jacobian J (N, D, k) itself.
    """

    widths: tuple[int, ...]
    activations: tuple[Activation, ...]
    k: int
    mode: Mode
    hinge: Hinge | None

    @property
    def d(self) -> int:
        return self.widths[0]

    @property
    def D(self) -> int:
        return self.widths[-1]

    @property
    def depth(self) -> int:
        return len(self.activations)

    @property
    def keeps_adjoint(self) -> bool:
        """Adjoint mode with one output: its chain is also the task loss's own backward."""
        return self.mode == "adjoint" and self.D == 1


Packed = tuple[
    tuple[int, ...],
    tuple[str, ...],
    tuple[float, ...],
    int,
    Mode,
    bool,
    tuple[int, ...],
    float,
    bool,
    bool,
]


def pack(problem: Problem) -> Packed:
    """The problem as plain numbers and strings: what a registered operator can take."""
    hinge = problem.hinge or Hinge()
    numbers: tuple[float, ...] = ()
    for σ in problem.activations:
        numbers += (σ.p, σ.q, σ.r)
    return (
        problem.widths,
        tuple(σ.kind for σ in problem.activations),
        numbers,
        problem.k,
        problem.mode,
        problem.hinge is not None,
        hinge.direction,
        hinge.margin,
        hinge.squared,
        hinge.elementwise,
    )


def unpack(
    widths: Sequence[int],
    kinds: Sequence[str],
    numbers: Sequence[float],
    k: int,
    mode: Mode,
    penalised: bool,
    direction: Sequence[int],
    margin: float,
    squared: bool,
    elementwise: bool,
) -> Problem:
    """The problem that ``pack`` made these of."""
    activations = tuple(
        Activation(kind, *numbers[3 * i : 3 * i + 3]) for i, kind in enumerate(kinds)
    )
    hinge = Hinge(tuple(direction), margin, squared, elementwise) if penalised else None
    return Problem(tuple(widths), activations, k, mode, hinge)


def cheaper_mode(D: int, k: int) -> Mode:
    """The cost rule: adjoint (D chains) or tangent (k passes), whichever needs fewer products."""
    return "adjoint" if D == 1 or k > D else "tangent"


def nan_rule(y: Tensor, J: Tensor) -> Tensor:
    """Where the output (N, D) is NaN so is its slope (N, D, k): no NaN becomes a zero penalty.

    Without it PyTorch's σ'(NaN) = 1 of ReLU would give a finite slope to a row that has no value.
    """
    return torch.where(y.isnan().unsqueeze(-1), torch.nan, J)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of J, the hinge and every sum: float32 for half precision, else ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def direction_table(
    direction: tuple[int, ...], D: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``direction`` (1, k or D·k signs, row-major) as a new contiguous (D, k) tensor.

    By fills alone: a copy from the host waits for the device, and the capture of a CUDA graph
    refuses it.
    """
    runs = [
        torch.full((len(list(run)),), sign, dtype=dtype, device=device)
        for sign, run in groupby(direction)
    ]
    table = torch.cat(runs) if len(runs) > 1 else runs[0]
    return table.reshape(-1, k if len(direction) > 1 else 1).expand(D, k).contiguous()


# Never dropped: a captured CUDA graph keeps the address of the table that it reads.
_shared_tables: dict[tuple[object, ...], Tensor] = {}


def shared_direction_table(
    direction: tuple[int, ...], D: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same, made once and shared between the kernels' calls: not to be written to.

    While a CUDA graph is captured, a table that is not there yet is the graph's own: its memory
    belongs to the graph, which fills it when it is replayed. It is not shared.
    """
    key = direction, D, k, dtype, device
    found = _shared_tables.get(key)
    if found is not None:
        return found
    if capturing(device):
        return direction_table(direction, D, k, dtype, device)

    def make() -> Tensor:
        # A copy from the host is there when it returns, whatever stream reads it next.
        return direction_table(direction, D, k, dtype, torch.device("cpu")).to(device)

    # Modes belong to a thread, so none of the caller's reaches the table in a thread of its own:
    # inference mode, fake tensors, the memory pool in which torch.compile warms up its CUDA graphs.
    with ThreadPoolExecutor(1) as thread:
        return _shared_tables.setdefault(key, thread.submit(make).result())


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing may be copied from or to the host."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
