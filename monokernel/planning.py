"""Who serves a call, and for each backend refused, why. ``plan`` shows it to the user."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import capture, network, probing, reading
from .advice import FEW, advice, cost
from .again import as_before, forget, remember
from .arguments import (
    BACKEND_CHOICES,
    BATCH_STATS,
    MODES,
    AskedBackend,
    AskedBatchStats,
    AskedMode,
    Direction,
    Inputs,
    check_choice,
    check_constraints,
    check_inputs,
    check_module,
    check_parameter,
)
from .backends import BACKENDS, general, refusal
from .boundary import operand_dtype, transformed
from .columns import Columns
from .operands import has_memory
from .problem import Mode, Problem, cheaper_mode
from .program import Node, unread
from .signs import direction_table

__all__ = ["Plan", "Route", "choose", "not_read", "plan"]

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
    """What would serve a call, at what price, and what to change. Prints as a few lines.

    Attributes:
        backend: "triton", "cpu", "torch" or "reference"; "" where none would serve.
        mode: "tangent" or "adjoint".
        kernel: what that is, in words.
        refused: for every other backend that was considered, the reason.
        reason: the one reason why the network is not fused, "" if it is.
        cost: a penalised step in plain steps, (while 5 % of the rows violate, when all do): by
            matrix products where it is fused (``docs/performance.md`` has what was measured, mostly
            below that), by measurements of double backward where it is not; None where it is not
            known.
        advice: what to change, a sentence each.
        doubts: what the penalty would not see, a sentence each: activations that jump, columns
            that a forward does not use, and on the general path columns in which every slope is 0
            and rows that influence each other.
        error: the sentence with which the call would raise, "" if it would not.
    """

    backend: str
    mode: str
    kernel: str
    refused: dict[str, str]
    reason: str = ""
    cost: tuple[float, float] | None = None
    advice: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    error: str = ""

    @property
    def serves(self) -> bool:
        """Whether the call would be served."""
        return not self.error

    def __str__(self) -> str:
        lines = [f"the call would raise: {self.error}"] if self.error else []
        if self.backend:
            lines.append(f"backend {self.backend}, mode {self.mode}: {self.kernel}")
        if self.cost is not None:
            few, all_rows = self.cost
            price = f"{few:.2g} plain steps"
            if few != all_rows:
                price += f" while {FEW:.0%} of the rows violate, {all_rows:.2g} if all do"
            lines.append(f"  a penalised step: about {price}")
        by_reason: dict[str, list[str]] = {}
        for name, why in self.refused.items():
            by_reason.setdefault(why, []).append(name)
        lines += [f"  not {', '.join(names)}: {why}" for why, names in by_reason.items()]
        lines += [f"  beware: {said}" for said in self.doubts]
        lines += [f"  to change: {said}" for said in self.advice]
        return "\n".join(lines)


REFERENCE = "autograd through the layer-by-layer reference"
GENERAL = "autograd through one call of the module"
LOOKED_AT = 256  # rows on which slopes are looked at for a plan


def plan(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    direction: Any = None,
    columns: Any = None,
    mode: AskedMode = "auto",
    backend: AskedBackend = "auto",
    batch_stats: AskedBatchStats = "error",
) -> Plan:
    """Which backend, mode and kernel would serve ``fused_mono_penalty(mlp, x1, x2)``, why no
    other, what a step costs and what to change. All arguments as there; where x2 is left out and
    there is no ``direction``, every column of x counts, as for ``value_and_jacobian(mlp, x)``.

    Never raises: where the call would, ``Plan.error`` has its sentence and ``Plan.advice`` the way
    out, for BatchNorm in training mode say.

    Runs nothing of a chain of layers; a forward of one's own it runs once, on symbols in the place
    of numbers; and on the general path it calls the module on at most 256 rows, in evaluation mode,
    to see whether slopes are 0 by construction and whether rows mix. The attributes (with what is
    in lists, dicts and sets), buffers and random generators that this changed are put back.
    """
    try:
        inputs, signs = check_inputs(x1, x2), None
        if direction is not None:
            inputs, signs, *_ = check_constraints(inputs, direction, columns)
        route = choose(network.unwrap(mlp), inputs, mode, backend, batch_stats, rehearsal=True)
    except Exception as error:
        said = _sentence(error)
        return Plan("", "", "", {}, advice=advice("", said, {}), error=said)
    refused, kernel = dict(route.refused), REFERENCE
    reason = failed = ""
    D: int | None = None
    doubts: list[str] = []
    if route.network is None:
        kernel, reason = GENERAL, next(iter(refused.values()), "")
        try:
            with torch.inference_mode(False):
                D, doubts = _looked_at(network.unwrap(mlp), inputs, signs)
        except Exception as error:  # whatever a module of one's own says
            failed = _sentence(error)
    else:
        D = route.network.nodes[-1].width
        doubts = [*_jumps(route.network.nodes), *not_read(mlp, inputs, route, signs)]
        try:
            (signs or Direction((1,), ())).for_network(D)
        except ValueError as error:
            failed = _sentence(error)
        if route.backend in BACKENDS:
            kernel = BACKENDS[route.backend].kernel
    price = None if D is None else cost(route.backend, route.mode, D, inputs.k, route.running)
    change = advice(reason, failed, refused)
    own = route.backend, route.mode, kernel, refused, reason
    return Plan(*own, price, change, tuple(doubts), failed)


def _looked_at(
    mlp: nn.Module, inputs: Inputs, signs: Direction | None
) -> tuple[int | None, list[str]]:
    """How many outputs a network of the general path has, and sentences on slopes that are 0 and
    on rows that mix; None where its numbers cannot be read. Raises what the network raises."""
    if transformed() or torch.compiler.is_compiling() or not general.readable(*inputs.blocks):
        return None, []
    x = torch.cat([t.clone() for t in inputs.blocks], -1).detach()
    x = probing.spread(x, LOOKED_AT) if len(inputs.batch) else x
    rows, said = check_inputs(x)._replace(columns=inputs.columns), list[str]()
    with probing.evaluating(mlp), probing.untouched(mlp, x.device):
        general.check_gradient(mlp, rows)
        J = general.value_and_jacobian(mlp, rows, False, audited=True)[1].detach()
        if len(inputs.batch) == 1:
            said += probing.doubts(mlp, x)[0]
    D, k = J.shape[-2:]
    wanted = torch.ones(D, k, dtype=torch.bool, device=J.device)
    labels = (signs and signs.names) or inputs.numbers
    if signs is not None:
        wanted = direction_table(signs.for_network(D), D, k, J.dtype, J.device) != 0
    if J.numel() and len(inputs.batch) == 1:
        said += probing.without_slope(mlp, x, J, wanted, inputs.columns, labels)
    return D, said


def _jumps(nodes: tuple[Node, ...]) -> list[str]:
    """A sentence on the activations that are not continuous, if there are any."""
    kinds = dict.fromkeys(
        node.kind
        for node in nodes
        if (node.kind == "threshold" and node.numbers[0] != node.numbers[1])
        or (node.kind == "hardshrink" and node.numbers[0] != 0)
    )
    if not kinds:
        return []
    return [
        f"y may jump at its {' and '.join(kinds)}, and no slope shows by how much or in which "
        "direction; audit() compares finite steps"
    ]


def not_read(mlp: nn.Module, inputs: Inputs, route: Route, signs: Direction | None) -> list[str]:
    """A sentence on the constrained columns that a program never looks at, if there are any."""
    if route.network is None or isinstance(route.network, network.Chain):
        return []
    blank = unread(inputs.d, route.network.nodes)
    labels = (signs and signs.names) or inputs.numbers
    found = [labels[i] for i, c in enumerate(inputs.columns) if c in blank]
    if not found:
        return []
    return [
        f"{probing.named(found)} every slope of mlp ({type(network.unwrap(mlp)).__name__}) is "
        "exactly 0, since its forward does not use what is there: nothing is constrained there"
    ]


def _sentence(error: Exception) -> str:
    """As the call says it; what is not this package's names itself."""
    said = f"{error}".partition("\n")[0]
    own = re.match(r"(mlp|x1|x2|direction|columns|mode|backend|batch_stats|Monotone): ", said)
    return said if own else f"mlp: {type(error).__name__}: {said}"


def choose(
    mlp: nn.Module,
    inputs: Inputs,
    mode: AskedMode,
    backend: AskedBackend,
    batch_stats: AskedBatchStats = "error",
    rehearsal: bool = False,
) -> Route:
    """The route of a call; raises where ``backend`` was asked for by name and cannot serve. A
    ``rehearsal`` leaves no trace of that."""
    asked = mode, backend, batch_stats, rehearsal
    served = as_before(mlp, inputs, asked)
    again: network.Chain | reading.Reading | str | None = None
    if served is not None:
        again = reading.read(mlp, inputs) if served.chain is None else served.chain.again()
        if isinstance(again, (network.Chain, reading.Reading)) and again.nodes == served.nodes:
            was = served.route  # whose _replace takes three times as long
            return Route(was.backend, was.mode, again, was.transformed, was.refused)
    if not rehearsal:
        forget(mlp)
    check_choice("mode", mode, MODES)
    check_choice("backend", backend, BACKEND_CHOICES)
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
    if again is None and not aside:
        again = reading.read_again(mlp, inputs)
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
    if name in BACKENDS and not (aside or inputs.autocast):
        remember(mlp, inputs, asked, route)
    return route


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
