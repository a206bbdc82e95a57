"""Calls like one before: what was found out for it is kept, and looked at again.

The calls of a training loop differ in numbers alone. So of a network that was served who serves it
is kept, and where it is a chain of layers and the inputs are rows (N, d) the call as a whole: for
one with the same arguments a look at each layer leads straight to the backend's operator.

No parameter is looked at here: a backend asks of every operand what it is before it reads it
(``operands.py``, ``csrc/boundary.cpp``), and where one is refused the network is read anew.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .arguments import Inputs
from .backends import BACKENDS, Prepare, Step
from .boundary import preparing, traced, transformed
from .network import Chain, Known, known
from .operands import has_memory
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
    margin: float
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
    asked: tuple[object, ...],
    route: tuple[object, ...],
    hinge: Hinge | None,
) -> None:
    """Of a call that was served, if its arguments ``asked`` are values that cannot change. Those
    that the ``route`` follows from are the last of them."""
    margin = 0.0 if hinge is None else hinge.margin
    k = inputs.k if len(inputs.blocks) > 1 else 0
    first, d1 = inputs.blocks[0], inputs.d - k
    if (
        len(inputs.batch) != 1
        or d1 == 0
        or isinstance(margin, tuple)
        or not all(map(_is_constant, asked))
    ):
        return
    kept = as_before(mlp, inputs, (*route, False))
    if kept is None or kept.chain is None or kept.route.backend not in BACKENDS:
        return
    prepare = preparing(kept.route.backend)
    if prepare is None:
        return
    if len(kept.calls) >= MOST_CALLS:
        kept.calls.clear()
    problem = Problem(inputs.d, kept.nodes, inputs.columns, kept.route.mode, hinge)
    call = Call(problem, margin, prepare(problem, first.dtype), prepare)
    kept.calls[(first.dtype, first.device, d1, k, *asked)] = call


def _is_constant(given: object) -> bool:
    if type(given) is tuple:
        return all(map(_is_constant, given))
    return given is None or type(given) in (int, float, str)


def repeated(
    mlp: nn.Module, x1: Tensor, x2: Tensor | None, margin: object, asked: tuple[object, ...]
) -> tuple[Tensor, Tensor, Problem] | None:
    """y (N, D) and the penalty or J, and the problem, of a call like one that was kept; None if
    there is none, or something is to be said of this one."""
    if traced():
        return None
    kept = _served.get(id(mlp))
    if (
        kept is None
        or not kept.calls
        or kept.mlp() is not mlp
        or type(margin) is not float
        or not _is_dense(x1)
        or torch._C._is_any_autocast_enabled()
        or transformed()
    ):
        return None
    shape, dtype, device, k = x1.shape, x1.dtype, x1.device, 0
    if len(shape) != 2:
        return None
    if x2 is None:
        if x1.is_inference():
            return None
        x = x1
    else:
        if not _is_dense(x2) or x2.dtype is not dtype or x2.device != device:
            return None
        of_x2 = x2.shape
        if len(of_x2) == 1:
            x2, k = x2.unsqueeze(-1), 1
        elif len(of_x2) == 2:
            k = of_x2[1]
        if k == 0 or of_x2[0] != shape[0]:
            return None
    try:
        call = kept.calls.get((dtype, device, shape[1], k, *asked))
    except TypeError:  # some argument may change, as a list
        return None
    chain = None if call is None or kept.chain is None else kept.chain.again()
    if call is None or chain is None:
        return None
    if call.margin != margin:
        if not math.isfinite(margin):
            return None
        call = kept.calls[(dtype, device, shape[1], k, *asked)] = _with_margin(call, margin, dtype)
    if x2 is not None:
        x = torch.cat((x1, x2), -1)
    try:
        return *call.step(x, None, chain.parameters(x)), call.problem
    except RuntimeError:  # of which the call as a whole has the sentence
        return None


def _is_dense(t: object) -> bool:
    return type(t) is Tensor and t.layout is torch.strided and not t.is_nested


def _with_margin(call: Call, margin: float, dtype: torch.dtype) -> Call:
    hinge = call.problem.hinge
    assert hinge is not None
    problem = call.problem._replace(hinge=hinge._replace(margin=margin))
    return Call(problem, margin, call.prepare(problem, dtype), call.prepare)
