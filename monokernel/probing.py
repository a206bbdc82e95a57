"""What the values of a network tell where its derivatives do not: it is called and looked at.

Every probe calls the network without gradients, on a bounded number of rows, and puts back what
that changed: attributes, buffers and random generators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .columns import Columns
from .network import ending, parts, uncompiled, unwrap, where
from .reading import State

__all__ = [
    *("WITHOUT_DERIVATIVE", "doubts", "evaluating", "hidden", "named", "output", "rounding"),
    *("spread", "untouched", "without_slope"),
]

WITHOUT_DERIVATIVE = "an embedding, a rounding, a step, detach, no_grad or a quantised layer"

# In so many rows a column whose slopes are all 0 is moved, over twice so many values.
PROBED_ROWS, PROBED_VALUES = 256, 9
# So many rows are called together and in halves.
MIXED_ROWS = 64
# Roundings, of the largest |y|, that one row may differ by between two batches.
BATCH_ROUNDINGS, MOST_ROUNDING = 256, 0.05

REPEATED = (
    "y of the same rows differs by up to {:.3g} between two calls in evaluation mode: it is drawn "
    "anew in each, and what is counted is one draw"
)
MIXED = (
    "ROWS INFLUENCE EACH OTHER{}: y of a row changes by up to {:.3g} with the rows beside it. So "
    "no row has a slope of its own, and no penalty and no count of slopes or steps can be relied on"
)
REFUSED = "mlp takes all of {} rows but not {} of them: {}"


@contextmanager
def evaluating(mlp: nn.Module) -> Iterator[None]:
    """In evaluation mode, and afterwards every part in the mode in which it was."""
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: expected an nn.Module, got {type(mlp).__name__}")
    training = [m for m in mlp.modules() if m.training]
    try:
        with ending():
            mlp.eval()
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def untouched(mlp: nn.Module, device: torch.device) -> Iterator[None]:
    """Without gradients; what calls change in the network and in random generators is put back."""
    modules = [*mlp.modules()]
    state = State(modules, device)
    try:
        with torch.no_grad(), uncompiled(modules), state:
            yield
    finally:
        state.restore()


def output(mlp: nn.Module, x: Tensor) -> Tensor:
    """y (n, D) of the rows x (n, d)."""
    y: Tensor = unwrap(mlp)(x)
    return y if y.dim() == 2 else y.reshape(len(x), -1)


def spread(t: Tensor, most: int) -> Tensor:
    """At most so many entries of t (n, …), first and last among them, as a copy."""
    n = len(t)
    at = torch.linspace(0, max(n - 1, 0), min(n, most), dtype=torch.float64).round().long()
    return t[at.to(t.device)]


def rounding(dtype: torch.dtype, roundings: int) -> float:
    """The share of |y| that so many roundings may make."""
    eps = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
    return min(roundings * eps, MOST_ROUNDING)


# --- what moves ----------------------------------------------------------------------------------


def hidden(mlp: nn.Module, x: Tensor, dead: Tensor, columns: Columns) -> Tensor:
    """Of the entries (D, k) in which every slope is 0, those where y moves with the column all the
    same, in rows like x (N, d)."""
    found = dead.clone()
    for c in dead.any(0).nonzero().flatten().tolist():
        found[:, c] &= _changes(mlp, x, columns[c])
    return found


def without_slope(
    mlp: nn.Module, x: Tensor, J: Tensor, wanted: Tensor, columns: Columns, labels: Sequence[Any]
) -> list[str]:
    """Sentences on the columns in which every slope J (N, D, k) that is wanted (D, k) is exactly
    0, told apart by whether y moves with them. The network is called for that where there are
    any."""
    dead = wanted & (J == 0).all(0)
    if not dead.any():
        return []
    with evaluating(mlp), untouched(mlp, x.device):
        moving = hidden(mlp, x, dead, columns)
    name, said = type(mlp).__name__, []
    by_outputs: dict[tuple[int, ...], list[int]] = {}
    for c in moving.any(0).nonzero().flatten().tolist():
        by_outputs.setdefault(tuple(moving[:, c].nonzero().flatten().tolist()), []).append(c)
    for outputs, places in by_outputs.items():
        whole = all((moving[:, c] == wanted[:, c]).all() for c in places)
        which = "" if whole else f"output{'s' * (len(outputs) > 1)} {_listed(outputs)} of "
        said.append(
            f"in {_named(places, labels)} every slope of {which}mlp ({name}) is exactly 0, yet y "
            f"moves with {'it' if len(places) == 1 else 'them'}, as behind {WITHOUT_DERIVATIVE}: "
            "no penalty can see that, and 0 is no all-clear; audit() compares finite steps"
        )
    still = [
        c
        for c in dead.any(0).nonzero().flatten().tolist()
        if not moving[:, c].any() and bool((dead[:, c] == wanted[:, c]).all())
    ]
    if still:
        said.append(
            f"in {_named(still, labels)} every slope of mlp ({name}) is exactly 0, and y was not "
            "seen to move: nothing is constrained there"
        )
    return said


def _named(places: Sequence[int], labels: Sequence[Any]) -> str:
    return f"column{'s' * (len(places) > 1)} {_listed([labels[c] for c in places])}"


def named(labels: Sequence[Any]) -> str:
    return f"in column{'s' * (len(labels) > 1)} {_listed(labels)}"


def _listed(entries: Sequence[Any]) -> str:
    return ", ".join(map(str, entries))


def _changes(mlp: nn.Module, x: Tensor, column: int) -> Tensor:
    """Whether each output (D,) changes in any row of x (N, d) as one column moves, the others held:
    evenly over its range, and over values that it has in the data. A column of one value, which has
    no range, is moved over what that spans with 0 and 1.
    """
    values = x[:, column]
    values = values[values.isfinite()].unique()
    ends = values if len(values) > 1 else torch.cat([values, values.new_tensor([0, 1])])
    even = torch.linspace(0, 1, PROBED_VALUES, dtype=x.dtype, device=x.device)
    even = torch.lerp(ends.amin(), ends.amax(), even)
    rows = spread(x, PROBED_ROWS)
    first = changed = None
    for value in torch.cat([even, spread(values, PROBED_VALUES)]):
        rows = rows.clone()  # the last y may be a view of them
        rows[:, column] = value
        try:
            y = output(mlp, rows)
        except Exception:  # whatever it is, a network that refuses a value reads it
            return torch.ones((), dtype=torch.bool, device=x.device)
        if first is None or changed is None:
            first, changed = y, torch.zeros_like(y[0], dtype=torch.bool)
        changed |= ((y != first) & ~(y.isnan() & first.isnan())).any(0)
    assert changed is not None
    return changed


# --- what mixes ----------------------------------------------------------------------------------


def doubts(mlp: nn.Module, x: Tensor) -> tuple[tuple[str, ...], bool]:
    """Sentences on what makes rows (N, d) without slopes of their own, and whether they mix.

    A few rows are called together, twice, and then every other one of them in the opposite order,
    twice: an average over the batch sees fewer rows, a sum along it others before, and a maximum
    is missing in one of the halves.
    """
    rows = spread(x[~x.isnan().any(1)], MIXED_ROWS)
    n = len(rows)
    if n < 2:
        return (), False
    y = output(mlp, rows)
    apart = _apart(y, output(mlp, rows.clone()))
    if apart:
        return (REPEATED.format(apart),), False
    for first in (0, 1):
        at = torch.arange(first, n, 2, device=x.device).flip(0)
        try:
            apart = _apart(y[at], output(mlp, rows[at]))
        except Exception as error:  # a size of the batch may be written into it
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            return (REFUSED.format(n, len(at), said),), False
        if apart:
            part = _mixer(mlp, rows, at)
            return (MIXED.format(f" in {part}" if part else "", apart),), True
    return (), False


def _apart(a: Tensor, b: Tensor) -> float:
    """By how much two outputs (n, D) of the same rows differ, 0 where it may be rounding."""
    if not a.numel():
        return 0.0
    share = rounding(a.dtype, BATCH_ROUNDINGS)
    a, b = a.double(), b.double()
    size = torch.where(a.isfinite(), a, 0).abs().amax(0)
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0, (a - b).abs()).nan_to_num(torch.inf)
    far = apart > share * size
    return apart[far].max().item() if far.any() else 0.0


def _mixer(mlp: nn.Module, rows: Tensor, at: Tensor) -> str:
    """The innermost part of which the rows that come in are the same and those that go out are not,
    "" where none can be told."""
    root = unwrap(mlp)
    seen: list[tuple[nn.Module, Any, Any]] = []

    def note(m: nn.Module, given: Any, y: Any) -> None:
        seen.append((m, given[0] if given else None, y))

    handles = []
    try:
        handles = [m.register_forward_hook(note) for m in parts(root)]
        output(root, rows)
        whole, seen = seen, []
        output(root, rows[at])
    except Exception:  # what is scripted may take no hooks
        return ""
    finally:
        for handle in handles:
            handle.remove()
    if [m for m, *_ in whole] != [m for m, *_ in seen]:
        return ""
    for (m, x, y), (_, x_at, y_at) in zip(whole, seen, strict=True):
        if _same_rows(x, x_at, len(rows), at) and not _same_rows(y, y_at, len(rows), at):
            return where(root, m)
    return ""


def _same_rows(whole: Any, some: Any, n: int, at: Tensor) -> bool:
    """Whether these of n rows are the same in both; what is no tensor of n rows is taken to be."""
    if not all(isinstance(t, Tensor) and t.dim() and not t.is_complex() for t in (whole, some)):
        return True
    if whole.shape[0] != n or some.shape[0] != len(at):
        return True
    return not _apart(whole[at].reshape(len(at), -1), some.reshape(len(at), -1))
