"""``python -m monokernel.backends.triton.compile_report``: compiles every shipped configuration.

Without a GPU, for each target, and prints what the compiler made of it: registers, stack bytes
(spills), shared memory, tensor-core and special-function instructions. Exits with 1 if a kernel
spills, traps, lacks its tensor cores, or takes more shared or tensor memory than the target has.

What is compiled is what the host code launches: it runs on empty CPU tensors with the launcher
replaced, so no signature is written twice.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...activations import Activation
from ...nodes import parameter_shapes
from ...problem import Hinge, Mode, Problem, chain_problem
from ...program import Node
from . import launch, layered, programs, whole
from .config import WIDEST_ROW

__all__ = ["main"]


@dataclass(frozen=True)
class Target:
    """A device to compile for, and a program's most shared memory and tensor-memory columns."""

    gpu: GPUTarget
    shared: int
    tensor_core: str  # the instruction that must be there, in SASS or AMD assembly
    products: str  # see ``launch.products``
    tensor_memory: int = 0


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, r"\bHMMA", "warp"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, r"\b[HQ]GMMA", "wgmma"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, r"\bUTC\w*MMA|\bHMMA", "tcgen05", 512),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, r"v_mfma", "wave"),
}


LINEAR = Hinge()
PATHS: dict[str, Any] = {"whole": whole, "layered": layered, "programs": programs}


@dataclass(frozen=True)
class Case:
    """A network and a precision for which the path's kernels are compiled."""

    widths: tuple[int, ...]
    kind: str
    k: int
    mode: Mode
    dtype: torch.dtype
    precision: str = "highest"
    path: str = "whole"
    hinge: Hinge | None = LINEAR
    cotangents: str = "both"  # of y and the second output, or of "y" or the "slopes" alone
    dx: bool = False
    bias: bool = True
    row_weight: bool = False  # a hinge weight for each row
    N: int = 1024
    nodes: tuple[Node, ...] = ()  # of a program, which ``kind`` is then the name of

    @property
    def problem(self) -> Problem:
        if self.nodes:
            return Problem(self.widths[0], self.nodes, self.k, self.mode, self.hinge)
        hidden = {"softplus": (1.0, 20.0), "elu": (1.0, 1.0, 1.0)}.get(self.kind, ())
        σ = Activation(self.kind, *hidden)
        acts = (*(σ,) * (len(self.widths) - 2), Activation("identity"))
        return chain_problem(self.widths, acts, self.k, self.mode, self.hinge)

    @property
    def name(self) -> str:
        kind = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}[self.dtype]
        if self.dtype == torch.float32 and self.precision != "high":
            kind = "fp32" if self.precision == "highest" else self.precision
        shape = "-".join(map(str, self.widths))
        hinge = self.hinge or LINEAR
        special = {
            "no hinge": self.hinge is None,
            "squared": hinge.squared,
            "none": hinge.elementwise,
            "row weight": self.row_weight,
            "no bias": not self.bias,
            f"{self.cotangents} alone": self.cotangents != "both",
            "dx": self.dx,
            f"N={self.N}": self.N != 1024,
        }
        own = "".join(f", {what}" for what, present in special.items() if present)
        return f"{shape} k{self.k} {self.mode} {self.kind} {kind} {self.path}{own}"

    def variants(self) -> Iterator[Case]:
        """The same network in every other kind of call: each compiles branches of its own."""
        yield replace(self, hinge=None)
        yield replace(
            self, hinge=Hinge(squared=True, elementwise=True), row_weight=True, bias=False
        )
        yield replace(self, dx=True)
        yield replace(self, dx=True, cotangents="slopes")
        yield replace(self, cotangents="y")
        yield replace(self, N=1)  # strides of 1 are compile-time constants


# Spills that are known and stand in the table as warnings, as (kernel, target, width of the hidden
# layers, with dx of more than 16 inputs): bytes. One byte more fails.
KNOWN_SPILLS = {("network_backward", "sm_80", 128, True): 24}

# Outputs and columns for which either mode is the cheaper one.
SIDES: tuple[tuple[int, int, Mode], ...] = ((1, 4, "adjoint"), (8, 1, "tangent"))


def whole_cases() -> Iterator[Case]:
    """Every configuration of a whole-network kernel, at 3 hidden layers and at the extremes.

    Of 40 inputs the backward takes a part at a time.
    """
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for H in (32, 64, 128):
        hidden = (8, H, H, H)
        yield Case((*hidden, 1), "silu", 1, "adjoint", half)
        yield Case((*hidden, 8), "silu", 1, "tangent", half)
        if H > 32:
            yield Case((*hidden, 1), "relu", 4, "adjoint", half)
            yield Case((*hidden, 1), "silu", 4, "adjoint", brain)
        if H < 128:
            yield Case((*hidden, 1), "silu", 4, "adjoint", single, "high")
            yield Case((*hidden, 8), "silu", 1, "tangent", single, "high")
    yield Case((8, 32, 32, 1), "silu", 4, "adjoint", single, "tf32x3")
    yield Case((8, 64, 64, 64, 1), "silu", 4, "adjoint", single, "tf32x3")
    yield Case((8, 64, 64, 64, 8), "silu", 1, "tangent", single, "tf32x3")
    yield Case((100, 128, 128, 1), "gelu", 4, "adjoint", half)
    yield Case((8, *(64,) * 7, 1), "mish", 3, "adjoint", half)
    yield Case((8, *(128,) * 7, 1), "silu", 3, "adjoint", brain)
    yield Case((8, 64, 64, 100), "silu", 1, "tangent", brain)
    for D, k, mode in SIDES:
        yield from Case((8, 64, 64, 64, D), "silu", k, mode, half).variants()
        yield Case((40, 64, 64, 64, D), "silu", k, mode, half, dx=True)
        yield Case((40, 64, 64, 64, D), "silu", k, mode, single, "high", dx=True)
        yield Case((40, 128, 128, 128, D), "silu", k, mode, half, dx=True)


def layered_cases() -> Iterator[Case]:
    """Wide networks in each precision, and the strict float32 that narrow ones take too."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    wide = (8, 512, 512, 1)
    yield Case(wide, "silu", 2, "adjoint", half, "highest", "layered", dx=True)
    yield Case(wide, "silu", 2, "adjoint", single, "high", "layered", dx=True)
    yield Case(wide, "silu", 2, "adjoint", single, "highest", "layered", dx=True)
    yield Case((8, 512, 512, 8), "silu", 2, "tangent", brain, "highest", "layered", dx=True)
    for D, k, mode in SIDES:
        yield from Case((8, 512, 512, D), "silu", k, mode, half, "highest", "layered").variants()


class _Program:
    """Nodes in a row, each with parameters of its own."""

    def __init__(self, d: int) -> None:
        self.nodes: list[Node] = []
        self.widths, self.places = [d], 0

    def add(self, kind: str, *inputs: int, numbers: tuple[float, ...] = (), width: int = 0) -> int:
        """The number of the node's value, of the width of the last input if none is given."""
        parameters = {"linear": 2, "scale": 1, "shift": 1, "prelu": 1, "dropout": 1}.get(kind, 0)
        places = tuple(range(self.places, self.places + parameters))
        self.places += parameters
        self.widths.append(width or self.widths[inputs[-1]])
        self.nodes.append(Node(kind, inputs, places, numbers, self.widths[-1]))
        return len(self.nodes)


def residual(d: int, H: int, D: int) -> tuple[Node, ...]:
    """A pre-norm block."""
    of = _Program(d)
    h = of.add("linear", 0, width=H)
    z = of.add("normalise", h, numbers=(1e-5,))
    z = of.add("shift", of.add("scale", z))
    z = of.add("silu", of.add("linear", z, width=H), numbers=(0.0, 0.0, 0.0))
    h = of.add("sum", h, of.add("linear", z, width=H), numbers=(1.0, 1.0))
    of.add("linear", h, width=D)
    return tuple(of.nodes)


def every_node(d: int, H: int, D: int) -> tuple[Node, ...]:
    """A program of all kinds of light nodes."""
    of = _Program(d)
    h = of.add("linear", 0, width=2 * H)
    gate = of.add("columns", h, numbers=(0.0, 1.0), width=H)
    h = of.add("columns", h, numbers=(H, 1.0), width=H)
    gate = of.add("sigmoid", gate, numbers=(0.0, 0.0, 0.0))
    h = of.add("dropout", of.add("product", gate, h), numbers=(0.1, 0.0))
    h = of.add("prelu", of.add("line", h, numbers=(0.5, 0.25)))
    z = of.add("shift", of.add("scale", of.add("normalise", h, numbers=(1e-5,))))
    h = of.add("sum", h, of.add("linear", z, width=H), numbers=(1.0, 0.5))
    z = of.add("root_mean_square", h, numbers=(1e-5,))
    z = of.add("softmax", of.add("gelu", z, numbers=(0.0, 0.0, 0.0)))
    total = of.add("total", of.add("product", z, h), width=1)
    h = of.add("product", of.add("log_softmax", h), of.add("expand", total, width=H))
    h = of.add("concat", h, 0, width=H + d)
    of.add("linear", h, width=D)
    return tuple(of.nodes)


def whole_rows(d: int, H: int, D: int) -> tuple[Node, ...]:
    """A program of nodes that hold whole rows."""
    of = _Program(d)
    h = of.add("linear", 0, width=H)
    for kind, numbers in (("normalise", (1e-5,)), ("softmax", ()), ("log_softmax", ())):
        h = of.add(kind, h, numbers=numbers)
    of.add("linear", h, width=D)
    return tuple(of.nodes)


def program_cases() -> Iterator[Case]:
    """Programs as wide as ordinary ones, and with the widest rows that are held in registers."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for D, k, mode in SIDES:
        for make, H, dtype in ((every_node, 512, half), (whole_rows, WIDEST_ROW, single)):
            yield Case(
                (8, H, D), make.__name__, k, mode, dtype, path="programs", dx=True,
                nodes=make(8, H, D), N=256,
            )  # fmt: skip
        block = Case(
            (8, 512, D), "residual", k, mode, brain, path="programs", nodes=residual(8, 512, D)
        )
        yield block
        yield replace(block, cotangents="slopes")
        yield replace(block, hinge=None, N=1)


def quick_cases() -> Iterator[Case]:
    """What ``make test`` compiles."""
    half = torch.float16
    yield Case((8, 64, 64, 1), "silu", 1, "adjoint", half)
    yield Case((8, 512, 512, 1), "silu", 2, "adjoint", half, "highest", "layered", dx=True)
    for D, k, mode in SIDES:
        for path in ("whole", "layered"):
            small = Case((8, 32, D), "silu", k, mode, half, "highest", path)
            yield replace(small, hinge=None)
            yield replace(small, N=1)
    yield Case(
        (8, 32, 1), "residual", 2, "adjoint", half, path="programs", nodes=residual(8, 32, 1)
    )


@dataclass(frozen=True)
class Launch:
    """One kernel as the host code launches it."""

    kernel: Any
    args: tuple[object, ...]
    options: dict[str, Any]


def launches(case: Case, target: str) -> list[Launch]:
    """What a training step of the case launches on the target; nothing if it is not served so."""
    seen: list[Launch] = []
    launch.instead_of_launching.append(lambda *call: seen.append(Launch(*call)))
    launch.instead_of_device.append(TARGETS[target].products)
    precision = torch.get_float32_matmul_precision()
    chosen = case.precision
    if chosen == "tf32x3":
        os.environ["MONOKERNEL_FP32"], chosen = chosen, "highest"
    torch.set_float32_matmul_precision(chosen)
    try:
        _step(case)
    finally:
        os.environ.pop("MONOKERNEL_FP32", None)
        torch.set_float32_matmul_precision(precision)
        launch.instead_of_launching.pop()
        launch.instead_of_device.pop()
    return seen


def _step(case: Case) -> None:
    problem, N = case.problem, case.N
    biases = {node.params[1] for node in problem.nodes if node.kind == "linear"}
    params: list[Tensor | None] = []
    for place, (_, shapes) in sorted(parameter_shapes(problem.d, problem.nodes).items()):
        given = case.bias or place not in biases
        params.append(torch.zeros(shapes[0], dtype=case.dtype) if given else None)
    x = torch.empty(N, problem.d, dtype=case.dtype)
    weight = torch.empty(N, problem.D, problem.k) if case.row_weight else None
    path = PATHS[case.path]
    if path.refuses(problem, x) is not None:
        return
    y, out, saved = path.forward(problem, x, weight, params, True)
    gy = None if case.cotangents == "slopes" else y
    gout = None if case.cotangents == "y" else out
    drawn = {place for node in problem.nodes if node.kind == "dropout" for place in node.params}
    needs = [case.dx, *(p is not None and i not in drawn for i, p in enumerate(params))]
    path.backward(problem, gy, gout, x, params, saved, needs)


# --- one kernel, one target ---------------------------------------------------------------------

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def source_of(call: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel with the types and constants of the call, as the launcher would specialise it."""
    names = call.kernel.arg_names
    values = dict(zip(names, call.args, strict=False))
    options = {k: v for k, v in call.options.items() if k in COMPILER_OPTIONS}
    values |= {k: v for k, v in call.options.items() if k not in COMPILER_OPTIONS}
    constexprs = {p.name for p in call.kernel.params if p.is_constexpr}
    general = {p.name for p in call.kernel.params if p.do_not_specialize}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def describe(value: object, at: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(v, (*at, i)) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            attributes[at] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if value is None:
            constants[at] = None
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        assert isinstance(value, int)
        if value == 1:
            constants[at] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[at] = [["tt.divisibility", 16]]
        return "i32"

    for i, name in enumerate(names):
        if name in constexprs:
            signature[name] = "constexpr"
            constants[(i,)] = values[name]
        elif name in general:
            signature[name] = "i32"
        else:
            signature[name] = describe(values[name], (i,))
    return ASTSource(call.kernel, signature, constants, attributes), options


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    kernel: str
    target: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    tensor_core: int
    special: int
    seconds: float
    complaints: tuple[str, ...]
    warning: str = ""


def compile_one(case: Case, index: int, target_name: str) -> Row:
    """Compiles launch number ``index`` of the case's step and reads what came out."""
    call, target = launches(case, target_name)[index], TARGETS[target_name]
    source, options = source_of(call)
    if target.gpu.backend == "hip":
        options.pop("maxnreg", None)
    began = time.perf_counter()
    name = f"{call.kernel.__name__}"
    try:
        compiled = triton.compile(source, target=target.gpu, options=options)
    except Exception as error:  # the table shows which one failed, whatever the compiler raised
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        complaint = f"does not compile: {' '.join(str(root).split())[-200:]}"
        return Row(case.name, name, target_name, 0, 0, 0, 0, 0, 0, 0.0, (complaint,))
    seconds = time.perf_counter() - began
    if target.gpu.backend == "hip":
        registers, stack, code = read_amd(compiled.asm["amdgcn"])
    else:
        registers, stack, code = read_nvidia(compiled.asm["cubin"])
    # wgmma takes 64 rows; what has fewer runs on the instruction of the older cards.
    few = call.options.get("BM", 64) < 64
    dots = len(re.findall(target.tensor_core + (r"|\bHMMA" if few else ""), code))
    special = len(re.findall(r"\bMUFU|\bv_(?:exp|log|rcp|rsq|sqrt|sin|cos)_", code))
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    ieee = "PRECISION" in call.options and call.options["PRECISION"] == "ieee"
    full = str(call.options.get("C")) == "fp32" and ieee  # no tensor core computes strict float32
    complaints = []
    wide_dx = case.dx and case.widths[0] > 16
    known = KNOWN_SPILLS.get((name, target_name, max(case.widths[1:-1]), wide_dx), 0)
    if stack > known:
        complaints.append(f"spills {stack} bytes")
    if "C" in call.options and not full and not dots:
        complaints.append("no tensor-core instruction")
    if shared > target.shared:
        complaints.append(f"shared memory above {target.shared}")
    if tensor_memory > target.tensor_memory:
        complaints.append(f"tensor memory above {target.tensor_memory}")
    if "ptx" in compiled.asm and re.search(r"^\s*trap;", compiled.asm["ptx"], re.M):
        complaints.append("a trap in the PTX")
    return Row(
        case.name, name, target_name, registers, stack, shared, tensor_memory, dots, special,
        seconds, tuple(complaints), f"known: spills {stack} bytes" if 0 < stack <= known else "",
    )  # fmt: skip


def read_nvidia(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack bytes and SASS of a cubin, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    return registers, stack, code


def read_amd(assembly: str) -> tuple[int, int, str]:
    """Vector registers, scratch bytes and instructions of AMD assembly."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), number("private_segment_fixed_size"), assembly


def _output(*command: object) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True
    ).stdout


# --- the table ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="compile_report")
    parser.add_argument("--quick", action="store_true", help="small networks, sm_90 alone")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if launch.interpreting():
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 1
    cases = (
        [*quick_cases()] if options.quick else [*whole_cases(), *layered_cases(), *program_cases()]
    )
    targets = ["sm_90"] if options.quick else options.targets
    jobs = []
    seen: set[str] = set()
    for case, target in itertools.product(cases, targets):
        if case.precision == "tf32x3" and TARGETS[target].gpu.backend == "hip":
            continue  # Triton has no such products there, and ``whole.py`` asks for none
        if options.match in case.name:
            for index, call in enumerate(launches(case, target)):
                source, chosen = source_of(call)
                kind = f"{target} {source.hash()} {chosen}"
                if kind not in seen:
                    seen.add(kind)
                    jobs.append((case, index, target))
    print(f"Triton {triton.__version__}: {len(jobs)} kernels")
    wide = max(len(case.name) for case, _, _ in jobs)
    head = f"{'network':{wide}} {'kernel':18} {'target':7} reg stack  shared tmem  dots  mufu     s"
    print(head + "\n" + "-" * len(head))
    failed = 0
    # Not forked: PyTorch's threads do not survive that.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        for row in pool.map(compile_one, *zip(*jobs, strict=True)):
            print(
                f"{row.case:{wide}} {row.kernel:18} {row.target:7} {row.registers:3} {row.stack:5} "
                f"{row.shared:7} {row.tensor_memory:4} {row.tensor_core:5} {row.special:5} "
                f"{row.seconds:5.1f}  {'; '.join(row.complaints) or row.warning}".rstrip(),
                flush=True,
            )
            failed += bool(row.complaints)
    print(f"{failed} of {len(jobs)} kernels fail" if failed else "every kernel passes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
