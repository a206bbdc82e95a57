"""Signs and margins of a call as tensors, where a kernel or PyTorch's operations read them.

A :class:`~monokernel.problem.Problem` holds them as plain numbers; here they get memory, in a way
that the capture of a CUDA graph allows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch
from torch import Tensor

__all__ = ["capturing", "direction_table", "shared_direction_table", "shared_tables"]


def direction_table(
    direction: tuple[float, ...], D: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``direction`` (1, k or D·k signs, row-major; or margins) as a new contiguous (D, k) tensor.

    By fills alone: a copy from the host waits for the device, and the capture of a CUDA graph
    refuses it.
    """
    runs = [
        torch.full((len(list(run)),), sign, dtype=dtype, device=device)
        for sign, run in groupby(direction)
    ]
    table = torch.cat(runs) if len(runs) > 1 else runs[0]
    return table.reshape(-1, k if len(direction) > 1 else 1).expand(D, k).contiguous()


# Never dropped: a captured CUDA graph keeps the address of the table that it reads.
_shared_tables: dict[tuple[object, ...], Tensor] = {}


def shared_direction_table(
    direction: tuple[float, ...], D: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same, made once and shared between the kernels' calls: not to be written to.

    While a CUDA graph is captured, a table that is not there yet is the graph's own: its memory
    belongs to the graph, which fills it when it is replayed. It is not shared.
    """
    key = direction, D, k, dtype, device
    found = _shared_tables.get(key)
    if found is not None:
        return found
    if capturing(device):
        return direction_table(direction, D, k, dtype, device)

    def make() -> Tensor:
        # A copy from the host is there when it returns, whatever stream reads it next.
        return direction_table(direction, D, k, dtype, torch.device("cpu")).to(device)

    # Modes belong to a thread, so none of the caller's reaches the table in a thread of its own:
    # inference mode, fake tensors, the memory pool in which torch.compile warms up its CUDA graphs.
    with ThreadPoolExecutor(1) as thread:
        return _shared_tables.setdefault(key, thread.submit(make).result())


def shared_tables() -> list[Tensor]:
    """All that there are."""
    return list(_shared_tables.values())


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing may be copied from or to the host."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
