"""Train until it is proved: penalty, certificate, counterexamples back into the penalty, again.

    python examples/until_proved.py [--out FILE] [--seed N]

Disease progression (scikit-learn's diabetes set, ten measurements scaled to [-1, 1]) must rise with
body mass index, blood pressure and serum triglycerides: not on the data, but at every point of the
box that the data spans. A penalty with a margin gets there, or nearly; ``certify`` says whether,
and where not; the points it found join those that the penalty is taken on, and the margin is wider
in every round. The loop ends with a proof.

The picture shows the response of held-out patients along the whole range of body mass index, and
for each the slope that is proved on that line beside the lowest that was found there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from monokernel import Certificate, certify, fused_mono_penalty

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MONOTONE = ("bmi", "bp", "s5")
K = len(MONOTONE)
WIDTH, STEPS, ROUNDS = 32, 400, 12
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1.0
# The hinge starts above zero, so that what is right on a point is right beside it, and each round
# higher.
MARGIN, PENALTY_WEIGHT, POINTS = 0.1, 20.0, 512
SECONDS = 10.0  # for a proof


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs in [-1, 1], the monotone ones last, and standardised targets: to fit and held out."""
    bunch = load_diabetes(scaled=False)
    last = [bunch.feature_names.index(name) for name in MONOTONE]
    first = [i for i in range(len(bunch.feature_names)) if i not in last]
    x = torch.tensor(bunch.data[:, first + last], dtype=torch.float32)
    t = torch.tensor(bunch.target, dtype=torch.float32).unsqueeze(1)
    low, high = x.amin(0), x.amax(0)
    x, t = 2 * (x - low) / (high - low) - 1, (t - t.mean()) / t.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, held_out = order[:330], order[330:]
    return x[fit], t[fit], x[held_out], t[held_out]


def network(d: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)
    )


def train(mlp: nn.Module, x: Tensor, t: Tensor, counterexamples: Tensor, margin: float) -> None:
    """Without a penalty where the margin is 0."""
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if not margin:
            (mlp(x) - t).square().mean().backward()
            optimizer.step()
            continue
        elsewhere = torch.rand(POINTS, x.shape[1]) * 2 - 1
        points = torch.cat([x, elsewhere, counterexamples])
        y, penalty = fused_mono_penalty(
            mlp, points[:, :-K], points[:, -K:], margin=margin, return_output=True
        )
        loss = (y[: len(x)] - t).square().mean() + PENALTY_WEIGHT * penalty / (K * POINTS)
        loss.backward()
        optimizer.step()


def prove(mlp: nn.Module, d: int) -> Certificate:
    """Of the whole box [-1, 1]ᵈ."""
    direction = [0] * (d - K) + [1] * K
    return certify(mlp, -1.0, 1.0, direction=direction, seconds=SECONDS, progress=False)


def r2(mlp: nn.Module, x: Tensor, t: Tensor) -> float:
    with torch.no_grad():
        return 1 - (mlp(x) - t).square().mean().item() / t.var(correction=0).item()


def until_proved(x: Tensor, t: Tensor, seed: int) -> tuple[nn.Module, Certificate]:
    torch.manual_seed(seed)
    mlp, d = network(x.shape[1]), x.shape[1]
    counterexamples = x[:0]
    for round_ in range(ROUNDS):
        train(mlp, x, t, counterexamples, MARGIN * (1 + round_))
        certificate = prove(mlp, d)
        print(
            f"round {round_ + 1}: {certificate.status}, lowest slope found "
            f"{certificate.lowest_found[0, -K:].min().item():.3f}, {certificate.boxes} boxes"
        )
        if certificate.status == "proved":
            break
        # Where slopes are lowest, whether they violate or not: 4 times as heavy as any other.
        counterexamples = torch.cat(
            [counterexamples, certificate.witness[0, -K:].float().repeat(4, 1)]
        )
    return mlp, certificate


def picture(mlp: nn.Module, x: Tensor, out: Path) -> None:
    d = x.shape[1]
    bmi = d - K
    lower, upper = x.clone(), x.clone()
    lower[:, bmi], upper[:, bmi] = -1.0, 1.0
    direction = [0] * d
    direction[bmi] = 1
    lines = certify(mlp, lower, upper, direction=direction, progress=False)
    left, right = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")[1]
    values = torch.linspace(-1, 1, 61)
    with torch.no_grad():
        for row in x[:40]:
            rows = row.repeat(len(values), 1)
            rows[:, bmi] = values
            left.plot(values, mlp(rows).squeeze(1), lw=0.7)
    left.set(xlabel="body mass index, scaled", ylabel="progression, standardised")
    left.set_title("40 held-out patients")
    order = lines.lower_bound[:, 0, bmi].argsort()
    right.plot(lines.lowest_found[order, 0, bmi], label="lowest slope found")
    right.plot(lines.lower_bound[order, 0, bmi], label="proved: no slope is lower")
    right.axhline(0, color="k", lw=0.5)
    right.set(xlabel="held-out patient", ylabel="slope along the whole range")
    right.legend()
    plt.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to draw the picture")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # at this size a second thread only makes the first one wait
    x, t, held_x, held_t = data(given.seed)
    torch.manual_seed(given.seed)
    free = network(x.shape[1])
    train(free, x, t, x[:0], margin=0.0)
    certificate = prove(free, x.shape[1])
    print(f"unconstrained: {certificate.status}, held-out R² {r2(free, held_x, held_t):.3f}")
    mlp, certificate = until_proved(x, t, given.seed)
    print(f"{certificate.status}, held-out R² {r2(mlp, held_x, held_t):.3f}\n\n{certificate}")
    if given.out:
        picture(mlp, held_x, given.out)


if __name__ == "__main__":
    main()
