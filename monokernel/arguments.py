"""Bad input gets one clear sentence: which argument, what was expected, what came.

What a user can get wrong before the network is looked at is checked here; what takes the network to
see (its widths, its dtype, what of it cannot be saved) where it is read.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .columns import Columns, last_columns
from .operands import PLAIN, holds
from .problem import Hinge, accumulate_dtype

__all__ = [
    "BACKEND_CHOICES",
    "BATCH_STATS",
    "MODES",
    "REDUCTIONS",
    "AskedBackend",
    "AskedBatchStats",
    "AskedHinge",
    "AskedMode",
    "AskedReduction",
    "Direction",
    "Inputs",
    "Names",
    "by_column",
    "check_box",
    "check_choice",
    "check_chosen",
    "check_column",
    "check_constraints",
    "check_count",
    "check_direction",
    "check_flag",
    "check_hinge",
    "check_inputs",
    "check_module",
    "check_multiplier",
    "check_named",
    "check_names",
    "check_number",
    "check_outputs",
    "check_parameter",
    "check_penalty",
    "check_scaler",
    "check_tables",
    "check_values",
    "check_weight",
    "is_finite",
    "is_mapping",
    "plain",
]

# The choices of the public calls; what is checked at run time is derived from them.
AskedMode = Literal["auto", "tangent", "adjoint"]
AskedBackend = Literal["auto", "triton", "cpu", "torch", "reference"]
AskedHinge = Literal["linear", "squared"]
AskedReduction = Literal["sum", "mean", "none"]
AskedBatchStats = Literal["error", "running"]
MODES, BACKEND_CHOICES = get_args(AskedMode), get_args(AskedBackend)
HINGES, REDUCTIONS = get_args(AskedHinge), get_args(AskedReduction)
NUMBERS = "biuf"  # kinds of NumPy's dtypes
BATCH_STATS = get_args(AskedBatchStats)


Names = tuple[Any, ...]


class Inputs(NamedTuple):
    """The network's input x (*batch, d), and those of its columns in which slopes are asked for.

    x comes in ``blocks`` of columns: x1 (*batch, d1) and x2 (*batch, k), of which the columns are
    the last, or as one. The widths are plain numbers also where torch.compile made the shapes
    symbolic. ``autocast`` says whether it is on for their device: to ask a device for its type
    takes longer than all else that is asked of a tensor."""

    blocks: tuple[Tensor, ...]
    batch: torch.Size
    d: int
    columns: Columns
    autocast: bool

    @property
    def k(self) -> int:
        return len(self.columns)

    @property
    def numbers(self) -> Columns:
        """Of the k columns, in the argument that they came as."""
        return self.columns if len(self.blocks) == 1 else tuple(range(self.k))

    @property
    def like(self) -> Tensor:
        """One of the blocks, for what all have in common."""
        return self.blocks[-1]

    def argument(self, block: Tensor) -> str:
        """The name of the argument that a block came as."""
        return "x1" if block is self.blocks[0] else "x2"

    def joined(self) -> Tensor:
        """x itself: cat[x1, x2]."""
        if len(self.blocks) > 1 and self.d > len(self.columns):
            return torch.cat(self.blocks, -1)
        x = self.blocks[-1]
        if torch.compiler.is_compiling() or not x.is_inference():
            return x
        return x if torch.is_inference_mode_enabled() else x.clone()  # which autograd may save


def check_module(mlp: Any) -> None:
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: expected an nn.Module, got {type(mlp).__name__}")


def check_inputs(x1: Any, x2: Any = None) -> Inputs:
    """Reads ``x2`` of shape (...,) as k = 1. Without it ``x1`` is all of x, and all of its columns
    are asked for."""
    for name, t in (("x1", x1), ("x2", x2)):
        if t is None and name == "x2":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {_dtype(t)}")
        _check_dense(name, t)
    free = x1.shape
    if not free:
        raise ValueError("x1: expected shape (..., d1), got a tensor with no dimension")
    if x2 is None:
        d = operator.index(free[-1])
        if d == 0:
            raise ValueError("x1: expected at least one column where x2 is left out, got d = 0")
        return Inputs((x1,), free[:-1], d, last_columns(d, d), _autocast(x1))
    monotone = x2.shape
    if len(monotone) == len(free) - 1:
        x2 = x2.unsqueeze(-1)
        monotone = x2.shape
    batch = free[:-1]
    if len(monotone) != len(free) or monotone[:-1] != batch:
        raise ValueError(
            f"x2: expected shape {_shape(batch, 'k')} or {tuple(batch)} to go with "
            f"x1 {tuple(free)}, got {tuple(monotone)}"
        )
    k = operator.index(monotone[-1])
    if k == 0:
        raise ValueError("x2: expected at least one column, got k = 0")
    if x1.device != x2.device:
        raise ValueError(f"x2: expected on the device of x1, {x1.device}, got {x2.device}")
    if x1.dtype != x2.dtype:
        raise TypeError(f"x2: expected the dtype of x1, {_dtype(x1)}, got {_dtype(x2)}")
    d = operator.index(free[-1]) + k
    return Inputs((x1, x2), batch, d, last_columns(d, k), _autocast(x2))


def _autocast(x: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def check_parameter(t: Tensor, x: Tensor) -> None:
    """A parameter of the network goes with its inputs x; autocast brings dtypes together."""
    if t.device != x.device:
        raise ValueError(f"x1: expected on the device of mlp, {t.device}, got {x.device}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"mlp: expected floating-point parameters, got {_dtype(t)}")
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x1: expected the dtype of mlp, {_dtype(t)}, got {_dtype(x)}")


class Direction(NamedTuple):
    """The signs as given: ``flat`` is row-major of ``shape`` (), (k,) or (D, k). ``margins`` is the
    shape of the margins that go with them, likewise; ``names`` are those of the k columns, if the
    user gave any."""

    flat: tuple[int, ...]
    shape: tuple[int, ...]
    margins: tuple[int, ...] = ()
    names: Names | None = None

    def for_network(self, D: int) -> tuple[int, ...]:
        """The 1, k or D·k signs of a network with D outputs."""
        for name, shape in (("direction", self.shape), ("margin", self.margins)):
            if len(shape) == 2 and shape[0] != D:
                raise ValueError(
                    f"{name}: expected a scalar, (k,) = ({shape[1]},) or (D, k) = "
                    f"({D}, {shape[1]}), got shape {shape}"
                )
        return self.flat

    def of_columns(self, columns: Columns) -> Direction:
        """The signs (k,) or (D, k) of those (d,) or (D, d)."""
        flat = _of_columns(self.flat, self.shape[-1], columns)
        return Direction(flat, (*self.shape[:-1], len(columns)))


def _of_columns(flat: tuple[Any, ...], d: int, columns: Columns) -> tuple[Any, ...]:
    """Of rows of d entries those of some columns."""
    return tuple([flat[row + c] for row in range(0, len(flat), d) for c in columns])


def check_names(columns: Any, n: int, what: str = "", argument: str = "columns") -> Names | None:
    """The names of n columns, or of any number where n is -1; ``what`` says of what: a sequence, or
    the index of a DataFrame."""
    if columns is None:
        return None
    unordered = isinstance(columns, (set, frozenset))
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable) or unordered:
        raise TypeError(f"{argument}: expected a sequence of names, got {type(columns).__name__}")
    names = tuple(_plain(name) for name in columns)
    if len(names) != n >= 0:
        raise ValueError(
            f"{argument}: expected {n} names, one for each column{what}, got {len(names)}"
        )
    if len(set(names)) < n:
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{argument}: expected each name once, got {twice!r} twice")
    return names


def check_outputs(outputs: Any, D: int) -> Names:
    """The names of the D outputs; their numbers if there are none."""
    if outputs is None:
        return tuple(range(D))
    if isinstance(outputs, (str, bytes)) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs: expected a sequence of names, got {type(outputs).__name__}")
    names = tuple(_plain(name) for name in outputs)
    if len(names) != D:
        raise ValueError(f"outputs: expected {D} names, one for each output, got {len(names)}")
    return names


def _plain(entry: Any) -> Any:
    """A number or string of NumPy's as one of Python's, which every pickle can hold."""
    return entry.item() if callable(getattr(entry, "item", None)) else entry


def is_mapping(given: Any) -> bool:
    """A dict, or what is one from columns to numbers, as a pandas Series."""
    return callable(getattr(given, "items", None)) and callable(getattr(given, "keys", None))


def plain(given: Any) -> Any:
    """The same signs, margins or names as plain Python, without tensors, arrays or Series."""
    if is_mapping(given):
        return {_plain(key): plain(value) for key, value in given.items()}
    if callable(getattr(given, "tolist", None)):
        given = given.tolist()
    if isinstance(given, (list, tuple)):
        return tuple(plain(entry) for entry in given)
    return given


def check_column(argument: str, key: Any, n: int, names: Names | None) -> int:
    """The number of one of n columns, which goes by its name, or without names by its number."""
    if names is not None:
        if key in names:
            return names.index(key)
        raise ValueError(f"{argument}: expected names of columns, got {key!r}{_hint(key, names)}")
    if isinstance(key, str):
        raise ValueError(
            f"{argument}: expected to be given the names of the {n} columns too, to know which is "
            f"{key!r}"
        )
    number = _plain(key)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < n:
        raise ValueError(f"{argument}: expected columns 0 to {n - 1}, got {key!r}")
    return number


def _hint(key: Any, names: Names) -> str:
    """What is meant by a key that is no name: the nearest one, whatever its case, or that of the
    column with such a number."""
    number = _plain(key)
    if isinstance(number, int) and 0 <= number < len(names):
        return f"; column {number} is called {names[number]!r}"
    lower = {str(name).lower(): name for name in names}
    near = difflib.get_close_matches(str(key).lower(), list(lower), 1, 0.0)
    return f"; the nearest is {lower[near[0]]!r}" if near else ""


def by_column(argument: str, given: Any, n: int, names: Names | None) -> Any:
    """A mapping from each of n columns to a number, or to a sequence of B (a dict, a Series, a
    DataFrame), as the numbers (n,) or (B, n) in the order of the columns; anything else as it
    is."""
    if not is_mapping(given):
        return given
    found = {check_column(argument, key, n, names): value for key, value in given.items()}
    for c in range(n):
        if c not in found:
            which = names[c] if names else c
            raise ValueError(
                f"{argument}: expected a number for each of the {n} columns, got none for {which!r}"
            )
    columns = [found[c] for c in range(n)]
    columns = [c.tolist() if callable(getattr(c, "tolist", None)) else c for c in columns]
    if not any(isinstance(c, (list, tuple)) for c in columns):
        return columns
    try:
        return [list(row) for row in zip(*columns, strict=True)]
    except (TypeError, ValueError):
        raise ValueError(
            f"{argument}: expected as many numbers in every column, got columns that differ"
        ) from None


def _table(argument: str, given: Any, n: int, names: Names | None) -> Any:
    """A mapping from columns to numbers, or to one number for each output, as the numbers (n,) or
    (D, n): 0 for every other column."""
    entries: dict[int, tuple[list[Any], tuple[int, ...]]] = {}
    for key, value in given.items():
        c = check_column(argument, key, n, names)
        if c in entries:
            raise ValueError(f"{argument}: expected each column once, got {key!r} twice")
        entries[c] = _numbers(value)
    shapes = sorted({shape for _, shape in entries.values()} - {()})
    if len(shapes) > 1 or any(len(shape) > 1 for shape in shapes):
        raise ValueError(
            f"{argument}: expected a number for each column, or (D,) numbers for each, got shapes "
            f"{', '.join(map(str, shapes))}"
        )
    D = shapes[0][0] if shapes else 1
    full = {c: values * (1 if shape else D) for c, (values, shape) in entries.items()}
    rows = [[full[c][i] if c in full else 0 for c in range(n)] for i in range(D)]
    return rows if shapes else rows[0]


def check_table(argument: str, given: Any, mlp: Any) -> tuple[Any, Names | None]:
    """A DataFrame (or for x2 a Series, its one column) as a tensor of the network's dtype, on its
    device, and the names of its columns; anything else as it is."""
    if not callable(getattr(given, "to_numpy", None)):
        return given, None
    parameters = mlp.parameters() if isinstance(mlp, nn.Module) else ()
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    if hasattr(given, "columns"):
        names = tuple(_plain(name) for name in given.columns)
        array = given.to_numpy()
        if array.dtype.kind in NUMBERS:
            return torch.tensor(array, dtype=like.dtype, device=like.device), names
        series = [given.iloc[:, i] if hasattr(given, "iloc") else given[name]
                  for i, name in enumerate(names)]  # fmt: skip
    elif argument == "x2" and hasattr(given, "name"):
        names, series = (_plain(given.name),), [given]
    else:
        return given, None
    table = torch.stack([_floats(argument, *of) for of in zip(names, series, strict=True)], 1)
    return table.to(dtype=like.dtype, device=like.device), names


def check_tables(
    mlp: Any, x1: Any, x2: Any, columns: Any
) -> tuple[Any, Any, Any, Sequence[Any] | None]:
    """Both inputs, each of which may be a DataFrame, as tensors; the names of the columns that may
    be constrained, as given or as the DataFrames have them; and those of all columns of x, where
    they are known."""
    (x1, names), (x2, own) = check_table("x1", x1, mlp), check_table("x2", x2, mlp)
    if isinstance(columns, Iterator):
        columns = tuple(columns)
    if columns is None:
        columns = names if x2 is None else own
    if x2 is None:
        return x1, x2, columns, columns
    known = names is not None and columns is not None
    return x1, x2, columns, (*names, *columns) if known else None  # type: ignore[misc]


def _floats(argument: str, name: Any, column: Any) -> Tensor:
    """A column of a DataFrame (N,) in float64, NaN where a number is missing. Bools are numbers;
    what only reads as one, as text does, is none."""
    kind = getattr(column.dtype, "kind", None)  # pandas', of extension types too
    if kind is None:
        array = column.to_numpy()
    elif kind in NUMBERS:
        array = column.to_numpy(dtype="float64", na_value=math.nan)
    if kind not in (None, *NUMBERS) or array.dtype.kind not in NUMBERS:
        raise TypeError(
            f"{argument}: expected numbers in every column, got {name!r} of dtype {column.dtype}"
        )
    return torch.from_numpy(array.astype("float64"))


def check_direction(
    direction: Any, k: int, names: Names | None = None, letter: str = "k"
) -> Direction:
    """``direction`` is a number, a nested sequence, a tensor (read to the host once) or a mapping
    from columns to signs. ``letter`` is what k is called: "d" where it is all columns of x."""
    if type(direction) is int and -1 <= direction <= 1:  # the usual case, at once
        return Direction((direction,), ())
    values, shape = _read("direction", direction, k, names)
    for v in values:
        if isinstance(v, (complex, str)) or v not in (-1, 0, 1):
            raise ValueError(f"direction: expected entries in {{-1, 0, 1}}, got {v!r}")
    _check_shape("direction", shape, k, letter)
    return Direction(tuple(int(v) for v in values), shape)


def check_constraints(
    inputs: Inputs, direction: Any, columns: Any = None, margin: Any = 0.0
) -> tuple[Inputs, Direction, float | tuple[float, ...], Names | None]:
    """The inputs with the columns that are constrained, the signs and the margins of these, and
    their names: of x2, or without it of what any output constrains of all of x."""
    whole, n = len(inputs.blocks) == 1, inputs.k
    if not whole and columns is None and type(margin) is float and is_finite(margin):
        return inputs, check_direction(direction, n), margin, None
    if not whole:
        names = check_names(columns, n, " of x2")
        signs = check_direction(direction, n, names)
        margin, shape = check_margin(margin, inputs.columns, n, names)
        return inputs, signs._replace(margins=shape, names=names), margin, names
    if torch.compiler.is_compiling():
        chosen, signs, margin, names = _constraints(n, direction, columns, margin)
    else:
        try:
            known = _known_constraints(n, _frozen(direction), _frozen(columns), _frozen(margin))
            chosen, signs, margin, names = known
        except TypeError:  # something in there may change, or is wrong
            chosen, signs, margin, names = _constraints(n, direction, columns, margin)
    return Inputs(inputs.blocks, inputs.batch, n, chosen, inputs.autocast), signs, margin, names


Constraints = tuple[Columns, Direction, float | tuple[float, ...], Names | None]


def _constraints(n: int, direction: Any, columns: Any, margin: Any) -> Constraints:
    """Of all n columns of x: those that are constrained, and what is said of them."""
    names = check_names(columns, n)
    signs = check_direction(direction, n, names, "d")
    if not signs.shape:
        raise ValueError(
            f"direction: expected a sign for each of the d = {n} columns of x1 where x2 is left "
            f"out, or a mapping from columns to signs, got {direction!r}"
        )
    chosen = tuple([c for c in range(n) if any(signs.flat[c::n])])
    if not chosen:
        raise ValueError("direction: expected +1 or -1 for at least one column, got none")
    margin, shape = check_margin(margin, chosen, n, names)
    if names is not None:
        names = tuple([names[c] for c in chosen])
    signs = signs.of_columns(chosen)._replace(margins=shape, names=names)
    return chosen, signs, margin, names


class _Items(NamedTuple):
    """Those of a dict, which cannot be looked up itself."""

    of: tuple[tuple[Any, Any], ...]


def _frozen(given: Any) -> Any:
    if type(given) is dict:
        return _Items(tuple(given.items()))
    if isinstance(given, Tensor):
        raise TypeError("a tensor may change")
    return given


@lru_cache(maxsize=256, typed=True)
def _known_constraints(n: int, direction: Any, columns: Any, margin: Any) -> Constraints:
    """The same, which takes 30 µs, once. Raises a TypeError for what may change, as tensors do."""

    def thawed(given: Any) -> Any:
        if isinstance(given, tuple):
            for entry in given.of if isinstance(given, _Items) else given:
                thawed(entry)
        elif not isinstance(given, (int, float, str, type(None))):
            raise TypeError(f"{type(given).__name__} may change")
        return dict(given.of) if isinstance(given, _Items) else given

    return _constraints(n, *map(thawed, (direction, columns, margin)))


def check_penalty(direction: Any, columns: Any, margin: Any) -> Names | None:
    """The names of the columns, and as much of what is said of them as can be checked before there
    are any rows."""
    if columns is None:
        if not is_mapping(direction):
            _, shape = _read("direction", direction, 0, None)
            check_direction(direction, shape[-1] if shape else 1)
        return None
    names = check_names(tuple(columns) if isinstance(columns, Iterator) else columns, -1)
    assert names is not None
    check_direction(direction, len(names), names)
    if is_mapping(margin):
        check_margin(margin, tuple(range(len(names))), len(names), names)
    return names


def check_named(inputs: Inputs, names: Any) -> None:
    """Names of all of x, where x2 is left out."""
    if len(inputs.blocks) > 1:
        raise ValueError("names: expected none beside x2, which says which columns are wanted")
    check_names(names, inputs.d, argument="names")


def check_chosen(inputs: Inputs, columns: Any, names: Any) -> tuple[Inputs, Columns | None]:
    """The inputs with the columns of x that are named; and these, unless they were named in the
    order of x, as places among them."""
    if len(inputs.blocks) > 1:
        raise ValueError("columns: expected none beside x2, which says which columns are wanted")
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable):
        raise TypeError(f"columns: expected a sequence of columns, got {type(columns).__name__}")
    names = check_names(names, inputs.d, argument="names")
    found = [check_column("columns", key, inputs.d, names) for key in columns]
    chosen = tuple(sorted(set(found)))
    if not chosen or len(chosen) < len(found):
        raise ValueError(f"columns: expected one or more columns, each once, got {found}")
    order = None if tuple(found) == chosen else tuple([chosen.index(c) for c in found])
    return inputs._replace(columns=chosen), order


def check_margin(
    margin: Any, chosen: Columns, n: int, names: Names | None
) -> tuple[float | tuple[float, ...], tuple[int, ...]]:
    """One number, or those of the k constrained of n columns, (k,) or (D, k) row-major, and their
    shape. A mapping names some of these."""
    if isinstance(margin, (bool, str)) or margin is None:
        raise TypeError(f"margin: expected a number, got {type(margin).__name__}")
    if isinstance(margin, Tensor) and margin.requires_grad:
        raise TypeError(
            "margin: expected numbers, got a tensor that wants a gradient, which would not reach "
            "it; take relu(margin - slopes) of what value_and_jacobian gives"
        )
    if isinstance(margin, (int, float)):
        return _finite(margin), ()
    k = len(chosen)
    if not is_mapping(margin):
        values, shape = _entries("margin", margin, k, None)
    else:
        values, shape = _entries("margin", margin, n, names)
        at = chosen if k < n else tuple(range(n))
        free = [c for c in range(n) if c not in at and any(values[c::n])]
        if free:
            which = names[free[0]] if names else free[0]
            raise ValueError(f"margin: expected constrained columns, got {which!r}, which is free")
        values, shape = list(_of_columns(tuple(values), n, at)), (*shape[:-1], k)
    for v in values:
        if isinstance(v, (bool, complex, str)):
            raise TypeError(f"margin: expected numbers, got {v!r}")
    if not shape:
        return _finite(values[0]), ()
    return tuple([_finite(v) for v in values]), shape


def _finite(margin: float) -> float:
    if not is_finite(margin):
        raise ValueError(f"margin: expected finite numbers, got {margin}")
    return float(margin)


def is_finite(number: float) -> bool:
    """Not looked at under torch.compile, where a number of a dynamic graph may be a symbol."""
    try:
        return torch.compiler.is_compiling() or math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False


def _entries(
    argument: str, given: Any, k: int, names: Names | None
) -> tuple[list[Any], tuple[int, ...]]:
    """The numbers of an argument, row-major, and their shape: (), (k,) or (D, k)."""
    values, shape = _read(argument, given, k, names)
    _check_shape(argument, shape, k)
    return values, shape


def _read(
    argument: str, given: Any, k: int, names: Names | None
) -> tuple[list[Any], tuple[int, ...]]:
    """The numbers of an argument, row-major, and their shape, whatever it is."""
    try:
        return _numbers(_table(argument, given, k, names) if is_mapping(given) else given)
    except (TypeError, RuntimeError):
        raise TypeError(
            f"{argument}: expected a number, a (nested) sequence of numbers, a tensor or a mapping "
            f"from columns to numbers, got {type(given).__name__}"
        ) from None


def _check_shape(argument: str, shape: tuple[int, ...], k: int, letter: str = "k") -> None:
    if len(shape) > 2 or (shape and shape[-1] != k):
        scalar = "a scalar, " if letter == "k" else ""
        raise ValueError(
            f"{argument}: expected {scalar}({letter},) = ({k},) or (D, {letter}) = (D, {k}), got "
            f"shape {shape}"
        )


def _numbers(direction: Any) -> tuple[list[Any], tuple[int, ...]]:
    """The numbers, row-major, and their shape. Plain Python as far as it goes: numbers that went
    through a tensor would be unknown to torch.compile."""
    if isinstance(direction, (int, float, str)):
        return [direction], ()
    if not isinstance(direction, (list, tuple)):
        tensor = torch.as_tensor(direction)
        return tensor.flatten().tolist(), tuple(tensor.shape)
    rows = [_numbers(row) for row in direction]
    shapes = {shape for _, shape in rows}
    if len(shapes) > 1:
        raise TypeError("rows of different length")
    inner = shapes.pop() if shapes else ()
    return [v for values, _ in rows for v in values], (len(rows), *inner)


def check_box(
    lower: Any, upper: Any, d: int, names: Names | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The ends of a box in d columns: numbers, which serve every column, (d,), or a mapping from
    every column to its number."""
    ends = []
    for name, end in (("lower", lower), ("upper", upper)):
        wanted = f"(d,) = ({d},), as direction has it"
        kinds = "a number, a sequence of numbers, a tensor or a mapping from columns to numbers"
        end = by_column(name, end, d, names)
        ends.append(tuple(_numbers_of(name, end, d, kinds, wanted)))
    for c, (l, u) in enumerate(zip(*ends, strict=True)):
        for name, end in (("lower", l), ("upper", u)):
            if math.isnan(end) or (math.isinf(end) and l == u):
                raise ValueError(f"{name}: expected an interval in column {c}, got [{l}, {u}]")
        if l > u:
            raise ValueError(f"lower: expected at most upper = {u} in column {c}, got {l}")
    return ends[0], ends[1]


def check_hinge(
    direction: tuple[int, ...], margin: float | tuple[float, ...], hinge: Any, reduction: Any
) -> Hinge:
    """The static part of the penalty; ``direction`` as ``Direction.for_network`` gives it."""
    check_choice("hinge", hinge, HINGES)
    check_choice("reduction", reduction, REDUCTIONS)
    return Hinge(direction, margin, hinge == "squared", reduction == "none")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_count(name: str, value: Any, least: int = 0, of: str = "points") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a number of {of} >= {least}, got {value!r}")


def check_values(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value == 1:
        raise ValueError(f"{name}: expected a number of values >= 2, or 0 for none, got {value!r}")


def check_scaler(
    name: str, scaler: Any, n: int, names: Any = None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The means and scales of n columns that were standardised, as ``(own - mean) / scale``: given
    as a pair, of mappings by ``names`` say, or what the ``inverse_transform`` of a fitted scaler
    makes of a few rows."""
    if scaler is None:
        return None
    if callable(getattr(scaler, "inverse_transform", None)):
        asked = [[0.0] * n, [1.0] * n, [float(c) for c in range(n)]]
        try:
            rows = [[float(v) for v in row] for row in scaler.inverse_transform(asked)]
        except Exception as error:  # whatever a scaler says to rows that it was not made for
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{name}: expected a fitted scaler of {n} columns, got {said}"
            ) from None
        mean = rows[0]
        scale = [b - a for a, b in zip(*rows[:2], strict=True)]
        for c, v in enumerate(rows[2]):
            if not math.isclose(v, mean[c] + c * scale[c], rel_tol=1e-6, abs_tol=1e-9):
                raise ValueError(
                    f"{name}: expected a scaler that shifts and scales each column by itself, got "
                    f"{type(scaler).__name__}"
                )
    elif isinstance(scaler, (tuple, list)) and len(scaler) == 2:
        kinds, wanted = "numbers as mean and scale", f"({n},)"
        if any(map(is_mapping, scaler)):
            names = check_names(names, n, argument="outputs" if name == "y_scaler" else "columns")
        parts = [by_column(name, part, n, names) for part in scaler]
        mean, scale = (_numbers_of(name, part, n, kinds, wanted) for part in parts)
    else:
        raise TypeError(
            f"{name}: expected a pair (mean, scale) or a fitted scaler, got {type(scaler).__name__}"
        )
    for c in range(n):
        if not (math.isfinite(mean[c]) and math.isfinite(scale[c]) and scale[c] > 0):
            raise ValueError(
                f"{name}: expected finite means and scales above 0, got {mean[c]} and {scale[c]} "
                f"in column {c}"
            )
    return tuple(mean), tuple(scale)


def _numbers_of(name: str, given: Any, n: int, kinds: str, wanted: str) -> list[float]:
    """n numbers, of one or n that are given; what was expected of their types and their shape."""
    try:
        values, shape = _numbers(given)
        values = [float(v) for v in values]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected {kinds}, got {type(given).__name__}") from None
    if shape not in ((), (n,)):
        raise ValueError(f"{name}: expected a number or shape {wanted}, got {tuple(shape)}")
    return values if shape else values * n


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_weight(weight: Any, x: Tensor, D: int, k: int) -> Tensor | None:
    """``weight`` as a tensor that broadcasts to (*batch, D, k), x being (*batch, d), or None."""
    if weight is None:
        return None
    if isinstance(weight, (int, float)):
        if not weight >= 0:
            raise ValueError(f"weight: expected none below 0, got {weight}")
        dtype = accumulate_dtype(x.dtype)
        if torch.compiler.is_compiling():  # a fill by a number is compiled for that number
            return x.new_ones((), dtype=dtype) * weight
        # A fill: a copy from the host would wait for the device.
        return torch.full((), weight, dtype=dtype, device=x.device)
    check_multiplier(weight)
    assert isinstance(weight, Tensor)
    if weight.device != x.device and weight.dim():
        raise ValueError(f"weight: expected on the device of x1, {x.device}, got {weight.device}")
    batch = x.shape[:-1]
    full = (*batch, D, k)
    short = len(full) - weight.dim()
    fits = short >= 0 and all(w in (1, n) for w, n in zip(weight.shape, full[short:], strict=True))
    by_row = weight.dim() > 0 and weight.shape == batch
    if not (fits or by_row):
        raise ValueError(
            f"weight: expected a shape that broadcasts to (D, k) = ({D}, {k}) or (..., D, k) = "
            f"{tuple(full)}, or one for each row, {tuple(batch)}, got {tuple(weight.shape)}"
        )
    if fits and by_row and weight.numel() > 1:
        raise ValueError(
            f"weight: expected to know whether {tuple(weight.shape)} is one for each row or "
            f"broadcasts to (D, k) = ({D}, {k}); write weight[..., None, None] or weight[None]"
        )
    return weight[..., None, None] if by_row and not fits else weight


def check_multiplier(weight: Any) -> None:
    """A tensor of numbers none of which is below 0, whatever its shape; or None."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a number or a tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight: expected a floating-point tensor, got {_dtype(weight)}")
    _check_dense("weight", weight)
    _check_not_negative(weight)


def _check_not_negative(weight: Tensor) -> None:
    """Where that can be seen: on the CPU, since a device would have to be waited for. NaN passes:
    where nothing is violated the penalty is 0 whatever its weight, and elsewhere it shows."""
    if torch.compiler.is_compiling():
        if weight.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
            torch._assert_async((~(weight < 0)).all(), "weight: expected none below 0")
        return
    if (
        weight.device.type == "cpu"
        and type(weight) in PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and holds(weight)
        and bool((weight.detach() < 0).any())
    ):
        least = weight[weight < 0].min().item()
        raise ValueError(f"weight: expected none below 0, got {least:g}")


def _check_dense(name: str, t: Tensor) -> None:
    if t.layout is not torch.strided or t.is_nested:
        came = "a nested one" if t.is_nested else t.layout
        raise TypeError(f"{name}: expected a dense tensor, got {came}")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _shape(batch: Sequence[int], last: str) -> str:
    return f"({', '.join([*map(str, batch), last])}{'' if batch else ','})"
