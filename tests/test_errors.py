"""Each bad input gets one sentence: which argument, what was expected, what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from monokernel import audit, fused_mono_penalty, plan, value_and_jacobian
from tests.support import mlp, points

NET = mlp(3, 2, 2, dtype=torch.float32)
X1, X2 = points(5, 3, 2, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("x", X2), {}, "x1: expected a tensor, got str"),
        ((X1, None), {}, "x2: expected a tensor, got NoneType"),
        ((X1.long(), X2), {}, "x1: expected a floating-point tensor, got int64"),
        ((X1, X2.bool()), {}, "x2: expected a floating-point tensor, got bool"),
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
            "direction: expected a number, a (nested) sequence of numbers or a tensor, got str",
        ),
        ((X1, X2), {"margin": "0"}, "margin: expected a number, got str"),
        ((X1, X2), {"margin": True}, "margin: expected a number, got bool"),
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
            "(5, 2, 2), got (3,)",
        ),
        (
            (X1, X2),
            {"weight": torch.ones(4, 2, 2)},
            "weight: expected a shape that broadcasts to (D, k) = (2, 2) or (..., D, k) = "
            "(5, 2, 2), got (4, 2, 2)",
        ),
        ((X1, X2), {"weight": "1"}, "weight: expected a number or a tensor, got str"),
        (
            (X1, X2),
            {"weight": torch.ones(2, 2, dtype=torch.int64)},
            "weight: expected a floating-point tensor, got int64",
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


def test_not_a_module() -> None:
    for call in (fused_mono_penalty, value_and_jacobian, plan, audit):
        with pytest.raises(TypeError, match=r"^mlp: expected an nn.Module, got function$"):
            call(lambda x: x, X1, X2)


def test_the_other_calls_check_as_well() -> None:
    for call in (value_and_jacobian, plan, audit):
        with pytest.raises(TypeError, match="x1: expected a floating-point tensor, got int64"):
            call(NET, X1.long(), X2)
    for call in (value_and_jacobian, plan):
        with pytest.raises(ValueError, match="mode: expected one of"):
            call(NET, X1, X2, mode="sideways")
    with pytest.raises(ValueError, match="direction: expected entries"):
        audit(NET, X1, X2, direction=3)


def test_a_backend_by_name_says_why_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="backend: 'cpu' was asked for but cannot serve: "):
        fused_mono_penalty(NET.half(), X1.half(), X2.half(), backend="cpu")
    NET.float()
