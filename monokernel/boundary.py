"""The boundary: how a hand-written backend meets autograd and ``torch.compile``.

Eager calls go through a classic ``autograd.Function`` straight to the backend (about 8 µs; a custom
operator costs 24), on the CPU through its twin in C++, ``csrc/boundary.cpp``, where that was built.
Under ``torch.compile`` and every other tracer the same Function calls two registered operators,
opaque to them. It declares no ``jvp``: forward mode and functorch take the reference path instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import BACKENDS, Prepare, Step, load
from .operands import check_forward, check_gradients, check_saveable, check_saved, shapes_of
from .problem import Problem, accumulate_dtype, pack, unpack

__all__ = [
    "FusedMonoPenalty",
    "evaluate",
    "operand_dtype",
    "preparing",
    "traced",
    "transformed",
    "whole_step",
]

Params = Sequence[Tensor | None]

NOTHING = nullcontext()
SECOND_DERIVATIVE = (
    "fused_mono_penalty: its backward is written by hand and first-order; a second derivative was "
    "asked for, which backend='reference' supports"
)


def evaluate(
    problem: Problem, backend: str, x: Tensor, weight: Tensor | None, params: Params
) -> tuple[Tensor, Tensor]:
    """y (N, D) and the penalty, or J where there is no hinge, differentiable once."""
    prepare = None if traced() else preparing(backend)
    if prepare is not None:
        return whole_step(prepare(problem, x.dtype), x, weight, params)
    tracked = torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in params)
    )
    if tracked:
        if not traced():
            check_saveable(params)
        y, out = _apply(FusedMonoPenalty, problem, backend, weight, x, *params)
        return y, out
    y, out, _ = _forward(problem, backend, x, weight, params, save=False)
    return y, out


def whole_step(
    step: Step, x: Tensor, weight: Tensor | None, params: Params
) -> tuple[Tensor, Tensor]:
    """A whole step by a backend's own operator."""
    try:
        return step(x, weight, params)
    except RuntimeError:
        check_saveable(params)
        raise


@cache
def preparing(backend: str) -> Prepare | None:
    """What prepares the backend's own operator for a whole step, if it has one."""
    return load(backend).step()


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def operand_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of x; float64 is exempt, as in PyTorch."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


class FusedMonoPenalty(torch.autograd.Function):
    """(problem, backend, weight, x, *params) → (y, penalty or J), differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        backend: str,
        weight: Tensor | None,
        x: Tensor,
        *params: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, out, saved = _forward(problem, backend, x, weight, params, save=True)
        ctx.problem, ctx.backend = problem, backend
        ctx.count, ctx.shapes = len(params), shapes_of(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *params, *saved)
        return y, out

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gout: Tensor | None) -> Any:
        x, *rest = ctx.saved_tensors
        params, saved = rest[: ctx.count], rest[ctx.count :]
        if not traced():
            check_saved(saved, ctx.shapes, x.device)
        needs = ctx.needs_input_grad[3:]
        asked = ctx.problem, ctx.backend, gy, gout, x, params, saved, needs
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                grads = _backward(*asked)
            return (None, None, None, *_guard(grads, [gy, gout, x, *params]))
        return (None, None, None, *_backward(*asked))


class _NoSecond(torch.autograd.Function):
    """Identity on the first ``count`` tensors; its backward raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(SECOND_DERIVATIVE)


def _guard(grads: Sequence[Tensor | None], causes: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, so tied to what they depend on that differentiating them raises."""
    present = [g for g in grads if g is not None]
    tied = _apply(_NoSecond, len(present), *present, *(c for c in causes if c is not None))
    rest = iter(tied)
    return [None if g is None else next(rest) for g in grads]


# --- eager or traced -----------------------------------------------------------------------------


def traced() -> bool:
    """Whether torch.compile, make_fx, a FakeTensorMode, a TorchDispatchMode or torch.jit.trace
    looks on, which can see operators but not what a kernel writes to memory."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _forward(
    problem: Problem, backend: str, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    if traced():
        y, out, *saved = torch.ops.monokernel.forward(
            x, weight, list(params), save, backend, *pack(problem)
        )
        return y, out, saved
    x, weight, params = check_forward(problem, x, weight, params)
    with _no_autocast(x):
        return load(backend).forward(problem, x, weight, params, save)


def _backward(
    problem: Problem,
    backend: str,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    if traced():
        found = torch.ops.monokernel.backward(
            gy, gout, x, list(params), list(saved), list(needs), backend, *pack(problem)
        )
        present = iter(found)
        return [next(present) if need else None for need in needs]
    x, _, params = check_forward(problem, x, None, params)
    gy, gout = check_gradients(problem, x, gy, gout)
    with _no_autocast(x):
        return load(backend).backward(problem, gy, gout, x, params, saved, needs)


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The operands are cast already; autocast must not touch the sums in float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else NOTHING


# --- the registered operators --------------------------------------------------------------------
# Anybody may call them, so they check all that they are given.

# The problem as ``pack`` gives it, behind the backend's public name.
_PROBLEM = (
    "str backend, int d, str[] kinds, int[] shapes, float[] numbers, int[] columns, str mode, "
    "bool penalised, int[] direction, float[] margin, bool squared, bool elementwise, "
    "ScalarType? cast=None"
)
_library = torch.library.Library("monokernel", "DEF")
_library.define(
    f"forward(Tensor x, Tensor? weight, Tensor?[] params, bool save, {_PROBLEM}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "backward(Tensor? gy, Tensor? gout, Tensor x, Tensor?[] params, "
    f"Tensor[] saved, bool[] needs, {_PROBLEM}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.no_grad()
def _forward_op(
    x: Tensor, weight: Tensor | None, params: Params, save: bool, backend: str, *packed: Any
) -> list[Tensor]:
    problem = _problem(backend, packed, x)
    x, weight, params = check_forward(problem, x, weight, params)
    with _no_autocast(x):
        y, out, saved = load(backend).forward(problem, x, weight, params, save)
    return [y, out, *saved]


def _problem(backend: str, packed: Any, x: Tensor) -> Problem:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    problem = unpack(*packed)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (N, {problem.d}), got {tuple(x.shape)}")
    why = load(backend).refuses(problem, x)
    if why is not None:
        raise ValueError(f"backend: {backend!r} was asked for but cannot serve: {why}")
    return problem


def _forward_fake(
    x: Tensor, weight: Tensor | None, params: Params, save: bool, backend: str, *packed: Any
) -> list[Tensor]:
    problem = unpack(*packed)
    N, D = x.shape[0], problem.D
    scalar = problem.hinge is not None and not problem.hinge.elementwise
    shape = () if scalar else (N, D, problem.k)
    out = x.new_empty(shape, dtype=accumulate_dtype(x.dtype))
    saved = load(backend).saved_like(problem, x) if save else []
    return [x.new_empty(N, D), out, *saved]


@torch.no_grad()
def _backward_op(
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
    *packed: Any,
) -> list[Tensor]:
    problem = _problem(backend, packed, x)
    x, _, params = check_forward(problem, x, None, params)
    gy, gout = check_gradients(problem, x, gy, gout)
    like = load(backend).saved_like(problem, x.new_empty(x.shape, device="meta"))
    check_saved(saved, shapes_of(like), x.device)
    if len(needs) != 1 + len(params):
        raise ValueError(f"needs: expected {1 + len(params)} values, got {len(needs)}")
    with _no_autocast(x):
        grads = load(backend).backward(problem, gy, gout, x, params, saved, needs)
    return [g for g in grads if g is not None]


def _backward_fake(
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
    *packed: Any,
) -> list[Tensor]:
    return [
        t.new_empty(t.shape)
        for t, need in zip((x, *params), needs, strict=True)
        if need and t is not None
    ]


for _name, _real, _fake in (
    ("forward", _forward_op, _forward_fake),
    ("backward", _backward_op, _backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"monokernel::{_name}", _fake, lib=_library)
