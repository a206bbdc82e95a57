"""What the repository says of itself in several places is the same in all; a wheel is checked."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import monokernel
from monokernel.backends import cpu

tomllib: Any = pytest.importorskip("tomllib")

from tests.support import text_of  # noqa: E402
from tools import wheel  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(text_of("pyproject.toml"))["project"]
    return found


def test_the_versions_that_are_tested() -> None:
    """In the README, the workflow, the window of the wheels, and what an installation asks for."""
    page = re.findall(
        r"^\| (3\.\d+) \| (2\.\d+\.\d+) \(.*?\) \| (\d+\.\d+) \|", text_of("README.md"), re.M
    )
    workflow = re.findall(
        r'- { python: "(.*?)", pytorch: "(.*?)", triton: "(.*?)" }',
        text_of(".github/workflows/tests.yml"),
    )
    assert page == workflow
    window = wheel.window()
    assert sorted({version.rpartition(".")[0] for _, version, _ in page}) == window
    assert f"torch>={window[0]}" in project()["dependencies"]
    pythons = [python for python, *_ in page]
    assert project()["requires-python"] == f">={pythons[0]}"
    classifiers = [c for c in project()["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert classifiers == [f"Programming Language :: Python :: {python}" for python in pythons]


def test_the_changelog_has_every_public_name_and_the_version() -> None:
    page = text_of("CHANGELOG.md")
    names = set(re.findall(r"`(?:python -m )?(\w+)", page))
    assert not set(monokernel.__all__) - {"__version__"} - names
    version, day = re.findall(r"^## (\d+\.\d+\.\d+) \((.*?)\)$", page, re.M)[0]
    assert version == monokernel.__version__
    citation = text_of("CITATION.cff")
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {day}\n" in citation


def test_lint_is_one_thing() -> None:
    """At exact versions; a commit and the workflow run the same target."""
    pinned = re.findall(r"^(ruff|mypy|clang-format)==", text_of("requirements/dev.txt"), re.M)
    assert sorted(pinned) == ["clang-format", "mypy", "ruff"]
    assert re.findall(r"entry: (.*)", text_of(".pre-commit-config.yaml")) == ["make lint"]
    assert re.findall(r"- run: (make \w+)", text_of(".github/workflows/lint.yml")) == ["make lint"]


def test_the_contract_of_a_wheel_s_tests_is_there() -> None:
    sources = wheel.configuration()["cibuildwheel"]["test-sources"]
    assert "monokernel" not in sources
    assert all((ROOT / name).exists() for name in sources)


NATIVE, FOR_213 = "monokernel/_native.so", "monokernel/_boundary_2_13.so"


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        ("py3-none-manylinux_2_28_x86_64", [NATIVE, FOR_213], None),
        ("py3-none-macosx_14_0_arm64", [NATIVE, FOR_213], None),
        ("py3-none-linux_x86_64", [NATIVE, FOR_213], "expected a repaired wheel"),
        ("cp312-cp312-manylinux_2_28_x86_64", [NATIVE, FOR_213], "expected the tag py3-none"),
        ("py3-none-manylinux_2_28_x86_64", [FOR_213], "expected the libraries"),
        ("py3-none-manylinux_2_28_x86_64", [NATIVE], "expected the libraries"),
        (
            "py3-none-manylinux_2_28_x86_64",
            [NATIVE, FOR_213, "monokernel.libs/libtorch_cpu-1.so"],
            "expected the libraries",
        ),
        ("py3-none-manylinux_2_28_x86_64", [NATIVE, FOR_213, "tests/x.py"], "the package alone"),
        ("py3-none-musllinux_1_2_x86_64", [NATIVE, FOR_213], "expected the libraries"),
    ],
)
def test_what_a_wheel_has_to_hold(
    name: str, files: list[str], sentence: str | None, tmp_path: Path
) -> None:
    path = tmp_path / f"monokernel-0.1.0-{name}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in ["monokernel/__init__.py", "monokernel-0.1.0.dist-info/WHEEL", *files]:
            archive.writestr(file, "")
    if sentence is None:
        wheel.check(path, ["2.13"])
    else:
        with pytest.raises(SystemExit, match=sentence):
            wheel.check(path, ["2.13"])


@pytest.mark.skipif(cpu.isa() is None, reason="the native kernel was not built")
def test_on_musl_the_library_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which needs no PyTorch: that has no wheels there."""
    path = tmp_path / "monokernel-0.1.0-py3-none-musllinux_1_2_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(Path(monokernel.__file__).parent / "_native.so", NATIVE)
    wheel.check(path, ["2.13"])
    assert f"{NATIVE} opens" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gcc", "c++", "x86_64-linux-gnu-g++-12", "clang-19", "cc"])
def test_compilers_are_known(name: str) -> None:
    assert wheel.COMPILER.fullmatch(name)


@pytest.mark.parametrize("name", ["python3", "ccache-stats", "bash", "env", "gccgo-doc", "git"])
def test_and_nothing_else_is_one(name: str) -> None:
    assert not wheel.COMPILER.fullmatch(name)


def test_the_architecture_has_a_place_for_every_module() -> None:
    page = text_of("docs/architecture.md")
    package = Path(monokernel.__file__).parent
    modules = {p.stem for p in package.glob("*.py") if not p.stem.startswith("_")}
    assert modules
    assert not {name for name in modules if f"`{name}.py`" not in page}


def test_the_native_page_has_a_place_for_every_file() -> None:
    page = text_of("docs/native.md")
    files = {p.name for p in (ROOT / "csrc").iterdir() if p.is_file()}
    assert not {name for name in files if f"`{name}`" not in page}


SCREEN = 60  # lines


def long_functions(text: str) -> Iterator[str]:
    """Those whose body, without a docstring, is longer than a screen; kernels are not asked."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        start = node.body[ast.get_docstring(node) is not None :] or node.body
        assert node.end_lineno is not None
        if node.end_lineno - start[0].lineno + 1 > SCREEN:
            yield node.name


def test_no_function_is_longer_than_a_screen() -> None:
    home = Path(monokernel.__file__).parent
    folders = [home, *(ROOT / name for name in ("benchmarks", "examples", "tests", "tools"))]
    found = {
        f"{p.name}: {f}"
        for folder in folders
        for p in folder.rglob("*.py")
        for f in long_functions(p.read_text("utf-8"))
    }
    assert not found


def test_a_long_function_is_found_and_a_kernel_is_none() -> None:
    body = '    """What it is for."""\n' + "    x = 1\n" * (SCREEN + 1)
    assert list(long_functions(f"def f(\n    x,\n):\n{body}")) == ["f"]
    assert not list(long_functions(f"def f():\n{body[: -len('    x = 1') - 1]}"))
    assert not list(long_functions(f"@triton.jit\ndef f():\n{body}"))
