"""Chains as problems with operands, for kernels to be run against their twin, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from monokernel.activations import ACTIVATIONS, Activation
from monokernel.backends import handwritten
from monokernel.problem import Hinge, Mode, Problem, chain_problem

# The numbers of the kinds that have any: not the defaults.
NUMBERS = {
    "leaky_relu": (0.125, 0.0, 0.0),
    "hardtanh": (-0.75, 1.125, 0.0),
    "elu": (1.0625, 1.625, 0.875),
    "softplus": (1.75, 2.5, 0.0),
    "softshrink": (0.375, 0.0, 0.0),
    "hardshrink": (0.25, 0.0, 0.0),
    "threshold": (0.125, -0.5, 0.0),
    "clamp": (-0.625, 0.875, 0.0),
}
# Defined for positive numbers alone, with a pole, or soon too large where they are nested.
UNRULY = ("sqrt", "log", "reciprocal", "exp", "square")
EVERY_KIND = [Activation(kind, *NUMBERS.get(kind, ())) for kind in ACTIVATIONS]
IDENTITY = EVERY_KIND[0]


def activation(kind: str) -> Activation:
    return EVERY_KIND[list(ACTIVATIONS).index(kind)]


def problem(
    widths: Sequence[int],
    σ: Activation | str = "silu",
    k: int = 1,
    mode: Mode = "adjoint",
    hinge: Hinge | None = None,
    last: Activation | str = IDENTITY,
) -> Problem:
    σ = activation(σ) if isinstance(σ, str) else σ
    last = activation(last) if isinstance(last, str) else last
    return chain_problem(tuple(widths), (*(σ,) * (len(widths) - 2), last), k, mode, hinge)


def inputs(
    p: Problem,
    N: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    bias: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """x (N, d) and the parameters, the same numbers for every dtype and device."""
    noise = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=noise)

    params: list[Tensor | None] = []
    for fan_in, out in zip(p.widths, p.widths[1:], strict=False):
        params += [random(out, fan_in) * 1.3 / fan_in**0.5, random(out) * 0.5 if bias else None]
    x = random(N, p.d)
    # Low precisions and their float64 truth begin from the same numbers.
    half = torch.bfloat16
    return x.to(half).to(device, dtype), [
        None if t is None else t.to(half).to(device, dtype) for t in params
    ]


def run(
    backend: ModuleType,
    p: Problem,
    x: Tensor,
    params: list[Tensor | None],
    weight: Tensor | None = None,
    task: bool = True,
    slopes: bool = True,
    needs: Sequence[bool] | None = None,
    violating: Tensor | None = None,
) -> list[Tensor]:
    """y, out, and the gradients for fixed cotangents; ``violating`` (N) masks gout's rows."""
    y, out, saved = backend.forward(p, x, weight, params, True)
    noise = torch.Generator().manual_seed(3)
    gy = torch.randn(y.shape, dtype=torch.float64, generator=noise).to(y)
    gout = torch.randn(out.shape, dtype=torch.float64, generator=noise).abs().to(out)
    if violating is not None:
        gout = gout * violating.view(-1, 1, 1).to(gout)
    wanted = [q is not None for q in params]
    needs = [True, *wanted] if needs is None else needs
    grads = backend.backward(
        p, gy if task else None, gout if slopes else None, x, params, saved, list(needs)
    )
    assert [g is not None for g in grads] == list(needs)
    return [y, out, *(g for g in grads if g is not None)]


def errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Root-mean-square error of each tensor, relative to the size of the truth."""
    found = []
    for g, t in zip(got, truth, strict=True):
        assert g.shape == t.shape
        size = t.double().square().mean().sqrt().clamp(min=1e-12)
        found.append(((g.double().cpu() - t.double().cpu()).square().mean().sqrt() / size).item())
    return found


def product_roundoff(dtype: torch.dtype, device: str) -> float:
    """What one operand of a product may lose, relative to itself, at the precision in force.

    float32 is multiplied in TF32 on a device unless PyTorch is told "highest": 10 bits of mantissa,
    and wgmma cuts off the other 13 where cuBLAS may round. A cut takes up to 2^-10 of each of the
    two operands, always towards zero, so that no sum averages it out. Emulated on the cases of
    these tests (``test_tolerance.py``) the results are off by up to 1.9 · 2^-10.
    """
    if dtype == torch.float32 and device != "cpu":
        return 2**-24 if torch.get_float32_matmul_precision() == "highest" else 2**-9
    return torch.finfo(dtype).eps / 2


def away_from_kinks(
    p: Problem, x: Tensor, params: Sequence[Tensor | None], distance: float
) -> Tensor:
    """Rows (N) in which no σ' or σ'' of float64 ``x`` jumps within ``distance`` of a_l."""
    h, away = x, torch.ones(len(x), dtype=torch.bool)
    for l, σ in enumerate(p.activations):
        W, b = params[2 * l], params[2 * l + 1]
        assert W is not None
        a = torch.nn.functional.linear(h, W, b)
        for f in (σ.first, σ.second):
            away &= ((f(a + distance) - f(a - distance)).abs() < 0.1).all(1)
        h = σ.value(a)
    return away


def assert_as_precise_as_pytorch(
    backend: ModuleType,
    p: Problem,
    N: int,
    dtype: torch.dtype,
    device: str = "cpu",
    factor: float = 2.0,
    roundoff: float | None = None,
) -> None:
    """Error against float64 at most ``factor`` times that of PyTorch at the same precision.

    Rows near a kink may fall on either side of it in low precision. The hinge here has none within
    reach, since its margin is above every slope; rows near an activation's are left out.
    """
    roundoff = product_roundoff(dtype, device) if roundoff is None else roundoff
    exact, exact_params = inputs(p, N)
    away = away_from_kinks(p, exact, exact_params, 4 * roundoff)
    truth = run(handwritten, p, exact[away], exact_params)
    x, params = inputs(p, N, dtype, device)
    x = x[away.to(device)]
    ours = errors(run(backend, p, x, params), truth)
    torchs = errors(run(handwritten, p, x, params), truth)
    for i, (a, b) in enumerate(zip(ours, torchs, strict=True)):
        assert a <= factor * b + roundoff, f"tensor {i}: error {a:.2e}, PyTorch's {b:.2e}"
