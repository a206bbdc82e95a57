"""The tolerance of the device's tests tells a right TF32 kernel from a wrong one: emulated here.

A device cuts float32 operands of a product to TF32. The same is done to PyTorch's own products, in
the hand-written backward, and that stands for a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from monokernel.activations import KINDS
from monokernel.backends import handwritten
from monokernel.nodes import Elementwise
from monokernel.problem import Hinge, Mode, Problem
from tests.problems import assert_as_precise_as_pytorch, problem, product_roundoff

ROWS = 300


def _cut(operand: Tensor) -> Tensor:
    """The operand without the 13 bits of mantissa that TF32 has not."""
    if operand.dtype != torch.float32:
        return operand
    return (operand.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class TensorFloat32(TorchDispatchMode):
    """Every matrix product takes its two operands, the last of its arguments, cut."""

    PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv", "dot")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            args = (*args[:-2], *(_cut(operand) for operand in args[-2:]))
        return func(*args, **(kwargs or {}))


class Kernel(ModuleType):
    """The backward in PyTorch with TF32 products; ``wrong`` spoils its gradients."""

    def __init__(self, wrong: Callable[[list[Tensor]], object] = lambda grads: None) -> None:
        super().__init__("kernel")
        self.wrong = wrong

    def forward(self, *asked: Any) -> Any:
        with TensorFloat32():
            return handwritten.forward(*asked)

    def backward(self, *asked: Any) -> list[Tensor | None]:
        with TensorFloat32():
            grads = handwritten.backward(*asked)
        self.wrong([g for g in grads if g is not None])
        return grads


@pytest.fixture
def roundoff() -> Iterator[float]:
    """What the device's tests allow with TF32 switched on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield product_roundoff(torch.float32, "cuda")
    torch.set_float32_matmul_precision(before)


def _problem(mode: Mode, width: int = 64) -> Problem:
    D, k = (1, 3) if mode == "adjoint" else (3, 1)
    return problem((6, width, width, D), "silu", k, mode, Hinge(margin=9.0))


MODES = pytest.mark.parametrize("mode", ["tangent", "adjoint"])


@MODES
@pytest.mark.parametrize("width", [20, 32, 64])
def test_a_right_kernel_passes(mode: Mode, width: int, roundoff: float) -> None:
    p = _problem(mode, width)
    assert_as_precise_as_pytorch(Kernel(), p, ROWS, torch.float32, roundoff=roundoff)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_kernel_passes_with_every_activation(kind: str, roundoff: float) -> None:
    p = problem((5, 40, 24, 2), kind, 2, "tangent", Hinge(margin=9.0), kind)
    assert_as_precise_as_pytorch(Kernel(), p, ROWS, torch.float32, roundoff=roundoff)


@MODES
def test_float32s_own_epsilon_would_fail_it(mode: Mode, roundoff: float) -> None:
    with pytest.raises(AssertionError, match="PyTorch's"):
        assert_as_precise_as_pytorch(Kernel(), _problem(mode), ROWS, torch.float32)


@MODES
@pytest.mark.parametrize("tensor", range(7))
def test_an_error_of_a_hundredth_fails(mode: Mode, tensor: int, roundoff: float) -> None:
    kernel = Kernel(lambda grads: grads[tensor].mul_(1.01))
    with pytest.raises(AssertionError, match=f"tensor {tensor + 2}"):
        assert_as_precise_as_pytorch(kernel, _problem(mode), ROWS, torch.float32, roundoff=roundoff)


@MODES
def test_a_kernel_without_curvature_fails(
    mode: Mode, roundoff: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flat(Kernel):
        def backward(self, *asked: Any) -> list[Tensor | None]:
            with monkeypatch.context() as patch:
                patch.setattr(Elementwise, "curvature", lambda *_: [None])
                return super().backward(*asked)

    with pytest.raises(AssertionError, match="PyTorch's"):
        assert_as_precise_as_pytorch(Flat(), _problem(mode), ROWS, torch.float32, roundoff=roundoff)


def test_strict_float32_is_held_to_its_own_rounding() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    assert product_roundoff(torch.float32, "cuda") == torch.finfo(torch.float32).eps / 2
