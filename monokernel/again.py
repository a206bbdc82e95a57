"""Calls like one before: what was found out for it is kept, and looked at again.

The calls of a training loop differ in numbers alone. So of a network that was served who serves it
is kept, and where it is a chain of layers the call as a whole: for one with the same arguments a
look at each layer leads straight to the backend's operator.

No parameter is looked at here: a backend asks of every operand what it is before it reads it
(``operands.py``, ``csrc/boundary.cpp``), and where one is refused the network is read anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .arguments import Inputs, check_weight, freeze, is_finite
from .backends import BACKENDS, Prepare, Step
from .boundary import preparing, traced, transformed
from .network import Chain, Known, known
from .operands import has_memory, kernel_weight
from .problem import Hinge, Problem
from .program import Node

if TYPE_CHECKING:
    from .planning import Route

__all__ = ["Served", "as_before", "keep", "remember", "repeated", "twice"]

T = TypeVar("T")

MOST_CALLS = 16  # of one network


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
    forget = partial(_served.pop, id(mlp), None)
    own = weakref.ref(mlp, lambda _: forget())
    of = *asked, *_like(inputs)
    _served[id(mlp)] = Served(own, of, chain, found.nodes, route._replace(network=None), {})


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


def twice(serve: Callable[..., T], mlp: nn.Module, *asked: Any) -> T:
    """``serve(mlp, *asked)``, which chooses a route; where that is refused an operand once more, by
    a route that is chosen anew."""
    try:
        return serve(mlp, *asked)
    except RuntimeError:
        kept = _served.pop(id(mlp), None)
        if kept is None or kept.chain is None:  # it was looked at as a whole
            raise
    return serve(mlp, *asked)


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
    with, if these are plain values. The ``route`` follows from the last of them."""
    kept = as_before(mlp, inputs, (*route, False))
    d1 = inputs.d if len(inputs.blocks) == 1 else inputs.d - inputs.k
    if kept is None or kept.chain is None or kept.route.backend not in BACKENDS:
        return
    prepare = preparing(kept.route.backend)
    try:
        frozen = tuple(map(freeze, (*_of_key(margin), *asked)))
    except TypeError:
        return
    if prepare is None or not all(map(_is_plain, frozen)):
        return
    if len(kept.calls) >= MOST_CALLS:
        kept.calls.clear()
    x = inputs.like
    problem = Problem(inputs.d, kept.nodes, inputs.columns, kept.route.mode, hinge)
    key = x.dtype, x.device, d1, inputs.d - d1, *frozen
    kept.calls[key] = Call(problem, prepare(problem, x.dtype), prepare)


def _of_key(margin: object) -> tuple[bool, object]:
    """Whether it is one number, which may move, and what it is if not."""
    moves = type(margin) in (float, int)
    return moves, None if moves else margin


def _is_plain(given: object) -> bool:
    if isinstance(given, tuple):
        return all(map(_is_plain, given))
    return given is None or type(given) in (bool, int, float, str)


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
        or (isinstance(weight, Tensor) and (type(weight) is not Tensor or weight.requires_grad))
    ):
        return None
    blocks, like = _read(x1, x2)
    key, call = _find(kept.calls, (*like, *_of_key(margin), *asked))
    if call is None or (chain := kept.chain.again()) is None:
        return None
    problem = call.problem
    if problem.hinge is not None and problem.hinge.margin != margin and key[len(like)]:
        if not is_finite(margin):
            return None
        problem = problem._replace(hinge=problem.hinge._replace(margin=float(margin)))
        call = kept.calls[key] = Call(problem, call.prepare(problem, x1.dtype), call.prepare)
    of_x = blocks[-1]
    if weight is not None:
        weight = kernel_weight(check_weight(weight, of_x, problem.D, problem.k), of_x, problem)
    try:
        x = of_x if x2 is None else torch.cat(blocks, -1)
        rows, params = chain.operands(x)
        y, out = call.step(rows, weight, params)
    except RuntimeError:  # of which the call as a whole has the sentence
        return None
    if rows is not x:
        batch = x.shape[:-1]
        y = y.view(*batch, problem.D)
        out = out.view(*batch, *out.shape[1:]) if out.dim() else out
    return y, out, problem


def _read(x1: Tensor, x2: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    """The blocks of columns that the inputs are, and what a call is kept by of them, which is like
    nothing that was kept if something is to be said of them. Blocks that do not go together are
    refused when they are joined."""
    if not _is_dense(x1) or not (shape := x1.shape):
        return (), ()
    dtype = x1.dtype
    if x2 is None:
        return (x1,), (dtype, x1.device, shape[-1], 0)
    if not _is_dense(x2) or x2.dtype is not dtype:
        return (), ()
    if x2.dim() == len(shape) - 1:
        x2 = x2.unsqueeze(-1)
    return (x1, x2), (dtype, x1.device, shape[-1], x2.shape[-1] if x2.dim() else 0)


def _is_dense(t: object) -> bool:
    return type(t) is Tensor and t.layout is torch.strided and not t.is_nested


def _find(
    calls: dict[tuple[object, ...], Call], key: tuple[object, ...]
) -> tuple[tuple[object, ...], Call | None]:
    """The call of such a key, in which a list or a dict goes by its entries."""
    try:
        return key, calls.get(key)
    except TypeError:
        pass
    try:
        key = tuple(map(freeze, key))
        return key, calls.get(key)
    except TypeError:
        return key, None
