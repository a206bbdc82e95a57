"""The active pairs of a backward, listed on the device: the host never knows how many there are.

``listing.py`` has the kernels that list them, ``products.py`` the products over as many rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....problem import Problem
from ..constants import output_code
from ..launch import launch
from ..target import register_limit
from .listing import count_pairs, list_pairs

__all__ = ["BLOCK", "Active", "list_active"]

BLOCK = 1024  # pairs that one program lists


class Active(NamedTuple):
    """The active pairs as the device lists them, of at most M: row (M), the place of each of the M
    in the list or -1, their number, ẋ (M, k) and s (M, D)."""

    rows: Tensor
    place: Tensor
    total: Tensor
    x_dot: Tensor
    seed: Tensor


def list_active(problem: Problem, gout: Tensor, S: Tensor | None, x: Tensor) -> Active:
    """Those of the rows x (N, d), of the cotangent gout and the hinge's derivatives S of theirs."""
    N, D, k, adjoint = x.shape[0], problem.D, problem.k, problem.mode == "adjoint"
    M = N * (D if adjoint else k)
    blocks = -(-M // BLOCK)
    found = Active(
        rows=x.new_empty(M, dtype=torch.int32),
        place=x.new_empty(M, dtype=torch.int32),
        total=x.new_empty((), dtype=torch.int32),
        x_dot=x.new_empty(M, k),
        seed=x.new_empty(M, D),
    )
    shape = {
        "D": D, "K": k, "ADJOINT": adjoint, "OUT": output_code(problem), "BLOCK": BLOCK,
        **register_limit(x.device),
    }  # fmt: skip
    counts = x.new_empty(blocks, dtype=torch.int32)
    launch(count_pairs, (blocks,), x, gout, S, counts, N, **shape)
    launch(
        list_pairs, (blocks,), x, gout, S, counts, found.rows, found.place, found.x_dot,
        found.seed, found.total, N, **shape,
    )  # fmt: skip
    return found
