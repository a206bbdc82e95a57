"""Problems for the Triton kernels, run against their twin in PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from monokernel.activations import KINDS, Activation
from monokernel.backends import handwritten
from monokernel.problem import Hinge, Mode, Problem

# The numbers of the kinds that have any: not the defaults.
NUMBERS = {
    "leaky_relu": (0.125, 0.0, 0.0),
    "hardtanh": (-0.75, 1.125, 0.0),
    "elu": (1.0625, 1.625, 0.875),
    "softplus": (1.75, 2.5, 0.0),
}
TABLE = [Activation(kind, *NUMBERS.get(kind, ())) for kind in KINDS]
IDENTITY = TABLE[0]


def activation(kind: str) -> Activation:
    return TABLE[KINDS.index(kind)]


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
    return Problem(tuple(widths), (*(σ,) * (len(widths) - 2), last), k, mode, hinge)


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
        p, gy if task else None, gout if slopes else None, x, weight, params, saved, list(needs)
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


def assert_as_precise_as_pytorch(
    backend: ModuleType,
    p: Problem,
    N: int,
    dtype: torch.dtype,
    device: str = "cpu",
    factor: float = 2.0,
) -> None:
    """Error against float64 at most ``factor`` times that of PyTorch at the same precision.

    Rows whose slope lies near the hinge's kink may fall on either side in low precision: the hinge
    here has none within reach, since its margin is above every slope.
    """
    truth = run(handwritten, p, *inputs(p, N))
    x, params = inputs(p, N, dtype, device)
    ours = errors(run(backend, p, x, params), truth)
    torchs = errors(run(handwritten, p, x, params), truth)
    floor = torch.finfo(dtype).eps / 2
    for i, (a, b) in enumerate(zip(ours, torchs, strict=True)):
        assert a <= factor * b + floor, f"tensor {i}: error {a:.2e}, PyTorch's {b:.2e}"
