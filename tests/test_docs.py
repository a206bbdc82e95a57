"""Every Python block of README and docs runs, and the pages say what the code has."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import monokernel

ROOT = Path(__file__).parents[1]
PACKAGE = Path(monokernel.__file__).parent  # elsewhere where it was installed from a wheel
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
# Of LaTeX, in formulas: each was looked at on the site.
COMMANDS = set(
    """alpha bar beta begin cdot circ dot end exp frac gt hat infty kappa lambda langle ldots le
    left log lt mathbf mathrm mu nabla ne ni partial pi pm qquad rangle rho right sigma subset
    sum tau text theta top varepsilon""".split()  # noqa: SIM905
)


def given() -> dict[str, Any]:
    """What a page may take for granted: a network, a batch, an optimizer."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 2))
    return {
        "__name__": "page",
        "torch": torch,
        "nn": nn,
        "mlp": mlp,
        "x1": torch.randn(32, 4),
        "x2": torch.randn(32, 2),
        "target": torch.randn(32, 2),
        "optimizer": torch.optim.Adam(mlp.parameters()),
        **{name: getattr(monokernel, name) for name in monokernel.__all__},
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From top to bottom in one namespace, line numbers of the page in the traceback."""
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    if any("plot_audit" in b[1] or "matplotlib" in b[1] for b in blocks):
        pytest.importorskip("matplotlib")
    for package in ("sklearn", "pandas"):
        if any(package in b[1] for b in blocks):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = given()
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


def test_blocks_are_found() -> None:
    """A page whose fences are spelled otherwise would pass unread."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^[ ]*(?:```|~~~)[ ]*(?:py|python)\b.*$", text, re.M | re.I)
        assert len(fences) == len(BLOCK.findall(text)), page


def test_every_environment_variable_has_its_line() -> None:
    source = [p for folder in (PACKAGE, ROOT / "csrc") for p in folder.rglob("*.*")]
    read: set[str] = set()
    for path in (ROOT / "setup.py", *source):
        if path.suffix in (".py", ".h", ".cpp", ".cu"):
            read |= set(re.findall(r"""["'](MONOKERNEL_[A-Z0-9_]+)["']""", path.read_text()))
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(MONOKERNEL_\w+)`", page)) == read


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: monokernel\.\w+\.(\w+)$", page, re.M))
    tables = {"MonotoneClassifier", "MonotoneRegressor"}  # of an optional dependency
    assert listed == set(monokernel.__all__) - {"__version__"} | tables


def test_the_reference_can_be_read_as_a_file() -> None:
    """Each name in one line with a link to where it is defined, each argument of the penalty."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| \[`(\w+)`\]\(\.\./(\S+)\) \| \S", page, re.M)
    listed = re.findall(r"^::: monokernel\.\w+\.(\w+)$", page, re.M)
    assert sorted(name for name, _ in lines) == sorted(listed)
    for name, path in lines:
        source = PACKAGE.parent.joinpath(path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.M), name
    arguments = re.findall(r"^\| `(\w+)` \|", page, re.M)
    known = list(inspect.signature(monokernel.fused_mono_penalty).parameters)
    assert arguments == known[known.index("direction") :]


def test_a_code_host_renders_every_formula() -> None:
    """Between ``$`` nothing that Markdown reads otherwise, in all formulas known commands alone."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        displayed = re.findall(r"^```math\n(.*?)^```", text, re.M | re.S)
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)
        inline = re.findall(r"\$(\S|\S[^$\n]*?\S)\$(?!\w)", text)
        assert text.count("$") == 2 * len(inline), page
        for formula in inline:
            assert not re.search(r"\\[^a-zA-Z]|[|*<>]|[})]_", formula), (page, formula)
        for formula in inline + displayed:
            assert set(re.findall(r"\\([a-zA-Z]+)", formula)) <= COMMANDS, (page, formula)
            assert formula.count("{") == formula.count("}"), (page, formula)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not re.match(r"[a-z]+:", target):
                place = page.parent / target
                if target.startswith("../monokernel/"):
                    place = PACKAGE.parent / target.removeprefix("../")
                assert place.exists(), f"{page.name}: {target}"


def test_site_builds(tmp_path: Path) -> None:
    """Only where mkdocs is installed, which `make docs` does and the tests do not ask for."""
    for package in ("mkdocstrings", "latex2mathml", "ziamath"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert all(
        f'id="monokernel.{name}' in api for name in ("api.fused_mono_penalty", "audit.audit")
    )
    shown = (tmp_path / "mathematics.html").read_text(encoding="utf-8")
    assert shown.count("<math") > 200
    assert not re.search(r"\$|```|\\[a-z]", shown)
    assert (tmp_path / "math.ttf").exists()
