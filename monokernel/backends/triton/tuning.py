"""Autotuning, off unless ``MONOKERNEL_AUTOTUNE=1``: the analytic rules of ``config.py`` decide.

When on, the first call of each kind on a device runs every candidate and keeps the quickest for the
life of the process. Results then depend on the choice in their last bits (the order of sums does).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from ...problem import capturing

__all__ = ["choose", "enabled"]

Config = TypeVar("Config")
ROUNDS = 5

_chosen: dict[Hashable, object] = {}


def enabled(device: torch.device) -> bool:
    """Whether calls on the device are tuned: never inside a CUDA graph's capture."""
    if os.environ.get("MONOKERNEL_AUTOTUNE") != "1" or device.type != "cuda":
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
