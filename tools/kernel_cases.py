"""What the compile report compiles: targets, networks, and what a training step of one launches.

The host code runs on empty CPU tensors and what it launches is written down, so no signature is
written twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from monokernel.activations import Activation
from monokernel.backends.triton import layered, narrow, path_of, programs, whole
from monokernel.backends.triton.launch import Launch, recorded
from monokernel.backends.triton.programs.config import WIDEST_ROW
from monokernel.backends.triton.target import assumed
from monokernel.columns import last_columns
from monokernel.nodes import parameter_shapes
from monokernel.problem import Hinge, Mode, Problem, chain_problem
from monokernel.program import Node

__all__ = [
    "KNOWN_SPILLS",
    "TARGETS",
    "Case",
    "Target",
    "every_case",
    "launches",
    "quick_cases",
]


@dataclass(frozen=True)
class Target:
    """A device to compile for, and a program's most shared memory and tensor-memory columns."""

    gpu: GPUTarget
    shared: int
    tensor_core: str  # the instruction that must be there, in SASS or AMD assembly
    products: str  # see ``target.products``
    tensor_memory: int = 0


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, r"\bHMMA", "warp"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, r"\b[HQ]GMMA", "wgmma"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, r"\bUTC\w*MMA|\bHMMA", "tcgen05", 512),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, r"v_mfma", "wave"),
}


LINEAR = Hinge()
PATHS: dict[str, Any] = {
    "whole": whole,
    "narrow": narrow,
    "layered": layered,
    "programs": programs,
}


@dataclass(frozen=True)
class Case:
    """A network and a precision for which the path's kernels are compiled."""

    widths: tuple[int, ...]
    kind: str
    k: int
    mode: Mode
    dtype: torch.dtype
    precision: str = "highest"
    path: str = "whole"  # or "served", the one that the target serves it by
    hinge: Hinge | None = LINEAR
    cotangents: str = "both"  # of y and the second output, or of "y" or the "slopes" alone
    dx: bool = False
    bias: bool = True
    row_weight: bool = False  # a hinge weight for each row
    N: int = 1024
    nodes: tuple[Node, ...] = ()  # of a program, which ``kind`` is then the name of
    cast: torch.dtype | None = None  # of an autocast

    @property
    def problem(self) -> Problem:
        if self.nodes:
            d = self.widths[0]
            columns = last_columns(d, self.k)
            return Problem(d, self.nodes, columns, self.mode, self.hinge, self.cast)
        hidden = {"softplus": (1.0, 20.0), "elu": (1.0, 1.0, 1.0)}.get(self.kind, ())
        σ = Activation(self.kind, *hidden)
        acts = (*(σ,) * (len(self.widths) - 2), Activation("identity"))
        return chain_problem(self.widths, acts, self.k, self.mode, self.hinge)

    @property
    def name(self) -> str:
        kinds = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}
        kind = kinds[self.dtype]
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
            f"autocast {kinds.get(self.cast or self.dtype)}": self.cast is not None,
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
KNOWN_SPILLS = {("whole_backward", "sm_80", 128, True): 24}

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
            yield Case((*hidden, 1), "relu", 4, "adjoint", brain)
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
        for case in (
            Case((8, 64, 64, 64, D), "relu", k, mode, brain),
            Case((8, 64, 64, 64, D), "silu", k, mode, half),
            *Case((8, 64, 64, 64, D), "silu", k, mode, brain).variants(),
        ):
            if case.N != 1:  # small tiles, at two processors
                yield replace(case, N=64)
        yield Case((40, 64, 64, 64, D), "silu", k, mode, half, dx=True)
        yield Case((40, 64, 64, 64, D), "silu", k, mode, single, "high", dx=True)
        yield Case((40, 128, 128, 128, D), "silu", k, mode, half, dx=True)


def narrow_cases() -> Iterator[Case]:
    """One output above the widths whose sums one kernel holds."""
    half, brain = torch.float16, torch.bfloat16
    hidden = (8, 128, 128, 128)
    yield Case((*hidden, 1), "silu", 1, "adjoint", brain, path="narrow")
    yield Case((*hidden, 1), "hardtanh", 3, "adjoint", brain, path="narrow")
    # Whom it serves beside these depends on the Triton: the others are one kernel.
    yield Case((16, 100, 128, 72, 1), "silu", 4, "adjoint", half, path="served")
    yield Case((8, 100, 100, 100, 1), "relu", 4, "adjoint", brain, path="served")
    yield Case((*hidden, 1), "leaky_relu", 1, "adjoint", half, path="served")
    yield Case((8, 128, 128, 1), "relu", 1, "adjoint", half, path="narrow")
    yield Case((8, 128, 1), "silu", 2, "adjoint", half, path="narrow")
    yield from Case((*hidden, 1), "silu", 4, "adjoint", half, path="narrow").variants()


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
        yield replace(block, dtype=single, cast=brain)


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


def every_case() -> Iterator[Case]:
    """What ``make kernels`` compiles."""
    yield from whole_cases()
    yield from narrow_cases()
    yield from layered_cases()
    yield from program_cases()


def launches(case: Case, target: str, processors: int = 2) -> list[Launch]:
    """What a training step of the case launches on the target; nothing if it is not served so."""
    precision = torch.get_float32_matmul_precision()
    chosen = case.precision
    if chosen == "tf32x3":
        os.environ["MONOKERNEL_FP32"], chosen = chosen, "highest"
    torch.set_float32_matmul_precision(chosen)
    try:
        with assumed(TARGETS[target].products, processors), recorded() as seen:
            _step(case)
    finally:
        os.environ.pop("MONOKERNEL_FP32", None)
        torch.set_float32_matmul_precision(precision)
    return seen


def _step(case: Case) -> None:
    problem, N = case.problem, case.N
    linears = [node for node in problem.nodes if node.kind == "linear"]
    layers, biases = {p for n in linears for p in n.params}, {n.params[1] for n in linears}
    params: list[Tensor | None] = []
    for place, (_, shapes) in sorted(parameter_shapes(problem.d, problem.nodes).items()):
        given = case.bias or place not in biases
        dtype = case.cast if case.cast and place in layers else case.dtype
        params.append(torch.zeros(shapes[0], dtype=dtype) if given else None)
    x = torch.empty(N, problem.d, dtype=case.dtype)
    weight = torch.empty(N, problem.D, problem.k) if case.row_weight else None
    path = path_of(problem, x) if case.path == "served" else PATHS[case.path]
    if path.refuses(problem, x) is not None:
        return
    y, out, saved = path.forward(problem, x, weight, params, True)
    gy = None if case.cotangents == "slopes" else y
    gout = None if case.cotangents == "y" else out
    drawn = {place for node in problem.nodes if node.kind == "dropout" for place in node.params}
    needs = [case.dx, *(p is not None and i not in drawn for i, p in enumerate(params))]
    path.backward(problem, gy, gout, x, params, saved, needs)
