"""The penalty in a Lightning module: nothing special, since ``MonotonePenalty`` is a module.

    pip install lightning
    python examples/lightning_module.py

Checkpoints, precision, several devices and gradient clipping are the Trainer's business as always.
The validation logs where the network stands, rate and worst slope, from ``audit``.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from monokernel import MonotonePenalty, audit

MONOTONE = ("bmi", "bp")
Batch = tuple[Tensor, Tensor, Tensor]


class MonotoneRegressor(lightning.LightningModule):
    """y = mlp(cat[x1, x2]) (N, 1), to rise with every column of x2."""

    def __init__(self, d1: int, k: int, width: int = 64, penalty: float = 10.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        mlp = nn.Sequential(
            nn.Linear(d1 + k, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )
        self.model = MonotonePenalty(mlp, margin=0.05, weight=penalty, reduction="mean")

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """What is deployed: the network alone."""
        y: Tensor = self.model.mlp(torch.cat([x1, x2], -1))
        return y

    def training_step(self, batch: Batch, index: int) -> Tensor:
        x1, x2, t = batch
        y, penalty = self.model(x1, x2)
        task = (y - t).square().mean()
        self.log_dict({"task": task, "penalty": penalty}, prog_bar=True)
        return task + penalty

    def validation_step(self, batch: Batch, index: int) -> None:
        x1, x2, t = batch
        report = audit(self.model.mlp, x1, x2, steps=0)
        error = (self(x1, x2) - t).square().mean()
        self.log_dict(
            {"val_error": error, "val_violating": report.violation_rate, "val_worst": report.worst},
            prog_bar=True,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1.0)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """scikit-learn's diabetes set, standardised; x1 (N, 8), x2 (N, 2), t (N, 1)."""
    bunch = load_diabetes(scaled=False)
    last = [bunch.feature_names.index(name) for name in MONOTONE]
    first = [i for i in range(len(bunch.feature_names)) if i not in last]
    x = torch.tensor(bunch.data, dtype=torch.float32)
    t = torch.tensor(bunch.target, dtype=torch.float32).unsqueeze(1)
    x, t = (x - x.mean(0)) / x.std(0), (t - t.mean()) / t.std()
    rows = TensorDataset(x[:, first], x[:, last], t)
    fit, held_out = torch.utils.data.random_split(
        rows, [330, len(rows) - 330], torch.Generator().manual_seed(0)
    )
    return DataLoader(fit, batch_size=110, shuffle=True), DataLoader(held_out, batch_size=112)


def main(**trainer: Any) -> dict[str, float]:
    """Trains and returns what was logged last."""
    lightning.seed_everything(0, verbose=False)
    fit, held_out = loaders()
    options = {"max_epochs": 100, "gradient_clip_val": 1.0, "log_every_n_steps": 1} | trainer
    run = lightning.Trainer(**options)
    run.fit(MonotoneRegressor(d1=8, k=len(MONOTONE)), fit, held_out)
    return {name: float(value) for name, value in run.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
