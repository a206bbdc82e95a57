"""Nine quantiles of disease progression that each rise with body-mass index and blood pressure.

The diabetes set of scikit-learn (442 patients, ten measurements): one network with nine quantile
outputs, trained once without and once with the penalty, from the same seed and for the same steps.
Printed from patients the training never saw: pinball loss, share of slopes with the wrong sign, and
the worst slope. Then the time of one training step: plain, with the penalty by the usual loop of
double backward, and with monokernel. One picture shows what the penalty does to the curves.

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

from monokernel import audit, fused_mono_penalty, plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MONOTONE = ("bmi", "bp")
QUANTILES = torch.linspace(0.1, 0.9, 9)
WIDTH, LEARNING_RATE, WEIGHT_DECAY = 128, 2e-3, 0.3

# The penalty is the mean shortfall from a slope of MARGIN (in standard deviations of the outcome
# per standard deviation of the input). The margin carries the sign over to patients not trained on:
# without it 0.1 to 2 % of their slopes stay wrong, with it none (seeds 0 to 4).
PENALTY_WEIGHT, MARGIN = 10.0, 0.05


@dataclass(frozen=True)
class Data:
    """Standardised rows, x1 (N, 8) free and x2 (N, 2) monotone, target t (N,)."""

    x1: Tensor
    x2: Tensor
    t: Tensor


@dataclass(frozen=True)
class Units:
    """Back from standard deviations to the units of the files."""

    bmi: tuple[float, float]  # mean, standard deviation
    outcome: tuple[float, float]


def load(seed: int) -> tuple[Data, Data, Units]:
    """Seven tenths of the patients to train on, three tenths held out."""
    raw = load_diabetes(scaled=False)
    names = list(raw.feature_names)
    free = [i for i, name in enumerate(names) if name not in MONOTONE]
    columns = free + [names.index(name) for name in MONOTONE]
    x = torch.from_numpy(raw.data[:, columns]).float()
    t = torch.from_numpy(raw.target).float()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(t)))
    held_out, train = order.split([len(t) * 3 // 10, len(t) - len(t) * 3 // 10])
    x_mean, x_std = x[train].mean(0), x[train].std(0)
    t_mean, t_std = t[train].mean(), t[train].std()
    x, t = (x - x_mean) / x_std, (t - t_mean) / t_std
    k, bmi = len(MONOTONE), len(free) + MONOTONE.index("bmi")
    units = Units((x_mean[bmi].item(), x_std[bmi].item()), (t_mean.item(), t_std.item()))
    parts = [Data(x[rows, :-k], x[rows, -k:], t[rows]) for rows in (train, held_out)]
    return parts[0], parts[1], units


def network(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, len(QUANTILES)),
    )


def pinball(y: Tensor, t: Tensor) -> Tensor:
    """Mean over rows and quantiles; y (N, 9), t (N,)."""
    error = t.unsqueeze(-1) - y
    return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean()


# --- three losses: what differs between the trainings ---------------------------------------------

Loss = Callable[[nn.Module, Data], Tensor]


def plain(net: nn.Module, data: Data) -> Tensor:
    return pinball(net(torch.cat([data.x1, data.x2], -1)), data.t)


def with_monokernel(net: nn.Module, data: Data) -> Tensor:
    y, penalty = fused_mono_penalty(
        net, data.x1, data.x2, margin=MARGIN, reduction="mean", return_output=True
    )
    return pinball(y, data.t) + PENALTY_WEIGHT * penalty


def with_loop(net: nn.Module, data: Data) -> Tensor:
    """The usual recipe, right for several outputs: one differentiable backward pass for each."""
    x2 = data.x2.detach().requires_grad_()
    y: Tensor = net(torch.cat([data.x1, x2], -1))
    penalty = torch.zeros(())
    for d in range(y.shape[1]):
        (slope,) = torch.autograd.grad(y[:, d].sum(), x2, create_graph=True)
        penalty = penalty + torch.relu(MARGIN - slope).mean()
    return pinball(y, data.t) + PENALTY_WEIGHT * penalty / y.shape[1]


# --- training and timing --------------------------------------------------------------------------


def optimiser(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def step(net: nn.Module, data: Data, loss: Loss, adam: torch.optim.Optimizer) -> float:
    adam.zero_grad()
    value = loss(net, data)
    value.backward()
    adam.step()
    return value.item()


def train(name: str, loss: Loss, data: Data, held_out: Data, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    net = network(data.x1.shape[1] + data.x2.shape[1])
    adam = optimiser(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    start = time.perf_counter()
    for i in range(1, steps + 1):
        value = step(net, data, loss, adam)
        schedule.step()
        if i % max(1, steps // 5) == 0:
            rate = audit(net, held_out.x1, held_out.x2).violation_rate
            print(
                f"  {name:<16} step {i:>4} of {steps}   loss {value:.4f}   "
                f"held-out violations {rate:6.2%}   {time.perf_counter() - start:4.1f} s",
                flush=True,
            )
    return net


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
    """The nine fitted quantiles over bmi for the patient of this row, a panel for each network."""
    grid = torch.linspace(data.x2[:, 0].min().item(), data.x2[:, 0].max().item(), 400)
    x1 = data.x1[row].expand(len(grid), -1)
    x2 = torch.stack([grid, data.x2[row, 1].expand(len(grid))], -1)
    bmi, (t_mean, t_std) = units.bmi[0] + units.bmi[1] * grid, units.outcome
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True)
    colours = plt.get_cmap("viridis")(np.linspace(0.08, 0.88, len(QUANTILES)))
    for axis, (title, net) in zip(axes, nets.items(), strict=True):
        rate = audit(net, data.x1, data.x2).violation_rate
        curves = t_mean + t_std * net(torch.cat([x1, x2], -1))
        _panel(axis, bmi.numpy(), curves.numpy(), colours)
        axis.scatter(
            units.bmi[0] + units.bmi[1] * data.x2[:, 0],
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
            f"{rate:.1%} of the held-out slopes have the wrong sign",
            transform=axis.transAxes,
            color="crimson" if rate > 0.001 else "0.35",
        )
        axis.set_xlabel("body-mass index (kg/m²)")
    axes[0].set_ylabel("disease progression after one year")
    _name_curves(axes[1], bmi[-1].item(), curves[-1].tolist(), colours)
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
        f"{len(data.t)} patients to train on, {len(held_out.t)} held out; "
        f"{len(QUANTILES)} quantiles, each to rise with {' and '.join(MONOTONE)}"
    )
    losses: dict[str, Loss] = {"without penalty": plain, "with penalty": with_monokernel}
    nets = {
        name: train(name, loss, data, held_out, options.seed, options.steps)
        for name, loss in losses.items()
    }

    print(f"\n{'held-out patients':<20}{'pinball loss':>14}{'violations':>14}{'worst slope':>14}")
    worst_row = 0
    for name, net in nets.items():
        with torch.no_grad():
            loss = plain(net, held_out).item() * units.outcome[1]
        report = audit(net, held_out.x1, held_out.x2)
        print(f"{name:<20}{loss:>14.2f}{report.violation_rate:>14.2%}{report.worst:>14.3f}")
        if name == "without penalty":  # the picture shows the patient whose bmi slope is worst
            worst_row = int(report.worst_row[report.worst_slope[:, 0].argmin(), 0])
    print("(slopes in standard deviations of the outcome per standard deviation of the input)")

    print(f"\none training step, {len(data.t)} rows, median of 50")
    steps: dict[str, Loss] = {
        "plain, no penalty": plain,
        "monokernel": with_monokernel,
        "loop of double backward": with_loop,
    }
    times = time_steps(nets["with penalty"], data, steps, rounds=50)
    for name, ms in times.items():
        print(f"  {name:<24}{ms:8.2f} ms   {ms / times['plain, no penalty']:5.1f} x plain")
    ratio = times["loop of double backward"] / times["monokernel"]
    print(f"  the loop takes {ratio:.1f} times as long as monokernel")
    print(f"  ({plan(nets['with penalty'], data.x1, data.x2)})".replace("\n", "\n   "))

    draw(nets, held_out, worst_row, units, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    main()
