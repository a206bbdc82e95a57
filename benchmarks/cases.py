"""What is timed: a network, its rows, and a hinge that a chosen share of the slopes violates."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from monokernel.advice import products
from monokernel.problem import Mode, accumulate_dtype, cheaper_mode

__all__ = ["FREE_INPUTS", "PRECISIONS", "Case", "Job", "margin_for"]

FREE_INPUTS = 8
HIDDEN_LAYERS = 3
ROWS_AT_A_TIME, ROWS_AT_A_TIME_ELSEWHERE = 4096, 1 << 16
# A dtype, and how PyTorch multiplies float32 on a GPU.
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


@dataclass(frozen=True)
class Case:
    """N rows, ``depth`` hidden layers of ``width``; D outputs, each to rise with k inputs.

    ``network`` names one of ``tests/zoo.py`` in place of the chain with an activation."""

    rows: int
    width: int
    outputs: int
    columns: int
    activation: str
    share: float
    depth: int = HIDDEN_LAYERS
    precision: str = "fp32"
    network: str = ""

    def __str__(self) -> str:
        precision = "" if self.precision == "fp32" else f"{self.precision} "
        return (
            f"{precision}N={self.rows} width={self.width} D={self.outputs} k={self.columns} "
            f"{self.network or self.activation} v={self.share:g}"
        )

    @property
    def mode(self) -> Mode:
        """The mode that ``mode="auto"`` takes."""
        return cheaper_mode(self.outputs, self.columns)

    @property
    def products(self) -> float:
        """Matrix products per hidden layer that the task and the penalty need: the cost table."""
        curved = self.activation != "relu"
        return products(self.mode, self.outputs, self.columns, self.share, curved)

    def flops(self, products: float) -> float:
        """Operations of that many products in every hidden-to-hidden layer."""
        return products * 2 * self.rows * self.width**2 * (self.depth - 1)

    def build(self) -> nn.Module:
        inputs = FREE_INPUTS + self.columns
        if self.network:
            from tests.zoo import network  # of a clone; an installed package has no tests

            return network(self.network, inputs, self.outputs, self.width)
        layers: list[nn.Module] = []
        for _ in range(self.depth):
            layers += [nn.Linear(inputs, self.width), ACTIVATIONS[self.activation]()]
            inputs = self.width
        return nn.Sequential(*layers, nn.Linear(inputs, self.outputs))


@dataclass
class Job:
    """A case with its tensors, the margin that makes the share, unless it is known, and the share
    of violating pairs as measured; the truth to agree with is computed when it is asked for."""

    case: Case
    device: str = "cpu"
    known: InitVar[float | None] = None
    net: nn.Module = field(init=False)
    x1: Tensor = field(init=False)
    x2: Tensor = field(init=False)
    target: Tensor = field(init=False)
    margin: float = field(init=False)
    share: float = field(init=False)

    def __post_init__(self, known: float | None) -> None:
        case = self.case
        torch.manual_seed(0)
        dtype, _ = PRECISIONS[case.precision]
        self.net = case.build().to(self.device, dtype)
        x = torch.randn(case.rows, FREE_INPUTS + case.columns, device=self.device).to(dtype)
        self.x1, self.x2 = x[:, :FREE_INPUTS].contiguous(), x[:, FREE_INPUTS:].contiguous()
        self.target = torch.randn(case.rows, case.outputs, device=self.device).to(dtype)
        if known is not None:
            self.margin, self.share = known, math.nan
            return
        pairs = self._pair_slopes()
        self.margin = margin_for(pairs.flatten(), case.share)
        self.share = (pairs < self.margin).double().mean().item()

    def task_loss(self, y: Tensor) -> Tensor:
        if y.shape != self.target.shape:  # one output, squeezed
            y = y.reshape_as(self.target)
        # Half precision ends at 65504: less than a sum over 65536 rows.
        squares = (y - self.target).square().sum(dtype=accumulate_dtype(y.dtype))
        return squares / self.case.rows

    def loss(self, y: Tensor, penalty: Tensor | float) -> Tensor:
        return self.task_loss(y) + penalty / self.case.rows

    def hinge(self, slopes: Tensor) -> Tensor:
        """The penalty of the slopes, summed over all."""
        return torch.relu(self.margin - slopes.to(accumulate_dtype(slopes.dtype))).sum()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def error(self, loss: float, gradient: Tensor) -> float:
        """Relative error of a loss and a gradient, the larger of the two."""
        true_loss, true_gradient = self.truth
        of_loss = abs(loss - true_loss) / abs(true_loss)
        of_gradient = (gradient.double() - true_gradient).norm() / true_gradient.norm()
        return max(of_loss, float(of_gradient))

    @cached_property
    def truth(self) -> tuple[float, Tensor]:
        """Loss and gradient by double backward in float64."""
        net, total = copy.deepcopy(self.net).double(), 0.0
        for y, slopes, target in self._parts(net, create_graph=True):
            penalty = torch.relu(self.margin - slopes).sum()
            loss = ((y - target).square().sum() + penalty) / self.case.rows
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    def _parts(
        self, net: nn.Module, create_graph: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """y (n, D), slopes (n, D, k) and targets (n, D), so many rows at a time in float64; one
        reverse pass for each output."""
        step = ROWS_AT_A_TIME if self.device == "cpu" else ROWS_AT_A_TIME_ELSEWHERE
        for start in range(0, self.case.rows, step):
            rows = slice(start, start + step)
            target = self.target[rows].double()
            x1, x2 = self.x1[rows].double(), self.x2[rows].double().requires_grad_()
            y = net(torch.cat([x1, x2], -1)).reshape_as(target)
            slopes = [
                torch.autograd.grad(out.sum(), x2, retain_graph=True, create_graph=create_graph)[0]
                for out in y.unbind(-1)
            ]
            yield y, torch.stack(slopes, 1), target

    def _pair_slopes(self) -> Tensor:
        """The lowest slope of each pair: (row, column) or, in adjoint mode, (row, output)."""
        net = copy.deepcopy(self.net).double()
        over = 1 if self.case.mode == "tangent" else 2
        return torch.cat([slopes.amin(over) for _, slopes, _ in self._parts(net)])


def margin_for(slopes: Tensor, share: float) -> float:
    """A margin that this share of the slopes misses, in the widest gap near that rank.

    The gap keeps float32 from deciding a row the other way than float64 does.
    """
    ordered = slopes.sort().values
    if share <= 0:
        return ordered[0].item() - 1
    if share >= 1:
        return ordered[-1].item() + 1
    rank, n = round(share * len(ordered)), len(ordered)
    low = min(max(1, rank - max(1, rank // 20)), n - 1)
    high = min(max(low + 1, rank + max(1, rank // 20)), n)
    gap = low + int((ordered[low:high] - ordered[low - 1 : high - 1]).argmax())
    return (ordered[gap - 1].item() + ordered[gap].item()) / 2
