"""Bad input gets one clear sentence: which argument, what was expected, what came.

Everything a user can get wrong before the network runs is checked here, and here alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .problem import Hinge, accumulate_dtype

__all__ = [
    "BATCH_STATS",
    "MODES",
    "REDUCTIONS",
    "Direction",
    "Inputs",
    "check_box",
    "check_choice",
    "check_count",
    "check_direction",
    "check_flag",
    "check_hinge",
    "check_inputs",
    "check_module",
    "check_number",
    "check_parameter",
    "check_weight",
]

MODES = ("auto", "tangent", "adjoint")
REDUCTIONS = ("sum", "mean", "none")
HINGES = ("linear", "squared")
BATCH_STATS = ("error", "running")


class Inputs(NamedTuple):
    """``x1`` (*batch, d1) and ``x2`` (*batch, k); d = d1 + k. The widths are plain numbers also
    where torch.compile made the shapes symbolic. ``autocast`` says whether it is on for their
    device: to ask a device for its type takes longer than all else that is asked of a tensor."""

    x1: Tensor
    x2: Tensor
    batch: torch.Size
    d: int
    k: int
    autocast: bool

    def joined(self) -> Tensor:
        """cat[x1, x2], the network's input (*batch, d)."""
        return torch.cat((self.x1, self.x2), -1) if self.d > self.k else self.x2


def check_module(mlp: Any) -> None:
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: expected an nn.Module, got {type(mlp).__name__}")


def check_inputs(x1: Any, x2: Any) -> Inputs:
    """Reads ``x2`` of shape (...,) as k = 1."""
    for name, t in (("x1", x1), ("x2", x2)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {_dtype(t)}")
        _check_dense(name, t)
    free, monotone = x1.shape, x2.shape
    if not free:
        raise ValueError("x1: expected shape (..., d1), got a tensor with no dimension")
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
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x2.device.type)
    return Inputs(x1, x2, batch, operator.index(free[-1]) + k, k, autocast)


def check_parameter(t: Tensor, x: Tensor) -> None:
    """A parameter of the network goes with its inputs x; autocast brings dtypes together."""
    if t.device != x.device:
        raise ValueError(f"x1: expected on the device of mlp, {t.device}, got {x.device}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"mlp: expected floating-point parameters, got {_dtype(t)}")
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x1: expected the dtype of mlp, {_dtype(t)}, got {_dtype(x)}")


class Direction(NamedTuple):
    """The signs as given: ``flat`` is row-major of ``shape`` (), (k,) or (D, k)."""

    flat: tuple[int, ...]
    shape: tuple[int, ...]

    def for_network(self, D: int) -> tuple[int, ...]:
        """The 1, k or D·k signs of a network with D outputs."""
        if len(self.shape) == 2 and self.shape[0] != D:
            raise ValueError(
                f"direction: expected a scalar, (k,) = ({self.shape[1]},) or (D, k) = "
                f"({D}, {self.shape[1]}), got shape {self.shape}"
            )
        return self.flat


def check_direction(direction: Any, k: int) -> Direction:
    """``direction`` is a number, a nested sequence or a tensor (read to the host once)."""
    if type(direction) is int and -1 <= direction <= 1:  # the usual case, at once
        return Direction((direction,), ())
    try:
        values, shape = _numbers(direction)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "direction: expected a number, a (nested) sequence of numbers or a tensor, got "
            f"{type(direction).__name__}"
        ) from None
    if len(shape) > 2 or (shape and shape[-1] != k):
        raise ValueError(
            f"direction: expected a scalar, (k,) = ({k},) or (D, k) = (D, {k}), got shape {shape}"
        )
    for v in values:
        if isinstance(v, complex) or v not in (-1, 0, 1):
            raise ValueError(f"direction: expected entries in {{-1, 0, 1}}, got {v}")
    return Direction(tuple(int(v) for v in values), shape)


def _numbers(direction: Any) -> tuple[list[Any], tuple[int, ...]]:
    """The numbers, row-major, and their shape. Plain Python as far as it goes: numbers that went
    through a tensor would be unknown to torch.compile."""
    if isinstance(direction, (int, float)):
        return [direction], ()
    if not isinstance(direction, (list, tuple)):
        tensor = torch.as_tensor(direction)
        return tensor.flatten().tolist(), tuple(tensor.shape)
    rows = [_numbers(row) for row in direction]
    shapes = {shape for _, shape in rows}
    if len(shapes) > 1:
        raise ValueError("rows of different length")
    inner = shapes.pop() if shapes else ()
    return [v for values, _ in rows for v in values], (len(rows), *inner)


def check_box(lower: Any, upper: Any, d: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The ends of a box in d columns: numbers, which serve every column, or (d,)."""
    ends = []
    for name, end in (("lower", lower), ("upper", upper)):
        try:
            values, shape = _numbers(end)
            values = [float(v) for v in values]
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name}: expected a number, a sequence of numbers or a tensor, got "
                f"{type(end).__name__}"
            ) from None
        if shape not in ((), (d,)):
            raise ValueError(
                f"{name}: expected a number or shape (d,) = ({d},), as direction has it, got "
                f"{tuple(shape)}"
            )
        ends.append(tuple(values * d if not shape else values))
    for c, (l, u) in enumerate(zip(*ends, strict=True)):
        for name, end in (("lower", l), ("upper", u)):
            if math.isnan(end) or (math.isinf(end) and l == u):
                raise ValueError(f"{name}: expected an interval in column {c}, got [{l}, {u}]")
        if l > u:
            raise ValueError(f"lower: expected at most upper = {u} in column {c}, got {l}")
    return ends[0], ends[1]


def check_hinge(direction: tuple[int, ...], margin: Any, hinge: Any, reduction: Any) -> Hinge:
    """The static part of the penalty; ``direction`` as ``Direction.for_network`` gives it."""
    check_number("margin", margin)
    check_choice("hinge", hinge, HINGES)
    check_choice("reduction", reduction, REDUCTIONS)
    return Hinge(direction, float(margin), hinge == "squared", reduction == "none")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected a number of points >= 0, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_weight(weight: Any, x: Tensor, D: int, k: int) -> Tensor | None:
    """``weight`` as a tensor that broadcasts to (*batch, D, k), x being (*batch, d), or None."""
    if weight is None:
        return None
    if isinstance(weight, (int, float)):
        # A fill: a copy from the host would wait for the device.
        return torch.full((), weight, dtype=accumulate_dtype(x.dtype), device=x.device)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a number or a tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight: expected a floating-point tensor, got {_dtype(weight)}")
    _check_dense("weight", weight)
    if weight.device != x.device and weight.dim():
        raise ValueError(f"weight: expected on the device of x1, {x.device}, got {weight.device}")
    full = (*x.shape[:-1], D, k)
    short = len(full) - weight.dim()
    if short < 0 or any(w not in (1, n) for w, n in zip(weight.shape, full[short:], strict=True)):
        raise ValueError(
            f"weight: expected a shape that broadcasts to (D, k) = ({D}, {k}) or (..., D, k) = "
            f"{tuple(full)}, got {tuple(weight.shape)}"
        )
    return weight


def _check_dense(name: str, t: Tensor) -> None:
    if t.layout is not torch.strided or t.is_nested:
        came = "a nested one" if t.is_nested else t.layout
        raise TypeError(f"{name}: expected a dense tensor, got {came}")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _shape(batch: Sequence[int], last: str) -> str:
    return f"({', '.join([*map(str, batch), last])}{'' if batch else ','})"
