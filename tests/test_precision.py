"""Low precision: the error against the float64 truth is at most twice PyTorch's own there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monokernel import fused_mono_penalty, plan, value_and_jacobian
from tests.support import gradients, mlp, oracle, points

N, D1, K = 400, 4, 2


def backends(dtype: torch.dtype) -> list[str]:
    net, (x1, x2) = mlp(D1, K, 1, dtype=dtype), points(1, D1, K, dtype)
    found = []
    for backend in ("reference", "torch", "cpu"):
        if plan(net, x1, x2, backend=backend).serves:
            found.append(backend)
    return found


CASES = [
    (dtype, backend)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for backend in backends(dtype)
]


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def results(net: nn.Module, x1: Tensor, x2: Tensor, J_of: object, seed: int) -> list[Tensor]:
    """y, J and the gradients of a smooth loss of both: no hinge, whose sign may flip near zero."""
    y, J = J_of(net, x1, x2)  # type: ignore[operator]
    torch.manual_seed(seed)
    gy, gJ = torch.randn(y.shape, dtype=torch.float64), torch.randn(J.shape, dtype=torch.float64)
    loss = (y * gy.to(y.dtype)).sum() / N + (J * gJ.to(J.dtype)).sum() / N
    return [y, J, *gradients(loss, *net.parameters())]


def ours(net: nn.Module, x1: Tensor, x2: Tensor, mode: str, backend: str) -> list[Tensor]:
    return results(net, x1, x2, lambda *a: value_and_jacobian(*a, mode=mode, backend=backend), 1)


def close(got: list[Tensor], own: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    """y, J, and all gradients together at most twice as far from the truth as PyTorch's own; each
    gradient at most four times: of one by itself, a bias's say, PyTorch's error is a matter of luck
    (0.3 to 1 of ours for six losses of one network, whose gradients together are at 0.6 to 1)."""
    # PyTorch's own error may be none: one unit is granted.
    floor = torch.finfo(dtype).eps
    off, theirs = (
        torch.tensor([rms(g.double() - t) / rms(t) for g, t in zip(found, truth, strict=True)])
        for found in (got, own)
    )
    theirs = theirs.clamp(min=floor)
    assert (off[:2] <= 2 * theirs[:2]).all(), f"y, J: {off[:2]}, PyTorch {theirs[:2]}"
    assert rms(off[2:]) <= 2 * rms(theirs[2:]), f"gradients: {off[2:]}, PyTorch {theirs[2:]}"
    assert (off[2:] <= 4 * theirs[2:]).all(), f"gradients: {off[2:]}, PyTorch {theirs[2:]}"


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.Tanh()], ids=str)
@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize(("D", "width"), [(1, 32), (3, 48)])
@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_error_is_at_most_twice_pytorchs(
    dtype: torch.dtype, backend: str, D: int, width: int, mode: str, activation: nn.Module
) -> None:
    net = mlp(D1, K, D, (width, width), activation, dtype=dtype)
    x1, x2 = points(N, D1, K, dtype)
    own = results(net, x1, x2, oracle, 1)
    got = ours(net, x1, x2, mode, backend)
    net, x1, x2 = net.double(), x1.double(), x2.double()
    truth = results(net, x1, x2, oracle, 1)
    close(got, own, truth, dtype)


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize(("dtype", "backend"), [case for case in CASES if case[0] != torch.float32])
def test_error_under_autocast(dtype: torch.dtype, backend: str, D: int, mode: str) -> None:
    """At most twice PyTorch's; the native kernel does not round the weights first."""
    net = mlp(D1, K, D, (32, 32), dtype=torch.float32)
    x1, x2 = points(N, D1, K, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        own = results(net, x1, x2, oracle, 1)
        got = ours(net, x1, x2, mode, backend)
    net, x1, x2 = net.double(), x1.double(), x2.double()
    truth = results(net, x1, x2, oracle, 1)
    close(got, own, truth, dtype)
    if backend == "cpu":  # the slopes, in float32
        assert rms(got[1].double() - truth[1]) / rms(truth[1]) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_the_hinge_outside_a_band_around_its_kink(dtype: torch.dtype, backend: str) -> None:
    """Inside the band a slope's sign may flip; outside, the same rows are penalised."""
    net = mlp(D1, K, 2, (32, 32), dtype=dtype)
    x1, x2 = points(N, D1, K, dtype)
    got = fused_mono_penalty(net, x1, x2, reduction="none", backend=backend)
    _, J = value_and_jacobian(net.double(), x1.double(), x2.double(), backend="reference")
    band = 8 * torch.finfo(dtype).eps * J.abs().max()
    outside = J.abs() > band
    assert outside.double().mean() > 0.5
    assert torch.equal((got > 0)[outside], (J < 0)[outside])
    assert (got[~outside] <= 2 * band).all()


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_a_number_as_weight_is_not_rounded_to_half(dtype: torch.dtype, backend: str) -> None:
    """Of bfloat16, 0.1 is 0.10009765625."""
    net, (x1, x2) = mlp(D1, K, 2, (32, 32), dtype=dtype), points(N, D1, K, dtype)
    got, whole = (
        fused_mono_penalty(net, x1, x2, margin=1.0, weight=weight, backend=backend)
        for weight in (0.1, None)
    )
    torch.testing.assert_close(got, 0.1 * whole, rtol=1e-5, atol=0.0)
