"""A credit table, from the file to the audit, with the estimator for tables.

    python examples/credit.py

A thousand loans, of which three in ten went bad (see docs/tables.md for where they come from). The
probability of that must not fall with duration, amount and instalment, and must not rise with
savings and years of employment. Categories are embedded, unknown savings are a category of their
own, the network has BatchNorm and dropout, and stops when it gets no better.
"""

from pathlib import Path

import pandas as pd
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from monokernel.sklearn import MonotoneClassifier

FILE = Path(__file__).parent / "german_credit.csv"
SIGNS = {"duration": 1, "amount": 1, "instalment": 1, "savings": -1, "employed": -1}

table = pd.read_csv(FILE)
bad = table.pop("default")
fit, held_out, bad_fit, bad_held_out = train_test_split(table, bad, test_size=0.3, random_state=0)
model = MonotoneClassifier(SIGNS, batch_norm=True, dropout=0.1, random_state=0, verbose=1)
model.fit(fit, bad_fit)
print(f"held-out AUC {roc_auc_score(bad_held_out, model.predict_proba(held_out)[:, 1]):.3f}")
print(model.audit(held_out, sample=2000))
