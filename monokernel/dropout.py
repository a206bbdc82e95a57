"""The mask of an active dropout: a function of a key, the row and the column, never stored.

Whoever needs the mask computes it again: the value of the network, its slopes and the backward, in
every backend the same. The generator is Philox4x32 of Salmon et al. (2011), "Parallel random
numbers: as easy as 1, 2, 3", with the 7 rounds that they found to pass every test. The key is drawn
from PyTorch's own generator, once for each call, so ``torch.manual_seed`` repeats a run, a
recomputation under activation checkpointing draws the same mask, and processes of other seeds draw
others.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KEY", "draw_key", "mask", "philox"]

# The key as so many bytes, one number each: every floating-point dtype holds those exactly.
KEY = 8

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7


def draw_key(x: Tensor) -> Tensor:
    """A key (8,) from the default generator of the device of x, in its dtype."""
    return torch.randint(0, 256, (KEY,), dtype=x.dtype, device=x.device)


def mask(
    key: Tensor, number: int, rows: Tensor, width: int, p: float, dtype: torch.dtype
) -> Tensor:
    """(n, width) for rows (n,) of x: 0 by probability p, else 1/(1 - p). ``number`` tells the
    dropouts of a network apart.

    Word w of counter (row, c, number) belongs to column w·⌈width/4⌉ + c.
    """
    groups = (width + 3) // 4
    columns = torch.arange(groups, device=rows.device)
    counter = [
        rows.unsqueeze(1),
        rows.unsqueeze(1) >> 32,
        columns.unsqueeze(0),
        columns * 0 + number,
    ]
    shifts = torch.arange(0, 32, 8, device=rows.device)
    k0, k1 = (key.to(torch.int64).view(2, 4) << shifts).sum(1).unbind()
    words = torch.cat(philox(counter, k0, k1), 1)[:, :width]
    kept = (words >= int(p * 2**32)).to(dtype)
    return kept if p == 1 else kept.div_(1 - p)


def philox(counter: list[Tensor], k0: Tensor, k1: Tensor, rounds: int = ROUNDS) -> list[Tensor]:
    """The four words (int64, below 2³²) of each counter of four words, which broadcast."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    c0 = c0 & _LOW
    for i in range(rounds):
        # Products wrap around; what is shifted down is the upper word all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) & _LOW) ^ c1 ^ ((k0 + i * _STEPS[0]) & _LOW)
        c2 = ((p0 >> 32) & _LOW) ^ c3 ^ ((k1 + i * _STEPS[1]) & _LOW)
        c1, c3 = p1 & _LOW, p0 & _LOW
    return [c0, c1, c2, c3]
