"""Who computes.

``reference`` is autograd's own truth for a chain of layers, ``general`` serves any module. The
other backends have a hand-written backward and share one protocol, the four functions of
``handwritten.py``: PyTorch operations (``"torch"``), C++ (``"cpu"``) and Triton (``"triton"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from ..problem import Problem

__all__ = ["DEVICES", "MODULES", "WIDENS", "Backend", "load", "refusal"]

# Public name -> module, imported when first asked for: Triton must not be paid for on a CPU.
MODULES = {"triton": ".triton", "cpu": ".cpu", "torch": ".handwritten"}

# Where ``auto`` looks for it (AMD's GPUs are "cuda" too). Asked for by name it answers for itself:
# under its interpreter Triton serves CPU tensors.
DEVICES = {"triton": "cuda", "cpu": "cpu"}

# Computes in ``accumulate_dtype`` whatever it reads: under autocast it takes the weights as they
# are, for to round them first would only lose digits.
WIDENS = frozenset({"cpu"})

Params = Sequence[Tensor | None]


class Backend(Protocol):
    """What a module with a hand-written backward provides."""

    def refuses(self, problem: Problem, x: Tensor) -> str | None:
        """One sentence why it cannot serve, or None; x is (0, d), for its dtype and device."""

    def saved_like(self, problem: Problem, x: Tensor) -> list[Tensor]:
        """Uninitialised buffers for what the forward saves; none aliases another."""

    def forward(
        self, problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """y (N, D), the penalty or J, and the saved tensors (none unless ``save``)."""

    def backward(
        self,
        problem: Problem,
        gy: Tensor | None,
        gout: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        params: Params,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of x and of every parameter, None where ``needs`` is false."""


@cache
def load(name: str) -> Backend:
    """The module that serves the backend of this public name."""
    return cast(Backend, import_module(MODULES[name], __name__))


def refusal(name: str, problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend of this name cannot serve such a problem, or None."""
    try:
        return load(name).refuses(problem, torch.empty(0, problem.d, dtype=dtype, device=device))
    except ImportError as error:
        return f"it could not be imported ({error})"
