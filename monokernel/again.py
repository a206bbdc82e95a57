"""Calls like one before: what was found out for it is kept, and looked at again.

The calls of a training loop differ in numbers alone. So of a network that was served who serves it
is kept, and where it is a chain of layers the call as a whole: for one with the same arguments a
look at each layer leads straight to the backend's operator.

Of a parameter only the class is looked at here: a backend asks of every operand what it is before
it reads it (``operands.py``, ``csrc/boundary.cpp``), and where one is refused the network is read
anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .arguments import Inputs, check_weight, is_finite
from .backends import BACKENDS, Prepare, Step
from .boundary import preparing, traced, transformed, whole_step
from .network import Chain, Known, known, read
from .operands import has_memory, kernel_weight
from .problem import Hinge, Problem
from .program import Node

if TYPE_CHECKING:
    from .planning import Route

__all__ = ["Served", "as_before", "forget", "keep", "remember", "repeated", "twice"]

T = TypeVar("T")

MOST_CALLS = 16  # of one network
DENSE = torch.strided  # the layout


class Call(NamedTuple):
    """What serves a call, and what prepares the same for another margin."""

    problem: Problem
    step: Step
    prepare: Prepare


class Served(NamedTuple):
    """Which network, asked for how, on which inputs; what it was; its route, less the network; and
    its calls, by the arguments."""

    mlp: weakref.ref[nn.Module]
    asked: tuple[Any, ...]
    chain: Known | None
    nodes: tuple[Node, ...]
    route: Route
    calls: dict[tuple[object, ...], Call]


_served: dict[int, Served] = {}


# --- networks -------------------------------------------------------------------------------------


def remember(mlp: nn.Module, inputs: Inputs, asked: tuple[Any, ...], route: Route) -> None:
    """Of a network that is served, unless a part of it is more than a layer of PyTorch's own."""
    found = route.network
    assert found is not None
    chain = None
    if isinstance(found, Chain):
        chain = known(mlp, found)
        if chain is None:
            return
    gone = partial(_served.pop, id(mlp), None)
    own = weakref.ref(mlp, lambda _: gone())
    of = *asked, *_like(inputs)
    _served[id(mlp)] = Served(own, of, chain, found.nodes, route._replace(network=None), {})


def forget(mlp: nn.Module) -> None:
    """What is known of a network that is another now, or is served in another way: a record is of
    the last call. Tracers and transforms, which do not ask for it, leave it."""
    if not (traced() or transformed()):
        _served.pop(id(mlp), None)


def as_before(mlp: nn.Module, inputs: Inputs, asked: tuple[Any, ...]) -> Served | None:
    """What is known of a call of the same network that was like this one."""
    if traced():
        return None
    kept = _served.get(id(mlp))
    if (
        kept is None
        or kept.mlp() is not mlp
        or inputs.autocast
        or kept.asked != (*asked, *_like(inputs))
        or transformed()
        or not all(map(has_memory, inputs.blocks))
    ):
        return None
    return kept


def _like(inputs: Inputs) -> tuple[Any, ...]:
    x = inputs.like
    return inputs.d, inputs.columns, x.dtype, x.device


def twice(serve: Callable[..., T], mlp: nn.Module, inputs: Inputs, *asked: Any) -> T:
    """``serve(mlp, inputs, *asked)``, which chooses a route. Where that was done by what is known
    of the network and is refused an operand, which was not looked at, once more by a route that is
    chosen anew."""
    kept = None if traced() else _served.get(id(mlp))
    try:
        return serve(mlp, inputs, *asked)
    except RuntimeError:
        if kept is None or _served.get(id(mlp)) is not kept or not _outdated(kept, inputs.like):
            raise
    forget(mlp)
    return serve(mlp, inputs, *asked)


def _outdated(kept: Served, x: Tensor) -> bool:
    """Whether a parameter of a chain is no longer what a layer on such inputs takes: then, and not
    where memory is short or a hook of the user's raises, an error speaks of what is known."""
    mlp = kept.mlp()
    if kept.chain is None or mlp is None or transformed():
        return False
    found = read(mlp)
    if not isinstance(found, Chain) or found[1:] != (kept.chain.widths, kept.nodes, None):
        return True
    return any(
        p is not None and (p.dtype != x.dtype or p.device != x.device)
        for linear in found.linears
        for p in linear._parameters.values()
    )


# --- calls ----------------------------------------------------------------------------------------


def keep(
    mlp: nn.Module,
    inputs: Inputs,
    margin: object,
    asked: tuple[object, ...],
    route: tuple[object, ...],
    hinge: Hinge | None,
) -> None:
    """Of a call that was served, by its ``margin`` and the other arguments that it was ``asked``
    with, if these are plain values: first two that may be anything, then choices of words, from
    the last of which the ``route`` follows."""
    kept = as_before(mlp, inputs, (*route, False))
    if kept is None or kept.chain is None or kept.route.backend not in BACKENDS:
        return
    prepare = preparing(kept.route.backend)
    if prepare is None:
        return
    d1 = inputs.d if len(inputs.blocks) == 1 else inputs.d - inputs.k
    x = inputs.like
    try:
        key = _key((x.dtype, x.device, d1, inputs.d - d1), margin, asked)
    except TypeError:
        return
    if key in kept.calls:
        return
    if len(kept.calls) >= MOST_CALLS:
        kept.calls.clear()
    problem = Problem(inputs.d, kept.nodes, inputs.columns, kept.route.mode, hinge)
    kept.calls[key] = Call(problem, prepare(problem, x.dtype), prepare)


def _key(like: tuple[object, ...], margin: object, asked: tuple[object, ...]) -> tuple[object, ...]:
    """By which a call on such inputs is kept. One number as the margin may move, which is said by
    True. Raises a TypeError for an argument that may change or is no plain value."""
    moves = type(margin) in (float, int)
    first, second, *choices = asked
    return (
        *like, moves, None if moves else _frozen(margin), _frozen(first), _frozen(second), *choices
    )  # fmt: skip


def _frozen(given: object) -> object:
    """An argument, in which lists and dicts are tuples of their entries and which is unlike all
    that only equals it: True is 1, and so is a complex number."""
    kind = type(given)
    if given is None or kind is str or kind is int:
        return given
    if kind is float or kind is bool:
        return kind, given
    if isinstance(given, (tuple, list)) and kind in (tuple, list):
        return tuple(map(_frozen, given))
    if isinstance(given, dict) and kind is dict:
        return dict, tuple([(_frozen(key), _frozen(value)) for key, value in given.items()])
    raise TypeError(f"{kind.__name__} may change")


def repeated(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor | None,
    margin: Any,
    weight: Any,
    asked: tuple[object, ...],
) -> tuple[Tensor, Tensor, Problem] | None:
    """y and the penalty or J, and the problem, of a call like one that was kept; None if there is
    none, or something is to be said of this one."""
    kept = None if traced() else _served.get(id(mlp))
    if (
        kept is None
        or kept.chain is None
        or not kept.calls
        or kept.mlp() is not mlp
        or torch._C._is_any_autocast_enabled()
        or transformed()
        or (blocks := _blocks(x1, x2)) is None
    ):
        return None
    of_x = blocks[-1]
    dtype, k = of_x.dtype, 0 if x2 is None else of_x.shape[-1]
    try:
        key = _key((dtype, of_x.device, x1.shape[-1], k), margin, asked)
        call = kept.calls.get(key)
    except TypeError:
        return None
    if call is None or (chain := kept.chain.again()) is None:
        return None
    problem = call.problem
    if problem.hinge is not None and problem.hinge.margin != margin and key[4]:
        if not is_finite(margin):
            return None
        problem = problem._replace(hinge=problem.hinge._replace(margin=float(margin)))
        call = kept.calls[key] = Call(problem, call.prepare(problem, dtype), call.prepare)
    if weight is not None:
        try:
            weight = check_weight(weight, of_x, problem.D, problem.k)
        except (TypeError, ValueError):  # an earlier argument may be wrong too
            return None
        if type(weight) is not Tensor or weight.requires_grad:
            return None
        weight = kernel_weight(weight, of_x, problem)
    x = of_x if x2 is None else torch.cat(blocks, -1)
    rows, params = chain.operands(x)
    try:
        y, out = whole_step(call.step, rows, weight, params)
    except RuntimeError:
        if _outdated(kept, of_x):
            return None
        raise
    if rows is not x:
        batch = x.shape[:-1]
        y = y.view(*batch, problem.D)
        out = out.view(*batch, *out.shape[1:]) if out.dim() else out
    return y, out, problem


def _blocks(x1: Tensor, x2: Tensor | None) -> tuple[Tensor, ...] | None:
    """The blocks of columns that the inputs are; None if something is to be said of them."""
    if type(x1) is not Tensor or x1.layout is not DENSE or x1.is_nested or not (shape := x1.shape):
        return None
    if x2 is None:
        return None if x1.is_inference() else (x1,)
    if type(x2) is not Tensor or x2.layout is not DENSE or x2.is_nested:
        return None
    if x2.dtype is not x1.dtype or x2.device != x1.device:
        return None
    of_x2 = x2.shape
    if len(of_x2) < len(shape):
        x2 = x2.unsqueeze(-1)
        of_x2 = x2.shape
    return (x1, x2) if of_x2[:-1] == shape[:-1] else None
