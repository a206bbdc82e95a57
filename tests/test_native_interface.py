"""The C interface of ``csrc/c_api.h`` as ``backends/native.py`` and ``csrc/boundary.cpp`` have it.

ctypes believes what it is told: an argument too many, or a field in another place, would be read as
something else.
"""

from __future__ import annotations

import re
from ctypes import Array, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest

from monokernel.activations import ACTIVATIONS
from monokernel.backends import cpu, native
from monokernel.nodes import RULES

CSRC = Path(__file__).resolve().parent.parent / "csrc"

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="the sources are not at hand")

SCALARS = {"int64_t": c_int64, "int": c_int, "double": c_double, "void": None}


def text_of(file: str) -> str:
    """Without comments."""
    return re.sub(r"//.*", "", (CSRC / file).read_text(encoding="utf-8"))


def as_ctypes(declared: str) -> Any:
    """The type that declares a result or an argument, which may have a name."""
    if "*" in declared:
        return c_char_p if declared.split("*")[0].split() == ["const", "char"] else c_void_p
    return SCALARS[declared.split()[0]]


def functions() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    found = {}
    for result, name, given in re.findall(r"([\w* ]+?)(mk_\w+)\(([^)]*)\);", text_of("c_api.h")):
        arguments = tuple([as_ctypes(a.strip()) for a in given.split(",") if a.strip()])
        found[name] = as_ctypes(result.strip()), arguments
    return found


def fields(struct: str) -> list[tuple[str, Any]]:
    (body,) = re.findall(rf"struct {struct} {{(.*?)}};", text_of("c_api.h"), re.DOTALL)
    found: list[tuple[str, Any]] = []
    for line in filter(None, (line.strip() for line in body.split(";"))):
        if "*" in line:
            found.append((line.split("*")[-1].split()[-1], c_void_p))
            continue
        kind, names = line.split(None, 1)
        for each in names.split(","):
            name, count = re.findall(r"(\w+)(?:\[(\d+)\])?", each)[0]
            found.append((name, SCALARS[kind] * int(count) if count else SCALARS[kind]))
    return found


def test_the_parser_sees_what_is_there() -> None:
    assert len(functions()) == text_of("c_api.h").count("mk_") - len(
        re.findall(r"mk_(?:parameter|shape|layer|piecewise)\b", text_of("c_api.h"))
    )
    assert as_ctypes("const char*") is c_char_p
    assert as_ctypes("const double* numbers") is c_void_p
    assert as_ctypes("void* const* saved") is c_void_p
    assert as_ctypes("double margin") is c_double


def test_functions() -> None:
    assert functions() == native.SIGNATURES


def test_the_structures() -> None:
    def plain(declared: Any) -> Any:
        return [(name, (t._type_, t._length_) if isinstance(t, type(Array)) else t)
                for name, t in declared]  # fmt: skip

    assert plain(native._Shape._fields_) == plain(fields("mk_shape"))
    assert plain(cpu._Layer._fields_) == plain(fields("mk_layer"))
    assert plain(cpu._Piecewise._fields_) == plain(fields("mk_piecewise"))


def test_what_the_operator_calls() -> None:
    boundary = text_of("boundary.cpp")
    (kernel,) = re.findall(r"struct Kernel {(.*?)};", boundary, re.DOTALL)
    assert tuple(re.findall(r"decltype\(&mk_(\w+)\)", kernel)) == cpu.CALLS
    counts = re.findall(r"(?:sizeof\(Kernel\) ==|copy_n\(addresses,) (\d+)", boundary)
    assert [int(n) for n in counts] == [len(cpu.CALLS)] * 2


def test_what_is_saved() -> None:
    """Of each row of x: as many buffers in ``Saved`` as the shape tells the sizes of."""
    (count,) = re.findall(r"max_saved = (\d+)", text_of("problem.h"))
    saved: Any = dict(native._Shape._fields_)["saved"]
    assert int(count) == saved._length_


@pytest.mark.skipif(cpu.isa() is None, reason="the native kernel was not built")
def test_kinds_of_nodes() -> None:
    """All that there are, first the activations."""
    library = native.library()
    assert not isinstance(library, str)
    names = list(native.codes_of(library))
    assert names[: len(ACTIVATIONS)] == list(ACTIVATIONS)
    assert sorted(names) == sorted(RULES)
    header = text_of("problem.h")
    (enum,) = re.findall(r"enum NodeKind : int64_t {(.*?)node_kinds", header, re.DOTALL)
    assert re.findall(r"node_(\w+)", enum) == names[len(ACTIVATIONS) :]
