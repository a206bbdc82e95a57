"""``python -m tests.stub_device``: every public call through Triton's own JIT and launcher, with no
device.

Triton specialises the arguments, compiles machine code, builds its launcher and fills its caches as
it would on the card; the driver below it is a stub (``native/cuda_stub.c``) that runs nothing. The
tensors are the CPU's, and what the kernels should have written is whatever was in memory, so no
value means anything here. ``test_triton_driver.py`` starts this in a process of its own, since
Triton's interpreter is chosen when the kernels are defined, and judges what it prints.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from monokernel import MonotonePenalty, audit, fused_mono_penalty, value_and_jacobian
from tests.support import mlp, points
from tests.zoo import network

__all__ = ["CALLS", "build", "main", "stub_device"]

Call = Callable[[int, float], None]  # N rows, a margin
# The rows and the margin of the first call, and of those that must find everything compiled. Triton
# by itself compiles again for 1, for multiples of 16, and for addresses that are no multiple of it.
FIRST: list[tuple[int, float]] = [(130, 0.0)]
AGAIN = [(1003, 0.25), (64, -0.5), (1, 1.0), (0, 0.0)]
HALF = torch.float16


# --- the calls ----------------------------------------------------------------------------------

CALLS: dict[str, Call] = {}


def call(name: str, **options: Any) -> None:
    """Registers a step with the penalty under this name."""
    CALLS[name] = _step(**options)


def _step(
    d1: int = 3,
    k: int = 2,
    D: int = 1,
    hidden: tuple[int, ...] = (16,),
    dtype: torch.dtype = HALF,
    σ: nn.Module | None = None,
    last: nn.Module | None = None,
    bias: bool = True,
    precision: str = "highest",
    task: bool = True,
    slopes: bool = True,
    dx: bool = False,
    frozen: bool = False,
    shifted: bool = False,
    zoo: str = "",
    autocast: bool = False,
    weight: Callable[[int], Tensor | float] | None = None,
    of: Callable[..., Any] = fused_mono_penalty,
    **options: Any,
) -> Call:
    """Forward and backward. ``task`` and ``slopes`` say which of y and the penalty has a gradient,
    ``dx`` whether the inputs have one, ``frozen`` that the first layer has none; ``shifted`` that a
    weight lies at a multiple of 16 bytes and at none in turn; ``zoo`` names the network if it is no
    chain of layers."""

    def step(N: int, margin: float) -> None:
        once(N, margin)
        if shifted:
            weight = net[0].weight
            aligned, memory = weight.data, weight.data.new_zeros(weight.numel() + 1)
            weight.data = memory[1:].view(weight.shape)
            once(N, margin)
            weight.data = aligned

    def once(N: int, margin: float) -> None:
        x1, x2 = points(N, d1, k, dtype)
        if dx:
            x1.requires_grad_()
            x2.requires_grad_()
        given = dict(options)
        if of is fused_mono_penalty:
            given |= {"margin": margin, "return_output": task}
            if weight is not None:
                given["weight"] = weight(N)
        with _precision(precision), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = of(net, x1, x2, **given)
            y, out = found if isinstance(found, tuple) else (None, found)
            loss = torch.zeros((), dtype=torch.float32)
            if task and y is not None:
                loss = loss + y.float().square().sum()
            if slopes:
                loss = loss + out.float().sum()
            loss.backward()

    net = network(zoo, d1 + k, D, 16, dtype) if zoo else mlp(d1, k, D, hidden, σ, bias, last, dtype)
    if frozen:
        net[0].requires_grad_(False)
    return step


@contextmanager
def _precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield
    torch.set_float32_matmul_precision(before)


# The whole network in one kernel.
call("penalty alone", task=False, backend="triton")
call("penalty and output")
call("three layers", hidden=(16, 32))
call("the hinge squared, the mean", hinge="squared", reduction="mean")
call("each penalty", reduction="none", direction=(1, -1))
call("a number as weight", weight=lambda N: 2.0)
call("a weight for each constraint", weight=lambda N: torch.ones(1, 2))
call("a weight for each row", weight=lambda N: torch.ones(N, 1, 2))
call("a weight with a gradient", weight=lambda N: torch.ones(1, 2, requires_grad=True))
call("no gradient through the slopes", slopes=False)
call("gradients of the inputs", dx=True)
call("a frozen layer, no bias", frozen=True, bias=False)
call("tangent mode", D=2, k=1, mode="tangent")
call("several outputs in adjoint mode", D=2, k=1, mode="adjoint", σ=nn.ReLU())
call("one linear layer", hidden=())
call("bfloat16", dtype=torch.bfloat16, hidden=(24,))
call("autocast", dtype=torch.float32, autocast=True, hidden=(24,))
call("memory at any address", shifted=True)
call("TF32", dtype=torch.float32, precision="high")
call("Jacobian", of=value_and_jacobian)
call("Jacobian in tangent mode", D=2, k=1, of=value_and_jacobian)

# All layers in one kernel, their sums in another.
call("up to 128 units, one output", hidden=(72, 100, 72), hinge="squared")
call("up to 128 units, each penalty", hidden=(72, 72), k=1, reduction="none", bias=False)
call("up to 128 units, Jacobian", hidden=(72,), of=value_and_jacobian)
call("up to 128 units, penalty alone", hidden=(72, 72), task=False)

# Layer by layer.
call("strict float32", dtype=torch.float32, hidden=(16, 16))
call("strict float32, tangent mode", dtype=torch.float32, D=2, k=1, σ=nn.ReLU(), reduction="none")
call("strict float32, adjoint mode", dtype=torch.float32, D=2, k=1, mode="adjoint")
call("strict float32, gradients of the inputs", dtype=torch.float32, dx=True, last=nn.Softplus())
call("strict float32, Jacobian", dtype=torch.float32, of=value_and_jacobian)
call("wide", hidden=(144,), task=False, dx=True)
call("wide, Jacobian in tangent mode", hidden=(144,), D=2, k=1, of=value_and_jacobian)

# Node by node.
call("pre-norm", zoo="pre-norm LayerNorm", backend="triton")
call(
    "mixture of experts in tangent mode",
    zoo="mixture of experts",
    D=2,
    k=1,
    backend="triton",
    dx=True,
)
call("SwiGLU under autocast", zoo="SwiGLU", dtype=torch.float32, autocast=True, backend="triton")


def module(N: int, margin: float) -> None:
    """The module, whose margin is a plain attribute that may move."""
    MODULE.margin = margin
    y, penalty = MODULE(*points(N, 3, 2, HALF))
    (y.float().sum() + penalty).backward()


def audited(N: int, margin: float) -> None:
    """A first block of 256 rows, and one of N."""
    audit(MODULE.mlp, *points(256 + N, 3, 2, HALF), margin=margin)


MODULE = MonotonePenalty(mlp(3, 2, 1, (16,), dtype=HALF), weight=torch.ones(1, 2), direction=-1)
# Chains of any shape: which kernels they compile is a matter of many numbers at once.
CHAINS = st.fixed_dictionaries(
    {
        "d1": st.integers(1, 40),
        "k": st.integers(1, 5),
        "D": st.integers(1, 20),
        "hidden": st.lists(st.integers(1, 40), max_size=3).map(tuple),
        "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        "σ": st.sampled_from([nn.SiLU(), nn.ReLU(), nn.Mish(), nn.Softplus(1.5, 9.0)]),
        "last": st.sampled_from([None, nn.Sigmoid()]),
        "bias": st.booleans(),
        "precision": st.sampled_from(["highest", "high"]),
        "slopes": st.booleans(),
        "dx": st.booleans(),
        "mode": st.sampled_from(["tangent", "adjoint"]),
        "hinge": st.sampled_from(["linear", "squared"]),
        "reduction": st.sampled_from(["sum", "none"]),
    }
)


def drawn(N: int, margin: float) -> None:
    """Chains drawn at random, the same in every call. Each takes some seconds to compile."""

    @settings(max_examples=2, derandomize=True, database=None, deadline=None)
    @given(CHAINS)
    def call(options: dict[str, Any]) -> None:
        _step(**options, backend="triton")(N, margin)

    call()


CALLS |= {"module": module, "audit": audited, "drawn": drawn}


# --- the device that is none --------------------------------------------------------------------

SOURCE = Path(__file__).parent / "native" / "cuda_stub.c"


def build(folder: Path) -> Path:
    """The stub, compiled as Triton would compile its launcher. Raises a RuntimeError that says what
    is missing."""
    import triton

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler, which Triton needs for its launcher too")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise RuntimeError("no Python.h, which Triton needs for its launcher")
    built = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{built.name}", "-Wall", "-Wextra", "-Werror"]
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    places = ["-isystem", str(headers), "-o", str(built)]
    subprocess.run([compiler, *flags, *places, str(SOURCE)], check=True)
    return built


@contextmanager
def stub_device(library: Path, target: str) -> Iterator[ctypes.CDLL]:
    """CPU tensors count as a ``target``'s for Triton and for the package."""
    driver = ctypes.CDLL(str(library))  # before Triton looks for libcuda.so.1
    import triton
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver

    from monokernel import backends
    from monokernel.backends.triton.target import assumed
    from tools.kernel_cases import TARGETS

    card = TARGETS[target]
    capability = divmod(card.gpu.arch, 10)
    driver.stub_card(card.gpu.arch, card.shared, 132)
    knobs.nvidia.libcuda_path = str(library.parent)
    with (
        mock.patch.object(torch.cuda, "current_device", _always(0)),
        mock.patch.object(torch.cuda, "get_device_capability", _always(capability)),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _always(0), create=True),
        assumed(card.products),
        mock.patch.object(backends.load("triton"), "interpreting", _always(True)),
        mock.patch.dict(
            backends.BACKENDS, {"triton": backends.BACKENDS["triton"]._replace(device="cpu")}
        ),
    ):
        triton.runtime.driver.set_active(CudaDriver())
        yield driver


def _always(value: Any) -> Callable[..., Any]:
    """A function and no mock, a call of which takes longer than a launch."""

    def give(*_: object) -> Any:
        return value

    return give


class FromTheHost(TorchDispatchMode):
    """Notes what would make the host wait for a device, or copy to it: tensors made of host data
    and values read back."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.OPERATORS:
            here = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack()]
            place = [at for at in here if "/monokernel/" in at][-1:]
            self.seen.append(f"{name} {''.join(place)}")
        return func(*args, **(kwargs or {}))


def report(driver: ctypes.CDLL, name: str) -> dict[str, Any]:
    """What the first call and the later ones did."""
    from triton import knobs

    compiled: list[str] = []
    found: dict[str, Any] = {"name": name}

    def note(*, fn: Any, **_: Any) -> None:
        compiled.append(fn.name)

    knobs.runtime.jit_post_compile_hook = note
    for turn, calls in (("first", FIRST), ("again", AGAIN), ("same", FIRST)):
        before = driver.stub_launches()
        compiled.clear()
        error = ""
        with FromTheHost() as host:
            try:
                for N, margin in calls:
                    CALLS[name](N, margin)
            except Exception as failure:
                error = _told(failure)
        launches = driver.stub_launches() - before
        found[turn] = {
            "error": error,
            "launches": launches,
            "compiled": list(compiled),
            "host": host.seen,
        }
    found["launcher"] = by_both_ways(name)
    found["replayed"] = replayed(driver, name)
    return found


class Launcher:
    """Meanwhile, what reaches Triton's launcher in the first call again: which compiled kernel, its
    grid, stream and arguments; and how often Triton was asked for a kernel."""

    STREAM = 7

    def __init__(self, name: str) -> None:
        from triton import JITFunction
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.runtime import driver

        self.asked, self.calls = 0, list[tuple[Any, ...]]()
        find, start = JITFunction.run, CudaLauncher.__call__

        def asked(*args: Any, **options: Any) -> Any:
            self.asked += 1
            return find(*args, **options)

        def called(launcher: Any, *given: Any) -> None:
            place = (*given[:4], given[5])  # without the function, of which the stub has one
            self.calls.append((id(launcher), place, _shape_of(given[9:])))
            start(launcher, *given)

        with (
            mock.patch.object(JITFunction, "run", asked),
            mock.patch.object(CudaLauncher, "__call__", called),
            mock.patch.object(driver.active, "get_current_stream", _always(self.STREAM)),
        ):
            for N, margin in FIRST:
                CALLS[name](N, margin)


def _shape_of(value: Any) -> Any:
    """An argument, of a tensor what a kernel could be compiled for."""
    if isinstance(value, tuple):
        return tuple(map(_shape_of, value))
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    return value


def replayed(driver: ctypes.CDLL, name: str) -> dict[str, Any]:
    """What reaches the driver when Triton launches, beside when ``csrc/replay.cpp`` does; and of
    the step by that what it asked of Python, and why it has no plan."""
    from monokernel.backends import operators
    from monokernel.backends.triton import launch, replay
    from monokernel.backends.triton.recording import Recorder

    if operators.opened() is None:
        return {}
    asked, reasons = list[str](), list[str]()
    written, plan = replay._written, Recorder.plan

    def ask(*given: Any) -> Any:
        asked.append(given[0].__qualname__.split(".")[0])
        return written(*given)

    def say(recorder: Any, outputs: Any) -> Any:
        found = plan(recorder, outputs)
        reasons.extend([recorder.why] if recorder.why else [])
        return found

    def run() -> None:
        asked.clear()
        for N, margin in FIRST:
            CALLS[name](N, margin)

    with (
        mock.patch.object(replay, "_written", ask),
        mock.patch.object(Recorder, "plan", say),
    ):
        with mock.patch.object(launch, "watched", _always(True)):
            tritons = _logged(driver, run)
        for _ in range(2):
            run()
        own = _logged(driver, run)
    return {"tritons": tritons, "own": own, "asked": asked, "why": reasons}


def _logged(driver: ctypes.CDLL, run: Callable[[], None]) -> list[list[Any]]:
    """The driver's log: of each launch which kernel, its grid, block, shared memory and stream, and
    its parameters. In place of an address of a parameter of a network stands which, of any other
    memory what a kernel could be compiled for."""
    driver.stub_log.restype = ctypes.POINTER(ctypes.c_uint64)
    size = ctypes.c_long()
    driver.stub_forget()
    run()
    numbers = iter(driver.stub_log(ctypes.byref(size))[: size.value])
    parameters = {
        t.data_ptr(): f"parameter {i}"
        for i, t in enumerate(t for t in gc.get_objects() if type(t) is nn.Parameter)
    }

    def named(value: int) -> Any:
        if value < 1 << 36:  # a number, or a float32's bits
            return value
        return parameters.get(value, f"memory at {value % 16}")

    found = []
    for kernel in numbers:
        place = [next(numbers) for _ in range(6)]
        found.append([kernel, place, [named(next(numbers)) for _ in range(next(numbers))]])
    return found


def by_both_ways(name: str) -> dict[str, Any]:
    """What is launched directly beside what Triton launches when it is asked each time, and when a
    hook looks on."""
    from monokernel.backends.triton import launch

    with mock.patch.object(launch, "watched", _always(True)):  # by Python
        return _by_both_ways(name)


def _by_both_ways(name: str) -> dict[str, Any]:
    from triton import knobs

    from monokernel.backends.triton import launch

    own = Launcher(name)
    with mock.patch.object(launch, "specialised", None):
        tritons = Launcher(name)
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    hooked = Launcher(name)
    knobs.runtime.launch_enter_hook.remove(hook)
    return {
        "asked": [own.asked, tritons.asked, hooked.asked],
        "launches": [len(own.calls), len(tritons.calls), len(hooked.calls), len(seen)],
        "differ": [
            [repr(a[1:]), repr(b[1:])]
            for a, b in zip(own.calls, tritons.calls, strict=False)
            if a != b
        ],
        "streams": sorted({place[3] for _, place, _ in own.calls}),
    }


def _told(failure: BaseException | None) -> str:
    """The failure and what it came of; Triton says what is wrong with a kernel in the last."""
    if failure is None:
        return ""
    return "".join(traceback.format_exception_only(failure)) + _told(failure.__cause__)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.stub_device", description=__doc__)
    parser.add_argument("library", type=Path, help="the stub, compiled as libcuda.so.1")
    parser.add_argument("--target", default="sm_90", choices=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=list(CALLS))
    options = parser.parse_args(arguments)
    with stub_device(options.library, options.target) as driver:
        for name in options.calls:
            print(json.dumps(report(driver, name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
