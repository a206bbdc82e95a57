"""Columns of x by number, and tensors cut along them.

They are kept as they are and read as *runs* of neighbours: by slices alone, since an index tensor
would be a copy from the host, which waits for a device and which a CUDA graph refuses.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Columns", "Run", "add", "last_columns", "runs_of", "spread", "take"]

Columns = tuple[int, ...]  # ascending
Run = tuple[int, int, int]  # first column, its place among the columns, how many follow each other


def last_columns(d: int, k: int) -> Columns:
    """The last k of d columns."""
    return tuple(range(d - k, d))


def runs_of(columns: Columns) -> tuple[Run, ...]:
    """The columns as runs of neighbours."""
    return _runs_of(columns) if torch.compiler.is_compiling() else _cached_runs_of(columns)


def _runs_of(columns: Columns) -> tuple[Run, ...]:
    runs: list[Run] = []
    for place, column in enumerate(columns):
        if runs and column == sum(runs[-1][::2]):
            first, start, count = runs[-1]
            runs[-1] = first, start, count + 1
        else:
            runs.append((column, place, 1))
    return tuple(runs)


_cached_runs_of = lru_cache(maxsize=1024)(_runs_of)


def take(t: Tensor, columns: Columns, dim: int = -1) -> Tensor:
    """These of the d columns of t along ``dim``: a view where they are neighbours."""
    runs = runs_of(columns)
    parts = [t.narrow(dim, first, count) for first, _, count in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def add(to: Tensor, columns: Columns, part: Tensor) -> None:
    """Adds part (..., k) to these of the d columns of ``to`` (..., d)."""
    for first, place, count in runs_of(columns):
        to.narrow(-1, first, count).add_(part.narrow(-1, place, count))


def spread(part: Tensor, columns: Columns, d: int) -> Tensor:
    """Zeros (..., d) with part (..., k) in these columns."""
    out = part.new_zeros(*part.shape[:-1], d)
    add(out, columns, part)
    return out
