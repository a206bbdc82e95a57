"""Certificates of a network on a device are those of the same network on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monokernel import certify
from tests.support import mlp

pytestmark = [pytest.mark.gpu]


@pytest.mark.parametrize("hidden", [(12,), (6, 6)])
@pytest.mark.parametrize("name", ["ReLU", "SiLU"])
def test_verdicts_are_those_of_the_cpu(name: str, hidden: tuple[int, ...]) -> None:
    net = mlp(2, 1, 1, hidden, getattr(nn, name)(), dtype=torch.float32)
    lower = torch.rand(6, 3) * 2 - 1
    given = {"direction": [0, 0, 1], "progress": False, "seconds": 20.0}
    found = [
        certify(net.to(place), lower, lower + 0.5, margin=-0.2, **given).verdicts
        for place in ("cpu", "cuda")
    ]
    assert found[0] == found[1]
