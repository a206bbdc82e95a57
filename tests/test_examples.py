"""The examples run as a reader would run them and show what they claim."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_diabetes_violations_go_at_no_loss_of_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "diabetes.py", "--out", picture],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(
        r"^(with|without) penalty +([\d.]+) +([\d.]+)% +([\d.]+)% +(\S+)$", run.stdout, re.M
    )
    results = {name: [float(number) for number in numbers] for name, *numbers in found}
    assert results["without"][1] > 5.0
    assert results["with"][1] < 0.1  # per cent of the slopes
    assert results["with"][2] == 0.0  # per cent of the quantiles that cross
    assert results["with"][0] < 1.02 * results["without"][0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_training_ends_with_a_proof() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "until_proved.py", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^unconstrained: violated", run.stdout, re.M)
    assert re.search(r"^proved, held-out", run.stdout, re.M)
    assert "PROVED: direction * dy/dx >= 0 everywhere in the box" in run.stdout


def test_monotone_by_construction_beside_a_penalty_and_trees(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "monotone.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(r"^(\w+) +(-?[\d.]+) +([\d.]+)% +(-?[\d.]+) ", run.stdout, re.M)
    results = {name: (float(fit), float(rate), float(worst)) for name, fit, rate, worst in found}
    assert results["network"][1] > results["penalty"][1] > 0
    assert results["Monotone"][1] == 0
    assert results["Monotone"][2] >= 0
    assert results["Monotone"][0] > 0.4


@pytest.mark.parametrize(("name", "most"), [("credit.py", 12), ("credit_torch.py", 25)])
def test_credit_from_the_file_to_the_audit(name: str, most: int) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("pandas")
    file = ROOT / "examples" / name
    lines = file.read_text(encoding="utf-8").splitlines()
    first, last = (
        next(i for i, line in enumerate(lines) if line.startswith(start))
        for start in (
            "table = pd.read_csv",
            "print(audit(" if "torch" in name else "print(model.audit(",
        )
    )
    assert last + 1 - first <= most
    run = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    rates = re.findall(r"([\d.]+)% of the constrained slopes violate", run.stdout)
    assert len(rates) == 2
    assert all(float(rate) < 5 for rate in rates)
    measure, value = re.findall(r"^held-out ([\w ]+) ([\d.]+)$", run.stdout, re.M)[0]
    assert float(value) > 0.7 if measure == "AUC" else float(value) < 0.6
