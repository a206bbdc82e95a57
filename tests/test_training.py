"""Every ordinary way of training, each held against the loop of double backward it replaces.

The penalised network must behave under PyTorch's machinery (compile, autocast, checkpointing,
DistributedDataParallel, …) as any module does. Where the arithmetic is the same, so must be the
trained weights.
"""

from __future__ import annotations

import copy
import io
import pickle
import runpy
import socket
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from monokernel import (
    Monotone,
    MonotonePenalty,
    audit,
    fused_mono_penalty,
    value_and_jacobian,
)
from tests.support import NEEDS_COMPILER

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

D1, K, D = 3, 2, 2
DIRECTION = [[1, -1], [0, 1]]


pytestmark = pytest.mark.usefixtures("one_thread")


def network(dtype: torch.dtype = torch.float64, outputs: int = D, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(D1 + K, 16), nn.SiLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs)
    ).to(dtype)


def data(
    N: int = 48, dtype: torch.dtype = torch.float64, outputs: int = D, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """x1 (N, d1), x2 (N, k) and a target (N, D) that falls in x2, so that the penalty has work."""
    g = torch.Generator().manual_seed(seed)
    x1, x2 = (torch.randn(N, n, generator=g, dtype=dtype) for n in (D1, K))
    t = x1.sum(1, keepdim=True).sin() - x2.sum(1, keepdim=True)
    return x1, x2, t.expand(N, outputs).contiguous()


def penalised(mlp: nn.Module, **options: object) -> MonotonePenalty:
    return MonotonePenalty(mlp, **({"direction": DIRECTION, "weight": 0.1} | options))  # type: ignore[arg-type]


def recipe(mlp: nn.Module, x1: Tensor, x2: Tensor, reduction: str = "sum") -> tuple[Tensor, Tensor]:
    """y and 0.1 · the penalty by one double backward for each output: what is being replaced."""
    x2 = x2.detach().requires_grad_()
    y = mlp(torch.cat([x1, x2], -1))
    sign = torch.tensor(DIRECTION, dtype=y.dtype)
    total = y.new_zeros(())
    for d in range(y.shape[1]):
        (slope,) = torch.autograd.grad(y[:, d].sum(), x2, create_graph=True)
        total = total + torch.where(sign[d] == 0, 0.0, torch.relu(-sign[d] * slope)).sum()
    if reduction == "mean":
        total = total / (x1.shape[0] * int(sign.abs().sum()))
    return y, 0.1 * total


def monotone() -> Monotone:
    """The network that cannot fall, in the place of a penalty."""
    signs = [[0] * D1 + row for row in DIRECTION]
    return Monotone(network(), -2.0, 2.0, direction=signs, margin=0.1)


def loss_of(pair: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    y, penalty = pair
    return (y - t).square().mean() + penalty


def train(
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], mlp: nn.Module, steps: int = 5
) -> None:
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.05, momentum=0.9)
    for i in range(steps):
        x1, x2, t = data(seed=i)
        optimizer.zero_grad()
        loss_of(forward(x1, x2), t).backward()
        optimizer.step()


def assert_same_weights(a: nn.Module, b: nn.Module, rtol: float = 1e-10) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def grads(m: nn.Module) -> list[Tensor]:
    found = [p.grad for p in m.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


# --- plain loops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_plain_loop_gives_the_weights_of_double_backward(backend: str) -> None:
    ours, truth = network(), network()
    train(penalised(ours, backend=backend), ours)
    train(lambda x1, x2: recipe(truth, x1, x2), truth)
    assert_same_weights(ours, truth)


def test_training_makes_a_network_monotone() -> None:
    """Against a target that falls in x2: without the penalty all slopes are wrong, with it few."""
    rates = []
    for weight in (0.0, 10.0):
        mlp = network(torch.float32, outputs=1)
        model = MonotonePenalty(mlp, weight=weight, reduction="mean", margin=0.01)
        optimizer = torch.optim.Adam(mlp.parameters(), lr=0.01)
        x1, x2, t = data(256, torch.float32, outputs=1)
        for _ in range(150):
            optimizer.zero_grad()
            loss_of(model(x1, x2), t).backward()
            optimizer.step()
        rates.append(audit(mlp, x1, x2).violation_rate)
    assert rates[0] > 0.9, rates
    assert rates[1] < 0.02, rates


def test_gradient_accumulation() -> None:
    """Micro-batches add up to the batch: the sum as it is, the mean over equal parts."""
    x1, x2, t = data()
    for reduction, share in (("sum", 1.0), ("mean", 0.25)):
        mlp = network()
        model = penalised(mlp, reduction=reduction)
        loss_of(model(x1, x2), t).backward()
        whole = grads(mlp)
        mlp.zero_grad()
        for a, b, c in zip(x1.chunk(4), x2.chunk(4), t.chunk(4), strict=True):
            y, penalty = model(a, b)
            ((y - c).square().mean() / 4 + share * penalty).backward()
        torch.testing.assert_close(grads(mlp), whole, rtol=1e-11, atol=1e-12)


def test_gradient_clipping() -> None:
    ours, truth = network(), network()
    x1, x2, t = data()
    norms = []
    for mlp, pair in ((ours, penalised(ours)(x1, x2)), (truth, recipe(truth, x1, x2))):
        loss_of(pair, t).backward()
        norms.append(nn.utils.clip_grad_norm_(mlp.parameters(), 0.1))
    torch.testing.assert_close(*norms, rtol=1e-11, atol=0)
    assert norms[0] > 0.1
    torch.testing.assert_close(grads(ours), grads(truth), rtol=1e-10, atol=1e-13)


def test_no_memory_grows_over_the_iterations() -> None:
    """No reference cycle keeps a step's tensors alive (``create_graph=True`` makes such cycles)."""
    import gc

    def alive() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    mlp = network()
    train(penalised(mlp), mlp)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        train(penalised(mlp), mlp, steps=10)
        assert alive() <= before + 2 * len(list(mlp.parameters()))
    finally:
        gc.enable()


def test_lbfgs() -> None:
    """A closure that is called several times per step."""
    ours, truth = network(), network()
    x1, x2, t = data()
    for mlp, forward in (
        (ours, penalised(ours)),
        (truth, lambda a, b: recipe(truth, a, b)),
    ):
        optimizer = torch.optim.LBFGS(
            mlp.parameters(), max_iter=4, history_size=5, line_search_fn="strong_wolfe"
        )

        def closure(
            mlp: nn.Module = mlp,
            forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = forward,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> float:
            optimizer.zero_grad()
            loss = loss_of(forward(x1, x2), t)
            loss.backward()
            return loss.item()

        first = closure()
        for _ in range(2):
            optimizer.step(closure)
        assert closure() < first
    assert_same_weights(ours, truth, rtol=1e-7)  # the line search amplifies rounding


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_saved_state_survives_hooks_and_a_second_backward(backend: str) -> None:
    mlp = network()
    model = penalised(mlp, backend=backend)
    x1, x2, t = data()
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model(x1, x2), t)
    loss.backward(retain_graph=True)
    first = grads(mlp)
    mlp.zero_grad()
    loss.backward()
    torch.testing.assert_close(grads(mlp), first, rtol=0, atol=0)


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    mlp = network()
    x1, x2, t = data()
    loss = loss_of(penalised(mlp)(x1, x2), t)
    with torch.no_grad():
        mlp[0].weight.add_(1.0)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    ours, truth = network(), network()
    model = penalised(ours)

    def forward(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        x1 = x1.clone().requires_grad_()  # the re-entrant form asks for an input with a gradient
        pair: tuple[Tensor, Tensor] = checkpoint(model, x1, x2, use_reentrant=reentrant)
        return pair

    train(forward, ours)
    train(lambda x1, x2: recipe(truth, x1, x2), truth)
    assert_same_weights(ours, truth)


LIGHTNING = Path(__file__).parents[1] / "examples" / "lightning_module.py"


def test_lightning_example() -> None:
    """Only where Lightning is installed, which the tests do not ask for."""
    pytest.importorskip("lightning")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    run = runpy.run_path(str(LIGHTNING))["main"]
    logged = run(accelerator="cpu", max_epochs=60, **dict.fromkeys(quiet, False))
    assert logged["val_error"] < 0.7
    assert logged["val_violating"] < 0.05


class StandIn(nn.Module):
    """As much of a LightningModule as the example uses in its steps."""

    def save_hyperparameters(self) -> None:
        pass

    def log_dict(self, values: dict[str, object], prog_bar: bool = False) -> None:
        self.logged = {name: float(value) for name, value in values.items()}  # type: ignore[arg-type]


def test_lightning_example_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's own code, its steps called by a plain loop as the Trainer calls them."""
    pytest.importorskip("sklearn")
    lightning = types.ModuleType("lightning")
    lightning.LightningModule = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    example = runpy.run_path(str(LIGHTNING))
    torch.manual_seed(0)
    fit, held_out = example["loaders"]()
    module = example["MonotoneRegressor"](d1=8, k=2)
    optimizer = module.configure_optimizers()
    for _ in range(60):
        for i, batch in enumerate(fit):
            optimizer.zero_grad()
            module.training_step(batch, i).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    for i, batch in enumerate(held_out):
        module.validation_step(batch, i)
    assert module.logged["val_error"] < 0.7
    assert module.logged["val_violating"] < 0.05


# --- torch.compile and torch.export ---------------------------------------------------------------


@contextmanager
def no_more_compiling() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize(("dynamic", "compiles"), [(False, 3), (None, 2), (True, 1)])
def test_compile_whole_loss_without_graph_break_or_recompilation_storm(
    dynamic: bool | None, compiles: int
) -> None:
    """Four batch sizes, each twice. Static shapes compile once for each; by default the second size
    makes the shape dynamic and nothing after it compiles again; with ``dynamic=True`` the first."""
    torch._dynamo.reset()
    mlp = network()
    truth = copy.deepcopy(mlp)
    model = penalised(mlp)

    def loss(x1: Tensor, x2: Tensor, t: Tensor) -> Tensor:
        return loss_of(model(x1, x2), t)

    step = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sizes = (48, 32, 7) if dynamic is False else (48, 32, 7, 33)
    for i, N in enumerate((*sizes, *sizes)):
        x1, x2, t = data(N)
        mlp.zero_grad()
        truth.zero_grad()
        with no_more_compiling() if i >= compiles else nullcontext():
            got = step(x1, x2, t)
            got.backward()
        want = loss_of(recipe(truth, x1, x2), t)
        want.backward()
        torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
        torch.testing.assert_close(grads(mlp), grads(truth), rtol=1e-10, atol=1e-12)


def test_compile_trains_as_eager_does_and_a_changed_weight_is_no_new_graph() -> None:
    """Compiled module inside an ordinary loop; the optimizer and the multiplier change tensors."""
    torch._dynamo.reset()
    ours, truth = network(), network()
    model = penalised(ours)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = penalised(truth)
    for step in range(4):
        for m, forward in ((model, compiled), (plain, plain)):
            assert m.weight is not None
            m.weight.fill_(0.1 + 0.1 * step)
            with no_more_compiling() if step else nullcontext():
                train(forward, m.mlp, steps=1)
    assert_same_weights(ours, truth)


@pytest.mark.parametrize(
    ("values", "graphs", "call"),
    [
        ([0.1, 0.2, 0.3], 3, lambda mlp, x1, x2, v: fused_mono_penalty(mlp, x1, x2, margin=v)),
        ([0.1, 0.2, 0.3, 0.4], 2, lambda mlp, x1, x2, v: fused_mono_penalty(mlp, x1, x2, weight=v)),
        (
            [[1, -1], [1, 0], [1, -1]],
            2,
            lambda mlp, x1, x2, v: fused_mono_penalty(mlp, x1, x2, direction=v),
        ),
        (
            [torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.3)],
            1,
            lambda mlp, x1, x2, v: fused_mono_penalty(mlp, x1, x2, weight=v),
        ),
        ([0.1, 0.2, 0.3, 0.4], 2, lambda mlp, x1, x2, v: v * fused_mono_penalty(mlp, x1, x2)),
        (
            [torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.3)],
            1,
            lambda mlp, x1, x2, v: torch.relu(v - value_and_jacobian(mlp, x1, x2)[1]).sum(),
        ),
    ],
    ids=["margin", "weight number", "direction", "weight tensor", "factor outside", "own hinge"],
)
def test_compile_what_makes_a_new_graph(
    values: list[object], graphs: int, call: Callable[..., Tensor]
) -> None:
    """The table of the guide."""
    torch._dynamo.reset()
    mlp = network()
    x1, x2, _ = data()
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for value in values:
        got = compiled(mlp, x1, x2, value)
        torch.testing.assert_close(got, call(mlp, x1, x2, value))
    assert counter.frame_count == graphs


def test_compile_with_a_direction_that_is_a_tensor() -> None:
    """The module reads it once, outside every graph."""
    torch._dynamo.reset()
    model = penalised(network(), direction=torch.tensor(DIRECTION))
    x1, x2, _ = data()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x1, x2), model(x1, x2))


@NEEDS_COMPILER
def test_compile_inductor() -> None:
    """The default compiler, which generates code, on the loss and its gradients."""
    torch._dynamo.reset()
    mlp = network(torch.float32)
    model = penalised(mlp, reduction="mean")
    x1, x2, t = data(dtype=torch.float32)
    got = torch.compile(lambda: loss_of(model(x1, x2), t), fullgraph=True)()
    got.backward()
    ours = grads(mlp)
    mlp.zero_grad()
    want = loss_of(recipe(mlp, x1, x2, "mean"), t)
    want.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, grads(mlp), rtol=1e-4, atol=1e-5)


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    mlp = network(torch.float32)
    model = penalised(mlp)
    x1, x2, _ = data(dtype=torch.float32)
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        mlp.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, penalty = forward(x1, x2)
        (y.float().square().mean() + penalty).backward()
        if forward is model:
            want = (y.detach(), penalty.detach(), grads(mlp))
    torch.testing.assert_close((y.detach(), penalty.detach(), grads(mlp)), want, rtol=0, atol=0)


def test_compile_gradients_in_the_same_graph() -> None:
    """``torch.autograd.grad`` inside the compiled function, where PyTorch offers to trace it."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch does not trace torch.autograd.grad")
    mlp = network()
    model = penalised(mlp)
    x1, x2, t = data()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(model(x1, x2), t), list(mlp.parameters()))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        torch._dynamo.reset()
        got = torch.compile(step, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, step(), rtol=1e-11, atol=1e-12)


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_autocast_with_grad_scaler(dtype: torch.dtype, tolerance: float) -> None:
    """Gradients in the parameters' float32, near those of full precision; steps are taken."""
    mlp, truth = network(torch.float32), network(torch.float32)
    model = penalised(mlp, reduction="mean")
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(mlp.state_dict())
    x1, x2, t = data(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y, penalty = model(x1, x2)
        assert (y.dtype, penalty.dtype) == (dtype, torch.float32)
        loss = (y.float() - t).square().mean() + penalty
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    loss_of(recipe(truth, x1, x2, "mean"), t).backward()
    for got, want in zip(grads(mlp), grads(truth), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= tolerance * want.norm()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert any(not torch.equal(v, before[n]) for n, v in mlp.state_dict().items())


def test_grad_scaler_skips_a_step_that_overflowed() -> None:
    """An infinite scaled gradient must reach the scaler as one, so that it backs off."""
    mlp = network(torch.float32)
    model = penalised(mlp)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = copy.deepcopy(mlp.state_dict())
    x1, x2, t = data(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model(x1, x2), t)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**30
    for name, v in mlp.state_dict().items():
        assert torch.equal(v, before[name])


# --- functional calls, ensembles, persistence -----------------------------------------------------


def test_functional_call() -> None:
    """Other weights, same module; gradients reach the weights that were passed."""
    model, other = penalised(network()), network(seed=7)
    params = {f"mlp.{n}": p.detach().requires_grad_() for n, p in other.named_parameters()}
    x1, x2, t = data()
    loss = loss_of(torch.func.functional_call(model, params, (x1, x2)), t)
    got = torch.autograd.grad(loss, list(params.values()))
    loss_of(recipe(other, x1, x2), t).backward()
    torch.testing.assert_close(list(got), grads(other), rtol=1e-10, atol=1e-12)


def test_vmap_over_an_ensemble() -> None:
    """Stacked weights under ``vmap`` and ``grad``: each member has its penalty and gradient."""
    members = [penalised(network(seed=s)) for s in range(3)]
    params, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    model = copy.deepcopy(members[0]).to("meta")
    x1, x2, t = data()

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(model, (params, buffers), (x1, x2)), t)

    per_member, losses = torch.func.vmap(torch.func.grad_and_value(loss))(params, buffers)
    for i, member in enumerate(members):
        want = loss_of(recipe(member.mlp, x1, x2), t)
        torch.testing.assert_close(losses[i], want, rtol=1e-10, atol=0)
        want.backward()
        for name, p in member.named_parameters():
            torch.testing.assert_close(per_member[name][i], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["state_dict", "pickle", "torch.save", "deepcopy"])
def test_persistence(way: str) -> None:
    """A copy gives the same penalty and holds no part of the original."""
    model = penalised(network(), margin=0.1, hinge="squared", weight=torch.tensor([[1.0, 2.0]]))
    x1, x2, _ = data()
    if way == "state_dict":
        fresh = penalised(network(seed=9), margin=0.1, hinge="squared", weight=torch.zeros(1, 2))
        state = {"weight", "_extra_state", *(f"mlp.{n}" for n in network().state_dict())}
        assert set(model.state_dict()) == state
        fresh.load_state_dict(model.state_dict())
    elif way == "pickle":
        model(x1, x2)[1].backward()
        fresh = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        fresh = torch.load(buffer, weights_only=False)
    else:
        fresh = copy.deepcopy(model)
    torch.testing.assert_close(fresh(x1, x2), model(x1, x2), rtol=0, atol=0)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    assert model(x1, x2)[0].abs().max() > 0


def test_to_moves_the_weight_with_the_module() -> None:
    model = penalised(network(torch.float32), weight=torch.ones(D, K)).double()
    x1, x2, _ = data()
    assert model.weight is not None
    assert model.weight.dtype == torch.float64
    assert model(x1, x2)[1].dtype == torch.float64


# --- distributed ----------------------------------------------------------------------------------


RANKS = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def said(call: Callable[[], object]) -> str:
    """What a ValueError says, "" where there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def by_ddp(x1: Tensor, x2: Tensor, t: Tensor) -> dict[str, object]:
    from torch.nn.parallel import DistributedDataParallel

    found: dict[str, object] = {}
    for reduction in ("sum", "mean"):
        mlp = network()
        ddp = DistributedDataParallel(penalised(mlp, reduction=reduction))
        loss_of(ddp(x1, x2), t).backward()
        found[f"ddp {reduction}"] = grads(mlp)
    mlp = network()
    compiled = torch.compile(penalised(mlp, reduction="mean"), fullgraph=True, backend="aot_eager")
    ddp = DistributedDataParallel(compiled)
    loss_of(ddp(x1, x2), t).backward()
    found["ddp compiled"] = grads(mlp)
    mlp = network()
    inner = DistributedDataParallel(mlp)
    loss_of(penalised(inner, reduction="mean")(x1, x2), t).backward()
    found["ddp inside"] = grads(mlp)
    built = monotone()
    ddp = DistributedDataParallel(built)
    (ddp(torch.cat([x1, x2], -1)) - t).square().mean().backward()
    return found | {"monotone ddp": grads(built)}


def by_fsdp(x1: Tensor, x2: Tensor, t: Tensor, mesh: DeviceMesh) -> dict[str, object]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = penalised(network(), reduction="mean")
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(x1, x2), t).backward()
        optimizer.step()
    trained = {n: p.full_tensor().detach() for n, p in model.mlp.named_parameters()}
    half = penalised(network(torch.float32), reduction="mean")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(half, mesh=mesh, mp_policy=policy)
    y, penalty = half(x1.float(), x2.float())
    ((y.float() - t.float()).square().mean() + penalty).backward()
    apart = network()
    fully_shard(apart[0], mesh=mesh)
    return {
        "fsdp": trained,
        "fsdp bfloat16": [p.grad.full_tensor() for p in half.parameters()],  # type: ignore[union-attr]
        "fsdp layer": said(lambda: penalised(apart)(x1, x2)),
    }


def monotone_by_fsdp(x: Tensor, t: Tensor, mesh: DeviceMesh) -> dict[str, object]:
    from torch.distributed.fsdp import fully_shard

    built = monotone()
    fully_shard(built, mesh=mesh)
    (built(x) - t).square().mean().backward()
    found: dict[str, object] = {
        "monotone fsdp": [p.grad.full_tensor() for p in built.parameters()],  # type: ignore[union-attr]
        "monotone sharded": said(built.frozen),
    }
    built.unshard()  # type: ignore[operator]
    apart = monotone()
    fully_shard(apart.mlp[0], mesh=mesh)  # type: ignore[index]
    return found | {
        "monotone frozen": built.frozen()(x),
        "monotone layer": said(lambda: apart(x)),
    }


def on_rank(rank: int, port: int, folder: str) -> None:
    """One process of two: DDP and FSDP2 on its half of the rows; writes what it got."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    x1, x2, t = (v.chunk(RANKS)[rank] for v in data())
    mesh = init_device_mesh("cpu", (RANKS,))
    found = by_ddp(x1, x2, t) | by_fsdp(x1, x2, t, mesh)
    found |= monotone_by_fsdp(torch.cat([x1, x2], -1), t, mesh)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each rank got; both ways in one pair of processes, since each start costs seconds."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_rank, (free_port(), str(folder)), nprocs=RANKS)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1 / RANKS), ("mean", 1.0)])
def test_ddp_gives_the_single_process_gradients(
    distributed: list[dict[str, object]], reduction: str, factor: float
) -> None:
    """DDP averages over ranks. With "mean" and equal shards that is the whole batch's gradient;
    with "sum" it is that of 1/ranks times the whole batch's sum, the mean over ranks of their sums.
    """
    mlp = network()
    x1, x2, t = data()
    y, penalty = recipe(mlp, x1, x2, reduction)
    ((y - t).square().mean() + factor * penalty).backward()
    for found in distributed:
        torch.testing.assert_close(found[f"ddp {reduction}"], grads(mlp), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["ddp compiled", "ddp inside"])
def test_ddp_of_the_compiled_module_and_the_wrong_way_round(
    distributed: list[dict[str, object]], way: str
) -> None:
    """``MonotonePenalty(DDP(mlp))`` takes the general path and is right too."""
    mlp = network()
    x1, x2, t = data()
    loss_of(recipe(mlp, x1, x2, "mean"), t).backward()
    for found in distributed:
        torch.testing.assert_close(found[way], grads(mlp), rtol=1e-10, atol=1e-12)


def test_fsdp_trains_as_a_single_process(distributed: list[dict[str, object]]) -> None:
    mlp = network()
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.05)
    x1, x2, t = data()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(recipe(mlp, x1, x2, "mean"), t).backward()
        optimizer.step()
    want = {n: p.detach() for n, p in mlp.named_parameters()}
    for found in distributed:
        torch.testing.assert_close(found["fsdp"], want, rtol=1e-10, atol=1e-12)


def test_fsdp_in_mixed_precision(distributed: list[dict[str, object]]) -> None:
    mlp = network(torch.float32)
    x1, x2, t = (v.float() for v in data())
    loss_of(recipe(mlp, x1, x2, "mean"), t).backward()
    for found in distributed:
        for got, want in zip(found["fsdp bfloat16"], grads(mlp), strict=True):  # type: ignore[call-overload]
            assert got.dtype == torch.float32
            assert (got - want).norm() <= 0.02 * want.norm()


def test_fsdp_around_a_single_layer_says_what_to_do(distributed: list[dict[str, object]]) -> None:
    for found in distributed:
        assert "around the MonotonePenalty as a whole" in str(found["fsdp layer"])


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_network_monotone_by_construction_trains_in_several_processes(
    distributed: list[dict[str, object]], way: str
) -> None:
    model = monotone()
    x1, x2, t = data()
    (model(torch.cat([x1, x2], -1)) - t).square().mean().backward()
    for found in distributed:
        torch.testing.assert_close(found[f"monotone {way}"], grads(model), rtol=1e-10, atol=1e-12)


def test_a_network_monotone_by_construction_is_frozen_in_one_piece(
    distributed: list[dict[str, object]],
) -> None:
    x1, x2, _ = data()
    deployed = monotone().frozen()
    for rank, found in enumerate(distributed):
        x = torch.cat([x1, x2], -1).chunk(RANKS)[rank]
        torch.testing.assert_close(found["monotone frozen"], deployed(x), rtol=1e-10, atol=1e-12)
        assert "as FSDP's unshard() makes them, got a DTensor" in str(found["monotone sharded"])
        assert "fully_shard around the Monotone as a whole" in str(found["monotone layer"])
