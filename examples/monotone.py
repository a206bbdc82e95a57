"""A network that cannot fall, beside one that was taught not to and beside trees.

    python examples/monotone.py [--out FILE]

Disease progression (scikit-learn's diabetes set) must rise with body mass index and blood pressure.
Four models on the same rows: a network, the same with a penalty, the same inside ``Monotone``, and
gradient boosting with ``monotonic_cst``. Printed: the fit on held-out patients, the share of wrong
slopes and the worst one at ten thousand points drawn from the whole box of the inputs, where nobody
has looked before, and what is promised there. The picture shows ten patients along their body mass
index: their curves, and the slopes of those above the floor that ``Monotone`` has proved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor, nn

from monokernel import Monotone, audit, fused_mono_penalty, sample_points

MONOTONE = ("bmi", "bp")
K = len(MONOTONE)
STEPS, PENALTY_WEIGHT, MARGIN = 600, 10.0, 0.05


def data() -> tuple[Tensor, Tensor]:
    """Standardised inputs (442, 10), the monotone ones last, and targets (442, 1)."""
    bunch = load_diabetes(scaled=False)
    last = [bunch.feature_names.index(name) for name in MONOTONE]
    first = [i for i in range(len(bunch.feature_names)) if i not in last]
    x = torch.tensor(bunch.data[:, first + last], dtype=torch.float32)
    t = torch.tensor(bunch.target, dtype=torch.float32).unsqueeze(1)
    return (x - x.mean(0)) / x.std(0), (t - t.mean()) / t.std()


def train(x: Tensor, t: Tensor, way: str) -> nn.Module:
    torch.manual_seed(0)
    d = x.shape[1]
    net: nn.Module = nn.Sequential(
        nn.Linear(d, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
    )
    if way == "Monotone":
        direction = [0] * (d - K) + [1] * K
        net = Monotone(net, x.amin(0), x.amax(0), direction=direction)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if way == "penalty":
            points = torch.cat([x, sample_points(x, len(x), "mixup")])
            y, penalty = fused_mono_penalty(
                net,
                points[:, :-K],
                points[:, -K:],
                margin=MARGIN,
                reduction="mean",
                return_output=True,
            )
            loss = (y[: len(x)] - t).square().mean() + PENALTY_WEIGHT * penalty
        else:
            loss = (net(x) - t).square().mean()
        loss.backward()
        optimizer.step()
    return net


def r2(y: Tensor, t: Tensor) -> float:
    return 1 - ((y - t).square().mean() / t.var(correction=0)).item()


def draw(models: dict[str, nn.Module], x: Tensor, box: tuple[Tensor, Tensor], out: Path) -> None:
    """Ten patients along their body mass index, and the slopes of their curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    column = x.shape[1] - K
    grid = torch.linspace(box[0][column].item(), box[1][column].item(), 200)
    figure, axes = plt.subplots(2, len(models), figsize=(4 * len(models), 6), sharey="row")
    for (name, net), (above, below) in zip(models.items(), axes.T, strict=True):
        for row in x[:10]:
            rows = row.repeat(len(grid), 1)
            rows[:, column] = grid
            rows.requires_grad_()
            y = net(rows)
            (slopes,) = torch.autograd.grad(y.sum(), rows)
            above.plot(grid, y.detach())
            below.plot(grid, slopes[:, column])
        if isinstance(net, Monotone):
            floor = (net.bound + net.lift)[0, column].item()
            below.axhspan(-1, floor, color="0.85", label="proved empty")
            below.legend(loc="upper right")
        below.axhline(0, color="black", linewidth=0.8)
        below.set_ylim(-0.6, 1.2)
        above.set_title(name)
        below.set_xlabel("body mass index, standardised")
    axes[0, 0].set_ylabel("progression, standardised")
    axes[1, 0].set_ylabel("its slope")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="a picture, if there is to be one")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # at this size a second thread only makes the first one wait
    x, t = data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, held_out = order[:330], order[330:]
    box = x[fit].amin(0), x[fit].amax(0)
    everywhere = torch.lerp(*box, torch.rand(10_000, x.shape[1]))
    print(f"{'model':<22}{'held-out R²':>12}{'wrong slopes':>14}{'worst slope':>13}   proved")
    models = {}
    for way in ("network", "penalty", "Monotone"):
        models[way] = net = train(x[fit], t[fit], way)
        with torch.no_grad():
            fitted = r2(net(x[held_out]), t[held_out])
        report = audit(net, everywhere[:, :-K], everywhere[:, -K:])
        floor = "nothing"
        if isinstance(net, Monotone):
            floor = f"slopes of {(net.bound + net.lift)[0, -K:].min().item():.3f} and more"
        print(
            f"{way:<22}{fitted:>12.3f}{report.violation_rate:>14.2%}{report.worst:>13.3f}   {floor}"
        )
    trees = HistGradientBoostingRegressor(
        monotonic_cst=[0] * (x.shape[1] - K) + [1] * K, early_stopping=True, random_state=0
    )
    trees.fit(x[fit].numpy(), t[fit, 0].numpy())
    y = torch.from_numpy(trees.predict(x[held_out].numpy())).float().unsqueeze(1)
    print(f"{'boosting, monotone':<22}{r2(y, t[held_out]):>12.3f}{'0.00%':>14}{'steps':>13}   all")
    if out is not None:
        draw(models, x[held_out], box, out)


if __name__ == "__main__":
    main()
