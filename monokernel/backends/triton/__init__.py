"""The Triton kernels: the tangent beside the activations, on the GPU.

Four paths, each with the four functions of the backend protocol: ``whole`` (narrow chains of
layers, the network is one kernel), ``narrow`` (those of them whose sums one kernel cannot hold),
``layered`` (every other chain) and ``programs`` (every other program). This module only chooses.
What the paths share lies beside them: ``device`` (functions that kernels call), ``active`` (the
active pairs and products over them), ``slopes`` and ``reduce`` (kernels), ``target`` (what the card
is), ``launch``, ``replay`` (steps without Python), ``constants`` and ``tuning``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...problem import Problem
from .. import Params
from . import layered, narrow, programs, whole
from .replay import step
from .target import interpreting

__all__ = ["backward", "forward", "path_of", "refuses", "saved_like", "step"]

# Units of a hidden layer up to which the sums of the weights' gradients, and what a tile keeps, fit
# the registers of one kernel.
IN_ONE = 64


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if x.device.type != "cuda" and not interpreting():
        return f"x is on the {x.device.type}; the Triton kernels run on CUDA and ROCm devices"
    if x.dtype == torch.float64 and not interpreting():
        return "x is float64, for which there are no tensor-core kernels"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"x is {x.dtype}; the Triton kernels serve float32, float16 and bfloat16"
    if problem.cast is not None and x.dtype != torch.float32:
        return f"x is {x.dtype}; under autocast the Triton kernels take float32"
    if _is_program(problem):
        return programs.refuses(problem, x)
    return None if whole.refuses(problem, x) is None else layered.refuses(problem, x)


def path_of(problem: Problem, x: Tensor, saved: Sequence[Tensor] | None = None) -> ModuleType:
    """Of a chain the whole network in one kernel where it fits, else layer by layer; where both do,
    by the model of docs/predictions.md.

    In the backward what was saved decides, should the float32 precision have been changed since.
    """
    if _is_program(problem):
        return programs
    if max(problem.widths[1:]) > IN_ONE and narrow.refuses(problem, x) is None:
        return narrow
    if saved is not None:
        of_whole, of_layered = (len(p.saved_like(problem, x[:0])) for p in (whole, layered))
        if of_whole != of_layered:
            return whole if len(saved) == of_whole else layered
    return whole if whole.refuses(problem, x) is None else layered


def _is_program(problem: Problem) -> bool:
    """Whether it goes node by node: of a chain all operands have one dtype."""
    return problem.chain is None or problem.cast is not None


def saved_like(problem: Problem, x: Tensor, saved: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Uninitialised buffers for what the backward needs again; with ``saved`` like those that it
    was given."""
    like: list[Tensor] = path_of(problem, x, saved).saved_like(problem, x)
    return like


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty or J, and the saved tensors (none unless ``save``)."""
    result: tuple[Tensor, Tensor, list[Tensor]] = path_of(problem, x).forward(
        problem, x, weight, params, save
    )
    return result


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where ``needs`` is false."""
    grads: list[Tensor | None] = path_of(problem, x, saved).backward(
        problem, gy, gout, x, params, saved, needs
    )
    return grads
