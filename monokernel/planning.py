"""Who serves a call, and for each backend refused, why. ``plan`` shows it to the user."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import capture, network, reading
from .arguments import (
    BATCH_STATS,
    MODES,
    Inputs,
    check_choice,
    check_constraints,
    check_inputs,
    check_module,
    check_parameter,
)
from .backends import BACKENDS, refusal
from .columns import Columns
from .function import operand_dtype, transformed
from .operands import has_memory
from .problem import Mode, Problem, cheaper_mode
from .program import Node

__all__ = ["Plan", "Route", "choose", "plan"]

Refused = tuple[tuple[str, str], ...]  # a backend's name and the reason


class Route(NamedTuple):
    """The decision for one call. ``network`` is None on the general path, where ``running`` says
    that batch normalisations are in training mode and their slopes go by the running statistics.
    With ``captured`` there is none yet: the network is read when its forward has been compiled.
    ``broken`` says why torch.compile cannot have it and its slopes in one graph, if it is so."""

    backend: str
    mode: Mode
    network: network.Chain | reading.Reading | None
    transformed: bool
    refused: Refused
    running: bool = False
    captured: bool = False
    broken: str = ""


@dataclass(frozen=True)
class Plan:
    """What would serve a call: ``backend``, ``mode`` and ``kernel``, and for every other backend
    that was considered the reason it was ``refused``. Prints as a few readable lines."""

    backend: str
    mode: str
    kernel: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, mode {self.mode}: {self.kernel}"]
        lines += [f"  not {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


CHOICES = ("auto", *BACKENDS, "reference")
REFERENCE = "autograd through the layer-by-layer reference"
GENERAL = "autograd through one call of the module"


def plan(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    direction: Any = None,
    columns: Any = None,
    mode: str = "auto",
    backend: str = "auto",
    batch_stats: str = "error",
) -> Plan:
    """Which backend, mode and kernel would serve ``fused_mono_penalty(mlp, x1, x2)``, and why no
    other. All arguments as there; where x2 is left out and there is no ``direction``, every column
    of x counts, as for ``value_and_jacobian(mlp, x)``.

    Runs nothing of a chain of layers; a forward of one's own it runs once, on symbols in the place
    of numbers, and puts back the attributes (with what is in lists, dicts and sets), buffers and
    random generators that this changed.
    """
    inputs = check_inputs(x1, x2)
    if direction is not None:
        inputs, *_ = check_constraints(inputs, direction, columns)
    route = choose(network.unwrap(mlp), inputs, mode, backend, batch_stats, rehearsal=True)
    kernel = GENERAL if route.network is None else REFERENCE
    if route.backend in BACKENDS:
        kernel = BACKENDS[route.backend].kernel
    return Plan(route.backend, route.mode, kernel, dict(route.refused))


def choose(
    mlp: nn.Module,
    inputs: Inputs,
    mode: str,
    backend: str,
    batch_stats: str = "error",
    rehearsal: bool = False,
) -> Route:
    """The route of a call; raises where ``backend`` was asked for by name and cannot serve. A
    ``rehearsal`` leaves no trace of that."""
    asked = mode, backend, batch_stats, rehearsal
    route = _as_before(mlp, inputs, asked)
    if route is not None:
        return route
    check_choice("mode", mode, MODES)
    check_choice("backend", backend, CHOICES)
    check_choice("batch_stats", batch_stats, BATCH_STATS)
    check_module(mlp)
    functional = transformed()
    compiling = torch.compiler.is_compiling() and type(mlp) is not capture.Captured
    tracing = compiling and torch.compiler.is_dynamo_compiling()
    broken = capture.unseen(mlp, inputs) if tracing else ""
    if broken:
        return Route("", "adjoint", None, functional, (), broken=broken)
    wrapped, hooks = _wrapped(inputs), network.with_hooks(mlp) if compiling else None
    fusing = compiling and not functional and backend != "reference"
    if tracing:
        way = capture.way(mlp, inputs, fusing and not (wrapped or hooks))
        if isinstance(way, tuple):
            return Route("", "adjoint", None, False, (), captured=True)
        broken = way
    aside = functional or compiling or rehearsal or wrapped is not None
    again = None if aside else reading.read_again(mlp, inputs)
    found: network.Chain | network.Unfused | reading.Reading | str = again or network.read(mlp)
    if wrapped is not None:
        found = wrapped if isinstance(found, network.Chain) else found
    elif isinstance(found, network.Chain):
        _check_chain(found, inputs)
        if fusing and torch.compiler.is_dynamo_compiling():
            found = "the compiler does not hand over what it wrote down of its forward"
    elif again is None and not (functional or compiling):
        found = reading.read(mlp, inputs, rehearsal)
    if isinstance(found, network.Unfused):
        found = found.sentence(mlp)
    if isinstance(found, str):
        route = _general(mlp, found, mode, backend, functional, batch_stats)
        return route._replace(broken=broken) if broken else route
    x = inputs.like
    dtype = operand_dtype(x) if inputs.autocast else x.dtype
    name, chosen, refused = serving(
        inputs.d, found.nodes, inputs.columns, mode, backend, dtype, x.device, functional
    )
    rounded = found.rounded if isinstance(found, reading.Reading) else None
    if rounded is not None and name in BACKENDS and BACKENDS[name].autocast == "chains":
        why = f"under autocast backend {name!r} serves chains of linear layers and activations only"
        return _general(mlp, why, mode, backend, functional, batch_stats)
    if not name:
        raise ValueError(f"backend: {backend!r} was asked for but cannot serve: {refused[0][1]}")
    route = Route(name, chosen, found, functional, refused)
    if isinstance(found, network.Chain) and not (aside or inputs.autocast):
        _remember(mlp, inputs, asked, route, found)
    return route


# --- chains that were served before ---------------------------------------------------------------
# Most calls are like the last one: then a look at each layer is enough, and 9 µs of 50 are saved.


class _Served(NamedTuple):
    """Of which chain, asked for how, on which inputs; and its route, less the chain."""

    mlp: weakref.ref[nn.Module]
    asked: tuple[Any, ...]
    chain: network.Known
    route: Route


_served: dict[int, _Served] = {}


def _like(inputs: Inputs) -> tuple[Any, ...]:
    x = inputs.like
    return inputs.d, inputs.columns, x.dtype, x.device


def _as_before(mlp: nn.Module, inputs: Inputs, asked: tuple[Any, ...]) -> Route | None:
    """The route of a call of the same chain that was like this one, if all is as it was then."""
    if torch.compiler.is_compiling():
        return None
    kept = _served.get(id(mlp))
    if (
        kept is None
        or kept.mlp() is not mlp
        or inputs.autocast
        or kept.asked != (*asked, *_like(inputs))
        or transformed()
        or _wrapped(inputs)
    ):
        return None
    chain = kept.chain.again(inputs.like)
    backend, mode, _, _, refused, *_ = kept.route
    return None if chain is None else Route(backend, mode, chain, False, refused)


def _remember(
    mlp: nn.Module, inputs: Inputs, asked: tuple[Any, ...], route: Route, chain: network.Chain
) -> None:
    known = network.known(mlp, chain)
    if known is not None:
        forget = partial(_served.pop, id(mlp), None)
        own = weakref.ref(mlp, lambda _: forget())
        asked = (*asked, *_like(inputs))
        _served[id(mlp)] = _Served(own, asked, known, route._replace(network=None))


@lru_cache(maxsize=1024)
def serving(
    d: int,
    nodes: tuple[Node, ...],
    columns: Columns,
    mode: str,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    functional: bool,
) -> tuple[str, Mode, Refused]:
    """The backend and mode for such a problem, and why no earlier one; "" where the one asked for
    cannot serve."""
    automatic = cheaper_mode(nodes[-1].width, len(columns))
    chosen: Mode = automatic if mode == "auto" else mode  # type: ignore[assignment]
    problem = Problem(d, nodes, columns, chosen, None)
    refused: Refused = ()
    for name in BACKENDS if backend == "auto" else (backend,):
        if name == "reference":
            return name, chosen, refused
        own = BACKENDS[name].device
        if backend == "auto" and own is not None and own != device.type:
            why = f"the tensors are on {device.type}, it serves {own}"
        elif functional:
            why = "a functorch transform or forward-mode AD is at work"
        else:
            why = refusal(name, problem, dtype, device) or ""
        if not why:
            return name, chosen, refused
        refused += ((name, why),)
    return "reference" if backend == "auto" else "", chosen, refused


def _general(
    mlp: nn.Module, reason: str, mode: str, backend: str, functional: bool, batch_stats: str
) -> Route:
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend: {backend!r} was asked for but cannot serve: {reason}")
    coupled = network.batch_coupling(mlp)
    unknown = _without_statistics(mlp) if coupled else None
    if coupled and (unknown or batch_stats == "error"):
        raise ValueError(
            f"mlp: {unknown or coupled} normalises with the statistics of the batch, so a row has "
            "no slope of its own; expected evaluation mode (.eval()) with running statistics, or "
            "batch_stats='running' for slopes by the running statistics while training, got "
            + ("a layer that keeps none" if unknown else "training mode")
        )
    part = network.sharded(mlp)
    if part is not None:
        raise ValueError(
            f"mlp: {part} is sharded on its own, so its weights are gone when its slopes are "
            "needed; "
            "expected fully_shard around the MonotonePenalty as a whole"
        )
    if mode == "tangent":
        raise ValueError(
            f"mode: 'tangent' was asked for but serves fused networks only ({reason}); PyTorch's "
            "forward mode can be silently wrong inside a general module"
        )
    refused = tuple((name, reason) for name in BACKENDS) if backend == "auto" else ()
    return Route("reference", "adjoint", None, functional, refused, coupled is not None)


def _without_statistics(mlp: nn.Module) -> str | None:
    """A batch normalisation that keeps no running statistics."""
    for m, name in network.parts(mlp).items():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            return f"{name or 'mlp'} ({type(m).__name__})"
    return None


def _wrapped(inputs: Inputs) -> str | None:
    """A subclass that decides itself what an operation does (a MaskedTensor, a DTensor) gets to
    see the operations, unless a mode that looks on (a FakeTensorMode) takes care of it."""
    for t in inputs.blocks:
        if not has_memory(t) and torch._C._len_torch_dispatch_stack() == 0:
            name = inputs.argument(t)
            return f"{name} is a {type(t).__name__}, with operations of its own"
    return None


def _check_chain(chain: network.Chain, inputs: Inputs) -> None:
    """What PyTorch would complain about inside the first layer, said of the user's arguments."""
    d = chain.widths[0]
    if inputs.d != d and len(inputs.blocks) == 1:
        raise ValueError(
            f"x1: expected {d} columns, the inputs of mlp's first layer, where x2 is left out, got "
            f"{inputs.d}"
        )
    if inputs.d != d:
        raise ValueError(
            f"x2: expected d1 + k = {d}, the inputs of mlp's first layer, got d1 = "
            f"{inputs.d - inputs.k} and k = {inputs.k}"
        )
    x = inputs.like
    device, dtype = x.device, x.dtype
    for linear in chain.linears:
        for t in linear._parameters.values():
            if t is not None and (t.device != device or t.dtype != dtype):
                check_parameter(t, x)
