"""What is trained is deployed: in evaluation mode a penalised network is an ordinary one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from monokernel import Monotone, MonotonePenalty
from tests import zoo
from tests.support import mlp, points

ROWS, D1, K = 9, 3, 2
BOX = {"lower": -3.0, "upper": 3.0, "direction": [0, 0, 0, 1, -1]}


def penalised(net: nn.Module) -> nn.Module:
    return MonotonePenalty(net, direction=[1, -1], weight=2.0).eval()


def frozen(net: nn.Module) -> nn.Module:
    return Monotone(net, **BOX).frozen()


def normed() -> nn.Module:
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 2)]
    net = nn.Sequential(*layers)
    net(torch.randn(64, 5))  # has statistics of its own
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: mlp(D1, K, 2, dtype=torch.float32),
    "norm and dropout": normed,
    "wide and deep": lambda: zoo.network("wide and deep", D1 + K, 2, 8),
}
WAYS = [(name, how) for name in NETWORKS for how in (penalised, frozen)
        if (name, how) != ("norm and dropout", frozen)]  # fmt: skip


def made(name: str, how: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module to deploy, and inputs as it takes them."""
    x1, x2 = points(ROWS, D1, K, torch.float32)
    inputs = (x1, x2) if how is penalised else (torch.cat([x1, x2], -1),)
    return how(NETWORKS[name]()), inputs


def test_evaluation_mode_gives_y_alone() -> None:
    net, (x1, x2) = normed(), points(ROWS, D1, K, torch.float32)
    model = MonotonePenalty(net, direction=[1, -1], batch_stats="running")
    assert len(model(x1, x2)) == 2
    model.eval()
    x = torch.cat([x1, x2], -1)
    assert torch.equal(model(x1, x2), net(x))
    assert torch.equal(model(x), net(x))
    assert len(model.train()(x1, x2)) == 2
    one = MonotonePenalty(mlp(D1, 1, 1)).eval()
    x1, x2 = points(ROWS, D1, 1)
    assert torch.equal(one(x1, x2[:, 0]), one.mlp(torch.cat([x1, x2], -1)))
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x1, x2), one(x1, x2))
    with pytest.raises(ValueError, match=r"^x2: expected shape \(9, k\) or \(9,\) to go with x1"):
        one(x1, x2[:4])


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_export(name: str, how: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = made(name, how)
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: rows} for _ in inputs))
    for n in (ROWS, 4):
        part = [t[:n] for t in inputs]
        torch.testing.assert_close(program.module()(*part), model(*part))
    assert not any("monokernel" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("name", "how"), WAYS)
def test_trace(name: str, how: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = made(name, how)
    traced = torch.jit.trace(model, inputs)
    for n in (ROWS, 4):
        part = [t[:n] for t in inputs]
        torch.testing.assert_close(traced(*part), model(*part))


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_onnx(name: str, how: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Also in ONNX Runtime, where it is installed."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, inputs = made(name, how)
    rows = torch.export.Dim("rows")
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            dynamic_shapes=tuple({0: rows} for _ in inputs),
            verbose=False,
        )
    assert program is not None
    program.save(path)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for n in (ROWS, 4):
        part = [t[:n] for t in inputs]
        (y,) = session.run(None, dict(zip(names, (t.numpy() for t in part), strict=True)))
        torch.testing.assert_close(torch.from_numpy(y), model(*part), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "how"), WAYS)
def test_onnx_by_torchscript(
    name: str, how: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    """The exporter that was the default before PyTorch 2.9 takes no state but tensors."""
    onnx = pytest.importorskip("onnx")
    model, inputs = made(name, how)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, inputs, str(path), dynamo=False)
    names = {t.name for t in onnx.load(path).graph.initializer}
    assert not any("extra_state" in name for name in names)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = zip(session.get_inputs(), inputs, strict=True)
    (y,) = session.run(None, {of.name: t.numpy() for of, t in given})
    torch.testing.assert_close(torch.from_numpy(y), model(*inputs), rtol=1e-4, atol=1e-5)


def test_the_state_is_tensors_alone_while_torchscript_exports() -> None:
    model = penalised(mlp(D1, K, 1))
    with mock.patch("torch.onnx.is_in_onnx_export", return_value=True):
        assert all(isinstance(t, Tensor) for t in model.state_dict().values())
    assert isinstance(model.state_dict()["_extra_state"], dict)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_training_mode_and_a_network_that_bounds_itself_say_what_to_export() -> None:
    x1, x2 = points(ROWS, D1, K, torch.float32)
    x = torch.cat([x1, x2], -1)
    net = NETWORKS["wide and deep"]()
    model, sure = MonotonePenalty(net), MonotonePenalty(Monotone(net, **BOX)).eval()
    asked: list[tuple[nn.Module, tuple[Tensor, ...], str]] = [
        (model, (x1, x2), r"^MonotonePenalty: expected evaluation mode \(\.eval\(\)\)"),
        (sure, (x,), r"^Monotone: expected its frozen\(\) to be exported or traced"),
    ]
    for module, inputs, sentence in asked:
        ways: list[Callable[..., Any]] = [torch.export.export, torch.jit.trace]
        for write in ways:
            with pytest.raises(ValueError, match=sentence) as caught:
                write(module, inputs)
            assert "\n" not in str(caught.value)
