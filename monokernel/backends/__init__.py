"""Who computes.

``reference`` is autograd's own truth for a chain of layers, ``general`` serves any module. The
other backends have a hand-written backward and share one protocol, that of
``handwritten.py``: PyTorch operations (``"torch"``), C++ (``"cpu"``) and Triton (``"triton"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..problem import Problem

__all__ = ["BACKENDS", "Backend", "Params", "Prepare", "Record", "Step", "load", "refusal"]


class Record(NamedTuple):
    """A backend with a hand-written backward: what ``plan`` calls it, and the module that serves,
    imported when first asked for (Triton must not be paid for on a CPU).

    ``device`` is where ``auto`` looks for it, anywhere if None; asked for by name it answers for
    itself: under its interpreter Triton serves CPU tensors. ``autocast`` is what it serves under
    one, and how:

    * "chains": those of layers alone, with all operands rounded to autocast's dtype;
    * "mixed": these, and other programs as PyTorch does, linear nodes alone in autocast's dtype
      (``Problem.cast``);
    * "wide": every program with its operands as they are. It computes in ``accumulate_dtype``
      whatever it reads, so to round them first would only lose digits.
    """

    kernel: str
    module: str
    device: str | None = None
    autocast: Literal["chains", "mixed", "wide"] = "chains"


# By public name, in the order in which ``auto`` asks them. AMD's GPUs are "cuda" too.
BACKENDS = {
    "triton": Record("fused Triton kernels", ".triton", "cuda", "mixed"),
    "cpu": Record("native C++ kernel", ".cpu", "cpu", "wide"),
    "torch": Record("hand-written backward in PyTorch operations", ".handwritten"),
}

Params = Sequence[Tensor | None]
# A whole step, autograd included: x, the weight and the parameters → y and the penalty or J.
Step = Callable[[Tensor, Tensor | None, Params], tuple[Tensor, Tensor]]
Prepare = Callable[[Problem, torch.dtype], Step]  # of a problem on rows of that dtype


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
        params: Params,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of x and of every parameter, None where ``needs`` is false."""

    def step(self) -> Prepare | None:
        """What prepares one operator for the whole step, which autograd knows, if it has one. Asked
        once."""


@cache
def load(name: str) -> Backend:
    """The module that serves the backend of this public name."""
    return cast(Backend, import_module(BACKENDS[name].module, __name__))


def refusal(name: str, problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend of this name cannot serve such a problem, or None."""
    try:
        return load(name).refuses(problem, torch.empty(0, problem.d, dtype=dtype, device=device))
    except ImportError as error:
        return f"it could not be imported ({error})"
