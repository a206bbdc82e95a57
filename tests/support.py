"""The oracle (a loop of double backward over the outputs) and the networks of the tests."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monokernel
from monokernel.activations import _MODULES, KINDS, Activation, of_module

# One module per line of the activation table, with numbers that are not the defaults.
ACTIVATION_MODULES: dict[str, nn.Module] = {
    "ReLU": nn.ReLU(),
    "LeakyReLU": nn.LeakyReLU(0.07),
    "ELU": nn.ELU(1.3),
    "SELU": nn.SELU(),
    # PyTorch rounds 1/alpha to float32 in CELU's derivative: a power of two, to compare exactly.
    "CELU": nn.CELU(0.5),
    "GELU": nn.GELU(),
    "GELU-tanh": nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "Softplus": nn.Softplus(1.7, 2.5),
    "Softsign": nn.Softsign(),
    "Tanh": nn.Tanh(),
    "Sigmoid": nn.Sigmoid(),
    "LogSigmoid": nn.LogSigmoid(),
    "Hardtanh": nn.Hardtanh(-0.8, 1.1),
    "ReLU6": nn.ReLU6(),
    "Identity": nn.Identity(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Hardswish": nn.Hardswish(),
    "Softshrink": nn.Softshrink(0.3),
    "Hardshrink": nn.Hardshrink(0.2),
    "Threshold": nn.Threshold(0.1, -0.4),
    "Tanhshrink": nn.Tanhshrink(),
}
assert {type(m) for m in ACTIVATION_MODULES.values()} == set(_MODULES)

Function = Callable[[Tensor], Tensor]


def hardsigmoid(a: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid`` with a second derivative, which PyTorch's own lacks, and 1/6 in float64."""
    return F.hardtanh(a, -3, 3) / 6 + 0.5


# The kinds that no module of PyTorch's has: written as functions.
WRITTEN: dict[str, tuple[Activation, Function]] = {
    "clamp": (Activation("clamp", -0.6, 0.9), lambda a: a.clamp(-0.6, 0.9)),
    "abs": (Activation("abs"), torch.abs),
    "square": (Activation("square"), torch.square),
    "sqrt": (Activation("sqrt"), torch.sqrt),
    "exp": (Activation("exp"), torch.exp),
    "log": (Activation("log"), torch.log),
    "reciprocal": (Activation("reciprocal"), torch.reciprocal),
    "sin": (Activation("sin"), torch.sin),
    "cos": (Activation("cos"), torch.cos),
    "erf": (Activation("erf"), torch.erf),
}


def _elementwise() -> dict[str, tuple[Activation, Function]]:
    cases = dict(WRITTEN)
    for name, module in ACTIVATION_MODULES.items():
        entry = of_module(module)
        assert entry is not None
        cases[name] = entry, hardsigmoid if name == "Hardsigmoid" else module
    return cases


# Every line of the activation table: its entry and how PyTorch is told to compute it.
ELEMENTWISE = _elementwise()


def mlp(
    d1: int,
    k: int,
    D: int,
    hidden: Sequence[int] = (9, 7),
    activation: nn.Module | None = None,
    bias: bool = True,
    last: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A network with d1 free and k monotone inputs, D outputs; weights large enough to curve it."""
    layers: list[nn.Module] = []
    width = d1 + k
    for H in hidden:
        layers += [nn.Linear(width, H, bias=bias), activation or nn.SiLU()]
        width = H
    layers.append(nn.Linear(width, D, bias=bias))
    if last is not None:
        layers.append(last)
    net = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    return net


class Recurrent(nn.Module):
    """An LSTM over the same row three times."""

    def __init__(self, d: int, D: int) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(d, 4, batch_first=True), nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


class Attention(nn.Module):
    """Fused attention, which has no second derivative unless it is told to do without fusion."""

    def __init__(self, d: int, D: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(d, 6), nn.Linear(6, D)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1.0, 4.0, dtype=x.dtype).unsqueeze(1)
        return self.out(self.layer(self.into(x).unsqueeze(1) * steps).mean(1))


class Cube(torch.autograd.Function):
    """A derivative of its own, in the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Reads(nn.Module):
    """Two outputs that read the last column of x (..., 5) by ``how``, and the others smoothly."""

    def __init__(self, how: Callable[[Reads, Tensor], Tensor]) -> None:
        super().__init__()
        self.smooth, self.table, self.how = nn.Linear(4, 2), nn.Embedding(8, 2), how

    def forward(self, x: Tensor) -> Tensor:
        return self.smooth(x[..., :-1]) - self.how(self, x[..., -1:])


def _by_table(net: Reads, c: Tensor) -> Tensor:
    found: Tensor = net.table(c.squeeze(-1).abs().long().clamp(max=7))
    return found


def _under_no_grad(net: Reads, c: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.sin(c)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor) -> Tensor:
        return c.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


# How y may move with a column although its derivative in it is 0 or absent.
WITHOUT_DERIVATIVE: dict[str, Callable[[Reads, Tensor], Tensor]] = {
    "embedding": _by_table,
    "rounding": lambda net, c: c.round(),
    "step": lambda net, c: (c > 0).to(c.dtype),
    "detach": lambda net, c: c.detach(),
    "no_grad": _under_no_grad,
    "function": lambda net, c: _NoDerivative.apply(c),
}


def quantized(layers: Collection[Any]) -> nn.Module:
    """A network (..., 5) to 2 outputs of which some layers, by type or name, are quantised."""
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch quantises no layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch means to retire it
        net: nn.Module = quantize(mlp(3, 2, 2, dtype=torch.float32), set(layers))
    return net


def text_of(path: str) -> str:
    """Of a file in the repository, or of the package, wherever that is installed."""
    home = Path(__file__).resolve().parent.parent
    if path.startswith("monokernel/"):
        home = Path(monokernel.__file__).parent.parent
    return (home / path).read_text(encoding="utf-8")


def points(N: int, d1: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(N, d1, dtype=dtype), torch.randn(N, k, dtype=dtype)


def oracle(net: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """y as the network has it, (..., D) or (...), and J (..., D, k) by one reverse pass per output,
    ready for a second backward."""
    if not x2.requires_grad:
        x2 = x2.detach().requires_grad_()
    with mock.patch.object(F, "hardsigmoid", hardsigmoid):
        y = net(torch.cat([x1, x2], -1))
    outputs = y.unsqueeze(-1) if y.dim() < x2.dim() else y
    rows = [
        torch.autograd.grad(out.sum(), x2, create_graph=True, materialize_grads=True)[0]
        for out in outputs.unbind(-1)
    ]
    return y, torch.stack(rows, -2)


def oracle_penalties(
    J: Tensor,
    direction: Tensor | float = 1.0,
    margin: float = 0.0,
    hinge: str = "linear",
    weight: Tensor | float | None = None,
) -> Tensor:
    """The penalty of every slope, written as the definition reads."""
    direction = torch.as_tensor(direction, dtype=J.dtype)
    r = torch.relu(margin - direction * J)
    r = r**2 if hinge == "squared" else r
    r = torch.where(direction.expand_as(J) == 0, torch.zeros_like(r), r)
    return r if weight is None else r * weight


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True))


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Relative to each tensor's own largest entry, as the contract states it."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape, f"tensor {i}: shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        scale = w.abs().max().clamp(min=1e-3) if w.numel() else torch.ones(())
        error = ((g - w).abs().max() / scale).item() if w.numel() else 0.0
        assert error <= tolerance, f"tensor {i}: relative error {error:.2e} > {tolerance:.0e}"


def ways(net: nn.Module, *x: Tensor) -> Iterator[dict[str, str]]:
    """The modes and backends that serve the network; one at least always does."""
    for mode, backend in itertools.product(("tangent", "adjoint"), BACKENDS):
        if monokernel.plan(net, *x, mode=mode, backend=backend).serves:
            yield {"mode": mode, "backend": backend}
        else:
            assert (mode, backend) != ("adjoint", "reference"), "it serves every network"


def served(backend: str) -> bool:
    """Whether the backend serves a small float64 network on the CPU here."""
    return monokernel.plan(mlp(2, 1, 1), *points(3, 2, 1), backend=backend).serves


NEEDS_COMPILER = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")),
    reason="inductor needs a C++ compiler",
)

# Every backend that runs on CPU tensors by itself. Triton's interpreter has tests of its own.
BACKENDS = [b for b in ("reference", "torch", "cpu") if served(b)]
HANDWRITTEN = [b for b in BACKENDS if b != "reference"]


def activations_of(backend: str) -> dict[str, nn.Module]:
    """The modules of the table that the backend serves: Triton's kernels know a part of it."""
    if backend != "triton":
        return ACTIVATION_MODULES
    return {name: m for name, m in ACTIVATION_MODULES.items() if ELEMENTWISE[name][0].kind in KINDS}


def skip_unless_served(name: str, backend: str) -> None:
    """Skips a test of the activation of this name where the backend has no kernel for it."""
    if name not in activations_of(backend):
        pytest.skip(f"{backend!r} has no kernel for {name}")
