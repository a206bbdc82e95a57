"""Autotuning, off unless ``MONOKERNEL_AUTOTUNE=1``: the rules in each path's ``config.py`` decide.

When on, the first call of each kind on a device runs every candidate and keeps the quickest for the
life of the process. Results then depend on the choice in their last bits (the order of sums does).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...signs import capturing
from .launch import noted

__all__ = ["choose", "enabled", "tuned"]

Config = TypeVar("Config")
Result = TypeVar("Result")
ROUNDS = 5

_chosen: dict[Hashable, object] = {}


def tuned(
    rule: Config,
    candidates: Callable[[Config], Sequence[Config]],
    key: tuple[Hashable, ...],
    x: Tensor,
    run: Callable[[Config], Result],
) -> Result:
    """``run`` with the rule's choice, or with the quickest of its candidates where calls are tuned:
    found once for the key and about as many rows."""
    if enabled(x.device) and x.shape[0]:
        kind = (*key, x.dtype, x.device, x.shape[0].bit_length())
        return run(choose(kind, candidates(rule), run))
    return run(rule)


def enabled(device: torch.device) -> bool:
    """Whether calls on the device are tuned: never inside a CUDA graph's capture."""
    if device.type != "cuda" or os.environ.get("MONOKERNEL_AUTOTUNE") != "1":
        return False
    return not capturing(device)


def choose(
    key: Hashable,
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """The quickest candidate for ``key``, found once; ``run`` does the whole call with one."""
    if key not in _chosen:
        clock = seconds or _seconds
        with noted(None):
            times = [clock(lambda c=config: run(c)) for config in candidates]  # type: ignore[misc]
        _chosen[key] = candidates[times.index(min(times))]
    found: Config = _chosen[key]  # type: ignore[assignment]
    return found


def _seconds(call: Callable[[], object]) -> float:
    call()  # compiles
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(min(times))
