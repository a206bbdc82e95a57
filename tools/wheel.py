"""The wheels of a release: what they are built for, what they have to hold, and their tests.

    python -m tools.wheel pytorches     a PyTorch of each minor version of the window, under build/
    python -m tools.wheel check WHEEL   its tag, the library and the boundaries, and nothing else
    python -m tools.wheel test WHEEL    the tests, from the wheel alone, where there is no compiler

``make wheel`` does the last two to a wheel of this machine and its PyTorch; cibuildwheel, by its
table in pyproject.toml, the first two to those of a release.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTORCHES = ROOT / "build" / "pytorches"  # MONOKERNEL_PYTORCHES of a release's build
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
LIBRARY = "monokernel/_native.so"
COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|cpp|c89|c99|tcc|nvcc)(-[\d.]+)?")


def configuration() -> dict[str, Any]:
    """The tables of pyproject.toml that belong to tools."""
    import tomllib

    tables: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    return tables


def window() -> list[str]:
    """The minor versions of PyTorch that a release is built for."""
    versions: list[str] = configuration()["monokernel"]["pytorch"]
    return versions


def fetch_pytorches() -> None:
    for minor in window():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        command += ["--extra-index-url", CPU_BUILDS, "--target", str(PYTORCHES / minor)]
        subprocess.run([*command, f"torch=={minor}.*"], check=True)


def check(wheel: Path, minors: list[str]) -> None:
    """Ends the program with what is wrong. On musl is no PyTorch, so no boundary to one."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    if (python, abi) != ("py3", "none"):
        raise SystemExit(f"{wheel.name}: expected the tag py3-none, got {python}-{abi}")
    if not re.match(r"(manylinux|musllinux|macosx)_", platform):
        raise SystemExit(f"{wheel.name}: expected a repaired wheel, got the platform {platform}")
    musl = platform.startswith("musllinux")
    wanted = {LIBRARY}
    if not musl:
        wanted |= {f"monokernel/_boundary_{minor.replace('.', '_')}.so" for minor in minors}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        found = {name for name in names if re.search(r"\.(so|dylib)[\d.]*$", name)}
        if found != wanted:
            raise SystemExit(
                f"{wheel.name}: expected the libraries {sorted(wanted)}, got {sorted(found)}"
            )
        others = [n for n in names if not re.match(r"monokernel(/|-[\d.]+\w*\.dist-info/)", n)]
        if others or "monokernel/_native_build.txt" in names:
            raise SystemExit(f"{wheel.name}: expected the package alone, got also {others}")
        if musl:
            _load(archive)
    print(f"{wheel.name}: {', '.join(sorted(found))}")


def _load(archive: zipfile.ZipFile) -> None:
    """Opens the library, which needs no PyTorch for that."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(archive.extract(LIBRARY, folder))
        library.mk_isa.restype = ctypes.c_char_p
        print(f"{LIBRARY} opens, and takes {library.mk_isa().decode()}")


def test(wheel: Path, options: list[str]) -> None:
    """In a new environment with what the tests need, beside copies of what they read."""
    with tempfile.TemporaryDirectory(prefix="monokernel-wheel-") as folder:
        environment, source = Path(folder, "environment"), Path(folder, "source")
        venv.create(environment, with_pip=True, symlinks=True)
        python = str(environment / "bin" / "python")
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(ROOT / "requirements" / "dev.txt")], check=True)
        subprocess.run([*pip, "--no-deps", str(wheel.resolve())], check=True)
        for name in configuration()["cibuildwheel"]["test-sources"]:
            place = source / name
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, place)
        variables = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
        variables["PATH"] = os.pathsep.join([str(environment / "bin"), _no_compiler(folder)])
        where = [python, "-c", "import monokernel; print(monokernel.__file__)"]
        subprocess.run(where, check=True, cwd=source, env=variables)
        subprocess.run([python, "-m", "pytest", *options], check=True, cwd=source, env=variables)


def _no_compiler(folder: str) -> str:
    """A folder of links to all programs on the path that are no compiler."""
    programs = Path(folder, "programs")
    programs.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            link = programs / program.name
            if not COMPILER.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(program)
    return str(programs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tools.wheel")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("pytorches")
    of_check, of_test = commands.add_parser("check"), commands.add_parser("test")
    of_check.add_argument("wheel", type=Path, nargs="+")
    of_check.add_argument("--pytorch", nargs="+", help="minor versions; else those of the window")
    of_test.add_argument("wheel", type=Path)
    of_test.add_argument("options", nargs="*", help="pytest's")
    asked = parser.parse_args()
    if asked.command == "pytorches":
        fetch_pytorches()
    elif asked.command == "check":
        for wheel in asked.wheel:
            check(wheel, asked.pytorch or window())
    else:
        test(asked.wheel, asked.options)


if __name__ == "__main__":
    main()
