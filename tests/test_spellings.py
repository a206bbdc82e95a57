"""Every activation is written in each place that has to know it; docs/architecture.md lists them.

What a place leaves out is named with the place, and whether what it says is right is for the tests
of that place.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from monokernel import ranges
from monokernel.activations import ACTIVATIONS
from monokernel.arguments import check_inputs
from monokernel.reading import Reading, read
from tests.exact import EXACT
from tests.support import ACTIVATION_MODULES, ELEMENTWISE, WRITTEN, Function, text_of

KINDS_H = "csrc/kinds.h"
DEVICE = "monokernel/backends/triton/device/activations.py"
# Bounds of σ''' and σ'''' are for smooth kinds without a number whose derivatives are bounded. The
# others are certified by forms of the first order, which need none.
WITHOUT_THIRD = {
    "elu": "σ'' jumps",
    "softsign": "σ'' jumps",
    "hardswish": "σ' jumps",
    "softplus": "the bounds would depend on its numbers, and it jumps at its threshold",
    "square": "σ' is without bound",
    "sqrt": "has a pole",
    "exp": "σ' is without bound",
    "log": "has a pole",
    "reciprocal": "has a pole",
    "sin": "its turning points come again and again",
    "cos": "its turning points come again and again",
}


class _Written(nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def rows_of_cpp() -> list[tuple[str, bool]]:
    """The kinds of C++ in the order of their codes, and whether σ'' is zero everywhere."""
    rows = re.findall(r"row\((\w+), \w+, (true|false)\)", text_of(KINDS_H))
    return [(kind, flat == "true") for kind, flat in rows]


def codes_of_triton() -> dict[str, int]:
    """The codes for which the device function has a branch; identity is what needs none."""
    text = text_of(DEVICE)
    branches = set(re.findall(r"if CODE == (\w+):", text))
    codes = re.findall(r"^([A-Z]\w+) = tl\.constexpr\((\d+)\)", text, re.MULTILINE)
    return {"identity": 0} | {k.lower(): int(code) for k, code in codes if k in branches}


def kinds_that_are_read() -> set[str]:
    """Of the ways that the tests know to compute a kind, those that are read as that kind."""
    found = set()
    forwards = {name: f for name, (_, f) in WRITTEN.items()} | ACTIVATION_MODULES
    x = torch.rand(2, 3) + 0.5
    for name, f in forwards.items():
        program = read(_Written(f), check_inputs(x[:, :2], x[:, 2:]))
        kind = ELEMENTWISE[name][0].kind
        kinds = [node.kind for node in program.nodes] if isinstance(program, Reading) else []
        if kinds == [kind] or (kind == "identity" and not kinds and isinstance(program, Reading)):
            found.add(kind)
    return found


def kinds_in_the_readme() -> set[str]:
    words = set(re.findall(r"\w+", text_of("README.md")))
    names = {n: type(m).__name__ for n, m in ACTIVATION_MODULES.items()} | {n: n for n in WRITTEN}
    return {ELEMENTWISE[key][0].kind for key, name in names.items() if name in words}


def places() -> dict[str, set[str]]:
    """Where an activation is written, and the kinds that are."""
    straight = {kind for kind, spelling in ACTIVATIONS.items() if spelling.piecewise_linear}
    return {
        "monokernel/activations.py (ACTIVATIONS)": set(ACTIVATIONS),
        f"{KINDS_H} (MK_KINDS)": {kind for kind, _ in rows_of_cpp()},
        f"{DEVICE} (a code and a branch)": set(codes_of_triton()),
        "monokernel/ranges.py (_CURVES)": set(ranges._CURVES),
        "monokernel/ranges.py (THIRD)": straight | set(WITHOUT_THIRD) | set(ranges.THIRD),
        "monokernel/symbols.py or _MODULES (read)": kinds_that_are_read(),
        "tests/support.py (WRITTEN or ACTIVATION_MODULES)": {
            σ.kind for σ, _ in ELEMENTWISE.values()
        },
        "tests/exact.py (EXACT)": straight | set(EXACT),
        "README.md (the list of activations)": kinds_in_the_readme(),
    }


def missing(places: dict[str, set[str]]) -> list[str]:
    """A sentence for each kind that some place knows and others do not."""
    kinds = sorted(set().union(*places.values()))
    lacking = {kind: [p for p, known in places.items() if kind not in known] for kind in kinds}
    return [f"{kind} is missing in {', '.join(where)}" for kind, where in lacking.items() if where]


def test_no_activation_is_missing_anywhere() -> None:
    absent = missing(places())
    assert not absent, "\n".join(absent)


def test_a_missing_one_is_named_with_its_place() -> None:
    full = {place: {"gelu"} for place in places()}
    for place in full:
        assert missing(full | {place: set()}) == [f"gelu is missing in {place}"]
        (sentence,) = missing(full | {place: {"gelu", "new"}})
        assert sentence.startswith("new is missing in ")
        assert place not in sentence
        assert all(other in sentence for other in full if other != place)


def test_the_codes_are_the_places_in_the_table() -> None:
    flat = [(kind, spelling.piecewise_linear) for kind, spelling in ACTIVATIONS.items()]
    assert rows_of_cpp() == flat
    table = list(ACTIVATIONS)
    assert all(table[code] == kind for kind, code in codes_of_triton().items())


def test_the_worked_example_is_what_the_files_have() -> None:
    """The steps of docs/architecture.md, each with its file and the lines that it adds there."""
    steps = re.split(r"^\*\*(\d+)\. `(.*?)`", text_of("docs/architecture.md"), flags=re.M)[1:]
    numbers, files, bodies = steps[::3], steps[1::3], steps[2::3]
    assert list(map(int, numbers)) == list(range(1, 11))
    added = [re.findall(r"^\+(.*)$", body, re.M) for body in bodies]
    assert [i for i, lines in enumerate(added, 1) if not lines] == [10]
    for file, lines in zip(files, added, strict=True):
        # A row of a macro ends in a backslash unless it is the last.
        present = {line.rstrip("\\ ") for line in text_of(file).splitlines()}
        assert {line.rstrip("\\ ") for line in lines} <= present, file


def test_no_exception_is_out_of_date() -> None:
    assert set(WITHOUT_THIRD) <= set(ACTIVATIONS)
    assert not set(WITHOUT_THIRD) & set(ranges.THIRD)
