"""The same table and promises as ``credit.py``, with PyTorch alone: what the estimator does.

    python examples/credit_torch.py

``fused_mono_penalty`` takes the whole row, the constrained columns where they are, and the signs by
their names. BatchNorm is trained with the statistics of the batch and its slopes are those of the
network as it is deployed, by the running statistics.
"""

import copy
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

from monokernel import audit, fused_mono_penalty

FILE = Path(__file__).parent / "german_credit.csv"
SIGNS = {"duration": 1, "amount": 1, "instalment": 1, "savings": -1, "employed": -1}

torch.set_num_threads(1)  # at this size a second thread only makes the first one wait
torch.manual_seed(0)
table = pd.read_csv(FILE).sample(frac=1, random_state=0)
t = torch.tensor(table.pop("default").to_numpy(), dtype=torch.float32).unsqueeze(1)
table["savings unknown"] = table["savings"].isna().astype(float)
table = pd.get_dummies(table.fillna({"savings": table["savings"].median()}), dtype=float)
table = (table - table[:560].mean()) / table[:560].std()
x = torch.tensor(table.to_numpy(), dtype=torch.float32)
hidden = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Dropout(0.1)]
net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.SiLU(), *hidden, nn.Linear(64, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
best, since, options = float("inf"), 0, {"direction": SIGNS, "columns": table.columns}
while since < 100:
    rows = torch.randint(560, (256,))
    y, penalty = fused_mono_penalty(net.train(), x[rows], margin=0.02, reduction="mean",
        return_output=True, batch_stats="running", **options)  # fmt: skip
    optimizer.zero_grad()
    (log_loss(y, t[rows]) + 10 * penalty).backward()
    optimizer.step()
    since, loss = since + 1, log_loss(net.eval()(x[560:700]), t[560:700]).item()
    if loss < best:
        best, kept, since = loss, copy.deepcopy(net), 0
print(f"held-out log loss {log_loss(kept(x[700:]), t[700:]).item():.3f}")
print(audit(kept, x[700:], sample=2000, **options))
