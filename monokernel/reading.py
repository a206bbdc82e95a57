"""Reads a forward of one's own: what it does to the rows, as a program.

The forward runs once in each call, on a ``Value`` in the place of x (see ``symbols.py``), while
parameters and buffers are the real tensors. What happens to a ``Value`` is written down as nodes;
what the forward computes of parameters alone (a weight norm, ``self.log_scale.exp()``) PyTorch
computes, under autograd, and the result is a parameter of the program. Written down anew in every
call, it cannot be stale, so nothing of it is guarded. Whatever is not known to treat each row by
itself, to leave the numbers unread and to have the derivative that the table of nodes gives it
makes the network unreadable; the general path then calls the module as it is.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .arguments import Inputs
from .dropout import draw_key
from .network import global_hooks, hooked, uncompiled, where
from .program import Node, chain_of
from .signs import capturing
from .symbols import Key, Param, Tape, Value, place, placed, said

__all__ = ["Reading", "State", "read", "read_again"]


class Reading(NamedTuple):
    """The program of one call. ``offsets`` are added to x before it, ``squeezed`` says that y is
    (*batch,), and ``params`` are θ in the order of their places."""

    d: int
    nodes: tuple[Node, ...]
    params: tuple[Param, ...]
    offsets: tuple[Tensor | float, ...]
    squeezed: bool
    # Under autocast, of a program that is more than a chain of layers: whether y is in its dtype.
    rounded: bool | None = None

    def operands(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The program's rows (N, d) and its parameters, for the network's input x (*batch, d)."""
        x = x if x.dim() == 2 else x.reshape(-1, self.d)
        params = [draw_key(x) if type(p) is Key else p for p in self.params]
        for offset in self.offsets:
            x = x + offset
        return x, params  # type: ignore[return-value]  # no Key is left


# --- from what was written down to a program ------------------------------------------------------

LINES = frozenset(("scale", "shift", "line"))

# In the native kernel a node of few elements (rows times columns) costs less than what autograd
# takes for the weight that it would be folded into; ``docs/native.md`` has the measurement.
FOLDS_FROM = 1 << 15


class Step(NamedTuple):
    """A node of which the parameters are still tensors."""

    kind: str
    inputs: tuple[int, ...]
    width: int
    numbers: tuple[float, ...]
    params: tuple[Param, ...]


def _laid_out(tape: Tape, y: int, d: int, squeezed: bool, fold: bool) -> Reading | str:
    """The program of value y, its parameters in the order in which its nodes read them."""
    nodes, params = tape.nodes, tape.params
    offsets: list[Tensor | float] = []
    lines = [node.width for node in nodes if node.kind in LINES]
    folds = fold and lines and _pays(tape, max(lines))
    if folds or not _needs_all(nodes, y):
        # What is folded into a layer is not the network's own arithmetic: in full precision.
        with torch.autocast(tape.device_type, enabled=False) if tape.autocast else nullcontext():
            nodes, params, offsets = _rewritten(tape, y, fold)
    if not nodes:
        nodes = [Node("identity", (0,), (), (0.0, 0.0, 0.0), d)]
    program = tuple(nodes)
    rounded: bool | None = None
    if tape.casts and (lines or not chain_of(d, program)):
        rounded = _rounds(tape, y)
        if rounded is None:
            return "what dtype its output has under autocast is not known"
    return Reading(d, program, tuple(params), tuple(offsets), squeezed, rounded)


def _rounds(tape: Tape, y: int) -> bool | None:
    """Whether value y has autocast's dtype, as every linear layer's has, and not that of x; None
    where a parameter of another dtype may decide, or a function that is another one in another
    version of PyTorch."""
    if tape.device_type not in ("cpu", "cuda") or tape.dtype != torch.float32:
        return None
    found: list[bool | None] = [False]
    for v, node in enumerate(tape.nodes[:y], 1):
        of = {found[u] for u in node.inputs}
        if node.kind == "linear":
            found.append(True)
        elif v in tape.full:
            found.append(False)
        elif (node.params and node.kind != "dropout") or (
            node.kind == "root_mean_square" and tape.device_type == "cuda"
        ):
            found.append(None)
        else:  # the wider dtype of several decides
            found.append(False if False in of else None if None in of else True)
    return found[y]


def _needs_all(nodes: list[Node], y: int) -> bool:
    """Whether value y, the last one, depends on every other, and none is made in vain."""
    read = {u for node in nodes for u in node.inputs}
    read.update((0, y))
    return len(read) == len(nodes) + 1


def _rewritten(
    tape: Tape, y: int, fold: bool
) -> tuple[list[Node], list[Param], list[Tensor | float]]:
    """The nodes that y needs, renumbered, with their neighbours folded into linear layers where
    that pays; their parameters; and what is added to x before them. Without ``fold``, as they are:
    folding rounds parameters."""
    n = len(tape.nodes)
    uses = [0] * (n + 1)
    uses[y] = 1
    for i in range(y - 1, -1, -1):
        if uses[i + 1]:
            for u in tape.nodes[i].inputs:
                uses[u] += 1
    kept: list[Step] = []
    offsets: list[Tensor | float] = []
    at = [0] * (n + 1)  # where each value is among those kept
    once = [uses[0] == 1]  # whether each kept value is read once
    for i, node in enumerate(tape.nodes[:y]):
        if not uses[i + 1]:
            continue
        inputs = tuple([at[u] for u in node.inputs])
        params = tuple([tape.params[p] for p in node.params])
        step = Step(node.kind, inputs, node.width, node.numbers, params)
        u = inputs[0]
        if fold and step.kind in LINES and once[u]:
            if u == 0 and (c := _offset(step)) is not None:
                offsets.append(c)
                at[i + 1], once[0] = 0, uses[i + 1] == 1
                continue
            if u and kept[u - 1].kind == "linear" and _pays(tape, step.width, kept[u - 1]):
                kept[u - 1] = _after(kept[u - 1], step)
                at[i + 1], once[u] = u, uses[i + 1] == 1
                continue
        if fold and step.kind == "linear":
            # Only what lies last among those kept: no place of another value changes.
            while u == len(kept) > 0 and once[u] and _folds(tape, kept, step, bool(offsets)):
                step = _before(kept.pop(), step)
                once.pop()
                (u,) = step.inputs
        kept.append(step)
        once.append(uses[i + 1] == 1)
        at[i + 1] = len(kept)
    nodes: list[Node] = []
    θ: list[Param] = []
    for step in kept:
        places = placed(θ, step.params)
        nodes.append(Node(step.kind, step.inputs, places, step.numbers, step.width))
    return nodes, θ, offsets


def _offset(step: Step) -> Tensor | float | None:
    """What is added to x, by which no slope changes."""
    if step.kind == "line":
        return step.numbers[1] if step.numbers[0] == 1 else None
    return _tensor(step) if step.kind == "shift" else None


def _pays(tape: Tape, width: int, linear: Step | None = None) -> bool:
    """Whether it may cost less to fold a node of this width, into this linear layer, than to have
    it. Elsewhere than in the cache of a CPU it does, and for any number of rows, as the compiler
    has it, it is taken to."""
    rows = math.prod(tape.batch)
    if tape.device_type != "cpu" or type(rows) is not int:
        return True
    weight = 0 if linear is None else _tensor(linear).numel()
    return rows * width > FOLDS_FROM + weight


def _folds(tape: Tape, kept: list[Step], linear: Step, centred: bool) -> bool:
    """Whether the last of those kept can go into the linear layer that reads it. What is taken from
    inputs that are not ``centred``, a mean far from 0 say, is better taken before the product than
    after it."""
    step, u = kept[-1], len(kept)
    if step.kind not in LINES or not _pays(tape, step.width, linear):
        return False
    shifts = step.kind == "shift" or (step.kind == "line" and step.numbers[1] != 0)
    if shifts and not centred:
        while u and (kept[u - 1].kind in LINES or kept[u - 1].kind == "columns"):
            (u,) = kept[u - 1].inputs
    return u > 0


def _tensor(step: Step) -> Tensor:
    t = step.params[0]
    assert isinstance(t, Tensor)
    return t


def _after(linear: Step, step: Step) -> Step:
    """The linear layer W u + b with p∘(W u + b) + q behind it."""
    W, b = linear.params
    assert isinstance(W, Tensor)
    assert b is None or isinstance(b, Tensor)
    if step.kind == "scale":
        s = _tensor(step)
        W, b = W * s.unsqueeze(-1), None if b is None else b * s
    elif step.kind == "shift":
        t = _tensor(step)
        b = t.expand(linear.width).contiguous() if b is None else b + t
    else:
        p, q = step.numbers
        W, b = (W, b) if p == 1 else (W * p, None if b is None else b * p)
        if q:
            b = W.new_full((linear.width,), q) if b is None else b + q
    return linear._replace(params=(W, b))


def _before(step: Step, linear: Step) -> Step:
    """The linear layer with p∘u + q before it."""
    W, b = linear.params
    assert isinstance(W, Tensor)
    assert b is None or isinstance(b, Tensor)
    if step.kind == "scale":
        W = W * _tensor(step)
    elif step.kind == "shift":
        t = _tensor(step)
        if t.shape != (step.width,):
            t = t.expand(step.width)
        b = W @ t if b is None else torch.addmv(b, W, t)
    else:
        p, q = step.numbers
        if q:
            more = q * W.sum(-1)
            b = more if b is None else b + more
        W = W if p == 1 else W * p
    return linear._replace(inputs=step.inputs, params=(W, b))


# --- the whole reading ---------------------------------------------------------------------------


def read(
    mlp: nn.Module, inputs: Inputs, rehearsal: bool = False, fold: bool = True
) -> Reading | str:
    """The program that the module's forward is for these inputs, or one sentence naming what is
    not known as a row-wise node.

    Runs the forward once. Where that turns out unreadable, the attributes (lists, dicts and sets
    among them included), buffers and random generators that it changed are put back, since the
    general path runs it once more, and it is not tried again in later calls. A ``rehearsal`` tries
    all the same, and leaves no trace either way. With ``fold``, scales and shifts are taken into
    the linear layers next to them.
    """
    whole = _parts(mlp)
    if isinstance(whole, str):
        return whole
    parts, compiled = whole
    if inputs.like.is_meta or torch._C._get_tracing_state() is not None:
        return "its inputs have no numbers"
    key, known = _key(mlp, inputs), _known.get(id(mlp))
    before: str | bool | None = None if known is None else known[1].get(key)
    if isinstance(before, str) and not rehearsal:
        return before
    steady = before is True and not rehearsal
    if steady and not compiled and torch.is_grad_enabled():  # the usual case, at once
        found = _record(mlp, inputs, fold)
    else:
        state = None if steady else State(parts, inputs.like.device)
        as_written = uncompiled(parts) if compiled else nullcontext()
        with torch.enable_grad(), state or nullcontext(), as_written:
            found = _record(mlp, inputs, fold)
        if state is not None:
            steady = before is not False and not state.changed()
            if rehearsal or isinstance(found, str):
                state.restore()
    if known is None:
        _known[id(mlp)] = known = weakref.ref(mlp, _forgets(id(mlp))), {}
    after = found if isinstance(found, str) else steady
    if after is not before:
        known[1][key] = after
    return found


def read_again(mlp: nn.Module, inputs: Inputs) -> Reading | str | None:
    """The same of a network that could be read in a call like this, else None: it is known to be
    more than layers in turn, without a look at them."""
    known = _known.get(id(mlp))
    if known is None or not isinstance(known[1].get(_key(mlp, inputs)), bool):
        return None
    return read(mlp, inputs)


def _key(mlp: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """On what it depends whether a network can be read."""
    forward = mlp.__dict__.get("forward", type(mlp).forward)
    few = 0 in inputs.batch or 1 in inputs.batch  # so few rows may be squeezed, or tell no shape
    return mlp.training, len(inputs.batch), few, id(forward)


# Of each module, by identity, what was found of it in each mode: why it is unreadable, or whether a
# call leaves it as it was. One that changes itself may be unreadable in a later call, and then has
# to be put back.
_known: dict[int, tuple[weakref.ref[nn.Module], dict[tuple[Any, ...], str | bool]]] = {}


def _forgets(key: int) -> Callable[[Any], None]:
    return lambda _: _known.pop(key, None)  # type: ignore[return-value]


def _record(mlp: nn.Module, inputs: Inputs, fold: bool) -> Reading | str:
    tape = Tape(mlp, inputs)
    try:
        y = mlp(tape.value(0, inputs.d, flat=False, shared=True))
        if not tape.sentence and (type(y) is not Value or y.tape is not tape):
            tape.refuse("its output", "is no tensor that depends on its input")
        if tape.sentence:
            return tape.sentence
        at, squeezed = y.at, y.flat
        del y
        tape.value(0, 0, flat=False)  # which nobody else holds
        if len({sys.getrefcount(v) for v in tape.values}) > 1:
            tape.refuse("its forward", "keeps a tensor that depends on its input")
            return tape.sentence
        return _laid_out(tape, at, inputs.d, squeezed, fold)
    except Exception as error:  # whatever it is, the general path meets it if it is a real one
        part = place(mlp, _innermost(error))
        return tape.sentence or f"{part}: its forward does not run on symbols ({said(error)})"
    finally:
        tape.end()


def _innermost(error: Exception) -> FrameType | None:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return None if traceback is None else traceback.tb_frame


class State(TorchFunctionMode):
    """What a forward may change, as it is before it runs; and while it does, every random generator
    that it hands to PyTorch."""

    def __init__(self, parts: list[nn.Module], device: torch.device) -> None:
        super().__init__()
        self.held: list[tuple[Any, Any]] = []  # dicts, lists and so on, and what was in them
        self.tensors: list[tuple[Tensor, int, Tensor]] = []
        left: list[Any] = [m.__dict__ for m in parts]
        seen = {id(d) for d in left}
        for at in left:  # grows on the way
            if isinstance(at, Tensor):
                if not (isinstance(at, nn.Parameter) or at.is_inference()):
                    self.tensors.append((at, at._version, at.detach().clone()))
                continue
            self.held.append((at, _content(at)))
            for part in at.values() if isinstance(at, dict) else at:
                if isinstance(part, nn.Module):  # in a list, say, and so no part of the network
                    part = part.__dict__
                if isinstance(part, CHANGEABLE) and id(part) not in seen:
                    seen.add(id(part))
                    left.append(part)
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        self._keep(torch.default_generator)
        if device.type == "cuda" and not capturing(device):
            index = torch.cuda.current_device() if device.index is None else device.index
            self._keep(torch.cuda.default_generators[index])

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for given in (*args, *(kwargs or {}).values()):
            if type(given) is torch.Generator and all(g is not given for g, _ in self.generators):
                self._keep(given)
        return func(*args, **(kwargs or {}))

    def _keep(self, generator: torch.Generator) -> None:
        self.generators.append((generator, generator.get_state()))

    def changed(self) -> bool:
        """Whether anything may not be as it was."""
        return (
            torch._C._len_torch_dispatch_stack() > 0  # no number can be read
            or any(not _same(_content(now), before) for now, before in self.held)
            or any(t._version != version for t, version, _ in self.tensors)
            or any(not torch.equal(g.get_state(), state) for g, state in self.generators)
        )

    def restore(self) -> None:
        for now, before in self.held:
            if _same(_content(now), before):
                continue
            if isinstance(now, dict):
                for name in [name for name in now if name not in before]:
                    del now[name]
                for name, held in before.items():
                    if name not in now or now[name] is not held:
                        now[name] = held
                continue
            now.clear()
            (now.update if isinstance(now, set) else now.extend)(before)
        with torch.no_grad():
            for t, version, value in self.tensors:
                if t._version != version:
                    t.copy_(value)
        for generator, state in self.generators:
            generator.set_state(state)


CHANGEABLE = (dict, list, set, deque, Tensor)


def _content(held: Any) -> Any:
    return dict(held) if isinstance(held, dict) else list(held)


def _same(now: Any, before: Any) -> bool:
    """Whether they hold the same objects."""
    if isinstance(now, dict):
        return _same([*now, *now.values()], [*before, *before.values()])
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _parts(mlp: nn.Module) -> tuple[list[nn.Module], bool] | str:
    """Every module in it and whether any was compiled, or the sentence on one that is more than
    Python around functions."""
    if global_hooks():
        return "a global module hook is registered"
    found, seen, compiled = [mlp], {id(mlp)}, False
    for m in found:  # grows on the way
        own = m.__dict__
        if nature := _nature(type(m).__mro__):
            if nature == "opaque":
                return f"{where(mlp, m)} is scripted, distributed or quantised"
            if nature == "batch" and (m.training or m.running_mean is None):
                return f"{where(mlp, m)} normalises with the statistics of the batch"
            compiled = compiled or nature == "compiled"
        if "_compiled_call_impl" in own:
            compiled = True
        if hooked(m):
            return f"{where(mlp, m)} has hooks"
        for part in own["_modules"].values():
            if part is not None and id(part) not in seen:
                seen.add(id(part))
                found.append(part)
    return found, compiled


OPAQUE = ("torch.jit", "torch.distributed", "torch.nn.parallel", "torch.ao")


@lru_cache(maxsize=1024)
def _nature(mro: tuple[type, ...]) -> str:
    """ "opaque", "compiled", "batch" for a batch normalisation, or "", by the classes that a module
    has."""
    if any(base.__module__.startswith(OPAQUE) for base in mro):
        return "opaque"
    if any(base.__module__.startswith("torch._dynamo") for base in mro):
        return "compiled"
    return "batch" if _BatchNorm in mro else ""
