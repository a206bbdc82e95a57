"""What the workflows run is there: they run on a code host alone, where a wrong name costs a push.

Read as text, so that no parser of YAML is needed; where there is one, it reads them too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import monokernel
from tests.support import text_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(monokernel.__file__).parent.parent  # elsewhere where it was installed from a wheel
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(p.name for p in FOLDER.glob("*.yml"))
# Modules that a workflow or requirements/wheel.txt installs.
INSTALLED = {"build", "cibuildwheel"}


def commands(name: str) -> list[str]:
    """The lines of every ``run:``, a block's as they are."""
    text = text_of(f".github/workflows/{name}")
    found = re.findall(r"^ *(?:- )?run: (?!\|)(.+)$", text, re.M)
    for indent, block in re.findall(r"^( *)(?:- )?run: \|\n((?:\1 +.*\n)+)", text, re.M):
        found += [line.removeprefix(indent).strip() for line in block.splitlines()]
    return found


def test_commands_are_found() -> None:
    assert "make lint PYTHON=python" in commands("lint.yml")
    assert "mkdir -p build" in commands("tests.yml")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_it_runs_is_there(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.M))
    for command in commands(name):
        for target in re.findall(r"\bmake ([a-z]+)", command):
            assert target in targets, command
        for module in re.findall(r"\bpython -m (\w+)", command):
            assert module in INSTALLED or (ROOT / module).exists(), command
        for path in re.findall(r"(?<![\w./-])(?:requirements|monokernel|tools)/[\w./]+", command):
            assert (PACKAGE if path.startswith("monokernel/") else ROOT).joinpath(path).exists()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_it_calls_and_waits_for_is_there(name: str) -> None:
    text = text_of(f".github/workflows/{name}")
    jobs = set(re.findall(r"^  (\w+):", text.split("\njobs:\n")[1], re.M))
    waited = re.findall(r"^    needs: \[?(.*?)\]?$", text, re.M)
    assert {job for line in waited for job in line.split(", ")} <= jobs
    for path in re.findall(r"uses: \./(\S+)", text):
        assert "\n  workflow_call:\n" in text_of(path), path
    steps = re.findall(r"uses: (?!\./)(\S+)", text)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@\S+", step) for step in steps)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_it_downloads_was_uploaded(name: str) -> None:
    """By itself or by what it calls: artifacts are named, by a pattern or in full."""
    text = text_of(f".github/workflows/{name}")
    called = "".join(text_of(path) for path in re.findall(r"uses: \./(\S+)", text))
    upload = r"upload-artifact@\S+\n\s+with:\n\s+name: (\S+)"
    uploaded = set(re.findall(upload, text + called))
    for asked in re.findall(r"download-artifact@\S+\n\s+with:\n\s+(?:name|pattern): (\S+)", text):
        start = asked.removesuffix("*")
        assert any(n.startswith(start) if "*" in asked else n == start for n in uploaded), asked


@pytest.mark.parametrize(
    "path", [str(p.relative_to(ROOT)) for p in sorted((ROOT / ".github").rglob("*.yml"))]
)
def test_it_can_be_parsed(path: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(text_of(path)), dict)
