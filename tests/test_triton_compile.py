"""The kernels compile for a device that is not here, and without spilling.

A quick part of the table that ``make kernels`` prints in full.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import monokernel

pytest.importorskip("triton")

KERNELS = Path(monokernel.__file__).parent / "backends" / "triton"


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Not under the interpreter, which compiles nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_shipped_configurations_compile() -> None:
    report = _python("-m", "tools.compile_report", "--quick")
    assert report.returncode == 0, report.stdout + report.stderr
    assert "whole_backward" in report.stdout
    assert "pairs_down" in report.stdout
    assert "no hinge" in report.stdout
    assert "N=1" in report.stdout
    assert "every kernel passes" in report.stdout


def _left_early(function: ast.FunctionDef) -> Iterator[int]:
    """The lines of branches that return a value and are followed by more."""
    for node in ast.walk(function):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for statement in block[:-1] if isinstance(block, list) else ():
                if isinstance(statement, ast.If):
                    returns = (n for n in ast.walk(statement) if isinstance(n, ast.Return))
                    if any(n.value is not None for n in returns):
                        yield statement.lineno


def test_nothing_follows_a_branch_that_returned() -> None:
    """Triton compiles it all the same, with pointers that are None in that branch."""
    functions = [
        (file.name, node)
        for file in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
    ]
    assert len(functions) > 40
    assert [(name, line) for name, f in functions for line in _left_early(f)] == []


@pytest.mark.parametrize("path", ["whole", "layered"])
def test_no_number_of_rows_compiles_anything_again(path: str) -> None:
    """But the hinge layer by layer, whose strides are those of a product."""
    code = f"""
import torch
from tools.compile_report import source_of
from tools.kernel_cases import Case, launches
for D, k, mode in ((1, 4, "adjoint"), (8, 1, "tangent")):
    compiled = []
    for N in (1, 37, 64, 4096):
        case = Case((8, 32, 32, D), "silu", k, mode, torch.float16, path="{path}", dx=True, N=N)
        calls = [c for c in launches(case, "sm_90") if c.kernel.__name__ != "hinge_slopes"]
        compiled.append([source_of(call)[0].hash() for call in calls])
    assert len(compiled[0]) > 3
    assert all(c == compiled[0] for c in compiled), mode
"""
    found = _python("-c", code)
    assert found.returncode == 0, found.stderr


def test_each_card_exponentiates_in_its_own_way() -> None:
    """Also where both are compiled for in one process: what is kept of a problem tells them
    apart."""
    code = """
import torch
from tools.compile_report import compiled_code
from tools.kernel_cases import Case, launches
for path in ("whole", "layered"):
    case = Case((8, 32, 1), "silu", 1, "adjoint", torch.float16, path=path)
    for target, how in (("sm_90", 1), ("gfx942", 0), ("sm_90", 1)):
        options = launches(case, target)[0].options
        act = options["ACTS"][0] if path == "whole" else options["ACT"]
        assert act[4] == how, (path, target, act)
call = launches(case, "sm_90")[0]
assert "ex2.approx.ftz" in compiled_code(call, "sm_90").intermediate["ptx"]
"""
    found = _python("-c", code)
    assert found.returncode == 0, found.stderr
