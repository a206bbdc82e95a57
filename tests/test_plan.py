"""``plan`` tells what ``auto`` does; the cost rule; what an import brings along."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import monokernel
from monokernel import fused_mono_penalty, plan
from monokernel.arguments import BACKEND_CHOICES
from monokernel.backends import BACKENDS
from monokernel.problem import cheaper_mode
from tests.support import HANDWRITTEN, WITHOUT_DERIVATIVE, Reads, mlp, points


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


# --- what a plan says -----------------------------------------------------------------------------

X1, X2 = points(30, 3, 2, torch.float32)


def hooked() -> nn.Module:
    net = mlp(3, 2, 2, dtype=torch.float32)
    net.register_forward_hook(lambda *_: None)
    return net


def normed(**options: Any) -> nn.Module:
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8, **options), nn.SiLU(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


class Forward(nn.Module):
    """A network whose forward ends by ``how``."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(5, 2), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.linear(x))


def branches(y: Tensor) -> Tensor:
    return y if y[0, 0] > 1e9 else -y


def test_one_reason_is_said_once() -> None:
    chosen = plan(hooked(), X1, X2)
    assert chosen.reason == "mlp (Sequential) has hooks"
    assert set(chosen.refused.values()) == {chosen.reason}
    assert str(chosen).count(chosen.reason) == 1
    assert "not triton, cpu, torch: mlp (Sequential) has hooks" in str(chosen)
    assert plan(mlp(3, 2, 2, dtype=torch.float32), X1, X2).reason == ""


def test_the_price_in_plain_steps() -> None:
    """By the products of the cost table, three of which are a plain step."""
    for D, k, few, every in ((1, 2, 3.15, 6), (2, 2, 5.3, 11), (8, 1, 4.15, 7)):
        price = plan(mlp(3, k, D), *points(4, 3, k)).cost
        assert price == pytest.approx((few / 3, every / 3))
    fused = str(plan(mlp(3, 2, 1), *points(4, 3, 2)))
    assert "about 1.1 plain steps while 5% of the rows violate, 2 if all do" in fused
    assert plan(hooked(), X1, X2).cost == (6, 6)
    assert "about 6 plain steps\n" in str(plan(hooked(), X1, X2))


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (normed(), {}),
        (normed(track_running_stats=False), {"batch_stats": "running"}),
        (hooked(), {"mode": "tangent"}),
        (hooked(), {"backend": "torch"}),
        (hooked().double(), {}),
        (mlp(3, 1, 1, dtype=torch.float32), {}),
        (mlp(3, 2, 2, dtype=torch.float32), {"direction": [[1, 1]] * 3}),
        (hooked(), {"direction": [[1, 1]] * 3}),
        (Forward(Tensor.detach), {}),
        (Forward(lambda y: (y, y)), {}),  # type: ignore[arg-type,return-value]
        (Forward(lambda y: y.mean()), {}),
        (nn.Linear(5, 2).to("meta"), {}),
        (len, {}),
    ],
)
def test_a_plan_does_not_raise_and_says_what_the_call_says(net: Any, options: Any) -> None:
    with pytest.raises(Exception, match=r"\w") as caught:
        fused_mono_penalty(net, X1, X2, **options)
    chosen = plan(net, X1, X2, **{"direction": 1} | options)
    assert not chosen.serves
    said = str(caught.value).partition("\n")[0]
    assert chosen.error.removeprefix(f"mlp: {caught.type.__name__}: ") == said
    assert str(chosen).startswith(f"the call would raise: {chosen.error}")


def test_the_recipes_for_batch_norm_in_training_mode() -> None:
    net = normed()
    refused = plan(net, X1, X2)
    running, frozen = refused.advice
    assert "batch_stats='running'" in running
    assert plan(net, X1, X2, batch_stats="running").serves
    (recipe,) = re.findall("`(.*)`", frozen)
    exec(recipe, {"mlp": net, "nn": nn})
    assert net.training
    assert plan(net, X1, X2).backend == HANDWRITTEN[-1]
    kept = plan(normed(track_running_stats=False), X1, X2, batch_stats="running")
    assert kept.advice == ("make it with track_running_stats=True, or use LayerNorm",)


@pytest.mark.parametrize(
    ("net", "change"),
    [
        (hooked(), "take the hooks off"),
        (Reads(WITHOUT_DERIVATIVE["embedding"]), "look categories up outside of mlp"),
        (Reads(WITHOUT_DERIVATIVE["rounding"]), "has no derivative in x"),
        (Reads(WITHOUT_DERIVATIVE["step"]), "has no derivative in x"),
        (Reads(WITHOUT_DERIVATIVE["detach"]), "has no derivative in x"),
        (Reads(WITHOUT_DERIVATIVE["no_grad"]), "under no_grad has no derivative"),
        (Reads(WITHOUT_DERIVATIVE["function"]), "PyTorch's own operations"),
        (Forward(branches), "slices and lists of columns"),
        (Forward(lambda y: y - y.mean(0)), "along the columns"),
        (Forward(lambda y: y.cumsum(-1)), "written with linear layers"),
    ],
)
def test_what_to_change(net: nn.Module, change: str) -> None:
    chosen = plan(net, X1, X2)
    assert (chosen.backend, chosen.error) == ("reference", "")
    assert change in chosen.advice[0]
    assert f"  to change: {chosen.advice[0]}" in str(chosen)


@pytest.mark.parametrize("kind", WITHOUT_DERIVATIVE)
def test_a_plan_names_the_columns_without_a_derivative(kind: str) -> None:
    net = Reads(WITHOUT_DERIVATIVE[kind])
    numbers, training = torch.get_rng_state(), net.training
    (said,) = plan(net, X1, 3 * X2).doubts
    assert said.startswith("in column 1 every slope of mlp (Reads) is exactly 0, yet y moves")
    assert said in str(plan(net, X1, 3 * X2))
    whole = torch.cat([X1, 3 * X2], -1)
    (said,) = plan(net, whole, direction=(0, 0, 0, 1, 1)).doubts
    assert said.startswith("in column 4 every slope")
    assert plan(net, whole, direction=(0, 0, 0, 1, 0)).doubts == ()
    assert torch.equal(torch.get_rng_state(), numbers)
    assert net.training == training


def test_a_plan_names_activations_that_jump() -> None:
    for step, kind in ((nn.Threshold(0.5, 2.0), "threshold"), (nn.Hardshrink(), "hardshrink")):
        net = mlp(3, 2, 1, activation=step, dtype=torch.float32)
        chosen = plan(net, X1, X2)
        assert chosen.backend == HANDWRITTEN[-1]
        assert chosen.doubts[0].startswith(f"y may jump at its {kind}, and no slope shows")
    for smooth in (nn.Threshold(0.5, 0.5), nn.Hardshrink(0.0), nn.ReLU()):
        assert plan(mlp(3, 2, 1, activation=smooth, dtype=torch.float32), X1, X2).doubts == ()


def test_a_plan_in_inference_mode_is_the_same() -> None:
    for net in (hooked(), Reads(WITHOUT_DERIVATIVE["rounding"])):
        with torch.inference_mode():
            within = plan(net, X1.clone(), X2.clone())
        assert within == plan(net, X1, X2)


def test_a_plan_names_rows_that_mix() -> None:
    (said, *_) = plan(Forward(lambda y: y - y.mean(0)), X1, X2).doubts
    assert said.startswith("ROWS INFLUENCE EACH OTHER in mlp (Forward)")
    assert plan(hooked(), X1, X2).doubts == ()


def test_the_report_for_bugs() -> None:
    command = [sys.executable, "-m", "monokernel"]
    environment = {**os.environ, "MONOKERNEL_BOUNDARY": "0", "TRITON_INTERPRET": "0"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    facts = {line[:16].strip(): line[16:] for line in out.stdout.splitlines()}
    assert facts["monokernel"] == monokernel.__version__
    assert facts["torch"] == torch.__version__
    assert "MONOKERNEL_BOUNDARY=0" in out.stdout
    for name in ("triton", "cpu", "torch"):
        fact = facts[f"backend {name}"]
        assert fact.startswith("serves on") == (name in HANDWRITTEN or "serves on cuda" in fact)
    if "cpu" in HANDWRITTEN:
        assert facts["instructions"] in ("avx512", "avx2", "baseline", "neon")
        assert facts["boundary"] == "not wanted (MONOKERNEL_BOUNDARY=0)"


def test_the_report_tells_a_backend_that_computes_wrongly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = import_module("monokernel.__main__")

    def wrong(*given: Any, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        y, penalty = fused_mono_penalty(*given, backend=backend, **options)
        return y, penalty * (1.01 if backend == "torch" else 1.0)

    monkeypatch.setattr(report, "fused_mono_penalty", wrong)
    report.main()
    said = capsys.readouterr().out
    assert re.search(r"^backend torch   WRONG: a small step is .* from the reference$", said, re.M)


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


def test_the_backends_that_can_be_asked_for_are_those_that_there_are() -> None:
    assert set(BACKEND_CHOICES) == {"auto", *BACKENDS, "reference"}
