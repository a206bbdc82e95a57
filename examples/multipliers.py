"""Ask for a violation rate instead of tuning a penalty weight.

    python examples/multipliers.py

Disease progression (scikit-learn's diabetes set) must rise with body mass index, blood pressure and
serum triglycerides. Three networks, same seed and steps: unconstrained, "at most 10 % of the points
violate", "at most 1 %". Nobody sets a weight: one multiplier per constraint finds it, and each ends
at its own. Violations are held down on the training rows and on points between them (mixup).
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from monokernel import Multipliers, audit, fused_mono_penalty, sample_points

MONOTONE = ("bmi", "bp", "s5")
STEPS = 1000
# The hinge starts a little before zero, so that what is right on a point is right beside it.
MARGIN = 0.05


def data() -> tuple[Tensor, Tensor]:
    """Standardised inputs (442, 10), the monotone ones last, and targets (442, 1)."""
    bunch = load_diabetes(scaled=False)
    last = [bunch.feature_names.index(name) for name in MONOTONE]
    first = [i for i in range(len(bunch.feature_names)) if i not in last]
    x = torch.tensor(bunch.data[:, first + last], dtype=torch.float32)
    t = torch.tensor(bunch.target, dtype=torch.float32).unsqueeze(1)
    return (x - x.mean(0)) / x.std(0), (t - t.mean()) / t.std()


def train(x: Tensor, t: Tensor, target: float | None) -> tuple[nn.Module, Multipliers]:
    torch.manual_seed(0)
    k = len(MONOTONE)
    mlp = nn.Sequential(
        nn.Linear(x.shape[1], 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)
    )
    multipliers = Multipliers((1, k), target=target or 0.0, lr=0.1)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=2e-3, weight_decay=3.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if target is None:
            (mlp(x) - t).square().mean().backward()
            optimizer.step()
            continue
        points = torch.cat([x, sample_points(x, len(x), "mixup")])
        x1, x2 = points[:, :-k], points[:, -k:]
        y, violations = fused_mono_penalty(
            mlp, x1, x2, margin=MARGIN, reduction="none", return_output=True
        )
        ((y[: len(x)] - t).square().mean() + multipliers(violations)).backward()
        optimizer.step()
        multipliers.update(violations)
    return mlp, multipliers


def main() -> None:
    torch.set_num_threads(1)  # at this size a second thread only makes the first one wait
    x, t = data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, held_out = order[:330], order[330:]
    k = len(MONOTONE)
    print(f"{'target':>8}  {'held-out R²':>11}  {'violating, training rows':>25}  multipliers")
    for target in (None, 0.10, 0.01):
        mlp, multipliers = train(x[fit], t[fit], target)
        with torch.no_grad():
            error = (mlp(x[held_out]) - t[held_out]).square().mean()
        r2 = 1 - error.item() / t[held_out].var(correction=0).item()
        rates = audit(mlp, x[fit, :-k], x[fit, -k:], steps=0).rate[0].tolist()
        found = ", ".join(
            f"{name} {w:.2f}"
            for name, w in zip(MONOTONE, multipliers.weight[0].tolist(), strict=True)
        )
        print(
            f"{'none' if target is None else f'{target:.0%}':>8}  {r2:>11.3f}  "
            f"{', '.join(f'{r:.1%}' for r in rates):>25}  {found}"
        )


if __name__ == "__main__":
    main()
