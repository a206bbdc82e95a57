"""What is timed: a network, its rows, and a hinge that a chosen share of the slopes violates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from monokernel import fused_mono_penalty, value_and_jacobian
from monokernel.advice import products
from monokernel.problem import Mode, accumulate_dtype, cheaper_mode

__all__ = ["PRECISIONS", "Case", "Job", "Truth", "margin_for"]

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
    """N rows, ``depth`` hidden layers of ``width``; D outputs, each to rise with k inputs."""

    rows: int
    width: int
    outputs: int
    columns: int
    activation: str
    share: float
    depth: int = HIDDEN_LAYERS
    precision: str = "fp32"

    def __str__(self) -> str:
        precision = "" if self.precision == "fp32" else f"{self.precision} "
        return (
            f"{precision}N={self.rows} width={self.width} D={self.outputs} k={self.columns} "
            f"{self.activation} v={self.share:g}"
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


@dataclass
class Truth:
    """Loss and gradient in float64, and the share of violating pairs as measured."""

    loss: float
    gradient: Tensor
    share: float


@dataclass
class Job:
    """A case with its tensors, the margin that makes the share, and the truth to agree with."""

    case: Case
    device: str = "cpu"
    net: nn.Sequential = field(init=False)
    x1: Tensor = field(init=False)
    x2: Tensor = field(init=False)
    target: Tensor = field(init=False)
    margin: float = field(init=False)
    truth: Truth = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(0)
        dtype, _ = PRECISIONS[case.precision]
        self.net = network(case).to(self.device, dtype)
        x = torch.randn(case.rows, FREE_INPUTS + case.columns, device=self.device).to(dtype)
        self.x1, self.x2 = x[:, :FREE_INPUTS].contiguous(), x[:, FREE_INPUTS:].contiguous()
        self.target = torch.randn(case.rows, case.outputs, device=self.device).to(dtype)
        pairs = self._pair_slopes()
        self.margin = margin_for(pairs.flatten(), case.share)
        share = (pairs < self.margin).double().mean().item()
        self.truth = Truth(*self._truth(), share)

    def task_loss(self, y: Tensor) -> Tensor:
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
        of_loss = abs(loss - self.truth.loss) / abs(self.truth.loss)
        of_gradient = (gradient.double() - self.truth.gradient).norm() / self.truth.gradient.norm()
        return max(of_loss, float(of_gradient))

    def _parts(self) -> Iterator[slice]:
        """Rows to be taken at a time in float64."""
        step = ROWS_AT_A_TIME if self.device == "cpu" else ROWS_AT_A_TIME_ELSEWHERE
        for start in range(0, self.case.rows, step):
            yield slice(start, start + step)

    @torch.no_grad()
    def _pair_slopes(self) -> Tensor:
        """The lowest slope of each pair: (row, column) or, in adjoint mode, (row, output)."""
        net = copy.deepcopy(self.net).double()
        over = 1 if self.case.mode == "tangent" else 2
        lowest = []
        for rows in self._parts():
            x1, x2 = self.x1[rows].double(), self.x2[rows].double()
            _, J = value_and_jacobian(net, x1, x2, backend="reference")
            lowest.append(J.amin(over))
        return torch.cat(lowest)

    def _truth(self) -> tuple[float, Tensor]:
        """By the reference in float64."""
        net = copy.deepcopy(self.net).double()
        total = 0.0
        for rows in self._parts():
            y, penalty = fused_mono_penalty(
                net,
                self.x1[rows].double(),
                self.x2[rows].double(),
                margin=self.margin,
                return_output=True,
                backend="reference",
            )
            loss = ((y - self.target[rows]).square().sum() + penalty) / self.case.rows
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def network(case: Case) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = FREE_INPUTS + case.columns
    for _ in range(case.depth):
        layers += [nn.Linear(inputs, case.width), ACTIVATIONS[case.activation]()]
        inputs = case.width
    return nn.Sequential(*layers, nn.Linear(inputs, case.outputs))


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
