"""Quantiles of disease progression that rise with two measurements and do not cross.

The diabetes set of scikit-learn (442 patients, ten measurements). One network predicts every
quantile: its level is one more input, and quantiles do not cross if the output rises with it. So
three inputs are constrained, two measurements and the level. The network is trained once without
and once with the penalty, from the same seed and for the same steps. Printed from patients the
training never saw: pinball loss of nine quantiles, share of slopes with the wrong sign, share of
neighbouring quantiles that cross, and the worst slope. Then the time of one training step: plain,
with the penalty by double backward, and with monokernel. One picture shows what the penalty does.

    python examples/diabetes.py [--out FILE] [--seed N] [--steps N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from monokernel import Audit, audit, fused_mono_penalty, plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

QUANTILES = torch.linspace(0.1, 0.9, 9)
LEVELS = 9  # drawn anew for each patient in each step
WIDTH, LEARNING_RATE, WEIGHT_DECAY = 128, 2e-3, 0.3

# The penalty is the mean shortfall from a slope of MARGIN (in standard deviations of the outcome
# per standard deviation of the input). The margin carries the sign over to patients not trained on.
PENALTY_WEIGHT, MARGIN = 10.0, 0.05
RISING = {"bmi": 1, "bp": 1, "level": 1}


@dataclass(frozen=True)
class Data:
    """Standardised measurements x (N, 10) of N patients, outcome t (N,), the columns' names."""

    x: Tensor
    t: Tensor
    names: list[str]

    def at(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Each patient at several levels (N, m): inputs (N m, 11) and outcomes (N m,)."""
        m = levels.shape[1]
        return with_level(self.x.repeat_interleave(m, 0), levels.flatten()), (
            self.t.repeat_interleave(m)
        )

    @property
    def at_quantiles(self) -> Tensor:
        return self.at(QUANTILES.expand(len(self.t), -1))[0]

    @property
    def columns(self) -> list[str]:
        return [*self.names, "level"]


def with_level(x: Tensor, level: Tensor) -> Tensor:
    """x (N, 10) and quantile levels in (0, 1), about standardised, as the network's input."""
    return torch.cat([x, 4 * level[:, None] - 2], -1)


@dataclass(frozen=True)
class Units:
    """Back from standard deviations to the units of the files."""

    bmi: tuple[float, float]  # mean, standard deviation
    outcome: tuple[float, float]


def load(seed: int) -> tuple[Data, Data, Units]:
    """Seven tenths of the patients to train on, three tenths held out."""
    raw = load_diabetes(scaled=False)
    names = list(raw.feature_names)
    x = torch.from_numpy(raw.data).float()
    t = torch.from_numpy(raw.target).float()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(t)))
    held_out, train = order.split([len(t) * 3 // 10, len(t) - len(t) * 3 // 10])
    x_mean, x_std = x[train].mean(0), x[train].std(0)
    t_mean, t_std = t[train].mean(), t[train].std()
    x, t = (x - x_mean) / x_std, (t - t_mean) / t_std
    bmi = names.index("bmi")
    units = Units((x_mean[bmi].item(), x_std[bmi].item()), (t_mean.item(), t_std.item()))
    return Data(x[train], t[train], names), Data(x[held_out], t[held_out], names), units


def network(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, 1),
    )


def pinball(y: Tensor, t: Tensor, level: Tensor) -> Tensor:
    """Mean over rows; predicted quantile y, outcome t and level, (N,) each."""
    error = t - y
    return torch.maximum(level * error, (level - 1) * error).mean()


# --- three losses: what differs between the trainings ---------------------------------------------

Loss = Callable[[nn.Module, Data, Tensor], Tensor]  # of levels (N, m)


def plain(net: nn.Module, data: Data, levels: Tensor) -> Tensor:
    x, t = data.at(levels)
    return pinball(net(x).squeeze(-1), t, levels.flatten())


def with_monokernel(net: nn.Module, data: Data, levels: Tensor) -> Tensor:
    x, t = data.at(levels)
    y, penalty = fused_mono_penalty(
        net,
        x,
        direction=RISING,
        columns=data.columns,
        margin=MARGIN,
        reduction="mean",
        return_output=True,
    )
    return pinball(y.squeeze(-1), t, levels.flatten()) + PENALTY_WEIGHT * penalty


def with_double_backward(net: nn.Module, data: Data, levels: Tensor) -> Tensor:
    """The usual recipe, which is right for one output: a backward pass that is differentiated."""
    x, t = data.at(levels)
    x.requires_grad_()
    y: Tensor = net(x).squeeze(-1)
    (slopes,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    rising = slopes[:, [data.columns.index(name) for name in RISING]]
    return pinball(y, t, levels.flatten()) + PENALTY_WEIGHT * torch.relu(MARGIN - rising).mean()


# --- training and timing --------------------------------------------------------------------------


def optimiser(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def step(net: nn.Module, data: Data, loss: Loss, adam: torch.optim.Optimizer) -> float:
    adam.zero_grad()
    value = loss(net, data, torch.rand(len(data.t), LEVELS))
    value.backward()
    adam.step()
    return value.item()


def train(name: str, loss: Loss, data: Data, held_out: Data, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    net = network(len(data.columns))
    adam = optimiser(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    start = time.perf_counter()
    for i in range(1, steps + 1):
        value = step(net, data, loss, adam)
        schedule.step()
        if i % max(1, steps // 5) == 0:
            rate = slopes_of(net, held_out).violation_rate
            print(
                f"  {name:<16} step {i:>4} of {steps}   loss {value:.4f}   "
                f"held-out violations {rate:6.2%}   {time.perf_counter() - start:4.1f} s",
                flush=True,
            )
    return net


def slopes_of(net: nn.Module, data: Data) -> Audit:
    """The slopes of nine quantiles of each patient."""
    return audit(net, data.at_quantiles, direction=RISING, columns=data.columns, steps=0)


@torch.no_grad()
def crossing(net: nn.Module, data: Data) -> float:
    """The share of neighbouring quantiles of a patient of which the higher lies lower."""
    y = net(data.at_quantiles).view(len(data.t), -1)
    return float((y.diff(dim=1) < 0).float().mean())


def time_steps(
    net: nn.Module, data: Data, losses: dict[str, Loss], rounds: int
) -> dict[str, float]:
    """Median milliseconds of a whole training step, the variants taking turns."""
    copies = {name: deepcopy(net) for name in losses}
    adams = {name: optimiser(copy) for name, copy in copies.items()}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for i in range(rounds + 3):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(copies[name], data, loss, adams[name])
            if i >= 3:  # the first rounds warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(t) for name, t in times.items()}


# --- the picture ----------------------------------------------------------------------------------


@torch.no_grad()
def draw(nets: dict[str, nn.Module], data: Data, row: int, units: Units, out: Path) -> None:
    """Nine quantiles over bmi for the patient of this row, a panel for each network."""
    bmi = data.names.index("bmi")
    grid = torch.linspace(data.x[:, bmi].min().item(), data.x[:, bmi].max().item(), 400)
    x = data.x[row].repeat(len(grid), 1)
    x[:, bmi] = grid
    patient = Data(x, grid, data.names)
    shown, (t_mean, t_std) = units.bmi[0] + units.bmi[1] * grid, units.outcome
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True)
    colours = plt.get_cmap("viridis")(np.linspace(0.08, 0.88, len(QUANTILES)))
    for axis, (title, net) in zip(axes, nets.items(), strict=True):
        rate, crossed = slopes_of(net, data).violation_rate, crossing(net, data)
        curves = t_mean + t_std * net(patient.at_quantiles).view(len(grid), -1)
        _panel(axis, shown.numpy(), curves.numpy(), colours)
        axis.scatter(
            units.bmi[0] + units.bmi[1] * data.x[:, bmi],
            t_mean + t_std * data.t,
            s=9,
            color="0.75",
            linewidths=0,
            zorder=1,
        )
        axis.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
        axis.text(
            0.0,
            1.02,
            f"held out: {rate:.1%} of the slopes are wrong, {crossed:.1%} of the quantiles cross",
            transform=axis.transAxes,
            fontsize=9,
            color="crimson" if rate > 0.001 else "0.35",
        )
        axis.set_xlabel("body-mass index (kg/m²)")
    axes[0].set_ylabel("disease progression after one year")
    _name_curves(axes[1], shown[-1].item(), curves[-1].tolist(), colours)
    figure.text(
        0.5,
        0.01,
        "Nine quantiles for the held-out patient with the worst slope of the plain network, as bmi "
        "alone varies; red where a curve falls; dots are all held-out patients",
        ha="center",
        fontsize=9,
        color="0.35",
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _panel(axis: Axes, bmi: np.ndarray, curves: np.ndarray, colours: np.ndarray) -> None:
    """The curves (n, 9) over bmi (n,), red where one falls."""
    falling = np.diff(curves, axis=0, append=curves[-1:]) < 0
    for d, colour in enumerate(colours):
        axis.plot(bmi, curves[:, d], color=colour, linewidth=1.8, zorder=2)
        fall = np.where(falling[:, d], curves[:, d], np.nan)
        axis.plot(bmi, fall, color="crimson", linewidth=2.6, solid_capstyle="round", zorder=3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def _name_curves(axis: Axes, x: float, ends: list[float], colours: np.ndarray) -> None:
    """Each curve's quantile at its right end, pushed up where two would overlap."""
    low, high = axis.get_ylim()
    room, last = (high - low) / 30, low
    for d in sorted(range(len(ends)), key=ends.__getitem__):
        last = max(ends[d], last + room)
        axis.annotate(
            f"{QUANTILES[d].item():.0%}",
            (x, last),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colours[d],
        )
    axis.set_xmargin(0.08)


def main() -> None:
    parser = argparse.ArgumentParser(description="Monotone quantiles on the diabetes set.")
    parser.add_argument("--out", type=Path, default=Path("diabetes.png"), help="the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()

    data, held_out, units = load(options.seed)
    print(
        f"{len(data.t)} patients to train on, {len(held_out.t)} held out; every quantile to rise "
        "with bmi and bp, and with its level"
    )
    losses: dict[str, Loss] = {"without penalty": plain, "with penalty": with_monokernel}
    nets = {
        name: train(name, loss, data, held_out, options.seed, options.steps)
        for name, loss in losses.items()
    }

    heads = ("pinball loss", "violations", "crossing", "worst slope")
    print(f"\n{'held-out patients':<20}" + "".join(f"{head:>14}" for head in heads))
    quantiles, worst_row = QUANTILES.expand(len(held_out.t), -1), 0
    for name, net in nets.items():
        with torch.no_grad():
            loss = plain(net, held_out, quantiles).item() * units.outcome[1]
        report, crossed = slopes_of(net, held_out), crossing(net, held_out)
        print(
            f"{name:<20}{loss:>14.2f}{report.violation_rate:>14.2%}{crossed:>14.2%}"
            f"{report.worst:>14.3f}"
        )
        if name == "without penalty":  # the picture shows the patient whose bmi slope is worst
            worst_row = int(report.worst_row[0, 0]) // len(QUANTILES)
    print("(slopes in standard deviations of the outcome per standard deviation of the input)")

    rows = LEVELS * len(data.t)
    print(f"\none training step, {rows} rows, median of 50")
    steps: dict[str, Loss] = {
        "plain, no penalty": plain,
        "monokernel": with_monokernel,
        "double backward": with_double_backward,
    }
    times = time_steps(nets["with penalty"], data, steps, rounds=50)
    for name, ms in times.items():
        print(f"  {name:<24}{ms:8.2f} ms   {ms / times['plain, no penalty']:5.1f} x plain")
    ratio = times["double backward"] / times["monokernel"]
    print(f"  double backward takes {ratio:.1f} times as long as monokernel")
    served = plan(
        nets["with penalty"], held_out.at_quantiles, direction=RISING, columns=held_out.columns
    )
    print(f"  ({served})".replace("\n", "\n   "))

    draw(nets, held_out, worst_row, units, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    main()
