"""``python -m monokernel``: what is installed and what serves here, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib import metadata
from typing import cast

import torch
from torch import nn

from . import __version__
from .api import fused_mono_penalty
from .arguments import AskedBackend
from .backends import BACKENDS, cpu, load, native
from .planning import plan

__all__ = ["main"]

WORKS = 1e-3  # relative, of a penalty and its gradient, in any precision of products


def main() -> None:
    """Prints one line for each fact."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the library is missing is said below
        for name, fact in (*_versions(), *_machine(), *_native(), *_environment(), *_serving()):
            print(f"{name:<15} {fact}")


def _versions() -> list[tuple[str, str]]:
    found = [("monokernel", __version__), ("python", sys.version.split()[0])]
    found += [("torch", str(torch.__version__)), *((n, _version(n)) for n in ("triton", "numpy"))]
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("processor", f"{cores} cores, {torch.get_num_threads()} threads of PyTorch"),
    ]
    if not torch.cuda.is_available():
        return [*found, ("gpu", "none")]
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(("gpu", f"{torch.cuda.get_device_name(i)}, {major}.{minor}, {toolkit}"))
    return found


def _native() -> list[tuple[str, str]]:
    return [
        ("native kernel", cpu.missing() or str(native.path())),
        ("instructions", cpu.isa() or "none"),
        ("boundary", cpu.boundary()),
    ]


def _environment() -> list[tuple[str, str]]:
    names = sorted(n for n in os.environ if n.startswith("MONOKERNEL_"))
    names += [n for n in ("TRITON_INTERPRET", "OMP_NUM_THREADS") if n in os.environ]
    return [("environment", f"{name}={os.environ[name]}") for name in names]


def _serving() -> list[tuple[str, str]]:
    """Of each backend whether a small step of it agrees with the reference, or why there is
    none."""
    found = []
    for name, record in BACKENDS.items():
        device = record.device or "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            device = "cpu"  # where Triton's interpreter may serve
        found.append((f"backend {name}", _tried(cast(AskedBackend, name), device)))
    return found


def _tried(backend: AskedBackend, device: str) -> str:
    try:
        load(backend)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2)).to(device)
        x = torch.randn(8, 4, device=device)
        asked = (0, 1, 0, -1)
        found = plan(net, x, direction=asked, backend=backend)
        if not found.serves:
            return found.error.partition("cannot serve: ")[2] or found.error
        steps = []
        both: tuple[AskedBackend, ...] = (backend, "reference")
        for by in both:
            y, penalty = fused_mono_penalty(
                net, x, direction=asked, margin=1.0, return_output=True, backend=by
            )
            loss = y.square().mean() + penalty
            steps.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
        for got, want in zip(*steps, strict=True):
            apart = (got - want).abs().max() / want.abs().max().clamp(min=1e-6)
            if not apart <= WORKS:
                return f"WRONG: a small step is {apart.item():.1e} from the reference"
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}".partition("\n")[0]
    return f"serves on {device}: a small step agrees with the reference"


if __name__ == "__main__":
    main()
