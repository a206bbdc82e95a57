"""The cost table of the README, counted in matrix products instead of measured in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from monokernel import boundary, fused_mono_penalty
from tests.support import mlp, points

H, L, N = 64, 4, 512  # L hidden layers; one product is 2·N·H² operations


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that looks on sees the package's operators alone, and not the products in them."""
    monkeypatch.setattr(boundary, "traced", lambda: False)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of every matrix product."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if func is torch.ops.aten.addmm_.default:
            self.total += 2 * args[1].numel() * args[2].shape[1]
        elif count is not None:
            shaped = {k: v for k, v in (kwargs or {}).items() if k != "out"}
            self.total += count(*args, **shaped, out_val=out)
        return out


def products(step: Callable[[], object]) -> float:
    """Matrix products of a hidden layer in one step, per hidden-to-hidden layer."""
    with Operations() as counter:
        step()
    return counter.total / (2 * N * H * H * (L - 1))


def a_step(D: int, k: int, v: float, activation: nn.Module, mode: str) -> float:
    """Products of task loss + penalty, of which the share v of the rows violates."""
    torch.manual_seed(0)
    net = mlp(4, k, D, [H] * L, activation, dtype=torch.float32)
    x1, x2 = points(N, 4, k, torch.float32)
    # The weight switches rows off; the margin makes every other row violate.
    weight = torch.zeros(N, D, k)
    weight[torch.randperm(N)[: round(v * N)]] = 1.0

    def step() -> Tensor:
        y, penalty = fused_mono_penalty(
            net, x1, x2, margin=1e6, weight=weight, return_output=True, mode=mode, backend="torch"
        )
        (y.square().sum() + penalty).backward()
        return penalty

    return products(step)


def plain_step() -> float:
    net = mlp(4, 1, 1, [H] * L, nn.ReLU(), dtype=torch.float32)
    x = torch.cat(points(N, 4, 1, torch.float32), -1)
    return products(lambda: net(x).square().sum().backward())


# Narrow first and last layers add a little to each count: at most this share of it.
SLACK = 0.25


def test_a_plain_step_is_three_products() -> None:
    assert plain_step() == pytest.approx(3, rel=SLACK)


@pytest.mark.parametrize("v", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("k", [1, 4])
def test_adjoint_mode_of_one_output(k: int, v: float) -> None:
    """3 + 3v: forward, chain and weight gradient; tangent, its weight gradient and q for v. Without
    curvature the q chain falls away. Any k."""
    assert a_step(1, k, v, nn.SiLU(), "adjoint") == pytest.approx(3 + 3 * v, rel=SLACK)
    assert a_step(1, k, v, nn.ReLU(), "adjoint") == pytest.approx(3 + 2 * v, rel=SLACK)


@pytest.mark.parametrize("v", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("D", "k"), [(1, 1), (8, 1), (8, 2)])
def test_tangent_mode(D: int, k: int, v: float) -> None:
    """3 + k + 3kv: this backend recomputes the tangents of active rows instead of saving all."""
    for activation in (nn.SiLU(), nn.ReLU()):
        got = a_step(D, k, v, activation, "tangent")
        assert got == pytest.approx(3 + k + 3 * k * v, rel=SLACK)


@pytest.mark.parametrize("v", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("D", [2, 3])
def test_adjoint_mode_of_several_outputs(D: int, v: float) -> None:
    got = a_step(D, 4, v, nn.SiLU(), "adjoint")
    assert got == pytest.approx(3 + D + 3 * D * v, rel=SLACK)


def test_clean_rows_cost_nothing_when_only_the_penalty_is_wanted() -> None:
    net = mlp(4, 1, 1, [H] * L, nn.SiLU(), dtype=torch.float32)
    x1, x2 = points(N, 4, 1, torch.float32)
    penalty = fused_mono_penalty(net, x1, x2, margin=-1e6, backend="torch")
    assert products(lambda: penalty.backward()) == 0
