"""``plan`` tells what ``auto`` does; the cost rule; what an import brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import monokernel
from monokernel import plan
from monokernel.problem import cheaper_mode
from tests.support import HANDWRITTEN, mlp, points


@pytest.mark.parametrize(
    ("D", "k", "mode"),
    [(1, 1, "adjoint"), (1, 9, "adjoint"), (2, 3, "adjoint"), (3, 3, "tangent"), (8, 1, "tangent")],
)
def test_auto_takes_the_cheaper_mode(D: int, k: int, mode: str) -> None:
    assert cheaper_mode(D, k) == mode
    assert plan(mlp(3, k, D), *points(4, 3, k)).mode == mode


def test_auto_prefers_the_native_kernel_on_the_cpu() -> None:
    chosen = plan(mlp(3, 1, 1), *points(4, 3, 1))
    assert chosen.backend == ("cpu" if "cpu" in HANDWRITTEN else "torch")
    assert chosen.refused["triton"] == "the tensors are on cpu, it serves cuda"
    assert str(chosen).startswith(f"backend {chosen.backend}, mode adjoint: ")


class Bomb(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")


def test_plan_runs_a_forward_of_one_s_own_on_symbols_alone() -> None:
    seen = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(type(x))
            return x * 2

    assert plan(Looks(), *points(4, 3, 1)).backend == HANDWRITTEN[-1]
    assert len(seen) == 1
    assert seen[0] is not torch.Tensor
    chosen = plan(Bomb(), *points(4, 3, 1))
    assert (chosen.backend, chosen.mode) == ("reference", "adjoint")
    assert chosen.refused["cpu"] == (
        "mlp (Bomb): its forward does not run on symbols (AssertionError('called'))"
    )


def test_plan_says_who_serves_a_program_and_why_no_other() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    chosen = plan(net, *points(4, 3, 1))
    assert chosen.backend == HANDWRITTEN[-1]
    assert chosen.refused["triton"] == "the tensors are on cpu, it serves cuda"
    chosen = plan(net, *points(4, 3, 1), backend="torch")
    assert chosen.kernel == "hand-written backward in PyTorch operations"
    assert plan(net, *points(4, 3, 1), mode="tangent", backend="reference").mode == "tangent"


def test_nested_sequentials_and_inactive_dropout_are_fused() -> None:
    inner = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh())
    net = nn.Sequential(nn.Identity(), nn.Sequential(inner), nn.Linear(6, 2), nn.Softplus())
    net = net.double().eval()
    chosen = plan(net, *points(4, 3, 1))
    assert chosen.backend in HANDWRITTEN
    net.train()  # a mask in it
    assert plan(net, *points(4, 3, 1)).backend in HANDWRITTEN


def test_import_is_light() -> None:
    """No kernel is compiled or loaded, and Triton, the compiler and NumPy users pay for nothing."""
    code = (
        "import sys, torch; before = set(sys.modules); import monokernel; "
        "print(*sorted(m for m in set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert "monokernel.api" in loaded
    heavy = ("triton", "torch._dynamo", "torch._inductor", "monokernel.backends.triton")
    assert not {m for m in loaded if m.startswith(heavy)}
    assert "monokernel.backends.cpu" not in loaded


def test_public_names() -> None:
    for name in monokernel.__all__:
        assert getattr(monokernel, name).__doc__ or name == "__version__"
