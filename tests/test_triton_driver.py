"""Every public call compiles, launches, and does so again without compiling or waiting.

Triton's own JIT, argument specialisation, launcher and caches for a real target, above a stub of
the CUDA driver (``stub_device.py``). What the kernels compute is the interpreter's to show.
"""

from __future__ import annotations

import ast
import ctypes
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import monokernel
from monokernel.backends.triton.launch import direct
from tests.stub_device import CALLS, build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")

ROOT = Path(__file__).parent.parent
KERNELS = Path(monokernel.__file__).parent / "backends" / "triton"
# sm_80 multiplies in another way than sm_90: the kernels are others, the host code is the same.
CASES = [("sm_90", name) for name in CALLS]
CASES += [("sm_80", name) for name in ("gradients of the inputs", "Jacobian in tangent mode")]
PROCESSES = 2

Turn = dict[str, Any]
Reports = dict[tuple[str, str], dict[str, Turn]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("driver"))
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def reports(library: Path, request: pytest.FixtureRequest) -> Reports:
    """What every call that a selected test asks for did, found by processes side by side."""
    asked: dict[tuple[str, str], None] = {}
    for item in request.session.items:
        if item.path == request.path and "reports" in getattr(item, "fixturenames", ()):
            callspec = getattr(item, "callspec", None)
            asked |= dict.fromkeys([callspec.params["case"]] if callspec else CASES)
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(library.parent / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("TRITON_INTERPRET", None)

    def ask(job: tuple[str, list[str]]) -> list[tuple[tuple[str, str], dict[str, Turn]]]:
        target, names = job
        command = [sys.executable, "-m", "tests.stub_device", str(library), "--target", target]
        ran = subprocess.run(
            [*command, "--calls", *names],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert ran.returncode == 0, ran.stderr
        found = [json.loads(line) for line in ran.stdout.splitlines()]
        return [((target, report.pop("name")), report) for report in found]

    jobs = []
    for target in dict.fromkeys(target for target, _ in asked):
        names = [name for t, name in asked if t == target]
        jobs += [(target, names[i::PROCESSES]) for i in range(min(PROCESSES, len(names)))]
    with ThreadPoolExecutor(PROCESSES) as pool:
        return dict(itertools.chain.from_iterable(pool.map(ask, jobs)))


every_call = pytest.mark.parametrize("case", CASES, ids="-".join)


@every_call
def test_compiles_and_launches(case: tuple[str, str], reports: Reports) -> None:
    for name in ("first", "again", "same"):
        turn = reports[case][name]
        assert not turn["error"], turn["error"]
        assert turn["launches"] > 0
    assert reports[case]["same"]["launches"] == reports[case]["first"]["launches"]


@every_call
def test_triton_is_asked_once_for_a_kind_of_launch(case: tuple[str, str], reports: Reports) -> None:
    """From then on the launcher gets what Triton would give it."""
    found = reports[case]["launcher"]
    assert found["differ"] == []
    ours, tritons, hooked, seen = found["launches"]
    assert ours == tritons == hooked == seen > 0
    assert found["asked"] == [0 if direct() else ours, ours, ours]
    assert found["streams"] == [7]


@every_call
def test_the_third_call_asks_nothing_of_python(case: tuple[str, str], reports: Reports) -> None:
    """And the driver gets what Triton would give it, in every bit that is not an address."""
    found = reports[case]["replayed"]
    if not found:
        pytest.skip("the operators were not built")
    assert found["why"] == found["asked"] == []
    assert found["own"] == found["tritons"]
    assert all(len(parameters) > 2 for _, _, parameters in found["own"])


@every_call
def test_other_rows_and_another_margin_compile_nothing(
    case: tuple[str, str], reports: Reports
) -> None:
    again = reports[case]["again"]
    assert not again["error"], again["error"]
    assert again["compiled"] == []


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case[1] != "audit"],  # whose report is the host's
    ids="-".join,
)
def test_the_host_neither_waits_nor_copies(case: tuple[str, str], reports: Reports) -> None:
    again = reports[case]["again"]
    assert not again["error"], again["error"]
    assert again["host"] == []


def _launched() -> Iterator[str]:
    """The names of the kernels that the host code launches anywhere."""
    for file in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                yield ast.unparse(node.args[0]).split(".")[-1]


def test_every_kernel_was_compiled(reports: Reports) -> None:
    kernels = set(_launched())
    assert len(kernels) > 10
    assert kernels == {name for turns in reports.values() for name in turns["first"]["compiled"]}


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [(name, ctypes.c_uint) for name in ("x", "y", "z", "bx", "by", "bz", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p)]
    _fields_ += [("count", ctypes.c_uint)]


@pytest.mark.parametrize(
    ("wrong", "refused"),
    [
        ({}, False),
        ({"x": 2**31 - 1, "shared": 1000}, False),
        ({"x": 0}, True),
        ({"x": 2**31}, True),
        ({"y": 65_536}, True),
        ({"z": 65_536}, True),
        ({"bx": 2048}, True),
        ({"shared": 1001}, True),
    ],
)
def test_the_stub_refuses_what_a_driver_refuses(
    library: Path, wrong: dict[str, int], refused: bool
) -> None:
    driver = ctypes.CDLL(str(library))
    driver.stub_card(90, 1000, 1)
    image = (ctypes.c_char * 64)(*b"no machine code")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), image) != 0
    image[:4], image[18] = b"\x7fELF", 190
    assert driver.cuModuleLoadData(ctypes.byref(module), image) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"kernel") == 0
    config = LaunchConfig(**{"x": 1, "y": 1, "z": 1, "bx": 128, "by": 1, "bz": 1} | wrong)
    params = (ctypes.c_void_p * 1)()
    driver.stub_forget()
    before = driver.stub_launches()
    result = driver.cuLaunchKernelEx(ctypes.byref(config), function, params, None)
    assert (result != 0) == refused
    assert driver.stub_launches() - before == (not refused)
