"""``python -m benchmarks.gpu``: the training step on a GPU, unattended, in under eight minutes.

Plain steps (eager, compiled, as a CUDA graph), the usual ways to the penalty, and monokernel in
each precision. Cases come in the order of their importance; what the time limit leaves undone is
said.
One row for each contender is appended to ``results/gpu.csv``: times, peak memory, and the share of
the roofline, of three ceilings (tensor cores, memory bandwidth, special functions) the one that
binds. Before anything is timed a contender's loss and gradient are compared with float64.

Compiling is most of the work: before the first case, processes on every core compile what will be
timed, and what they find is in the caches of Triton and Inductor when its turn comes. Then each
contender of a case takes steps until it compiles nothing more, and only then does the clock begin.
``--no-jax`` leaves JAX out, which keeps no such cache.

``--device cpu --limit 20`` runs a few small cases without a GPU, to see that the program works; its
numbers are printed and not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monokernel import fused_mono_penalty, plan, value_and_jacobian

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
FREE, HIDDEN = 8, 3
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}
# Error of loss and gradient against float64 beyond which a contender's time does not count.
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1, "fp16": 3e-2}


@dataclass(frozen=True)
class Case:
    """N rows, three hidden layers of ``width``, D outputs that must rise with k inputs."""

    precision: str
    N: int
    width: int
    D: int
    k: int
    share: float
    kind: str = "silu"

    def __str__(self) -> str:
        return (
            f"{self.precision} N={self.N} width={self.width} D={self.D} k={self.k} "
            f"{self.kind} v={self.share:g}"
        )

    @property
    def tangent(self) -> bool:
        return self.D > 1 and self.k <= self.D

    @property
    def products(self) -> float:
        """Products per hidden layer that the task and the penalty need (the cost table)."""
        v, D, k = self.share, self.D, self.k
        if self.tangent:
            return 3 + k + 2 * k * v
        return 3 + 3 * v if D == 1 else 3 + D + 2 * D * v


def cases() -> Iterator[Case]:
    """What the project promises first, then the grid along one axis at a time."""
    base = Case("bf16", 65536, 64, 1, 1, 0.05)
    for precision in ("tf32", "bf16"):
        yield replace(base, precision=precision)
        yield replace(base, precision=precision, width=128)
        yield replace(base, precision=precision, N=1024)
        yield replace(base, precision=precision, width=1024)
        yield replace(base, precision=precision, width=128, D=8)
    for share in (0.0, 1.0):
        yield replace(base, share=share)
        yield replace(base, share=share, width=128)
        yield replace(base, share=share, width=1024)
    for N in (1 << 20, 1 << 22):
        yield replace(base, N=N)
        yield replace(base, N=N, width=128)
    for precision in ("fp16", "fp32"):
        yield replace(base, precision=precision)
        yield replace(base, precision=precision, width=128)
    for width in (32, 256, 512, 2048):
        yield replace(base, width=width)
    yield replace(base, k=4)
    yield replace(base, k=4, width=128)
    yield replace(base, k=4, width=1024)
    yield replace(base, D=8, k=4)
    yield replace(base, kind="relu")
    yield replace(base, kind="relu", width=128)
    yield replace(base, N=4096)
    yield replace(base, N=16384)


def small_cases() -> Iterator[Case]:
    """For a machine without a GPU."""
    yield Case("fp32", 256, 16, 1, 1, 0.05)
    yield Case("fp32", 256, 16, 2, 1, 1.0)


def network(case: Case) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = FREE + case.k
    for _ in range(HIDDEN):
        layers += [nn.Linear(width, case.width), nn.SiLU() if case.kind == "silu" else nn.ReLU()]
        width = case.width
    return nn.Sequential(*layers, nn.Linear(width, case.D))


class Job:
    """A case's network and data, and the float64 truth on a part of the rows."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        dtype, _ = PRECISIONS[case.precision]
        self.net = network(case).to(device, dtype)
        exact = network(case).to(device, torch.float64)
        exact.load_state_dict(self.net.state_dict())
        self.x1 = torch.randn(case.N, FREE, device=device).to(dtype)
        self.x2 = torch.randn(case.N, case.k, device=device).to(dtype)
        self.target = torch.randn(case.N, case.D, device=device).to(dtype)
        self.rows = min(case.N, 2048)  # of the truth
        x1, x2 = (t[: self.rows].double() for t in (self.x1, self.x2))
        with torch.no_grad():
            _, J = value_and_jacobian(exact, x1, x2, backend="reference")
        lowest = J.amin(2 if not self.case.tangent else 1).flatten()
        spread = float(lowest.max() - lowest.min()) + 1.0
        if case.share <= 0:
            self.margin = float(lowest.min()) - spread
        elif case.share >= 1:
            self.margin = float(lowest.max()) + spread
        else:
            self.margin = float(lowest.quantile(case.share))
        self.share = float((lowest < self.margin).double().mean())
        y, penalty = fused_mono_penalty(
            exact, x1, x2, margin=self.margin, return_output=True, backend="reference"
        )
        loss = self.loss(y, penalty, self.target[: self.rows].double())
        loss.backward()
        self.truth = loss.item(), _flat(exact)

    def loss(self, y: Tensor, penalty: Tensor | float, target: Tensor | None = None) -> Tensor:
        target = self.target if target is None else target
        squares = (y - target).square()
        # Half precision ends at 65504: less than a sum over 65536 rows.
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        return (squares.sum(dtype=wide) + penalty) / y.shape[0]

    def part(self) -> Job:
        """The same job on the rows of the truth."""
        twin = object.__new__(Job)
        twin.__dict__ |= self.__dict__
        twin.x1, twin.x2 = self.x1[: self.rows], self.x2[: self.rows]
        twin.target = self.target[: self.rows]
        return twin


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


# --- contenders: a job gives the loss; backward follows -------------------------------------------

LossOf = Callable[["Job"], Tensor]


def plain(job: Job) -> Tensor:
    return job.loss(job.net(torch.cat([job.x1, job.x2], -1)), 0.0)


def ours(job: Job) -> Tensor:
    y, penalty = fused_mono_penalty(job.net, job.x1, job.x2, margin=job.margin, return_output=True)
    return job.loss(y, penalty)


def double_backward(job: Job) -> Tensor:
    x2 = job.x2.detach().requires_grad_()
    y = job.net(torch.cat([job.x1, x2], -1))
    penalty = y.new_zeros((), dtype=torch.float32)
    for d in range(y.shape[1]):
        (slope,) = torch.autograd.grad(y[:, d].sum(), x2, create_graph=True)
        penalty = penalty + torch.relu(job.margin - slope.float()).sum()
    return job.loss(y, penalty)


def sum_of_outputs(job: Job) -> Tensor:
    x2 = job.x2.detach().requires_grad_()
    y = job.net(torch.cat([job.x1, x2], -1))
    (slope,) = torch.autograd.grad(y.sum(), x2, create_graph=True)
    return job.loss(y, torch.relu(job.margin - slope.float()).sum())


def hand_written_jvp(job: Job) -> Tensor:
    """Value and all k tangents forward by hand, for torch.compile to differentiate and fuse."""
    h, h_dot = torch.cat([job.x1, job.x2], -1), None
    layers = [m for m in job.net if isinstance(m, nn.Linear)]
    for l, layer in enumerate(layers):
        a = layer(h)
        W = layer.weight
        a_dot = W[:, FREE:].t().unsqueeze(1) if h_dot is None else F.linear(h_dot, W)
        if l == len(layers) - 1:
            return job.loss(a, torch.relu(job.margin - a_dot.float()).sum())
        if job.case.kind == "relu":
            h, h_dot = torch.relu(a), (a > 0).to(a.dtype) * a_dot
        else:
            s = torch.sigmoid(a)
            h, h_dot = a * s, s * (1 + a * (1 - s)) * a_dot
    raise AssertionError("no layers")


Step = Callable[[], object]


def eager(job: Job, loss_of: LossOf) -> Step:
    params = list(job.net.parameters())

    def step() -> Tensor:
        for p in params:
            p.grad = None
        loss = loss_of(job)
        loss.backward()
        return loss

    return step


def compiled(job: Job, loss_of: LossOf) -> Step:
    return eager(job, torch.compile(loss_of, dynamic=False))


def graphed(job: Job, loss_of: LossOf) -> Step:
    """The whole step captured once and replayed."""
    step = eager(job, loss_of)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def jax_step(job: Job) -> Step:
    """``jit(value_and_grad)`` over ``jvp`` (or ``vjp`` where D = 1)."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes the whole card
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX runs on the {jax.default_backend()} here")
    # Through NumPy's float32, for bfloat16 has no NumPy dtype.
    dtype = {"fp16": jnp.float16, "bf16": jnp.bfloat16}.get(job.case.precision, jnp.float32)
    exact = {"fp32": "highest", "tf32": "tensorfloat32"}.get(job.case.precision, "default")
    params = [jnp.asarray(p.detach().float().cpu().numpy(), dtype) for p in job.net.parameters()]
    x1, x2, t = (jnp.asarray(v.float().cpu().numpy(), dtype) for v in (job.x1, job.x2, job.target))
    σ = jax.nn.silu if job.case.kind == "silu" else jax.nn.relu

    def network(params: list[jax.Array], x2: jax.Array) -> jax.Array:
        h = jnp.concatenate([x1, x2], -1)
        for l in range(HIDDEN + 1):
            h = h @ params[2 * l].T + params[2 * l + 1]
            h = σ(h) if l < HIDDEN else h
        return h

    def loss(params: list[jax.Array]) -> jax.Array:
        if job.case.D == 1:
            y, pull = jax.vjp(lambda x2: network(params, x2), x2)
            (slopes,) = pull(jnp.ones_like(y))
        else:
            y, push = jax.linearize(lambda x2: network(params, x2), x2)
            columns = jnp.eye(job.case.k, dtype=dtype)[:, None]
            slopes = jax.vmap(push)(jnp.broadcast_to(columns, (job.case.k, *x2.shape)))
        return (jnp.square(y - t).sum() + jax.nn.relu(job.margin - slopes).sum()) / len(x2)

    fast = jax.jit(jax.value_and_grad(loss))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: Compiled.note() if "compile" in event else None
    )

    def step() -> object:
        with jax.default_matmul_precision(exact):  # part of what is compiled, so in every call
            return jax.block_until_ready(fast(params))

    return step


@dataclass(frozen=True)
class Contender:
    """``loss`` is checked against the truth; ``make`` prepares the step that is timed."""

    name: str
    loss: LossOf | None
    make: Callable[[Job], Step]
    penalised: bool = True


def contenders(job: Job, gpu: bool, thorough: bool, jax: bool) -> Iterator[Contender]:
    """``gpu``: also as CUDA graphs; ``thorough``: what compiles for the shapes, JAX if ``jax``."""
    yield Contender("plain, eager", plain, lambda j: eager(j, plain), False)
    yield Contender("monokernel, eager", ours, lambda j: eager(j, ours))
    usual = sum_of_outputs if job.case.D == 1 else double_backward
    name = "sum of outputs" if job.case.D == 1 else "loop of double backward"
    yield Contender(name, usual, lambda j: eager(j, usual))
    if gpu:
        yield Contender("plain, CUDA graph", plain, lambda j: graphed(j, plain), False)
        yield Contender("monokernel, CUDA graph", ours, lambda j: graphed(j, ours))
    if thorough:
        yield Contender("plain, compiled", plain, lambda j: compiled(j, plain), False)
        yield Contender(
            "hand-written jvp, compiled", hand_written_jvp, lambda j: compiled(j, hand_written_jvp)
        )
        if jax and importlib.util.find_spec("jax"):
            yield Contender("JAX jit", None, jax_step)


# --- compiling ------------------------------------------------------------------------------------

QUIET = 2  # steps in a row without a compilation, after which a contender is ready
RESTLESS = 20  # steps after which it will never be


class Compiled:
    """How much Triton's JIT and XLA have compiled in this process."""

    total = 0

    @classmethod
    def note(cls, *_: object, **__: object) -> None:
        cls.total += 1


def listen_to_triton() -> None:
    with contextlib.suppress(ImportError):
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = Compiled.note


def compilations() -> int:
    """What has been compiled in this process, by Dynamo and all behind it, by Triton and by XLA."""
    counters = torch._dynamo.utils.counters  # each compilation moves some of them, a step none
    return Compiled.total + sum(sum(kind.values()) for kind in counters.values())


def settle(step: Step) -> None:
    """Steps until nothing is compiled any more."""
    quiet = 0
    for _ in range(RESTLESS):
        before = compilations()
        step()
        quiet = quiet + 1 if compilations() == before else 0
        if quiet == QUIET:
            return
    raise RuntimeError(f"something was compiled again in {RESTLESS} steps")


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the card can do in a second: products, bytes, special functions."""

    flops: float
    bytes: float
    special: float


@lru_cache
def ceilings(precision: str, gpu: bool) -> Ceilings:
    """Measured: a large product, a large copy; special functions by the card's clock and width."""
    if not gpu:
        return Ceilings(float("nan"), float("nan"), float("nan"))
    dtype, _ = PRECISIONS[precision]
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    flops = 2 * 8192**3 / _seconds(lambda: a @ b, 5)[1]
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.numel() / _seconds(lambda: target.copy_(source), 5)[1]
    card = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(card, "clock_rate", 1_755_000)  # kHz, where this torch says it
    return Ceilings(flops, rate, card.multi_processor_count * 16 * clock)


def roofline(case: Case, limits: Ceilings) -> tuple[float, str]:
    """The least seconds that a step needs, and which ceiling says so."""
    size = 4 if case.precision in ("fp32", "tf32") else 2
    hidden = 2 * case.N * case.width**2 * (HIDDEN - 1) * case.products
    outer = 2 * case.N * case.width * (FREE + case.k + case.D) * 3
    # Inputs, targets, outputs and slopes once; activations once each way for wide networks.
    least = case.N * size * (2 * (FREE + case.k) + 4 * case.D) + 8 * case.N * case.D * case.k
    if case.width > 128:
        least += 6 * HIDDEN * case.N * case.width * size
    # exp and a reciprocal: forward, and once more where the backward computes them again.
    special = 4 * HIDDEN * case.N * case.width if case.kind == "silu" else 0
    by = {
        "tensor cores": (hidden + outer) / limits.flops,
        "memory": least / limits.bytes,
        "special functions": special / limits.special,
    }
    name = max(by, key=by.__getitem__)
    return by[name], name


def _seconds(step: Step, rounds: int) -> tuple[float, float, float]:
    """p20, p50 and p80 of a step, on the GPU's clock of events around it."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(max(rounds, 3)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    fifths = quantiles(times, n=10, method="inclusive")
    return fifths[1], fifths[4], fifths[7]


def interleaved(steps: dict[str, Step], seconds: float, gpu: bool) -> dict[str, list[float]]:
    """Seconds of each step by the wall, in turns, from the call to the device's end of it.

    The steps have settled. One that compiles all the same does not count.
    """
    sync = torch.cuda.synchronize if gpu else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):  # what lay in the caches is another contender's
            step()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or (time.perf_counter() < end and rounds < 200):
        for name, step in steps.items():
            before = compilations()
            sync()
            begin = time.perf_counter()
            step()
            sync()
            taken = time.perf_counter() - begin
            if compilations() == before:
                times[name].append(taken)
        rounds += 1
    return times


def admit(job: Job, contender: Contender) -> tuple[Step | None, str]:
    """The step, which compiles nothing any more, or why there is none."""
    try:
        error = ""
        if contender.loss is not None and contender.penalised:
            part = job.part()
            got = eager(part, contender.loss)()
            assert isinstance(got, Tensor)
            truth, gradient = job.truth
            off = float((_flat(job.net) - gradient).norm() / gradient.norm())
            off = max(off, abs(got.item() - truth) / abs(truth))
            error = f"error {off:.1e}"
            if off > TOLERANCE[job.case.precision]:
                return None, f"disagrees with float64: {error}"
        step = contender.make(job)
        settle(step)
        return step, error
    except Exception as failure:  # one contender's failure is a row of the table, not the end of it
        return None, f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"


def peak(step: Step, gpu: bool) -> float:
    """MiB that a step holds beyond what was there."""
    if not gpu:
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


FIELDS = [
    *["date", "card", "torch", "triton", "precision", "N", "width", "D", "k", "kind"],
    *["share", "contender", "kernels", "rounds", "p20_ms", "p50_ms", "p80_ms", "ratio"],
    *["peak_mib", "peak_ratio", "bound_by", "of_roofline", "note"],
]


Row = dict[str, object]


@dataclass(frozen=True)
class Prepared:
    """A case whose contenders have compiled: their steps, and a row for each."""

    job: Job
    gpu: bool
    rows: dict[str, Row]
    steps: dict[str, Step]


def prepare(case: Case, device: str, thorough: bool, jax: bool) -> Prepared:
    """Everything that compiles; ``thorough`` and ``jax`` as for ``contenders``."""
    gpu = device == "cuda"
    listen_to_triton()
    torch._dynamo.reset()
    gc.collect()  # the networks and graphs of the case before
    torch.set_float32_matmul_precision(PRECISIONS[case.precision][1])
    ceilings(case.precision, gpu)
    job = Job(case, device)
    about = str(plan(job.net, job.x1, job.x2)).splitlines()[0]
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for contender in contenders(job, gpu, thorough, jax):
        step, note = admit(job, contender)
        rows[contender.name] = {"contender": contender.name, "note": note, "kernels": ""}
        if contender.name.startswith("monokernel"):
            rows[contender.name]["kernels"] = about
        if step is not None:
            steps[contender.name] = step
    return Prepared(job, gpu, rows, steps)


def measure(ready: Prepared, seconds: float) -> list[Row]:
    """One row for each contender."""
    job, case, gpu, rows, steps = ready.job, ready.job.case, ready.gpu, ready.rows, ready.steps
    limits = ceilings(case.precision, gpu)
    times = interleaved(steps, seconds, gpu)
    least, bound = roofline(case, limits)
    for name, each in times.items():
        if len(each) < 2:
            rows[name]["note"] = "compiled in every step"
            continue
        tenths = quantiles(each, n=10, method="inclusive")
        memory = float("nan") if "graph" in name or "JAX" in name else peak(steps[name], gpu)
        rows[name] |= {
            "rounds": len(each),
            "p20_ms": f"{1e3 * tenths[1]:.4f}",
            "p50_ms": f"{1e3 * tenths[4]:.4f}",
            "p80_ms": f"{1e3 * tenths[7]:.4f}",
            "peak_mib": f"{memory:.1f}",
            "bound_by": bound,
            "of_roofline": f"{least / tenths[4]:.3f}" if name.startswith("monokernel") else "",
        }
    base = rows["plain, eager"]
    for row in rows.values():
        if "p50_ms" in row and "p50_ms" in base:
            row["ratio"] = f"{float(str(row['p50_ms'])) / float(str(base['p50_ms'])):.3f}"
            row["peak_ratio"] = (
                f"{float(str(row['peak_mib'])) / max(float(str(base['peak_mib'])), 1e-9):.3f}"
            )
    common = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "card": torch.cuda.get_device_name() if gpu else "none",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "precision": case.precision,
        "N": case.N,
        "width": case.width,
        "D": case.D,
        "k": case.k,
        "kind": case.kind,
        "share": f"{job.share:.3g}",
    }
    if gpu:
        torch.cuda.synchronize()  # raises if a contender left the device broken
    return [common | row for row in rows.values()]


def _triton_version() -> str:
    try:
        import triton

        return str(triton.__version__)
    except ImportError:
        return ""


def append(rows: list[Row]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


# --- in processes of their own --------------------------------------------------------------------

PATIENCE = 120.0  # seconds for the compilations of a case, and again for its times

# Not forked: CUDA does not survive that.
SPAWN = multiprocessing.get_context("spawn")


def compile_ahead(todo: list[tuple[Case, bool]], device: str, seconds: float) -> None:
    """Takes a step of what will be timed, on every core, for the caches of what it compiles."""
    # What Triton compiles is the same for many rows as for few, and for any share.
    jobs = {
        (case if thorough else replace(case, N=min(case.N, 16384), share=0.05), thorough)
        for case, thorough in todo
    }
    end = time.perf_counter() + seconds
    with SPAWN.Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
        waiting = [pool.apply_async(_take_a_step, (*job, device)) for job in jobs]
        for result in waiting:
            # A failure is the case's own to report; leaving the pool ends what still runs.
            with contextlib.suppress(Exception):
                result.get(max(0.0, end - time.perf_counter()))


def _take_a_step(case: Case, thorough: bool, device: str) -> None:
    torch.set_float32_matmul_precision(PRECISIONS[case.precision][1])
    job = Job(case, device)
    for contender in contenders(job, False, thorough, jax=False):  # JAX keeps nothing on disk
        admit(job, contender)


_ready: list[Prepared] = []  # the child's case


def _prepare(*case: Any) -> None:
    _ready[:] = [prepare(*case)]


def _measure(seconds: float) -> list[Row]:
    return measure(_ready.pop(), seconds)


class Child:
    """A process that runs the cases, and a new one after a failure or a case that hangs."""

    def __init__(self) -> None:
        self.pool = SPAWN.Pool(1)

    def prepare(self, patience: float, *case: object) -> None:
        """``prepare`` in the child, which keeps the case for ``measure``."""
        self._run(patience, _prepare, *case)

    def measure(self, patience: float, seconds: float) -> list[Row]:
        rows: list[Row] = self._run(patience, _measure, seconds)
        return rows

    def _run(self, patience: float, task: Callable[..., Any], *arguments: object) -> Any:
        try:
            return self.pool.apply_async(task, arguments).get(patience)
        except Exception:
            self.pool.terminate()
            self.pool = SPAWN.Pool(1)
            raise


def with_rivals(todo: Iterable[Case]) -> Iterator[tuple[Case, bool]]:
    """Each case, and whether what compiles for its shapes runs: once for each width and D."""
    seen: set[tuple[int, int]] = set()
    for case in todo:
        shape = (case.width, case.D)
        yield case, shape not in seen and case.N <= 65536
        seen.add(shape)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=float, default=440, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of timing for a case")
    parser.add_argument("--no-jax", dest="jax", action="store_false", help="leave JAX out")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--device cpu tries the program)", file=sys.stderr)
        return 2
    end = time.perf_counter() + options.limit
    todo = list(with_rivals(cases() if gpu else small_cases()))
    # Each of the processes compiles one thing at a time.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compile_ahead(todo, options.device, options.limit / 3)
    print(f"compiled ahead, {end - time.perf_counter():.0f} s left", flush=True)

    def left(keep: float = 0.0) -> float:
        return max(1.0, min(PATIENCE, end - time.perf_counter() - keep))

    child, slowest = Child(), 0.0
    for i, (case, thorough) in enumerate(todo):
        if time.perf_counter() + slowest > end:
            print("\ntime is up: not measured are\n  " + "\n  ".join(str(c) for c, _ in todo[i:]))
            break
        try:
            # What compiles late takes the time of later cases, never that of measuring this one.
            asked = case, options.device
            try:
                child.prepare(left(slowest) / (1 + thorough), *asked, thorough, options.jax)
            except multiprocessing.TimeoutError:
                if not thorough:
                    raise
                print(f"\n{case}   what compiles for its shapes took too long", flush=True)
                child.prepare(left(slowest), *asked, False, False)
            began = time.perf_counter()
            rows = child.measure(left(), options.seconds)
            slowest = max(slowest, time.perf_counter() - began)
        except Exception as failure:
            print(f"\n{case}   failed: {type(failure).__name__}: {failure}", flush=True)
            continue
        if gpu:
            append(rows)
        print(f"\n{case}   share {rows[0]['share']}", flush=True)
        for row in rows:
            print(
                f"  {row['contender']!s:28} {row.get('p50_ms', '-')!s:>10} ms  ratio "
                f"{row.get('ratio', '-')!s:>7}  peak {row.get('peak_mib', '-')!s:>9} MiB  roofline "
                f"{row.get('of_roofline', '')!s:6} {row['note']}",
                flush=True,
            )
    child.pool.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
