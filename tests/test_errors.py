"""Each bad input gets one sentence: which argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monokernel import audit, fused_mono_penalty, plan, value_and_jacobian
from tests.support import assert_same, mlp, points

NET = mlp(3, 2, 2, dtype=torch.float32)
X1, X2 = points(5, 3, 2, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("x", X2), {}, "x1: expected a tensor, got str"),
        ((X1, "x"), {}, "x2: expected a tensor, got str"),
        ((X1.long(), X2), {}, "x1: expected a floating-point tensor, got int64"),
        ((X1, X2.bool()), {}, "x2: expected a floating-point tensor, got bool"),
        ((X1.to_sparse(), X2), {}, "x1: expected a dense tensor, got torch.sparse_coo"),
        ((X1.sum(), X2), {}, "x1: expected shape (..., d1), got a tensor with no dimension"),
        (
            (X1, X2[:4]),
            {},
            "x2: expected shape (5, k) or (5,) to go with x1 (5, 3), got (4, 2)",
        ),
        (
            (X1[0], X2),
            {},
            "x2: expected shape (k,) or () to go with x1 (3,), got (5, 2)",
        ),
        ((X1, X2[:, :0]), {}, "x2: expected at least one column, got k = 0"),
        (
            (X1, X2[:, :1]),
            {},
            "x2: expected d1 + k = 5, the inputs of mlp's first layer, got d1 = 3 and k = 1",
        ),
        ((X1, X2.to("meta")), {}, "x2: expected on the device of x1, cpu, got meta"),
        ((X1, X2.double()), {}, "x2: expected the dtype of x1, float32, got float64"),
        (
            (X1.double(), X2.double()),
            {},
            "x1: expected the dtype of mlp, float32, got float64",
        ),
        ((X1.to("meta"), X2.to("meta")), {}, "x1: expected on the device of mlp, cpu, got meta"),
        ((X1, X2), {"direction": 2}, "direction: expected entries in {-1, 0, 1}, got 2"),
        ((X1, X2), {"direction": [1, 0.5]}, "direction: expected entries in {-1, 0, 1}, got 0.5"),
        (
            (X1, X2),
            {"direction": [1, 1, 1]},
            "direction: expected a scalar, (k,) = (2,) or (D, k) = (D, 2), got shape (3,)",
        ),
        (
            (X1, X2),
            {"direction": torch.ones(3, 2)},
            "direction: expected a scalar, (k,) = (2,) or (D, k) = (2, 2), got shape (3, 2)",
        ),
        (
            (X1, X2),
            {"direction": "up"},
            "direction: expected entries in {-1, 0, 1}, got 'up'",
        ),
        (
            (X1, X2),
            {"direction": {0: None}},
            "direction: expected a number, a (nested) sequence of numbers, a tensor or a mapping "
            "from columns to numbers, got dict",
        ),
        ((X1, X2), {"direction": 1j}, "direction: expected entries in {-1, 0, 1}, got 1j"),
        (
            (X1, X2),
            {"direction": torch.tensor(1 + 0j)},
            "direction: expected entries in {-1, 0, 1}, got (1+0j)",
        ),
        ((X1, X2), {"margin": "0"}, "margin: expected a number, got str"),
        ((X1, X2), {"margin": True}, "margin: expected a number, got bool"),
        ((X1, X2), {"margin": math.nan}, "margin: expected finite numbers, got nan"),
        ((X1, X2), {"margin": [0.0, math.inf]}, "margin: expected finite numbers, got inf"),
        ((X1, X2), {"weight": math.nan}, "weight: expected none below 0, got nan"),
        (
            (X1, X2),
            {"weight": torch.tensor([-1.0, math.nan])},
            "weight: expected none below 0, got -1",
        ),
        ((X1, X2), {"hinge": "cubic"}, "hinge: expected one of 'linear', 'squared', got 'cubic'"),
        (
            (X1, X2),
            {"reduction": None},
            "reduction: expected one of 'sum', 'mean', 'none', got None",
        ),
        (
            (X1, X2),
            {"mode": "forward"},
            "mode: expected one of 'auto', 'tangent', 'adjoint', got 'forward'",
        ),
        (
            (X1, X2),
            {"backend": "cuda"},
            "backend: expected one of 'auto', 'triton', 'cpu', 'torch', 'reference', got 'cuda'",
        ),
        (
            (X1, X2),
            {"weight": torch.ones(3)},
            "weight: expected a shape that broadcasts to (D, k) = (2, 2) or (..., D, k) = "
            "(5, 2, 2), or one for each row, (5,), got (3,)",
        ),
        (
            (X1, X2),
            {"weight": torch.ones(4, 2, 2)},
            "weight: expected a shape that broadcasts to (D, k) = (2, 2) or (..., D, k) = "
            "(5, 2, 2), or one for each row, (5,), got (4, 2, 2)",
        ),
        ((X1, X2), {"weight": "1"}, "weight: expected a number or a tensor, got str"),
        (
            (X1, X2),
            {"weight": torch.ones(2, 2, dtype=torch.int64)},
            "weight: expected a floating-point tensor, got int64",
        ),
        (
            (X1, X2),
            {"weight": torch.ones(2, 2).to_sparse()},
            "weight: expected a dense tensor, got torch.sparse_coo",
        ),
        (
            (X1, X2),
            {"weight": torch.ones(2, 2, device="meta")},
            "weight: expected on the device of x1, cpu, got meta",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sentence(
    arguments: tuple[Any, Any], options: dict[str, Any], sentence: str, backend: str
) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        fused_mono_penalty(NET, *arguments, **({"backend": backend} | options))
    assert str(caught.value) == sentence
    if not options.keys() & {"margin", "hinge", "weight", "reduction"}:
        asked = {"backend": backend, "direction": 1} | options
        assert plan(NET, *arguments, **asked).error == sentence


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor() -> None:
    with pytest.raises(TypeError, match="x2: expected a dense tensor, got a nested one"):
        fused_mono_penalty(NET, X1, torch.nested.nested_tensor([X2[:2], X2[2:]]))


def test_not_a_module() -> None:
    for call in (fused_mono_penalty, value_and_jacobian, audit):
        with pytest.raises(TypeError, match=r"^mlp: expected an nn.Module, got function$"):
            call(lambda x: x, X1, X2)


def test_a_weight_below_zero_in_a_compiled_loss() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def penalty(weight: Tensor) -> Tensor:
        return fused_mono_penalty(NET, X1, X2, margin=1.0, weight=weight)

    want = fused_mono_penalty(NET, X1, X2, margin=1.0, weight=torch.ones(2, 2))
    torch.testing.assert_close(penalty(torch.ones(2, 2)), want)
    with pytest.raises(RuntimeError, match="weight: expected none below 0"):
        penalty(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_parameters_made_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        chain, other = mlp(3, 2, 2, dtype=torch.float32), hooked(mlp(3, 2, 2, dtype=torch.float32))
    for net in (chain, other) if backend != "torch" else (chain,):
        with pytest.raises(RuntimeError, match=r"^mlp: expected parameters that autograd may keep"):
            fused_mono_penalty(net, X1, X2, backend=backend)


def test_the_other_calls_check_as_well() -> None:
    for call in (value_and_jacobian, audit):
        with pytest.raises(TypeError, match="x1: expected a floating-point tensor, got int64"):
            call(NET, X1.long(), X2)
    with pytest.raises(ValueError, match="mode: expected one of"):
        value_and_jacobian(NET, X1, X2, mode="sideways")
    with pytest.raises(ValueError, match="direction: expected entries"):
        audit(NET, X1, X2, direction=3)
    with pytest.raises(TypeError, match="margin: expected a number, got str"):
        audit(NET, X1, X2, margin="0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample: expected a number of points >= 0, got -1"):
        audit(NET, X1, X2, sample=-1)


def test_a_backend_by_name_says_why_it_cannot_serve() -> None:
    net, (x1, x2) = mlp(3, 2, 2), (t.double().to("meta") for t in (X1, X2))
    why = "backend: 'cpu' was asked for but cannot serve: it serves CPU tensors, got meta"
    with pytest.raises(ValueError, match=why):
        fused_mono_penalty(net.to("meta"), x1, x2, backend="cpu")


def endless(depth: int) -> nn.Sequential:
    """``depth`` Sequentials, one in the other, and the outermost but one in the innermost."""
    parts = [nn.Sequential(nn.Linear(5, 5)) for _ in range(depth)]
    for outer, inner in pairwise(parts):
        outer.append(inner)
    parts[-1].append(parts[min(1, depth - 1)])
    return parts[0]


@pytest.mark.parametrize(("depth", "part"), [(1, "mlp"), (2, "mlp.1"), (3, "mlp.1"), (5, "mlp.1")])
def test_a_network_inside_itself(depth: int, part: str) -> None:
    net = endless(depth)
    sentence = f"mlp: expected layers that end, got {part} (Sequential) inside itself"
    for call in (fused_mono_penalty, value_and_jacobian):
        with pytest.raises(ValueError) as caught:
            call(net, X1, X2)
        assert str(caught.value) == sentence
    assert plan(net, X1, X2).error == sentence


def test_a_network_inside_itself_that_is_not_fused() -> None:
    net = nn.Sequential(nn.LayerNorm(5))
    net.append(net)
    sentence = "^mlp: expected layers that end, got a module that calls itself without end$"
    for call in (fused_mono_penalty, value_and_jacobian, audit):
        with pytest.raises(ValueError, match=sentence):
            call(net, X1, X2)


def test_layers_and_parts_used_twice_are_no_cycle() -> None:
    layer = nn.Linear(5, 5)
    part = nn.Sequential(nn.Tanh(), layer)
    net = nn.Sequential(layer, part, part, nn.Sequential(nn.Sequential(), part), part)
    assert plan(net, X1, X2).kernel != plan(hooked(net), X1, X2).kernel
    y, _ = value_and_jacobian(net, X1, X2)
    torch.testing.assert_close(y, net(torch.cat([X1, X2], -1)))


def hooked(net: nn.Module) -> nn.Module:
    outer = nn.Sequential(net)
    outer.register_forward_hook(lambda *_: None)
    return outer


class Sub(Tensor):
    """A tensor whose memory need not be what it stands for."""


def removed(layer: nn.Linear) -> None:
    del layer.weight


def registered_none(layer: nn.Linear) -> None:
    layer.weight = None


def attribute(value: Any) -> Callable[[nn.Linear], None]:
    def replace(layer: nn.Linear) -> None:
        del layer.weight
        layer.__dict__["weight"] = value

    return replace


def parameter(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Linear], None]:
    def replace(layer: nn.Linear) -> None:
        weight = change(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())

    return replace


WEIGHT = torch.randn(4, 5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("replace", "sentence"),
    [
        (registered_none, r"linear\(\): argument 'weight' .* must be Tensor, not NoneType"),
        (removed, "'Linear' object has no attribute 'weight'"),
        (attribute(None), r"linear\(\): argument 'weight' .* must be Tensor, not NoneType"),
        (attribute([1.0]), r"linear\(\): argument 'weight' .* must be Tensor, not list"),
        (attribute(WEIGHT.long()), "mlp: expected floating-point parameters, got int64"),
        (attribute(WEIGHT.to_sparse()), "sparse"),
        (parameter(Tensor.long), "mlp: expected floating-point parameters, got int64"),
        (parameter(Tensor.cfloat), "mlp: expected floating-point parameters, got complex64"),
        (parameter(Tensor.to_sparse), "sparse"),
        (parameter(lambda t: t.to("meta")), "x1: expected on the device of mlp, meta, got cpu"),
    ],
)
def test_a_weight_that_is_none_or_no_dense_floating_point_tensor(
    replace: Callable[[nn.Linear], None], sentence: str, autocast: bool
) -> None:
    net = mlp(3, 2, 2, [4], dtype=torch.float32)
    replace(net[0])
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises((ValueError, TypeError, AttributeError, RuntimeError), match=sentence),
    ):
        fused_mono_penalty(net, X1, X2)


def test_plan_names_the_layer_without_a_weight() -> None:
    for replace in (registered_none, removed, attribute(None)):
        net = mlp(3, 2, 2, dtype=torch.float32)
        replace(net[2])
        assert plan(net, X1, X2).refused["torch"].startswith("mlp.2 (Linear)")


@pytest.mark.parametrize(
    "replace",
    [
        attribute(WEIGHT),
        attribute(WEIGHT.as_subclass(Sub)),
        parameter(lambda t: torch.randn(5, 4).t()),  # a view
        parameter(lambda t: torch.randn(1, 5).expand(4, 5)),
        parameter(
            lambda t: torch.randn(4, 5, dtype=torch.cfloat).conj().imag
        ),  # negated on reading
    ],
)
def test_a_weight_of_another_making_is_read_as_pytorch_reads_it(
    replace: Callable[[nn.Linear], None],
) -> None:
    net = mlp(3, 2, 2, [4], dtype=torch.float32)
    replace(net[0])
    assert_same(
        value_and_jacobian(net, X1, X2), value_and_jacobian(hooked(net), X1, X2), tolerance=1e-5
    )


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (4, 4)])
def test_a_bias_that_broadcasts_is_not_read_as_a_row(shape: tuple[int, ...]) -> None:
    """(4, 1) adds its entries down the rows of a batch of four, which is no bias of the layer."""
    net = mlp(3, 2, 2, [4], dtype=torch.float32)
    net[0].bias = nn.Parameter(torch.randn(shape))
    y, _ = value_and_jacobian(net, X1[:4], X2[:4])
    torch.testing.assert_close(y, net(torch.cat([X1[:4], X2[:4]], -1)))
    assert "bias of another size" in plan(net, X1, X2).refused["torch"]


@pytest.mark.parametrize(
    ("made", "came"),
    [(lambda t: None, "NoneType"), (Tensor.to_sparse, "torch.sparse_coo"), (Sub, "Sub")],
)
def test_a_parametrization_that_makes_no_dense_tensor(
    made: Callable[[Tensor], Any], came: str
) -> None:
    class Made(nn.Module):
        def forward(self, weight: Tensor) -> Any:
            return made(weight.detach())

    net = mlp(3, 2, 2, [4], dtype=torch.float32)
    nn.utils.parametrize.register_parametrization(net[0], "weight", Made(), unsafe=True)
    sentence = f"mlp: expected a parametrized weight that is a plain dense tensor, got {came}"
    with pytest.raises(TypeError, match=sentence):
        fused_mono_penalty(net, X1, X2)
