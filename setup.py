"""Builds the native CPU kernel of ``csrc/`` into the package; all else is in pyproject.toml.

The library is optional: where it cannot be built, the installation goes on without it and leaves
the reason in ``monokernel/_native_build.txt``, which ``monokernel.plan`` shows. It needs a C++17
compiler with GCC's vector extensions (GCC, Clang) and neither PyTorch nor Python headers. Each
instruction set has a source file of its own with its own flags, and the library chooses among them
at run time, so a wheel runs on every processor of its architecture and with every Python 3.

Where PyTorch can be imported while building (``--no-build-isolation``), ``csrc/boundary.cpp`` and
``csrc/replay.cpp`` are built too, for that version of PyTorch: small steps are faster with them. No
other version opens them.

Environment: MONOKERNEL_NATIVE=0 builds without either, MONOKERNEL_CXXFLAGS adds flags to the
library's (tests/native/sanitize.sh builds with the sanitizers that way), MONOKERNEL_PYTORCHES is
a folder of folders with a PyTorch in each, for all of which the boundary is built (tools/wheel.py).

The links of the package are those of the clone it is built from (tools/address.py).
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "_native.so"  # opened with ctypes, so the same name on every system
BUILD_LOG = "_native_build.txt"
BOUNDARY = "_boundary_{}_{}.so"  # of PyTorch's major and minor version, as in backends/cpu.py
WITH_PYTORCH = ["csrc/boundary.cpp", "csrc/replay.cpp"]
HEADERS = sorted(str(p) for p in Path("csrc").glob("*.h"))

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # fused multiply-add
    "-fno-math-errno",
    "-fno-trapping-math",
    "-falign-functions=64",  # else whatever is edited moves the inner loops: 15 % of forward
    "-Wno-psabi",  # vectors never cross a boundary between instruction sets
]
# The flags of each source file. Every processor runs the baseline (SSE2, or NEON on aarch64).
SOURCES: dict[str, list[str]] = {
    "csrc/binding.cpp": [],
    "csrc/describe.cpp": [],
    "csrc/isa_baseline.cpp": [],
    "csrc/switches.cpp": [],
}
if platform.machine().lower() in ("x86_64", "amd64"):
    SOURCES["csrc/isa_avx2.cpp"] = ["-mavx2", "-mfma"]
    SOURCES["csrc/isa_avx512.cpp"] = [
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw")
    ]


class BuildNative(build_ext):
    """Compiles the sources in parallel, each with its flags; a failure is noted, not raised."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def run(self) -> None:
        in_place = bool(self.inplace)  # an editable install: setuptools copies the library, if any
        here = Path("monokernel")
        if in_place:
            for stale in (here / LIBRARY, here / BUILD_LOG, *here.glob(BOUNDARY.format("*", "*"))):
                stale.unlink(missing_ok=True)
        super().run()
        if in_place:
            built = Path(self.build_lib, "monokernel")
            for more in (*built.glob(BUILD_LOG), *built.glob(BOUNDARY.format("*", "*"))):
                shutil.copy2(more, here)

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        log = library.with_name(BUILD_LOG)
        log.parent.mkdir(parents=True, exist_ok=True)
        for stale in (library, log, *library.parent.glob(BOUNDARY.format("*", "*"))):
            stale.unlink(missing_ok=True)
        try:
            self._build(ext, library)
        except Exception as error:
            print(f"monokernel: goes without the native kernel: {_reason(error)}", file=sys.stderr)
            log.write_text(f"{_reason(error)}\n", encoding="utf-8")
            return
        try:
            for torch in _pytorches():
                self._build_boundary(torch, library.parent)
        except Exception as error:
            print(f"monokernel: goes without the C++ boundary: {_reason(error)}", file=sys.stderr)

    def _build(self, ext: Extension, library: Path) -> None:
        if os.environ.get("MONOKERNEL_NATIVE") == "0":
            raise RuntimeError("MONOKERNEL_NATIVE=0 was set when the package was built")
        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("the kernel needs GCC or Clang, found MSVC")
        more = shlex.split(os.environ.get("MONOKERNEL_CXXFLAGS", ""))

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=[*FLAGS, *SOURCES[source], *more],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for found in pool.map(compile_one, SOURCES) for o in found]
        linking = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" else []
        if linking and not more:
            linking.append("-s")  # symbols are for sanitizers and profilers
        self.compiler.link_shared_object(
            objects, str(library), extra_postargs=[*linking, *more], target_lang="c++"
        )

    def _build_boundary(self, torch: Path, folder: Path) -> None:
        version = re.search(r"__version__ = ['\"](\d+)\.(\d+)", (torch / "version.py").read_text())
        if version is None:
            raise RuntimeError(f"{torch / 'version.py'} does not say PyTorch's version")
        name = BOUNDARY.format(*version.groups())
        include = torch / "include"

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp, name)),
                include_dirs=[str(include), str(include / "torch" / "csrc" / "api" / "include")],
                extra_postargs=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-w"],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for found in pool.map(compile_one, WITH_PYTORCH) for o in found]
        self.compiler.link_shared_object(
            objects,
            str(folder / name),
            libraries=["torch_cpu", "c10"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=["-s"] if sys.platform == "linux" else [],
            target_lang="c++",
        )


class AnyPython(bdist_wheel):
    """Neither library knows anything of Python: one wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def _pytorches() -> list[Path]:
    """The PyTorch packages to build the boundary for: those listed, or the one that is here."""
    folder = os.environ.get("MONOKERNEL_PYTORCHES")
    if folder:
        return sorted(version.parent for version in Path(folder).glob("*/torch/version.py"))
    import torch  # in an isolated build there is none

    return [Path(torch.__file__).parent]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        text = f"no C++ compiler was found ({text})"
    return text if len(text) < 300 else text[:300] + " ..."


setup(
    ext_modules=[
        Extension(
            "monokernel._native", list(SOURCES), depends=HEADERS, language="c++", optional=True
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
    project_urls=runpy.run_path("tools/address.py")["links"](),
)
