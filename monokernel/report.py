"""What an audit found, and how it is said: as text of one screen, as plain data, HTML and CSV."""

from __future__ import annotations

import csv
import html
import io
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .columns import Columns
from .probing import WITHOUT_DERIVATIVE
from .steps import Steps

__all__ = ["Audit", "Units"]

SCREEN, WIDE = 24, 100  # lines, and letters of a sentence in them
LEAST = 5  # lines of the first table
LONGEST = 20  # letters of a name
NAMED = 5  # columns in one sentence

Units = tuple[tuple[float, ...], tuple[float, ...]]  # means and scales


@dataclass(frozen=True)
class Audit:
    """Violations of the wanted direction on N rows, for every output d and column c.

    A slope counts in its direction (``direction · ∂y/∂x2``): a negative one is a violation, as is
    one below the margin or a NaN. Entries of direction 0 are NaN in the tables and never count.

    A slope of 0 is an all-clear only if the derivative tells of y at all. An entry is ``blind``
    where it does not: 0 in every row (or absent), while y changes with the column. Rise and fall
    are unknown to the slopes there: its entries are NaN, and so are ``violation_rate`` and
    ``worst``. ``steps`` knows: it moves the columns and looks at y.

    Printed it is at most a screen, the worst constraints first; in a notebook it is a table.

    Attributes:
        rows: N.
        direction: the signs (D, k).
        rate: the share of violating rows (D, k), in 0 to 1.
        worst_slope: the lowest slope in its direction (D, k), units of y per unit of x2.
        worst_row: its row (D, k), an index into the flattened leading shape; -1 where none is.
        worst_point: the inputs there, cat[x1, x2] (D, k, d).
        blind: where the derivative says nothing (D, k).
        flat: where every slope is 0 and y was not seen to move with the column either (D, k).
        steps: finite steps along each column, a ``Steps``; None where they were left out.
        mixing: rows influence each other, so that no row has a slope of its own;
            ``violation_rate`` and ``worst`` are NaN.
        doubts: one sentence each on what makes the counts doubtful.
        sampled: the same on points sampled away from the data, where they were asked for.
        attacked: the same on the points at which an attack ended, where it was asked for: one for
            each start and constraint, so that its rates are no shares of any data.
        columns: the columns of x that the k are.
        labels: what the report calls them: their names where they have any, else their numbers,
            among the columns of x2 or of x.
        outputs: what it calls the D outputs: their names, else their numbers.
        nan_row: the first row with a NaN among its inputs, -1 where none has.
        nan_rows: how many have one.
    """

    rows: int
    direction: Tensor
    rate: Tensor
    worst_slope: Tensor
    worst_row: Tensor
    worst_point: Tensor
    blind: Tensor
    flat: Tensor
    steps: Steps | None = None
    mixing: bool = False
    doubts: tuple[str, ...] = ()
    sampled: Audit | None = None
    attacked: Audit | None = None
    columns: Columns = ()
    labels: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    nan_row: int = -1
    nan_rows: int = 0

    @property
    def violation_rate(self) -> float:
        """The share of violating entries among all constrained ones; NaN where any is blind or the
        rows mix."""
        rate = self.rate[self.direction != 0].mean().item()
        return math.nan if self.mixing else rate

    @property
    def worst(self) -> float:
        """The lowest slope in its direction, over all constrained entries; NaN where any is blind
        or the rows mix."""
        worst = self.worst_slope[self.direction != 0]
        return math.nan if self.mixing or not worst.numel() else worst.min().item()

    @property
    def all_clear(self) -> bool:
        """Whether nothing speaks against the directions at any point that was looked at: no slope
        and no step, no entry without a known slope, no doubt. ``certify`` alone speaks of the
        points between."""
        parts = [self, *(part for _, part in self._others())]
        return not self.doubts and all(
            part.violation_rate == 0
            and not part.nan_rows
            and (part.steps is None or not (part.steps.refused or (part.steps.rate > 0).any()))
            for part in parts
        )

    def entries(self) -> list[tuple[int, int]]:
        """(d, c) of the constrained entries, the worst first: those that are blind, then by the
        share of violating rows, by slope or by step, then by the lowest slope."""
        fall = torch.zeros_like(self.rate) if self.steps is None else self.steps.rate
        share = self.rate.nan_to_num(0.0).maximum(fall.to(self.rate.dtype).nan_to_num(0.0)).tolist()
        low, blind = self.worst_slope.nan_to_num(-torch.inf).tolist(), self.blind.tolist()

        def badness(entry: tuple[int, int]) -> tuple[float, ...]:
            d, c = entry
            return -float(blind[d][c]), -share[d][c], low[d][c]

        return sorted(((d, c) for d, c in (self.direction != 0).nonzero().tolist()), key=badness)

    def in_units(self, x: Units | None, y: Units | None) -> Audit:
        """The same in units of which the network's are ``(own - mean) / scale``, for the d columns
        of x and the D outputs."""
        d, D = self.worst_point.shape[-1], len(self.direction)
        mean, scale = torch.tensor(x or ((0.0,) * d, (1.0,) * d), dtype=torch.float64)
        height = torch.tensor(y[1] if y else (1.0,) * D, dtype=torch.float64).unsqueeze(-1)
        at = list(self.columns)
        steps = self.steps
        if steps is not None:
            steps = replace(
                steps,
                worst_drop=steps.worst_drop * height,
                worst_point=steps.worst_point * scale + mean,
                drop_from=steps.drop_from * scale[at] + mean[at],
                drop_to=steps.drop_to * scale[at] + mean[at],
            )
        return replace(
            self,
            worst_slope=self.worst_slope * height / scale[at],
            worst_point=self.worst_point * scale + mean,
            steps=steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and nested lists (D, k); None for what is unknown, not a number or of
        direction 0."""
        tables = ("rate", "worst_slope", "worst_row", "worst_point")
        known = (self.direction != 0) & ~self.blind
        plain = {
            "rows": self.rows,
            "columns": list(self.columns),
            "labels": list(self.labels),
            "outputs": list(self.outputs),
            "nan_row": self.nan_row,
            "nan_rows": self.nan_rows,
            "doubts": list(self.doubts),
            "mixing": self.mixing,
            "all_clear": self.all_clear,
            "violation_rate": self.violation_rate,
            "worst": self.worst,
            "direction": self.direction.int().tolist(),
            **{name: _where(known, getattr(self, name)) for name in tables},
            "blind": self.blind.tolist(),
            "flat": self.flat.tolist(),
            "steps": None if self.steps is None else self.steps.to_dict(),
            "sampled": None if self.sampled is None else self.sampled.to_dict(),
            "attacked": None if self.attacked is None else self.attacked.to_dict(),
        }
        return {name: _numbers(value) for name, value in plain.items()}

    def to_frame(self) -> dict[str, list[Any]]:
        """Its constraints as columns of equal length, the worst first, which ``pandas.DataFrame``
        takes; None for what is unknown. ``points`` says where: "rows", "sampled" or "attacked"."""
        rows = [
            part._entry(d, c) | {"points": name}
            for name, part in (("rows", self), *self._others())
            for d, c in part.entries()
        ]
        names = ["points", *(name for name in self._entry_names() if name != "points")]
        return {name: [_numbers(row.get(name)) for row in rows] for name in names}

    def to_csv(self, path: str | Path | None = None) -> str:
        """``to_frame`` as comma-separated text, also written to the file if there is a path."""
        frame, text = self.to_frame(), io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(frame)
        writer.writerows(zip(*frame.values(), strict=True))
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def to_html(self, path: str | Path | None = None) -> str:
        """The summaries and all constraints as HTML (a ``<div>``), also written to the file if
        there is a path."""
        parts = []
        for name, part in (("rows", self), *self._others()):
            lines = "".join(f"<p>{html.escape(line)}</p>" for line in part._summary(SAID[name]))
            frame = replace(part, sampled=None, attacked=None).to_frame()
            frame.pop("points")
            head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in frame)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(_cell(v))}</td>" for v in row) + "</tr>"
                for row in zip(*frame.values(), strict=True)
            )
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            parts.append(lines + table)
        text = f"<div>{''.join(parts)}</div>"
        if path is not None:
            page = f'<!DOCTYPE html><meta charset="utf-8"><title>Audit</title>{text}\n'
            Path(path).write_text(page, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        """At most a screen: what is left of it after the summaries goes to the constraints."""
        parts = [("rows", self), *self._others()]
        heads, known = list[list[str]](), set[str]()
        for name, part in parts:
            new = [*self._compared(name, part), *part._summary(SAID[name])]
            new = [line for line in new if line not in known]
            known.update(new)
            heads.append([line for said in new for line in _wrapped(said)])
        if SCREEN - sum(map(len, heads)) - len(parts) + 1 < LEAST:
            heads[1:] = [head[:1] for head in heads[1:]]
        left = SCREEN - sum(map(len, heads)) - len(parts) + 1
        tables = list[list[str]]()
        for i, (_, part) in enumerate(parts):
            tables.append(part._table(max(left // (len(parts) - i), min(left, LEAST))))
            left -= len(tables[-1])
        texts = [[*head, *table] for head, table in zip(heads, tables, strict=True)]
        return "\n\n".join("\n".join(lines) for lines in texts)

    def _others(self) -> Iterator[tuple[str, Audit]]:
        for name in ("sampled", "attacked"):
            part = getattr(self, name)
            if part is not None:
                yield name, part

    def _compared(self, name: str, part: Audit) -> list[str]:
        """Whether the attack found worse."""
        if name != "attacked" or math.isinf(part._lowest()):
            return []
        seen = min(a._lowest() for a in (self, self.sampled) if a is not None)
        found, worst = "a worse slope than", part._lowest()
        if not worst < seen:
            found = "no worse slope than"
        return [f"The attack found {found} any above: {worst:.4g}, where {seen:.4g} was the worst"]

    def _lowest(self) -> float:
        """The lowest slope in its direction among those that are known."""
        known = self.worst_slope[(self.direction != 0) & ~self.blind]
        return known.min().item() if known.numel() else math.inf

    def _summary(self, what: str) -> list[str]:
        """What is said of all constraints together, what is loud first."""
        known = (self.direction != 0) & ~self.blind
        worst = self._lowest() if known.any() else math.nan
        rate = self.rate[known].mean().item() if known.any() else math.nan
        counted = f"{_share(rate)} of the constrained slopes violate, worst slope {worst:.4g}"
        if not (self.rows and known.any()):
            counted = "no slope to count"
        blind, doubts = self._columns(self.blind), list(self.doubts)
        if self.nan_rows:
            s = "s" * (self.nan_rows > 1)
            doubts.append(f"{self.nan_rows} row{s} with NaN among the inputs, first row "
                          f"{self.nan_row}")  # fmt: skip
        if self.rows == 1:
            what = what.replace("rows", "row").replace("points", "point")
        unknown = f"{self.rows} {what}: UNKNOWN how many of the constrained slopes violate"
        if self.mixing and not blind:
            lines = [unknown, *doubts, f"Taken for themselves {counted}"]
        elif not blind:
            lines = [f"{self.rows} {what}: {counted}", *doubts]
        else:
            lines = [
                unknown,
                *doubts,
                f"In {blind}{self._outputs_where(self.blind)} the derivative is 0 in every row, "
                "yet y changes with the column.",
                f"It says nothing of rise or fall, as behind {WITHOUT_DERIVATIVE}.",
                *([f"Elsewhere {counted}"] if known.any() else []),
            ]
        if self.flat.any():
            lines.append(f"In {self._columns(self.flat)} every slope is 0 and y does not move "
                         f"with it{self._outputs_where(self.flat)}.")  # fmt: skip
        return lines + self._stepped()

    def _stepped(self) -> list[str]:
        steps = self.steps
        if steps is None:
            return []
        lines = list(steps.refused[:1])
        if len(steps.refused) > 1:
            lines[0] += f"; and {len(steps.refused) - 1} more"
        if not math.isnan(steps.violation_rate):
            deepest = f"deepest by {steps.worst:.4g}"
            if math.isnan(steps.worst):
                row = steps.worst_row[steps.worst_drop.isnan() & ~steps.rate.isnan()][0].item()
                deepest = f"y becomes NaN, in row {row} first"
            lines.append(
                f"{steps.rows} of them moved along each column: {_share(steps.violation_rate)} "
                f"fall on the way, {deepest}"
            )
        unseen = (self.rate == 0) & (steps.rate > 0)
        if unseen.any():
            lines.append(
                f"STEPS DISAGREE WITH SLOPES: in {self._columns(unseen)}"
                f"{self._outputs_where(unseen)} no slope violates and y falls all the same, "
                "between the rows or where it has no derivative."
            )
        return lines

    def _columns(self, which: Tensor) -> str:
        """The columns of these entries (D, k), or of a few."""
        found = [_short(self.labels[c]) for c in which.any(0).nonzero().flatten().tolist()]
        if not found:
            return ""
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        return f"column{'s' * (len(found) > 1)} {', '.join(found[:NAMED])}{more}"

    def _outputs_where(self, which: Tensor) -> str:
        """Of which outputs that is so, where it is not so of all."""
        found = [_short(self.outputs[d]) for d in which.any(1).nonzero().flatten().tolist()]
        if len(found) == len(self.outputs) or not self.outputs:
            return ""
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        return f" (output{'s' * (len(found) > 1)} {', '.join(found[:NAMED])}{more})"

    def _table(self, most: int) -> list[str]:
        """At most so many lines, none where they have no room for a constraint."""
        entries, steps = self.entries(), self.steps
        if not entries or most < (3 if steps is None else 4):
            return []
        columns, outputs = ([_short(name) for name in of] for of in (self.labels, self.outputs))
        w, v = max(6, *map(len, columns)), max(6, *map(len, outputs))
        head = f"{'output':>{v}} {'column':>{w}} sign"
        above = " " * len(head) + f" {'by slopes':>9}"
        head += f" {'violating':>9} {'worst slope':>11} {'row':>7} {'x there':>9}"
        if steps is not None:
            above = f"{above:<{len(head)}}   by steps"
            head += f" {'falling':>9} {'drop':>9} {'from x':>9} {'to x':>9}"
        lines = [above, head] if steps is not None else [head]
        room = most - len(lines)
        shown = entries if len(entries) <= room else entries[: room - 1]
        for d, c in shown:
            line = f"{outputs[d]:>{v}} {columns[c]:>{w}} {int(self.direction[d, c]):>+4}"
            if self.blind[d, c]:
                line += f" {'unknown':>9} {'unknown':>11} {'':>7} {'':>9}"
            else:
                at = self.worst_point[d, c, self.columns[c]].item()
                line += (
                    f" {_share(self.rate[d, c].item()):>9} {self.worst_slope[d, c].item():>11.4g}"
                    f" {int(self.worst_row[d, c]):>7} {at:>9.4g}"
                )
            if steps is not None:
                line += f" {_share(steps.rate[d, c].item()):>9}"
                if steps.rate[d, c] > 0:
                    drop, high, low = (
                        t[d, c].item() for t in (steps.worst_drop, steps.drop_from, steps.drop_to)
                    )
                    line += f" {drop:>9.4g} {high:>9.4g} {low:>9.4g}"
            lines.append(line.rstrip())
        if len(entries) > len(shown):
            lines.append(f"... and {len(entries) - len(shown)} more constraints, none worse")
        return lines

    def _entry(self, d: int, c: int) -> dict[str, Any]:
        """One constraint as plain data."""
        blind, steps = bool(self.blind[d, c]), self.steps
        entry: dict[str, Any] = {
            "output": self.outputs[d],
            "column": self.labels[c],
            "direction": int(self.direction[d, c]),
            "violating": None if blind else self.rate[d, c].item(),
            "worst_slope": None if blind else self.worst_slope[d, c].item(),
            "worst_row": None if blind else int(self.worst_row[d, c]),
            "worst_x": None if blind else self.worst_point[d, c, self.columns[c]].item(),
            "blind": blind,
            "flat": bool(self.flat[d, c]),
        }
        if steps is not None:
            fell = int(steps.worst_row[d, c])
            entry |= {
                "falling": steps.rate[d, c].item(),
                "worst_drop": steps.worst_drop[d, c].item(),
                "drop_row": fell if fell >= 0 else None,
                "drop_from": steps.drop_from[d, c].item(),
                "drop_to": steps.drop_to[d, c].item(),
            }
        return entry

    def _entry_names(self) -> list[str]:
        stepped = any(a.steps is not None for a in (self, self.sampled, self.attacked) if a)
        return ENTRY + (STEPPED if stepped else [])


ENTRY = ["output", "column", "direction", "violating", "worst_slope", "worst_row", "worst_x"]
ENTRY += ["blind", "flat"]
STEPPED = ["falling", "worst_drop", "drop_row", "drop_from", "drop_to"]
SAID = {"rows": "rows", "sampled": "sampled points", "attacked": "points of the attack"}


def _where(known: Tensor, table: Tensor) -> list[list[Any]]:
    """A table (D, k, …) as lists, None where nothing is known."""
    pairs = zip(table.tolist(), known.tolist(), strict=True)
    return [[v if s else None for v, s in zip(*pair, strict=True)] for pair in pairs]


def _numbers(value: Any) -> Any:
    """None in the place of every NaN, which JSON does not have."""
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, dict):
        return {name: _numbers(v) for name, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _share(share: float) -> str:
    """In percent, none of which rounds to nothing or to all."""
    if 0 < share < 5e-5:
        return "<0.01%"
    if 0.99995 <= share < 1:
        return ">99.99%"
    return f"{share:.2%}" if not math.isnan(share) else "-"


def _wrapped(said: str) -> list[str]:
    return textwrap.wrap(said, WIDE, subsequent_indent="  ")


def _short(name: Any) -> str:
    text = str(name)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[1 - half :]}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
