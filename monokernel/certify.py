"""Proves that slopes have their sign everywhere in a box, or finds a point where one has not."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import attack, branching, forms, network, ranges, switches
from .api import MonotonePenalty
from .arguments import (
    Names,
    by_column,
    check_column,
    check_direction,
    check_module,
    check_names,
    check_number,
    is_mapping,
)
from .audit import slopes_in_direction
from .branching import Boxes, Constraints
from .forms import INTERVALS
from .layers import Layers, Straight, layers_of, width_of
from .monotone import Monotone
from .probing import evaluating
from .signs import direction_table

__all__ = ["Certificate", "certify"]

ARITHMETIC = (
    "float64; products by gamma_n = n u / (1 - n u), curves by units in the last place, "
    "rounded outward"
)
STARTS = 2048  # of descents and of sampled points, over all boxes and constraints
FAR = 10.0  # how far out points are sampled in a box without an end
MOST_ROWS = 100_000  # boxes that one-hot groups may make of those given
FEW_COLUMNS = 2  # in so few cutting boxes is faster than deciding neurons
LINES = 40


@dataclass(frozen=True)
class Certificate:
    """What is known of ``direction · ∂y_d/∂x_c >= margin`` in one box, or in each of B boxes.

    Shapes are those of one box; for B boxes given as (B, d) they have B in front.

    Attributes:
        status: "proved", "violated" or "unknown"; of B boxes the worst of theirs.
        verdicts: the status of each box, a tuple of length 1 or B.
        direction: the signs (D, d); margin: the number; names: of the d columns, or None.
        lower, upper: the box (d,), float64.
        lower_bound: (D, d), units of y per unit of x: the slope in its direction is nowhere in the
            box lower than that. NaN where the direction is 0. Where one constraint was found
            violated the search ends, so that others may be bounded loosely.
        lowest_found: (D, d), the lowest slope in its direction at any point that was looked at,
            computed by the network itself in its own dtype; NaN where the direction is 0.
        witness: (D, d, d), that point.
        open_lower, open_upper: the (n, d) boxes that are left open; open_box: to which of the B
            boxes each belongs (n,).
        open_share: how much of the boxes' volume that is, 0 to 1, over the columns in which they
            have an extent.
        float_step: (D, d), units of x: a step in x_c from which on the rounding of the network's
            own forward cannot hide the rise that is proved, 2E / max(lower_bound, margin) with E a
            bound of the error of y; NaN where no rise is proved, and for what is no chain.
        boxes: how many boxes were bounded; seconds: how long it took.
        methods: how many times what decided a constraint in a box.
        weights: SHA-256 of the network's layers and of their weights.
        dtype: the network's own.
        arithmetic: in which the bounds are computed.
    """

    status: str
    verdicts: tuple[str, ...]
    direction: Tensor
    margin: float
    lower: Tensor
    upper: Tensor
    lower_bound: Tensor
    lowest_found: Tensor
    witness: Tensor
    open_lower: Tensor
    open_upper: Tensor
    open_box: Tensor
    open_share: float
    float_step: Tensor
    boxes: int
    seconds: float
    methods: dict[str, int]
    weights: str
    dtype: str
    names: tuple[Any, ...] | None = None
    arithmetic: str = ARITHMETIC

    @property
    def not_proved(self) -> list[int]:
        """The boxes, of B, that are not proved."""
        return [i for i, verdict in enumerate(self.verdicts) if verdict != "proved"]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and nested lists, as JSON has them: None for NaN, and strings for
        infinities."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def save(self, path: str | Path) -> None:
        """Writes ``to_dict()`` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """The certificate that ``save`` wrote, equal in every number."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            found.setdefault("names", None)  # it was saved before columns had any
        if not isinstance(found, dict) or set(found) != {f.name for f in fields(cls)}:
            raise ValueError(f"path: expected a saved certificate, got other contents in {path}")
        integers = ("direction", "open_box")
        d = len(found["lower"][0] if len(_shape(found["lower"])) > 1 else found["lower"])
        for name in _TENSORS:
            dtype = torch.int64 if name in integers else torch.float64
            found[name] = _tensor(found[name], dtype)
        for name in ("open_lower", "open_upper"):
            found[name] = found[name].reshape(-1, d)
        found["verdicts"] = tuple(found["verdicts"])
        if found["names"] is not None:
            found["names"] = tuple(found["names"])
        return cls(**found)

    def check(self, mlp: nn.Module) -> None:
        """Verifies that the certificate is one of this network: the same layers and weights, and
        slopes below the margin at every witness of a violation.

        Raises:
            ValueError: one sentence, where it is not.
        """
        mlp = _network(mlp)
        layers, dtype = _read(mlp, self.lower.shape[-1])
        if dtype != self.dtype:
            raise ValueError(f"mlp: expected a network of dtype {self.dtype}, got {dtype}")
        found = layers.digest(dtype)
        if found != self.weights:
            raise ValueError(
                f"mlp: expected the certified layers and weights, of hash {self.weights[:16]}, got "
                f"others, of hash {found[:16]}"
            )
        signs = self.direction != 0
        slopes = self.lowest_found.reshape(-1, *self.direction.shape)
        below = (slopes < self.margin) & signs
        points = self.witness.reshape(*slopes.shape, -1)[below]
        if not len(points):
            return
        own = _replay(mlp, points, self.direction, getattr(torch, self.dtype))
        _, outputs, columns = below.nonzero(as_tuple=True)
        own = own[torch.arange(len(own)), outputs, columns]
        if not (own < self.margin).all():
            raise ValueError(
                f"mlp: expected slopes below {self.margin} at the witnesses, got "
                f"{own.max().item():.4g}"
            )

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", *self._table(), "", *self._basis()])

    def _summary(self) -> list[str]:
        claim = f"direction * dy/dx >= {self.margin:g}"
        if len(self.verdicts) == 1:
            text = {
                "proved": f"PROVED: {claim} everywhere in the box",
                "violated": f"VIOLATED: {claim} fails in the box",
                "unknown": f"UNKNOWN: {claim} is neither proved nor refuted in "
                f"{self.open_share:.3g} of the box",
            }
            return [text[self.status]]
        counts = {v: self.verdicts.count(v) for v in ("proved", "violated", "unknown")}
        counted = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
        lines = [f"{self.status.upper()}: {claim} in {len(self.verdicts)} boxes: {counted}"]
        if left := self.not_proved:
            more = f" and {len(left) - 20} more" if len(left) > 20 else ""
            lines.append(f"not proved: {', '.join(map(str, left[:20]))}{more}")
        return lines

    def _table(self) -> list[str]:
        D, d = self.direction.shape
        labels = [str(c) for c in self.names or range(d)]
        width = max(6, *map(len, labels))
        lines = [
            f"{'output':>6} {'column':>{width}} {'sign':>4} {'from':>9} {'to':>9} "
            f"{'lower bound':>11} {'lowest found':>12} {'x there':>9} {'float step':>10}"
        ]
        low = self.lower.reshape(-1, d).amin(0)
        high = self.upper.reshape(-1, d).amax(0)
        bound = self.lower_bound.reshape(-1, D, d)
        found, box = self.lowest_found.reshape(-1, D, d).min(0)
        step = self.float_step.reshape(-1, D, d).amax(0)
        witness = self.witness.reshape(-1, D, d, d)
        entries = (self.direction != 0).nonzero().tolist()
        for o, c in entries[:LINES]:
            lines.append(
                f"{o:>6} {labels[c]:>{width}} {int(self.direction[o, c]):>+4} "
                f"{low[c].item():>9.4g} {high[c].item():>9.4g} "
                f"{bound[:, o, c].min().item():>11.4g} "
                f"{found[o, c].item():>12.4g} {witness[box[o, c], o, c, c].item():>9.4g} "
                f"{step[o, c].item():>10.3g}"
            )
        if len(entries) > LINES:
            lines.append(f"... and {len(entries) - LINES} more constraints")
        free = [c for c in range(d) if not (self.direction[:, c] != 0).any()]
        if free:
            ends = [
                f"{labels[c]}: [{low[c].item():.4g}, {high[c].item():.4g}]" for c in free[:LINES]
            ]
            lines.append(f"free columns {', '.join(ends)}")
        return lines

    def _basis(self) -> list[str]:
        methods = ", ".join(f"{name} ({n})" for name, n in self.methods.items() if n)
        return [
            f"by         {methods or 'nothing'}; {self.boxes} boxes in {self.seconds:.2f} s",
            f"arithmetic {self.arithmetic}",
            f"network    {self.dtype}, layers and weights of SHA-256 {self.weights}",
        ]


_TENSORS = (
    *("direction", "lower", "upper", "lower_bound", "lowest_found", "witness"),
    *("open_lower", "open_upper", "open_box", "float_step"),
)


def certify(
    mlp: nn.Module,
    lower: Any,
    upper: Any,
    *,
    direction: Any = 1,
    columns: Any = None,
    margin: float = 0.0,
    seconds: float = 60.0,
    one_hot: Sequence[Sequence[Any]] = (),
    seed: int = 0,
    progress: bool = True,
) -> Certificate:
    """Proves ``direction · ∂y_d/∂x_c >= margin`` everywhere in a box, or finds where it fails.

    It is computed on the network's device, a CPU or a GPU with float64, and reported on the CPU.
    What is proved holds for the network in evaluation mode, in exact arithmetic on its stored
    weights, at every point of the box, and for nothing outside it. Where the slope has a jump, at a
    ReLU's kink, it holds for both sides.

    Args:
        mlp: a chain of Linear layers and activations of the table, or a module whose forward reads
            as one (``nn.Sequential``, a class of its own, dropout, BatchNorm in evaluation mode).
            Other programs whose nodes all have a range are bounded by intervals alone, which
            decides small boxes and what is monotone by construction.
        lower, upper: the box: (d,), numbers for all columns alike, or (B, d) for B boxes with a
            verdict each, over the columns of ``mlp``'s input; or a mapping from every column to its
            number or its B numbers (a dict, a Series, a DataFrame). Both ends may be equal: a box
            without extent in all columns but one is one row along the whole range of that column.
            Ends may be infinite: there intervals alone bound, and what they leave open is cut
            further.
        direction: +1 rising, -1 falling, 0 free, as a scalar, (d,) or (D, d), for every column; or
            a mapping from columns to signs, 0 for what it does not name.
        columns: the names of the d columns, for such a mapping, the table and the certificate.
        margin: the slope, in its direction, that is to be proved; units of y per unit of x.
        seconds: after so much time what is not decided is "unknown".
        one_hot: groups of columns, by number or name, of which exactly one is 1 and the others are
            0, so that no impossible row is asked about; they must be free.
        seed: of the random starts; the same call gives the same certificate, time permitting.
        progress: a line on the standard error while it runs.

    Returns:
        A ``Certificate``; print it for a table.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """
    begin = time.monotonic()
    mlp = _network(mlp)
    check_number("margin", margin)
    check_number("seconds", seconds)
    if not math.isfinite(margin):
        raise ValueError(f"margin: expected a finite number, got {margin}")
    if not seconds >= 0:
        raise ValueError(f"seconds: expected a number >= 0, got {seconds}")
    low, high, batched = _box(mlp, lower, upper, direction, columns)
    B, d = low.shape
    place = _place(mlp)
    layers, dtype = _read(mlp, d)
    low, high, layers = low.to(place), high.to(place), layers.to(place)
    D = layers.D
    names = check_names(columns, d)
    signs = check_direction(direction, d, names)
    table = direction_table(signs.for_network(D), D, d, torch.float64, low.device)
    if not table.any():
        raise ValueError("direction: expected +1 or -1 for at least one column, got none")
    rows = _rows(low, high, _groups(one_hot, names, table, low))
    outputs, places = (table != 0).nonzero(as_tuple=True)
    constraints = Constraints(outputs, places, table[outputs, places], float(margin))
    probe = _Probe(mlp, layers, constraints, table, dtype, low, high)
    Q = len(places)
    start = Boxes(
        *rows,
        low.new_ones(len(rows[2]), Q, dtype=torch.bool),
        low.new_full((len(rows[2]), Q), -torch.inf),
    )
    deadline = begin + seconds
    line = _Progress(progress, begin, probe)
    if Q and B:
        _attack(layers, constraints, start, probe, seed, deadline)
    going = start.at(~probe.violated[start.owner])
    if Q:
        line(0, len(going.owner))
        found = _search(layers, constraints, going, B, probe, deadline, line)
    else:
        none = going.known.new_zeros(B, 0)
        found = branching.Found(none, going.at(slice(0, 0)), 0, {})
    line.end()
    return _certificate(
        begin, batched, layers, constraints, table, low, high, dtype, probe, found, start, names
    )


def _search(
    layers: Layers | Straight,
    constraints: Constraints,
    start: Boxes,
    B: int,
    probe: _Probe,
    deadline: float,
    line: _Progress,
) -> branching.Found:
    """By boxes, and where neurons are switches and a box is wide in more than a few columns, by
    those."""
    columns = (start.lower < start.upper).sum(1)
    wide = (columns > FEW_COLUMNS) & ~branching.endless(start.lower, start.upper)
    if isinstance(layers, Straight) or not (switches.serves(layers) and wide.any()):
        return branching.search(layers, constraints, start, B, probe, deadline, line)
    found = branching.search(layers, constraints, start.at(~wide), B, probe, deadline, line)
    rest = start.at(wide)
    rest = rest.at(~probe.violated[rest.owner])
    split = switches.search(layers, constraints, rest, B, probe, deadline, line)
    return branching.Found(
        torch.minimum(found.lower, split.lower),
        Boxes.joined([found.left, split.left]),
        found.boxes + split.boxes,
        {**found.proved, switches.METHOD: split.proved},
    )


# --- arguments -----------------------------------------------------------------------------------


def _network(mlp: Any) -> nn.Module:
    """The network that is asked about, and no module that only holds it."""
    check_module(mlp)
    mlp = network.unwrap(mlp)
    assert isinstance(mlp, nn.Module)
    if isinstance(mlp, MonotonePenalty):
        raise ValueError("mlp: expected the network itself, got a MonotonePenalty; give its .mlp")
    if isinstance(mlp, Monotone):
        raise ValueError("mlp: expected what is deployed, got a Monotone; give its frozen()")
    return mlp


def _box(
    mlp: nn.Module, lower: Any, upper: Any, direction: Any, columns: Any
) -> tuple[Tensor, Tensor, bool]:
    """Both ends (B, d) in float64, and whether there is a B."""
    d = _width(mlp, lower, upper, direction, columns)
    names = check_names(columns, d)
    ends = []
    for name, value in (("lower", lower), ("upper", upper)):
        end = _end(name, by_column(name, value, d, names))
        if end.dim() and end.shape[-1] != d:
            raise ValueError(
                f"{name}: expected shape ({d},) or (B, {d}) for a network of {d} columns, got "
                f"{tuple(end.shape)}"
            )
        ends.append(end)
    batched = any(end.dim() == 2 for end in ends)
    B = max([len(end) for end in ends if end.dim() == 2], default=1)
    for name, end in zip(("lower", "upper"), ends, strict=True):
        if end.dim() == 2 and len(end) != B:
            raise ValueError(f"{name}: expected {B} boxes as in the other end, got {len(end)}")
    low, high = (end.expand(B, d).contiguous() for end in ends)
    if (low > high).any():
        box, column = (low > high).nonzero()[0].tolist()
        raise ValueError(
            f"lower: expected lower <= upper, got {low[box, column].item():g} > "
            f"{high[box, column].item():g} in column {column}"
            + (f" of box {box}" if batched else "")
        )
    return low, high, batched


def _end(name: str, value: Any) -> Tensor:
    """One end (), (d,) or (B, d) in float64."""
    try:
        value = value.detach().cpu() if isinstance(value, Tensor) else value
        end = torch.tensor(value, dtype=torch.float64) if not isinstance(value, Tensor) else value
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__}") from None
    if end.dim() > 2:
        raise ValueError(f"{name}: expected shape (d,) or (B, d), got {tuple(end.shape)}")
    if end.isnan().any():
        raise ValueError(f"{name}: expected numbers, got NaN")
    if (end == (torch.inf if name == "lower" else -torch.inf)).any():
        wrong = "inf" if name == "lower" else "-inf"
        raise ValueError(f"{name}: expected numbers or {'-' * (wrong == 'inf')}inf, got {wrong}")
    return end.to(torch.float64)


def _width(mlp: nn.Module, lower: Any, upper: Any, direction: Any, columns: Any) -> int:
    """How many columns the network takes: as its first layer says, or as many as there are names,
    ends or signs, or as its linear layers say."""
    chain = network.read(mlp)
    if isinstance(chain, network.Chain):
        return chain.widths[0]
    if isinstance(columns, Sized) and not isinstance(columns, (str, bytes)):
        return len(columns)
    for given in (lower, upper, direction):
        if (given is lower or given is upper) and is_mapping(given):
            return len(list(given.keys()))
        try:
            shape = torch.as_tensor(given).shape
        except (TypeError, ValueError, RuntimeError):
            continue  # what is wrong with it is said where it is read
        if shape:
            return shape[-1]
    d = width_of(mlp)
    if d is None:
        raise ValueError(
            "lower: expected (d,) numbers, since how many columns mlp takes is not known, got one "
            "for all"
        )
    return d


def _place(mlp: nn.Module) -> torch.device:
    """Where to compute: on the network's own device where that has float64, else on the CPU."""
    place = next((p.device for p in mlp.parameters()), torch.device("cpu"))
    if place.type == "meta":
        raise ValueError("mlp: expected weights to certify, got a network on the meta device")
    return place if place.type in ("cpu", "cuda") else torch.device("cpu")


def _read(mlp: nn.Module, d: int) -> tuple[Layers | Straight, str]:
    """The network in float64 and its own dtype, or a ValueError that says why not."""
    found = layers_of(mlp, d)
    if isinstance(found, str):
        raise ValueError(f"mlp: expected {found}")
    return found


def _groups(
    one_hot: Sequence[Sequence[Any]], names: Names | None, table: Tensor, low: Tensor
) -> list[list[int]]:
    d, seen = table.shape[1], set[int]()
    groups = []
    for group in one_hot:
        if isinstance(group, (str, bytes)) or not isinstance(group, Iterable):
            raise TypeError(f"one_hot: expected groups of columns, as [[0, 1]], got {one_hot!r}")
        columns = [
            check_column("one_hot", c, d, names if isinstance(c, str) else None) for c in group
        ]
        for c in columns:
            if c in seen:
                raise ValueError(
                    f"one_hot: expected columns 0 to {d - 1}, each in one group, got {c}"
                )
            if (table[:, c] != 0).any():
                raise ValueError(f"one_hot: expected free columns, got {c} of direction +1 or -1")
            seen.add(c)
        if columns:
            groups.append(columns)
    count = 1
    for group in groups:
        count *= len(group)
    if count * len(low) > MOST_ROWS:
        raise ValueError(
            f"one_hot: expected at most {MOST_ROWS} rows of zeros and ones, got {count * len(low)}"
        )
    return groups


def _rows(low: Tensor, high: Tensor, groups: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Every box (n, d) twice, and whose it is (n,): one for each choice in each group that lies in
    the box."""
    owner = torch.arange(len(low), device=low.device)
    if not groups:
        return low, high, owner
    lows, highs, owners = [], [], []
    for choice in product(*groups):
        l, h = low.clone(), high.clone()
        inside = torch.ones_like(owner, dtype=torch.bool)
        for group, one in zip(groups, choice, strict=True):
            for c in group:
                value = 1.0 if c == one else 0.0
                inside &= (low[:, c] <= value) & (high[:, c] >= value)
                l[:, c] = h[:, c] = value
        lows.append(l[inside])
        highs.append(h[inside])
        owners.append(owner[inside])
    found = torch.cat(lows), torch.cat(highs), torch.cat(owners)
    empty = sorted(set(owner.tolist()) - set(found[2].tolist()))
    if empty:
        raise ValueError(
            f"one_hot: expected boxes with a row of zeros and a one, got none in box {empty[0]}"
        )
    return found


# --- points --------------------------------------------------------------------------------------


class _Probe:
    """Asks the network for slopes, and remembers the lowest of every box and constraint."""

    def __init__(
        self,
        mlp: nn.Module,
        layers: Layers | Straight,
        constraints: Constraints,
        table: Tensor,
        dtype: str,
        low: Tensor,
        high: Tensor,
    ) -> None:
        self.mlp, self.layers, self.constraints, self.table = mlp, layers, constraints, table
        self.dtype = getattr(torch, dtype)
        self.low, self.high = low, high
        B, Q = len(low), len(constraints.signs)
        self.slope, _ = attack.of_layers(layers, *constraints[:3])
        self.lowest = low.new_full((B, Q), torch.inf)
        self.at = branching.middle(low, high).unsqueeze(1).repeat(1, Q, 1)
        self.violated = low.new_zeros(B, dtype=torch.bool)

    def __call__(self, x: Tensor, owner: Tensor, q: Tensor) -> Tensor:
        """``branching.Witness``."""
        self.take(x, self.slope(x, q), owner, q)
        return self.violated

    def take(self, x: Tensor, slope: Tensor, owner: Tensor, q: Tensor) -> None:
        """Points (n, d), their slopes (n,), boxes and constraints."""
        Q = self.lowest.shape[1]
        place = owner * Q + q
        flat = self.lowest.view(-1)
        before = flat.clone()
        flat.scatter_reduce_(0, place, slope, "amin")
        best = (slope == flat[place]) & (slope < before[place])
        self.at.view(len(flat), -1)[place[best]] = x[best]
        below = best & (slope < self.constraints.margin) & ~self.violated[owner]
        if below.any():
            self._judge(x[below], owner[below], q[below])

    def _judge(self, x: Tensor, owner: Tensor, q: Tensor) -> None:
        """A point is a violation where the network itself, in its own dtype, has a slope below the
        margin and exact arithmetic has too, on both sides of every kink."""
        x = self._own(x, owner)
        slope = self.replayed(x)
        rows = torch.arange(len(x))
        o, c = self.constraints.outputs[q], self.constraints.columns[q]
        bad = slope[rows, o, c] < self.constraints.margin
        for output in o.unique().tolist():
            of = (o == output) & bad
            if of.any():
                s = forms.slopes(self.layers, x[of], x[of], output, c[of].unique(), INTERVALS)
                column = torch.searchsorted(c[of].unique(), c[of])
                at = torch.arange(len(column))
                sign = self.constraints.signs[q[of]]
                high = (sign * s.centre[at, column] + s.radius()[at, column]) * (1 + 1e-12)
                bad[of.nonzero().flatten()] = high < self.constraints.margin
        self.at[owner[bad], q[bad]] = x[bad]
        self.violated[owner[bad]] = True

    def _own(self, x: Tensor, owner: Tensor) -> Tensor:
        """The points as numbers of the network's dtype, in their box where it holds any."""
        own = x.to(self.dtype).double()
        inf = torch.tensor(torch.inf, dtype=self.dtype)
        up = torch.nextafter(own.to(self.dtype), inf).double()
        down = torch.nextafter(own.to(self.dtype), -inf).double()
        low, high = self.low[owner], self.high[owner]
        own = torch.where((own < low) & (up <= high), up, own)
        return torch.where((own > high) & (down >= low), down, own)

    def replayed(self, x: Tensor) -> Tensor:
        """direction·∂y/∂x (n, D, d) by the network itself, in its own dtype."""
        return _replay(self.mlp, x, self.table, self.dtype).to(x.device)

    def tables(self) -> tuple[Tensor, Tensor]:
        """The lowest slopes that were found (B, D, d), replayed, and where (B, D, d, d)."""
        B, Q = self.lowest.shape
        D, d = self.table.shape
        slopes = self.low.new_full((B, D, d), torch.nan)
        points = self.low.new_full((B, D, d, d), torch.nan)
        if not B * Q:
            return slopes, points
        owner = torch.arange(B, device=self.low.device).repeat_interleave(Q)
        x = self._own(self.at.reshape(B * Q, d), owner)
        o, c = self.constraints.outputs, self.constraints.columns
        own = self.replayed(x)[torch.arange(B * Q), o.repeat(B), c.repeat(B)]
        slopes[:, o, c] = own.view(B, Q)
        points[:, o, c] = x.view(B, Q, d)
        return slopes, points


def _replay(mlp: nn.Module, x: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    place = next(mlp.parameters()).device
    d = table.shape[1]
    signs = check_direction(table.int(), d)
    with torch.no_grad(), evaluating(mlp):
        blocks = slopes_in_direction(mlp, x.to(place, dtype), tuple(range(d)), signs)
        return torch.cat([slope.double().cpu() for slope, _ in blocks])


def _attack(
    layers: Layers | Straight,
    constraints: Constraints,
    start: Boxes,
    probe: _Probe,
    seed: int,
    deadline: float,
) -> None:
    """A few descents in every box where there are few boxes, else a few points in each."""
    place = start.lower.device
    generator = torch.Generator(place).manual_seed(seed)
    n, Q = len(start.owner), len(constraints.signs)
    slope, smooth = attack.of_layers(layers, *constraints[:3])
    each = max(1, min(64, STARTS // (n * Q)))
    q = torch.arange(Q, device=place).repeat(n * each)
    row = torch.arange(n, device=place).repeat_interleave(Q * each)
    lower, upper = _within_reach(start.lower[row], start.upper[row])
    share = torch.rand(lower.shape, generator=generator, dtype=torch.float64, device=place)
    x = torch.lerp(lower, upper, share).clamp(lower, upper)
    if n * Q > STARTS:  # the search looks at the corners of its forms in any case
        for i in range(0, len(x), 1 << 16):
            part = slice(i, i + (1 << 16))
            probe(x[part], start.owner[row[part]], q[part])
        return
    found = attack.descend(slope, smooth, x, lower, upper, q, generator, deadline=deadline)
    probe.take(found.x, found.slope, start.owner[row], q)


def _within_reach(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The boxes, as far out as ``FAR`` from 0 or from the other end where one is infinite."""
    low = torch.where(lower.isinf(), upper.clamp(max=0) - FAR, lower)
    return low, torch.where(upper.isinf(), lower.clamp(min=0) + FAR, upper)


# --- the report ----------------------------------------------------------------------------------


def _certificate(
    begin: float,
    batched: bool,
    layers: Layers | Straight,
    constraints: Constraints,
    table: Tensor,
    low: Tensor,
    high: Tensor,
    dtype: str,
    probe: _Probe,
    found: branching.Found,
    start: Boxes,
    names: Names | None,
) -> Certificate:
    B, (D, d) = len(low), table.shape
    o, c = constraints.outputs, constraints.columns
    bound = low.new_full((B, D, d), torch.nan)
    # A box that the attack decided was never bounded.
    found.lower[probe.violated & found.lower.isinf().any(1)] = -torch.inf
    bound[:, o, c] = found.lower
    unknown = torch.zeros_like(probe.violated)
    unknown[found.left.owner] = True
    verdicts = tuple(
        "violated" if v else "unknown" if u else "proved"
        for v, u in zip(probe.violated.tolist(), unknown.tolist(), strict=True)
    )
    slopes, points = probe.tables()
    methods = dict(found.proved)
    if probe.violated.any():
        methods = {"points": int(probe.violated.sum()), **methods}

    def shaped(t: Tensor) -> Tensor:
        return (t if batched else t[0]).cpu()

    return Certificate(
        status=next((s for s in ("violated", "unknown") if s in verdicts), "proved"),
        verdicts=verdicts,
        direction=table.long().cpu(),
        margin=constraints.margin,
        lower=shaped(low),
        upper=shaped(high),
        lower_bound=shaped(bound),
        lowest_found=shaped(slopes),
        witness=shaped(points),
        open_lower=found.left.lower.cpu(),
        open_upper=found.left.upper.cpu(),
        open_box=found.left.owner.cpu(),
        open_share=_share(found.left, start),
        float_step=shaped(_float_step(layers, low, high, bound, constraints.margin, dtype)),
        boxes=found.boxes,
        seconds=time.monotonic() - begin,
        methods=methods,
        weights=layers.digest(dtype),
        dtype=dtype,
        names=names,
    )


def _share(left: Boxes, start: Boxes) -> float:
    """The volume of what is left over that of the start, in the columns with an extent."""
    if not len(left.owner):
        return 0.0
    squeezed = start.owner.new_zeros(int(start.owner.max()) + 1, dtype=torch.bool)
    squeezed[start.owner[branching.endless(start.lower, start.upper)]] = True
    size = branching.extent(start.lower, start.upper, squeezed[start.owner])
    widest = size.new_zeros(len(squeezed), size.shape[1])
    widest.scatter_reduce_(0, start.owner.unsqueeze(1).expand_as(size), size, "amax")
    size = branching.extent(left.lower, left.upper, squeezed[left.owner])
    share = size / widest[left.owner]
    share = torch.where(widest[left.owner] > 0, share, 1.0).prod(1)
    return min(1.0, share.sum().item() / len(start.owner))


def _float_step(
    layers: Layers | Straight, low: Tensor, high: Tensor, bound: Tensor, margin: float, dtype: str
) -> Tensor:
    """2E / rise (B, D, d) with E (B, D) a bound of the forward's rounding in the network's dtype,
    by running error analysis: |Δa| <= |W|(|Δh| + γ_n |h|) + γ_n |b|, |Δh| <= max|σ'| |Δa| + 4u |h|.
    """
    if isinstance(layers, Straight):
        return torch.full_like(bound, torch.nan)
    u = torch.finfo(getattr(torch, dtype)).eps / 2
    c, r = 0.5 * low + 0.5 * high, 0.5 * (high - low)
    h, off = c.abs() + r, torch.zeros_like(c)
    form = forms.values(layers, low, high)
    for l, (W, b, σ) in enumerate(zip(layers.W, layers.b, layers.σ, strict=True)):
        n = W.shape[1] + 2
        γ = n * u / (1 - n * u) if n * u < 1 else torch.inf
        off = (off * (1 + γ) + γ * h) @ W.abs().mT + γ * b.abs()
        least, most = form[l][0] - off, form[l][1] + off
        steep = torch.stack(ranges.bounds(σ, 1, least, most)).abs().amax(0)
        h = torch.stack(ranges.bounds(σ, 0, least, most)).abs().amax(0)
        off = steep * off + (4 * u * h if σ.kind != "identity" else 0.0)
    rise = bound.clamp(min=margin) if margin > 0 else bound
    step = 2 * off.unsqueeze(2) / rise
    return torch.where(rise > 0, step, torch.nan)


class _Progress:
    """One line on the standard error, five times a second."""

    def __init__(self, shown: bool, begin: float, probe: _Probe) -> None:
        self.shown, self.begin, self.probe, self.last = shown, begin, probe, 0.0

    def __call__(self, boxes: int, left: int) -> None:
        now = time.monotonic()
        if not self.shown or now - self.last < 0.2:
            return
        self.last = now
        lowest = self.probe.lowest.min().item() if self.probe.lowest.numel() else torch.inf
        print(
            f"\rcertify: {boxes} boxes, {left} open, lowest slope {lowest:.4g}, "
            f"{now - self.begin:.0f} s ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        if self.shown and self.last:
            print(file=sys.stderr)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not -torch.inf < value < torch.inf:
        return None if value != value else "inf" if value > 0 else "-inf"
    return value


def _tensor(value: Any, dtype: torch.dtype) -> Tensor:
    def number(v: Any) -> Any:
        if isinstance(v, list):
            return [number(w) for w in v]
        return torch.nan if v is None else float(v) if isinstance(v, str) else v

    return torch.tensor(number(value), dtype=dtype)


def _shape(value: Any) -> tuple[int, ...]:
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)
