"""A network under ``torch.compile``: what the compiler wrote down of its forward, read again.

The compiler runs a forward of one's own by itself, writes down which of PyTorch's functions it
calls, and guards all that it looked at on the way. ``call`` has it hand over that graph, by a
higher-order operator of PyTorch's made for this, and whoever runs the compiled graph next, the
compiler's backend or autograd's tracer, meets ``replay``: it reads the graph as ``reading.py``
reads a module, so that what is read is what the compiler saw, guards included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import SymFloat, Tensor, fx, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .arguments import Direction, Inputs, check_inputs, check_weight
from .backends import general
from .network import parts
from .problem import Hinge, accumulate_dtype
from .reading import read

__all__ = ["Captured", "aside", "call", "lift", "way"]


# (mlp, inputs, weight, signs, hinge, mode, backend, batch_stats) → y, and the penalty or, without a
# hinge, the slopes.
Serve = Callable[..., tuple[Tensor, Tensor]]
# (mlp, inputs, lower, upper, direction, margin, parts) → y with the linear term of ``monotone.py``.
Lift = Callable[..., Tensor]

# Where the graph begins, and where it ends: with all that was asked.
_library = torch.library.Library("monokernel", "FRAGMENT")
_library.define(
    "opened(Tensor[] blocks) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "closed(Tensor y, Tensor x, Tensor? weight, int[] columns, int[] direction, int[] shape, "
    "bool penalised, float[] margin, bool squared, bool elementwise, str mode, str backend, "
    "str batch_stats) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lifted(Tensor y, float[] lower, float[] upper, int[] direction, float margin, int parts) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _opened(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks, -1)


def _closed(
    y: Tensor, x: Tensor, weight: Tensor | None, columns: Any, direction: Any, shape: Any,
    penalised: bool, margin: Any, squared: bool, elementwise: bool, *who: str,
) -> Tensor:  # fmt: skip
    """Of the penalty, or of the slopes, the shape, dtype and whether it has a gradient, by which
    the compiler goes on."""
    _check_watched()
    out = y.to(accumulate_dtype(y.dtype))
    if penalised and not elementwise:
        out = out.sum()
    else:
        out = out if y.dim() == x.dim() else out.unsqueeze(-1)
        out = out.unsqueeze(-1) * x.new_ones(len(columns), dtype=out.dtype)
    return out if weight is None else out * weight.sum().to(out)


def _lifted(y: Tensor, *_: Any) -> Tensor:
    _check_watched()
    return y.clone()


def _check_watched() -> None:
    if torch._C._len_torch_dispatch_stack() == 0:
        raise RuntimeError("monokernel: a captured forward was run by itself")


for _name, _implementation in (("opened", _opened), ("closed", _closed), ("lifted", _lifted)):
    _library.impl(_name, _implementation, "CompositeImplicitAutograd")
_OPENED, _CLOSED = torch.ops.monokernel.opened.default, torch.ops.monokernel.closed.default
_LIFTED = torch.ops.monokernel.lifted.default


# --- aside from the compiler ----------------------------------------------------------------------
# What a traced function cannot find out: it can catch no error of the compiler's, and read nothing.


def way(mlp: nn.Module, inputs: Inputs, fusing: bool) -> tuple[str, ...] | str:
    """How the compiler is to take ``mlp``. If it can hand over what it writes down of the forward
    (``call``), and that can be read: the names of the numbers in the network, which it has met. If
    it is to have the slopes in its graph: why it cannot, or "".

    To know that takes a rehearsal, aside from the compiler. Its answer chooses the way and nothing
    else, so it may be of a module that the compiled function has yet to change: on every way the
    compiler sees, and guards, the forward itself.
    """
    _noting(mlp, inputs.blocks[0], inputs.like)
    training = tuple([m.training for m in parts(mlp)])
    found = rehearsed(training, len(inputs.blocks), fusing)
    if isinstance(found, tuple):
        _meet(mlp, found)
    return found


def unseen(mlp: nn.Module, inputs: Inputs) -> str:
    """Why the compiler must not even look at ``mlp``, or ""."""
    _noting(mlp, inputs.blocks[0], inputs.like)
    return recurrent()


def aside(serve: Serve, why: str, *asked: Any) -> tuple[Tensor, Tensor]:
    """``serve(*asked)`` in eager mode; where the whole function must be one graph, that is an error
    that says why."""
    torch._dynamo.graph_break(msg=why)
    y, out = torch.compiler.disable(serve)(*asked)
    return y, out


# The module in question and its inputs. As an argument it would be guarded by its identity: a graph
# for each.
_noted: list[Any] = []


def _noting(mlp: nn.Module, first: Tensor, last: Tensor) -> None:
    from torch._dynamo.comptime import comptime

    comptime(_note)


def _note(compiling: Any) -> None:
    mlp = compiling.get_local("mlp")._i_will_not_complain_if_bc_breaks_VariableTracker()
    inputs = [compiling.get_local(name).as_fake() for name in ("first", "last")]
    _noted[:] = [getattr(mlp.realize(), "value", None), *inputs]


def _like(fake: Tensor) -> Tensor:
    """A tensor for a trial, of the sizes that this graph was asked for with."""
    shape: list[Any] = list(fake.shape)
    hints = [n if type(n) is int else n.node.hint for n in shape]
    sizes = [2 if n is None else int(n) for n in hints]
    return torch.empty(sizes, dtype=fake.dtype, device=fake.device)


@contextmanager
def _rehearsing(
    training: tuple[bool, ...], blocks: int
) -> Iterator[tuple[nn.Module | None, tuple[Tensor, ...]]]:
    """What was noted, the module's parts in training or not as the compiler has them, which may be
    in the midst of a change; None where it has another module."""
    mlp, *like = _noted
    _noted.clear()
    found = list(parts(mlp)) if isinstance(mlp, nn.Module) else []
    before = [m.training for m in found]
    try:
        for m, flag in zip(found, training, strict=False):
            m.training = flag
        with temporarily_clear_interpreter_stack():  # of functorch, whose transform may be traced
            yield mlp if len(found) == len(training) else None, tuple(map(_like, like[-blocks:]))
    finally:
        for m, flag in zip(found, before, strict=True):
            m.training = flag


def recurrent() -> str:
    found = parts(_noted[0]) if isinstance(_noted[0], nn.Module) else {}
    if torch._dynamo.config.allow_rnn or not any(isinstance(m, nn.RNNBase) for m in found):
        return ""
    return BROKEN.format("it has an RNN, GRU or LSTM")


def rehearsed(training: tuple[bool, ...], blocks: int, fusing: bool) -> tuple[str, ...] | str:
    if not _noted:  # the compiler gave up between the note and this
        return BROKEN.format("it cannot be looked at")
    with _rehearsing(training, blocks) as (mlp, x):
        if mlp is None:
            return ""
        if fusing:
            # A forward that changes what was there before it (an attribute, a list) is not handed
            # over.
            numbers = _numbers_of(mlp)
            if not _trial(partial(_handed_over, numbers), mlp, x):
                readable = not isinstance(read(mlp, check_inputs(*x), rehearsal=True), str)
                return numbers if readable else ""
        return _trial(_with_slopes, mlp, x)


# What torch.compiler.assume_constant_result does, without importing the compiler for it (1 s).
recurrent._dynamo_marked_constant = True  # type: ignore[attr-defined]
rehearsed._dynamo_marked_constant = True  # type: ignore[attr-defined]


BROKEN = (
    "mlp: the compiler cannot trace its forward as one graph ({}); expected the call outside of "
    "the compiled function"
)


class _Enough(Exception):  # noqa: N818  # it ends a trial that went well
    pass


def _enough(graph: fx.GraphModule, inputs: Any) -> Any:
    for part in graph.modules():
        if isinstance(part, fx.GraphModule) and any(
            str(node.target) == "autograd_function_apply" for node in part.graph.nodes
        ):
            raise ValueError(
                "mlp: it has an autograd.Function, whose backward torch.compile does not "
                "differentiate; expected the call outside of the compiled function"
            )
    raise _Enough


def _trial(function: Callable[..., Tensor], mlp: nn.Module, blocks: tuple[Tensor, ...]) -> str:
    """What keeps the compiler from tracing the function as one graph, or "". Runs nothing."""
    blocks = (*blocks[:-1], blocks[-1].clone().requires_grad_())  # as the slopes want it
    try:
        with torch.enable_grad():
            torch.compile(function, backend=_enough, fullgraph=True)(mlp, blocks)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, _Enough):
            return ""
        if isinstance(cause, ValueError):
            return str(cause)
        said = str(error).strip().partition("\n")[0]
        return BROKEN.format(said)
    return ""


def _numbers_of(mlp: nn.Module) -> tuple[str, ...]:
    """The names by which the modules of ``mlp`` hold numbers that the compiler may make symbolic:
    eps, p and the like."""
    held = {name for m in parts(mlp) for name, v in vars(m).items() if type(v) is float}
    return tuple(sorted(held))


def _meet(mlp: nn.Module, numbers: tuple[str, ...]) -> None:
    """Has the compiler meet these numbers. One that it meets within a forward that is handed over
    for the first time PyTorch does not know again outside of it."""
    for m in parts(mlp):
        for name in numbers:
            number = getattr(m, name, None)
            if isinstance(number, float):
                _ = number + 0.0


def _handed_over(numbers: tuple[str, ...], mlp: nn.Module, blocks: tuple[Tensor, ...]) -> Tensor:
    """Twice, for there may be numbers elsewhere than in modules."""
    _meet(mlp, numbers)
    hand_over = torch.ops.higher_order.dynamo_bypassing_wrapper
    first: Tensor = hand_over(_as_it_is, _plain, mlp, blocks)
    second: Tensor = hand_over(_as_it_is, _plain, mlp, blocks)
    return first + second


def _as_it_is(body: Any) -> Any:
    return body


def _plain(mlp: nn.Module, blocks: tuple[Tensor, ...]) -> Tensor:
    y: Tensor = mlp(_OPENED(blocks))
    return y


def _with_slopes(mlp: nn.Module, blocks: tuple[Tensor, ...]) -> Tensor:
    return general.by_operators(mlp, check_inputs(*blocks), running=False)[1]


# --- handing over ---------------------------------------------------------------------------------


def call(
    serve: Serve, mlp: nn.Module, inputs: Inputs, weight: Tensor | float | None, *asked: Any
) -> tuple[Tensor, Tensor]:
    """``serve(mlp, inputs, weight, *asked)``, of which the compiler traces nothing but the forward
    of ``mlp``."""
    if isinstance(weight, (int, float)):  # which may be symbolic
        weight = check_weight(weight, inputs.like, 1, 1)
    y, out = torch.ops.higher_order.dynamo_bypassing_wrapper(
        partial(_replayed, serve), _body, mlp, inputs, weight, *asked
    )
    return y, out


def lift(
    serve: Lift, mlp: nn.Module, inputs: Inputs, lower: tuple[float, ...],
    upper: tuple[float, ...], direction: tuple[tuple[int, ...], ...], margin: float, parts: int,
) -> Tensor:  # fmt: skip
    """``serve`` of all that follows it, of which the compiler traces the forward of ``mlp``."""
    asked = lower, upper, direction, margin, parts
    y: Tensor = torch.ops.higher_order.dynamo_bypassing_wrapper(
        partial(_replayed_lift, serve), _lift_body, mlp, inputs, *asked
    )
    return y


# --- what the compiler traces ---------------------------------------------------------------------


def _body(
    mlp: nn.Module, inputs: Inputs, weight: Tensor | None, signs: Direction, hinge: Hinge | None,
    mode: str, backend: str, batch_stats: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = inputs.like
    y = mlp(_OPENED(inputs.blocks))
    D = y.shape[-1] if y.dim() == x.dim() else 1
    signs.for_network(D)
    weight = check_weight(weight, x, D, inputs.k)
    _, margin, squared, elementwise = hinge or Hinge()
    return y, _CLOSED(
        y, x, weight, inputs.columns, signs.flat, signs.shape, hinge is not None,
        margin if isinstance(margin, tuple) else (margin,), squared, elementwise, mode, backend,
        batch_stats,
    )  # fmt: skip


def _lift_body(
    mlp: nn.Module, inputs: Inputs, lower: tuple[float, ...], upper: tuple[float, ...],
    direction: tuple[tuple[int, ...], ...], margin: float, parts: int,
) -> Tensor:  # fmt: skip
    y = mlp(_OPENED(inputs.blocks))
    signs = [sign for row in direction for sign in row]
    lifted: Tensor = _LIFTED(y, lower, upper, signs, margin, parts)
    return lifted


# --- what is run in its place ---------------------------------------------------------------------
# Of the graph, or of the module itself, where the compiler gave up before it and goes on in Python.


def _replayed(serve: Serve, body: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return partial(_replay, serve, body) if isinstance(body, fx.GraphModule) else serve


def _replayed_lift(serve: Lift, body: Any) -> Callable[..., Any]:
    return partial(_replay_lift, serve, body) if isinstance(body, fx.GraphModule) else serve


def _replay(serve: Serve, graph: fx.GraphModule, *operands: Any) -> tuple[Tensor, Tensor]:
    """The call that was captured, of the network as the graph has it."""
    inputs, asked = _asked(graph, operands, _CLOSED)
    weight, columns, direction, shape, penalised, margin, squared, elementwise, *who = asked[1:]
    signs = Direction(tuple(direction), tuple(shape))
    own = float(margin[0]) if len(margin) == 1 else tuple(map(float, margin))
    hinge = Hinge(signs.flat, own, squared, elementwise) if penalised else None
    inputs = inputs._replace(columns=tuple(columns))
    return serve(Captured(graph, operands), inputs, weight, signs, hinge, *who)


def _replay_lift(serve: Lift, graph: fx.GraphModule, *operands: Any) -> tuple[Tensor]:
    """What a graph returns is a tuple."""
    inputs, (lower, upper, signs, margin, parts) = _asked(graph, operands, _LIFTED)
    d = len(lower)
    direction = tuple([tuple(signs[i : i + d]) for i in range(0, len(signs), d)])
    box = tuple(map(float, lower)), tuple(map(float, upper))
    return (serve(Captured(graph, operands), inputs, *box, direction, float(margin), parts),)


def _asked(graph: fx.GraphModule, operands: Any, end: Any) -> tuple[Inputs, Any]:
    """What the network is called with, and what the operator at the end is told beside y."""
    given = dict(zip(graph.graph.find_nodes(op="placeholder"), operands, strict=True))
    run = _Run(graph, None)

    def value(node: fx.Node) -> Any:
        """What goes in, or a number made of it; the network has no part in either."""
        if node not in given:
            given[node] = getattr(run, node.op)(node.target, fx.map_arg(node.args, value), {})
        return given[node]

    (opened,) = graph.graph.find_nodes(op="call_function", target=_OPENED)
    (closed,) = graph.graph.find_nodes(op="call_function", target=end)
    (blocks,) = fx.map_arg(opened.args, value)
    return check_inputs(*blocks), fx.map_arg(closed.args[1:], value)


class Captured(nn.Module):
    """The forward that the compiler wrote down, with the operands of one call: those of the network
    (parameters, buffers, sizes) in the order of the graph's placeholders."""

    def __init__(self, graph: fx.GraphModule, operands: tuple[Any, ...]) -> None:
        super().__init__()
        self.captured = graph, operands  # in a tuple, so that nothing is taken for a part of it

    def forward(self, x: Any) -> Any:
        graph, operands = self.captured
        run: Any = _Run(graph, x)
        return run.run(*operands)[0]


class _Run(fx.Interpreter):
    """One run of the graph for the input x, a tensor or a ``Value``, up to y."""

    def __init__(self, graph: fx.GraphModule, x: Any) -> None:
        super().__init__(graph)
        self.x = x

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _OPENED:
            return self.x
        if target is _LIFTED:
            return args[0]
        return None if target is _CLOSED else super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Numbers that the compiler keeps symbolic become what they are, which it guards: a node of
        a program has its numbers."""
        found = super().run_node(n)
        return float(found) if type(found) is SymFloat else found
