"""The network of an estimator, and the loop that trains it."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..api import fused_mono_penalty
from ..probing import evaluating

__all__ = [
    "ACTIVATIONS",
    "LIMIT",
    "Embeddings",
    "Model",
    "Rows",
    "Scale",
    "Training",
    "alone",
    "build",
    "rescaled",
]

ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
LIMIT = 3.0  # of a scaled column, in standard deviations
WIDEST = 8  # numbers that a category is embedded in, at most
FARTHEST = 1e6  # standard deviations, from which on nothing changes
LOOK_EVERY = 25  # steps between two looks at the validation rows
AVERAGED = 0.98  # the weights that are kept are an average, of the last 50 steps or so


@contextmanager
def alone(seed: int) -> Iterator[None]:
    """Random numbers of one's own, and one thread: with batches this small a second one costs more
    than it does, many times the whole training on a busy machine. PyTorch's own generator, which
    starts weights and draws dropout, and its number of threads are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


class Scale(nn.Module):
    """Columns in units of their spread, drawn in smoothly to within ``LIMIT``: z / sqrt(1 + (z /
    LIMIT)²) with z = (x - centre) / spread. That rises everywhere, so a network behind it is
    monotone in a table's own units where it is in these.

    Args:
        x: (n, m) numbers, of which centre and spread are median and quartiles.
        d: the number of columns; those after the first m are left as they are.
    """

    centre: Tensor
    inverse_spread: Tensor
    inverse_limit: Tensor

    def __init__(self, x: Tensor, d: int) -> None:
        super().__init__()
        (n, m), ordered = x.shape, x.sort(0).values
        low, centre, high = (ordered[round(q * (n - 1))] for q in (0.25, 0.5, 0.75))
        spread = (high - low) / 1.349  # the standard deviation of what is normal
        spread = spread.where(spread > 0, (x - x.mean(0)).square().mean(0).sqrt())
        spread = spread.where(spread > 0, 1.0)
        self.register_buffer("centre", F.pad(centre, (0, d - m)))
        self.register_buffer("inverse_spread", F.pad(1 / spread, (0, d - m), value=1.0))
        limits = torch.full_like(centre, 1 / LIMIT)
        self.register_buffer("inverse_limit", F.pad(limits, (0, d - m)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        z = (x - self.centre) * self.inverse_spread
        z = F.hardtanh(z, -FARTHEST, FARTHEST)  # whose square is finite
        bent: Tensor = z / torch.sqrt(1 + (z * self.inverse_limit) ** 2)
        return bent

    def of_numbers(self, x: Tensor) -> Tensor:
        """Of the first columns alone (..., p)."""
        whole = F.pad(x, (0, len(self.centre) - x.shape[-1]))
        return self(whole)[..., : x.shape[-1]]  # type: ignore[no-any-return]

    def inverse(self, z: Tensor) -> Tensor:
        """The x of a scaled z (..., d), infinite where that is at the limit."""
        z = z / torch.sqrt((1 - (z * self.inverse_limit) ** 2).clamp(min=0))
        return z / self.inverse_spread + self.centre


class Embeddings(nn.Module):
    """For each column of categories a table of vectors, one for each code: rows are looked up in
    front of the network, which sees them as free columns of numbers like any other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.widths = [min(WIDEST, (size + 2) // 2) for size in sizes]
        self.tables = nn.ModuleList(
            nn.Embedding(1 + size, width) for size, width in zip(sizes, self.widths, strict=True)
        )

    def forward(self, codes: Tensor) -> list[Tensor]:
        """Of codes (n, c) the vectors, c of (n, width)."""
        return [table(code) for table, code in zip(self.tables, codes.unbind(1), strict=True)]

    @torch.no_grad()
    def settle(self, codes: Tensor) -> None:
        """Where no row had code 0, it is the mean of the rows that there were."""
        for table, code in zip(self.tables, codes.unbind(1), strict=True):
            assert isinstance(table, nn.Embedding)
            if len(code) and code.all():
                table.weight[0] = table.weight[code].mean(0)


def build(
    inputs: int, outputs: int, hidden: Sequence[int], activation: str, dropout: float, norm: bool
) -> nn.Sequential:
    """Linear, BatchNorm, activation and dropout for each hidden layer, and a last Linear."""
    layers: list[nn.Module] = []
    for before, width in zip((inputs, *hidden), hidden, strict=False):
        layers.append(nn.Linear(before, width))
        if norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[activation]())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], outputs))


@torch.no_grad()
def rescaled(core: nn.Module, scale: float, shift: float | Tensor) -> nn.Sequential:
    """A network of ``build`` in float64, with outputs y · scale + shift by its last layer."""
    layers = nn.Sequential(*core.double().children())
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(scale)
    last.bias.mul_(scale).add_(shift)
    return layers


@dataclass(frozen=True)
class Rows:
    """Scaled numbers (n, p), codes (n, c), targets (n,) and weights (n,) of mean 1, or None."""

    numbers: Tensor
    codes: Tensor
    target: Tensor
    weight: Tensor | None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Tensor) -> Rows:
        weight = None if self.weight is None else self.weight[rows]
        return Rows(self.numbers[rows], self.codes[rows], self.target[rows], weight)


class Model(nn.Module):
    """Embeddings and network together, as they are trained.

    Args:
        levels: (Q,) values of a last column that every row is repeated with, or None.
    """

    def __init__(self, core: nn.Module, embeddings: Embeddings, levels: Tensor | None) -> None:
        super().__init__()
        self.core, self.embeddings, self.levels = core, embeddings, levels
        self.couples_rows = any(isinstance(m, _BatchNorm) for m in core.modules())

    def rows(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """What the network is called with: (n, d), or (n Q, d) with levels."""
        x = torch.cat([numbers, *self.embeddings(codes)], 1)
        if self.levels is None:
            return x
        Q = len(self.levels)
        level = self.levels.to(x.dtype).repeat(len(x)).unsqueeze(1)
        return torch.cat([x.repeat_interleave(Q, 0), level], 1)


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        loss: of outputs (n, D), or (n, Q) with levels, and targets the losses (n,).
        direction: of each column of the network.
        penalty: weight of the mean penalty, 0 where the network is monotone by construction.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    direction: Sequence[int]
    penalty: float
    margin: float
    rate: float
    decay: float
    batch: int
    steps: int
    patience: int
    seed: int
    verbose: bool

    def run(self, model: Model, fit: Rows, valid: Rows | None) -> tuple[int, float]:
        """Trains in place; the number of steps and the validation loss, NaN without rows."""
        generator = torch.Generator().manual_seed(self.seed)
        low, high = fit.numbers.aminmax(dim=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=self.decay)
        # Buffers too: averaged weights and the last batches' statistics do not go together.
        average = get_ema_multi_avg_fn(AVERAGED)
        averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True).eval()
        kept = averaged.module
        assert isinstance(kept, Model)
        best, best_state, best_step = math.inf, None, 0
        # A sum of losses that is better by less than 1, as a log-likelihood, says nothing: where
        # few validation rows are all classified it falls on as the network grows too sure.
        better = 0.0 if valid is None else 1 / len(valid)
        looked_at = None
        if valid is not None:
            looked_at = valid, self._points(valid.numbers, low, high, generator)
        model.train()
        line = _Progress(self.verbose, self.steps)
        for step in range(1, self.steps + 1):
            batch = fit
            if len(fit) > self.batch:
                batch = fit.take(torch.randint(len(fit), (self.batch,), generator=generator))
            points = self._points(batch.numbers, low, high, generator)
            optimizer.zero_grad()
            self._objective(model, batch, points).backward()
            optimizer.step()
            averaged.update_parameters(model)
            if looked_at is None or step % LOOK_EVERY:
                continue
            with torch.no_grad():
                loss = self._objective(kept, *looked_at).item()
            line(step, loss, min(loss, best))
            if loss < best - better:
                best, best_state, best_step = loss, copy.deepcopy(kept.state_dict()), step
            elif step - best_step >= self.patience:
                break
        model.load_state_dict(kept.state_dict() if best_state is None else best_state)
        model.eval()
        line.end(f"{step} steps, validation {best:.4g}")
        return step, best if best_state is not None else math.nan

    def _points(
        self, numbers: Tensor, low: Tensor, high: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The same rows with the constrained numbers drawn anew from their range."""
        drawn = torch.lerp(low, high, torch.rand(numbers.shape, generator=generator))
        signs = torch.tensor(self.direction[: numbers.shape[1]])
        return torch.where(signs != 0, drawn, numbers)

    def _objective(self, model: Model, rows: Rows, points: Tensor) -> Tensor:
        """Mean loss and weighted penalty, on the rows and on the points away from them."""
        x, penalty = model.rows(rows.numbers, rows.codes), None
        if not self.penalty:
            y = model.core(x)
        else:
            away = model.rows(points, rows.codes)
            if model.training and model.couples_rows:
                # The points are none of the rows whose statistics are to be learnt.
                y, near = self._penalised(model.core, x)
                with evaluating(model.core):
                    penalty = (near + self._penalised(model.core, away)[1]) / 2
            else:
                y, penalty = self._penalised(model.core, torch.cat([x, away]))
                y = y[: len(x)]
        losses = self.loss(y.reshape(len(rows), -1), rows.target)
        if rows.weight is not None:
            losses = losses * rows.weight
        loss = losses.mean()
        return loss if penalty is None else loss + self.penalty * penalty

    def _penalised(self, core: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return fused_mono_penalty(
            core,
            x,
            direction=self.direction,
            margin=self.margin,
            reduction="mean",
            return_output=True,
            batch_stats="running",
        )


class _Progress:
    """One line on the standard error, written over and over."""

    def __init__(self, shown: bool, steps: int) -> None:
        self.shown, self.steps, self.begin, self.last = shown, steps, time.monotonic(), -math.inf
        self.text = ""

    def __call__(self, step: int, loss: float, best: float) -> None:
        self.text = f"step {step} of at most {self.steps}, validation {loss:.4g}, best {best:.4g}"
        now = time.monotonic()
        if self.shown and now - self.last > 0.2:
            self.last = now
            print(f"\r{self.text}", end="", file=sys.stderr, flush=True)

    def end(self, text: str) -> None:
        if self.shown:
            seconds = time.monotonic() - self.begin
            print(f"\r{text}, {seconds:.1f} s".ljust(len(self.text) + 1), file=sys.stderr)
