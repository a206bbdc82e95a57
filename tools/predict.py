"""``python -m tools.predict``: how long a training step should take on a card, by a model.

A prediction and no measurement. What each kernel executes is counted in its machine code
(``machine_code.py``) and committed in ``kernel_counts.json``; what a card can do is in
``cards.py``. A launch takes as long as the part of the card that it needs most, as if all others
worked beside it without a wait; PyTorch's own operations, of ours and of the plain step, take what
their products and bytes need at least. ``--check`` compiles the kernels and fails where one, or a
step, is more than 5 % worse by the model than by what is committed; ``--write`` commits to what it
is now. docs/predictions.md has the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from monokernel.backends.triton.launch import Launch
from monokernel.backends.triton.target import interpreting
from tools.cards import CARDS, GAP, INDEPENDENT, Card
from tools.compile_report import Compiled, compiled_code, source_of
from tools.kernel_cases import Case, launches
from tools.machine_code import Section, sections_of

__all__ = ["Kernel", "Prediction", "Spent", "main", "predict", "seconds_of", "table"]

COUNTS = Path(__file__).with_name("kernel_counts.json")
PAGE = Path(__file__).parents[1] / "docs" / "predictions.md"
TARGETS = sorted({card.target for card in CARDS.values()})
# (rows, width) of the table: bfloat16, SiLU, three hidden layers, 8 inputs, D = k = 1.
STEPS = ((65_536, 64), (1 << 20, 64), (65_536, 128), (65_536, 1024), (1024, 64))
SHARE = 0.05  # of rows that violate
WORSE = 1.05


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: what a program takes of a processor, and what a warp of it executes."""

    name: str
    registers: int
    shared: int
    warps: int
    sections: tuple[Section, ...]


class Spent(NamedTuple):
    """Seconds of one launch, and the part of the card that decides them."""

    seconds: float
    by: str


def compiled_for(N: int) -> int:
    """The rows for which kernels are compiled that serve N rows of a card: at two processors."""
    return 64 if N < 4096 else 1024


def case_of(width: int, N: int = 1024) -> Case:
    widths = (8, width, width, width, 1)
    return Case(widths, "silu", 1, "adjoint", torch.bfloat16, path="served", N=N)


# --- one launch -----------------------------------------------------------------------------------

# Scratch and partial sums are sized to stay in the cache, so that they are its bytes alone.
IN_CACHE = ("scratch", "partials")
# Kernels of a whole network, whose programs walk over tiles of rows.
BY_TILE = ("whole_forward", "whole_backward", "narrow_forward", "narrow_gradients")
# Of one that goes over the rows and over the pairs, what is of the pairs.
OF_PAIRS = ("rows", "x_dot", "p", "q", "h", "h_dot")


def seconds_of(kernel: Kernel, call: Launch, card: Card, share: float) -> Spent:
    """Of a launch with the tensors and the grid of the call, ``share`` of its rows violating."""
    programs, trips = _work(kernel, call, share)
    done = defaultdict[str, float](float)
    for section, n in zip(kernel.sections, trips, strict=True):
        for name, amount in section.counts.items():
            done[name] += amount * kernel.warps * n
    each = max(1, ceil(programs / card.processors))  # programs of the busiest processor
    spent: dict[str, float] = {}
    for unit in card.units:
        clocks = each * sum(done[name] * taken for name, taken in unit.takes.items())
        spent[unit.name] = clocks / unit.per_clock / card.clock
    resident = min(each, card.resident(kernel.registers, kernel.shared, kernel.warps))
    ready = resident * kernel.warps / card.schedulers * INDEPENDENT / card.latency
    if "instructions issued" in spent:
        spent["instructions issued"] /= min(1.0, ready)
    spent["tensor cores"] = each * done["tensor"] * card.processors / card.tensor
    spent["L2 cache"] = (programs * done["memory"] - _unread(call, share)) / card.cache
    spent["memory"] = _moved(_bytes(call, share), card)
    by = max(spent, key=lambda name: spent[name])
    return Spent(spent[by], by)


def _moved(size: float, card: Card) -> float:
    """What fits the cache is taken to be there."""
    return size / (card.cache if size <= card.cache_size else card.memory)


def _bytes(call: Launch, share: float) -> float:
    """Of every tensor of the call once; of the pairs' those that are active."""
    name, found, total = call.kernel.__name__, dict[int, Tensor](), 0.0
    of_pairs = set[int]()
    for key, value in zip(call.kernel.arg_names, call.args, strict=False):
        if key not in IN_CACHE or name.startswith("reduce"):
            for t in value if isinstance(value, tuple) else (value,):
                if isinstance(t, Tensor):
                    found[id(t)] = t
                    if name == "narrow_gradients" and key in OF_PAIRS:
                        of_pairs.add(id(t))
    rows = max((t.shape[0] for t in found.values() if t.dim()), default=0)
    by_pairs = name.startswith("pairs_") or name in ("gather_inputs", "narrow_pairs")
    for at, t in found.items():
        listed = by_pairs or at in of_pairs
        part = share if listed and t.dim() and t.shape[0] == rows else 1.0
        total += part * t.numel() * t.element_size()
    return total - _unread(call, share)


def _unread(call: Launch, share: float) -> float:
    """Bytes of what the pairs give to the rows: a load of a row that has none moves nothing."""
    given = dict(zip(call.kernel.arg_names, call.args, strict=False))
    q = given.get("q") if call.kernel.__name__ == "layer_back" else None
    return (1 - share) * q.numel() * q.element_size() if isinstance(q, Tensor) else 0.0


def _work(kernel: Kernel, call: Launch, share: float) -> tuple[int, list[float]]:
    """How many programs run, and how often each section of the busiest one does."""
    name, own = kernel.name, dict(call.options)
    given = dict(zip(call.kernel.arg_names, call.args, strict=False)) | own
    programs = prod(call.programs)
    heavy: list[float] = [1.0]  # of the outermost loops that multiply, or all there are
    light: list[float] = [1.0]  # of those that do not, beside such
    if name in (*BY_TILE, "hinge_slopes"):
        tiles = ceil(ceil(given["N"] / own["BM"]) / programs)
        heavy = [tiles]
    if name == "whole_backward":
        rows, some = tiles * own["BM"], own["ACTIVE_ROWS"]
        active = ceil(share * rows / some)
        heavy = [active, ceil((rows - active * some) / own["BM"])]
        light = [own["OFFSETS"][-1] / 1024, ceil(tiles * own["BM"] / own["SCAN"])]
    elif name == "narrow_gradients":
        heavy = [tiles, ceil(ceil(share * given["N"] / own["BM"]) / programs)]
    elif name == "narrow_pairs":
        programs = ceil(share * given["rows"].shape[0] / own["BM"])
    elif name == "chain_down":
        heavy = [ceil(own["H"] / own["BN"])]
    elif name == "layer_back":
        heavy = [ceil(ceil(given["N"] / own["BM"]) / call.programs[0])]
    elif name.startswith("reduce"):
        heavy = [ceil(given["P"] / own.get("SLICES", own["BLOCK"]))]
    elif name == "pairs_product":
        programs = ceil(share * given["rows"].shape[0] / own["BM"]) * call.programs[1]
        heavy = [ceil(own["INPUTS"] / own["BK"])]
    elif name == "pairs_down":
        tiles = ceil(share * given["rows"].shape[0] / own["BM"])
        programs = min(tiles, call.programs[0]) * call.programs[1]
        heavy = [ceil(tiles / call.programs[0])]
    elif name == "pairs_weight":
        parts = ceil(share * given["rows"].shape[0] / own["BR"])
        heavy = [ceil(parts / call.programs[2])]
    trips, around = list[float](), {0: 1.0}  # by depth
    if (
        name.startswith("reduce") and len(kernel.sections) == 3
    ):  # several rounds at once, and the rest
        at_once, one = (section.counts["memory"] for section in kernel.sections[1:])
        return programs, [1.0, *map(float, divmod(heavy[0], max(at_once // one, 1)))]
    if name in ("pairs_product", "pairs_weight") and (not own["FAN"] or given.get("q") is None):
        return programs, _steps(kernel, given, heavy[0])
    multiplying = any(s.depth and s.counts["tensor"] for s in kernel.sections)
    loops = [s for s in kernel.sections if s.depth == 1]
    lights = sum(not _multiplies(kernel, s) for s in loops) if multiplying else 0
    seen = {True: 0, False: len(light) - min(len(light), lights)}
    for section in kernel.sections:
        if section.depth == 1:
            which = _multiplies(kernel, section) or not multiplying
            of = heavy if which else light
            around[1] = of[min(seen[which], len(of) - 1)]
            seen[which] += 1
        elif section.depth:
            own_trips = _inner(section, own) if _multiplies(kernel, section) else 1.0
            around[section.depth] = around[section.depth - 1] * own_trips
        trips.append(around[section.depth])
    return programs, trips


def _steps(kernel: Kernel, given: dict[str, Any], steps: float) -> list[float]:
    """How often the loop of a product goes round in so many steps, of which it may do several at
    once and have some before and after it."""
    inner = given.get("BK") or given["BR"]
    sums = sum(given.get(name) is not None for name in ("left", "p", "q"))
    step = 2 * given["BM"] * given["BN"] * inner * sums / kernel.warps
    around = kernel.sections[0].counts["tensor"]
    return [1.0] + [
        max(0.0, steps * step - around) / section.counts["tensor"]
        if section.counts["tensor"]
        else 1.0
        for section in kernel.sections[1:]
    ]


def _multiplies(kernel: Kernel, loop: Section) -> bool:
    """Whether there is a product in the loop or within it."""
    at = next(i for i, s in enumerate(kernel.sections) if s is loop)
    found = loop.counts["tensor"]
    for section in kernel.sections[at + 1 :]:
        if section.depth <= loop.depth:
            break
        found += section.counts["tensor"]
    return found > 0


def _inner(section: Section, own: dict[str, Any]) -> float:
    """Trips of a loop in a tile of a whole-network kernel: of weight gradients some columns at a
    time, which store, and within it some rows; or of a product in steps."""
    if "H" not in own:
        return 1.0
    if section.counts["stores"] and "CHUNK" in own:
        return float(ceil(own["H"] / own["CHUNK"]))
    whole = own["BM"] if section.depth > 2 else own["H"]
    return float(ceil(whole / (own["INNER"] or whole)))


# --- PyTorch's operations -------------------------------------------------------------------------


class Operation(NamedTuple):
    name: str
    operations: int  # of a product
    bytes: int


class Operations(TorchDispatchMode):
    """What PyTorch does meanwhile, but for views and memory alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        free = func.is_view or func.namespace == "prim" or "empty" in name
        if not free and name not in ("detach", "_unsafe_view"):
            products = 0
            if name in ("mm", "addmm"):
                left, right = [t for t in args if isinstance(t, Tensor)][-2:]
                products = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            size = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
            self.found.append(Operation(name, products, size))
        return out


def _floor(operation: Operation, card: Card) -> Spent:
    moved, multiplied = _moved(operation.bytes, card), operation.operations / card.tensor
    return Spent(moved, "memory") if moved >= multiplied else Spent(multiplied, "tensor cores")


@cache
def _plain(N: int, width: int) -> list[Operation]:
    """The same network's step without the penalty."""
    widths = case_of(width).widths
    with FakeTensorMode():
        layers: list[nn.Module] = []
        for fan_in, out in pairwise(widths):
            layers += [nn.Linear(fan_in, out, dtype=torch.bfloat16), nn.SiLU()]
        net = nn.Sequential(*layers[:-1])
        x, gy = torch.empty(N, widths[0]).bfloat16(), torch.empty(N, widths[-1]).bfloat16()
        seen = Operations()
        with seen:
            net(x).backward(gy)
    return seen.found


@cache
def _ours(N: int, width: int, target: str, processors: int) -> tuple[list[Launch], list[Operation]]:
    seen = Operations()
    with FakeTensorMode(allow_non_fake_inputs=True), seen:
        calls = launches(case_of(width, N), target, processors)
    made = [op for op in seen.found if op.name not in ("zeros", "zero_")]  # of the case itself
    return calls, made


# --- a step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A step of ours and the least that the plain one takes, in seconds. ``binding`` is the part of
    the card that decides most of ours; ``kernels`` says how many seconds are spent in each."""

    ours: float
    plain: float
    binding: str
    kernels: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.ours / self.plain


def predict(
    N: int, width: int, card: Card, kernels: Sequence[Kernel], share: float = SHARE
) -> Prediction:
    """Of the kernels in the order in which the step launches them."""
    calls, operations = _ours(N, width, card.target, card.processors)
    by, named = defaultdict[str, float](float), defaultdict[str, float](float)
    for call, kernel in zip(calls, kernels, strict=True):
        spent = seconds_of(kernel, call, card, share)
        by[spent.by] += spent.seconds
        named[kernel.name] += spent.seconds
    for operation in operations:
        spent = _floor(operation, card)
        by[spent.by] += spent.seconds
    by["launches"] = (len(calls) + len(operations)) * GAP
    plain = _plain(N, width)
    floor = sum(_floor(op, card).seconds + GAP for op in plain)
    return Prediction(sum(by.values()), floor, max(by, key=lambda name: by[name]), dict(named))


# By the rows that they are compiled for, width and target.
Known = dict[tuple[int, int, str], list[Kernel]]


def compiled_kernels() -> Known:
    """Of every width and target, as the compiler makes them now."""
    found: Known = {}
    known: dict[str, Kernel] = {}
    for rows, width in sorted({(compiled_for(N), width) for N, width in STEPS}):
        for target in TARGETS:
            found[rows, width, target] = []
            for call in launches(case_of(width, rows), target):
                source, options = source_of(call)
                key = f"{target} {source.hash()} {options}"
                if key not in known:
                    known[key] = _kernel(compiled_code(call, target), call, target)
                found[rows, width, target].append(known[key])
    return found


def _kernel(made: Compiled, call: Launch, target: str) -> Kernel:
    amd = target.startswith("gfx")
    return Kernel(
        call.kernel.__name__, made.registers, made.shared, made.warps,
        tuple(sections_of(made.code, amd)),
    )  # fmt: skip


def written(known: Known) -> str:
    """The counts as text."""
    rows = []
    for key, kernels in known.items():
        for kernel in kernels:
            sections = [[s.depth, dict(sorted(s.counts.items()))] for s in kernel.sections]
            rows.append(
                [
                    *key,
                    kernel.name,
                    kernel.registers,
                    kernel.shared,
                    kernel.warps,
                    sections,
                ]
            )
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n'


def read(text: str) -> Known:
    found: Known = {}
    for *key, name, registers, shared, warps, sections in json.loads(text)["kernels"]:
        rows, width, target = key
        own = tuple([Section(depth, Counter(counts)) for depth, counts in sections])
        kernel = Kernel(name, registers, shared, warps, own)
        found.setdefault((rows, width, target), []).append(kernel)
    return found


@lru_cache(maxsize=1)
def committed() -> Known:
    return read(COUNTS.read_text(encoding="utf-8"))


def worse(now: Known, before: Known) -> list[str]:
    """One sentence for each kernel of a step, and each step, that is more than 5 % worse."""
    found = []
    for name, card in CARDS.items():
        for N, width in STEPS:
            key = compiled_for(N), width, card.target
            new, old = (predict(N, width, card, of[key]) for of in (now, before))
            pairs = {"the step": (new.ours, old.ours)} | {
                kernel: (seconds, old.kernels.get(kernel, seconds))
                for kernel, seconds in new.kernels.items()
            }
            for what, (a, b) in pairs.items():
                if a > WORSE * b:
                    found.append(
                        f"{what} on {name} at {N} x {width}: {a * 1e6:.1f} us, was {b * 1e6:.1f}"
                    )
    return found


# --- the table ------------------------------------------------------------------------------------


def table(known: Known) -> str:
    """The predictions in Markdown."""
    lines = [
        "| rows × width | card | predicted, µs | plain at least, µs | ratio | what binds "
        "| ratio, v = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for N, width in STEPS:
        for name, card in CARDS.items():
            kernels = known[compiled_for(N), width, card.target]
            p = predict(N, width, card, kernels)
            every = predict(N, width, card, kernels, 1.0)
            lines.append(
                f"| {N:,} × {width} | {name} | {p.ours * 1e6:.0f} | {p.plain * 1e6:.0f} | "
                f"{p.ratio:.2f} | {p.binding} | {every.ratio:.2f} |"
            )
    return "\n".join(lines)


def tiles(known: Known) -> str:
    """What the kernels of a whole network execute for a row and layer of a tile, in Markdown."""
    lines = [
        "| kernel, width | target | rows | registers | shared, KB | special | arithmetic | integer "
        "| all | bytes | barriers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (compiled, width, target), kernels in known.items():
        card = next(card for card in CARDS.values() if card.target == target)
        case = case_of(width, compiled)
        for kernel, call in zip(kernels, launches(case, target), strict=True):
            BM = call.options.get("BM", 0)
            if kernel.name not in BY_TILE or (compiled < 1024 and compiled <= BM):
                continue  # what is no other than for more rows
            _, trips = _work(kernel, call, 0.0)
            total = defaultdict[str, float](float)
            for section, n in zip(kernel.sections, trips, strict=True):
                if section.depth and (section.counts["tensor"] or section.depth > 1):
                    for name, amount in section.counts.items():
                        total[name] += amount * kernel.warps * n
            rows = BM * ceil(case.N / BM / call.programs[0])
            each = {name: amount * card.warp / rows / 4 for name, amount in total.items()}
            lines.append(
                f"| {kernel.name}, {width} | {target} | {BM} | {kernel.registers} | "
                f"{kernel.shared / 1024:.0f} | {each['special']:.0f} | {each['arithmetic']:.0f} | "
                f"{each['integer']:.0f} | {each['issue']:.0f} | "
                f"{total['memory'] / rows / 4:.0f} | "
                f"{total['barrier'] / kernel.warps / (rows / BM):.0f} |"
            )
    return "\n".join(lines)


def page(text: str, known: Known) -> str:
    """The page with the tables of these kernels."""
    for name, found in (("steps", table(known)), ("tiles", tiles(known))):
        marker = f"<!-- {name}: written by python -m tools.predict --write -->\n"
        before, rest = text.split(marker)
        text = f"{before}{marker}{found}\n{rest[rest.index('<!-- end -->') :]}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="predict")
    parser.add_argument("--check", action="store_true", help="compile, and compare")
    parser.add_argument("--write", action="store_true", help="compile, and write the counts")
    options = parser.parse_args(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 1
    known = compiled_kernels() if options.check or options.write else committed()
    print("Predicted by counts of instructions, not measured.\n")
    print(table(known), tiles(known), sep="\n\n")
    found = worse(known, committed()) if options.check else []
    if options.write:
        COUNTS.write_text(written(known), encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), known), encoding="utf-8")
    for sentence in found:
        print(f"worse: {sentence}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
