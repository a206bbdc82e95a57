"""Training steps where a device gives them more than a CPU: graphs, streams, cards, processes.

Each is held against the same step by itself, so that what is shown is that nothing around it
matters: which card is current, which stream, who captures.
"""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from benchmarks.measure import captured
from monokernel import fused_mono_penalty, plan
from monokernel.backends import operators
from monokernel.backends.triton import launch, replay
from tests.support import gradients, mlp, points
from tests.zoo import network

pytestmark = [pytest.mark.gpu]

# Of the whole network in one kernel, layer by layer, and node by node.
PATHS = pytest.mark.parametrize("name", [64, 300, "pre-norm LayerNorm"])


def network_of(name: int | str, dtype: torch.dtype, device: str = "cuda") -> nn.Module:
    if isinstance(name, int):
        return mlp(6, 2, 1, hidden=(name, name), dtype=dtype).to(device)
    return network(name, 8, 1, 64, dtype).to(device)


def loss_of(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    y, penalty = fused_mono_penalty(
        net, x1, x2, margin=0.1, reduction="mean", return_output=True, backend="triton"
    )
    return y.float().square().mean() + penalty


def step(net: nn.Module, x1: Tensor, x2: Tensor) -> list[Tensor]:
    """The loss and the gradients of the parameters."""
    loss = loss_of(net, x1, x2)
    return [loss.detach(), *gradients(loss, *net.parameters())]


def placed(device: str, dtype: torch.dtype, N: int = 3000) -> list[Tensor]:
    return [t.to(device) for t in points(N, 6, 2, dtype)]


@PATHS
def test_graphs_of_the_compiler(name: int | str) -> None:
    """torch.compile's graph mode captures forward and backward, and replays them on other rows."""
    net = network_of(name, torch.float16)
    compiled = torch.compile(loss_of, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warms up, records, replays
        x1, x2 = placed("cuda", torch.float16)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(net, x1, x2)
        found = [loss.detach().clone(), *(g.clone() for g in gradients(loss, *net.parameters()))]
        for ours, alone in zip(found, step(net, x1, x2), strict=True):
            assert torch.equal(ours, alone)


@PATHS
def test_a_card_that_is_not_the_current_one(name: int | str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one card")
    net = network_of(name, torch.float16)
    x1, x2 = placed("cuda", torch.float16)
    here = step(net, x1, x2)
    there = step(copy.deepcopy(net).to("cuda:1"), x1.to("cuda:1"), x2.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(here, there, strict=True):
        assert b.device == torch.device("cuda:1")
        assert torch.allclose(a.float(), b.float().to(a.device), rtol=2e-3, atol=1e-5)


@PATHS
def test_a_stream_of_its_own(name: int | str) -> None:
    """Every launch is on the caller's stream: x is written there just before, after a delay."""
    net = network_of(name, torch.float16)
    x1, x2 = placed("cuda", torch.float16)
    alone = step(net, x1, x2)
    late1, late2 = torch.zeros_like(x1), torch.zeros_like(x2)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late1.copy_(x1)
        late2.copy_(x2)
        found = step(net, late1, late2)
    side.synchronize()
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a, b)


@PATHS
def test_a_step_without_python(name: int | str) -> None:
    """The third call of a kind is launched by ``csrc/replay.cpp``: the same bits as by Python, on
    the caller's stream, on a card that is not the current one, and in a graph's capture."""
    if operators.opened() is None:
        pytest.skip("the operators were not built")
    for card in range(min(torch.cuda.device_count(), 2)):
        net = network_of(name, torch.float16, f"cuda:{card}")
        x1, x2 = placed(f"cuda:{card}", torch.float16)
        with mock.patch.object(launch, "watched", return_value=True):
            alone = step(net, x1, x2)
        for _ in range(2):
            step(net, x1, x2)
        side = torch.cuda.Stream(card)
        late1, late2 = torch.zeros_like(x1), torch.zeros_like(x2)
        torch.cuda.synchronize(card)
        unasked = mock.patch.object(replay, "_written", side_effect=AssertionError("Python asked"))
        with unasked, torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            late1.copy_(x1)
            late2.copy_(x2)
            found = step(net, late1, late2)
        side.synchronize()
        for a, b in zip(found, alone, strict=True):
            assert torch.equal(a, b)
        assert torch.cuda.current_device() == 0
    with unasked:
        net, (x1, x2) = network_of(name, torch.float16), placed("cuda", torch.float16)
        alone = step(net, x1, x2)
        graph, found = captured(lambda: step(net, x1, x2))
        x1.neg_()
        graph.replay()
        x1.neg_()
        graph.replay()
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a, b)


def scaled_steps(net: nn.Module, x1: Tensor, x2: Tensor, backend: str) -> list[float]:
    """The losses of a few steps under autocast, by a scaler whose first scale is too large."""
    device = x1.device.type
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            y, penalty = fused_mono_penalty(
                net, x1, x2, margin=0.1, reduction="mean", return_output=True, backend=backend
            )
            loss = (y.float() - 0.5).square().mean() + penalty
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**40
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in net.parameters())
    return losses


@PATHS
def test_mixed_precision_with_a_scaler(name: int | str) -> None:
    """What overflows is left out, and then it trains as the reference does."""
    x1, x2 = placed("cuda", torch.float32)
    net = network_of(name, torch.float32)
    other = copy.deepcopy(net)
    with torch.autocast("cuda", torch.float16):
        assert plan(net, x1, x2).backend == "triton"
    ours = scaled_steps(net, x1, x2, "triton")
    reference = scaled_steps(other, x1, x2, "reference")
    assert ours[-1] < ours[0]
    assert abs(ours[-1] - reference[-1]) <= 0.02 * abs(reference[0])


def on_rank(rank: int, ranks: int, folder: str, device: str) -> None:
    """One process: its share of the rows by DistributedDataParallel; writes the gradients."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from monokernel import MonotonePenalty

    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks,
    )  # fmt: skip
    net, x1, x2 = torch.load(Path(folder) / "given.pt", weights_only=False)
    model = MonotonePenalty(net.to(device), margin=0.1, reduction="mean")
    ddp = DistributedDataParallel(model)
    y, penalty = ddp(x1.chunk(ranks)[rank].to(device), x2.chunk(ranks)[rank].to(device))
    (y.float().square().mean() + penalty).backward()
    found = [p.grad.cpu() for p in net.parameters() if p.grad is not None]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def shared_gradients(folder: Path, ranks: int, device: str) -> None:
    """Every rank ends with the gradients of all rows."""
    net, (x1, x2) = mlp(6, 2, 1, (64, 64), dtype=torch.float32), points(400, 6, 2, torch.float32)
    torch.save((net, x1, x2), folder / "given.pt")
    torch.multiprocessing.spawn(on_rank, (ranks, str(folder), device), nprocs=ranks)
    y, penalty = fused_mono_penalty(
        net.double(), x1.double(), x2.double(), margin=0.1, reduction="mean", return_output=True,
        backend="reference",
    )  # fmt: skip
    want = gradients(y.square().mean() + penalty, *net.parameters())
    for rank in range(ranks):
        found = torch.load(folder / f"{rank}.pt")
        for a, b in zip(found, want, strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


def test_data_parallel_over_nccl(tmp_path: Path) -> None:
    shared_gradients(tmp_path, min(torch.cuda.device_count(), 2), "cuda")
