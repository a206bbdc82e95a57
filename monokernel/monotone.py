"""Networks that are monotone by construction: a linear term on top of a bound from the weights."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from . import capture, dropout, network, reading
from .arguments import (
    Inputs,
    check_box,
    check_direction,
    check_inputs,
    check_module,
    check_names,
    check_number,
    is_mapping,
)
from .backends import reference
from .boundary import operand_dtype, traced, transformed
from .intervals import ENDS, Interval, jacobian, without_range
from .layers import width_of
from .operands import PLAIN
from .problem import accumulate_dtype
from .program import Node
from .symbols import Key, Param

if TYPE_CHECKING:
    from .backends import cpu

__all__ = ["Monotone"]

TO_EXPORT = (
    "Monotone: expected its frozen() to be exported or traced, got the module that bounds its "
    "weights anew in every call"
)


Boxes = list[tuple[tuple[float, ...], tuple[float, ...]]]  # (lower, upper) of each
Signs = Sequence[Sequence[int]]  # (D, d)


class Constants(NamedTuple):
    """What a forward needs besides weights, in one dtype on one device."""

    box: Interval  # ends (B, d) of the parts of the box
    sign: Tensor  # (D, k)
    place: Tensor  # (k, d), which columns of x the k are
    middle: Tensor  # (d,)


class Program(NamedTuple):
    """The nodes of a network, their parameters in the dtype in which it is bounded, and whether the
    native library may take these."""

    nodes: tuple[Node, ...]
    params: Sequence[Param]
    dtype: torch.dtype
    exact: bool


class Monotone(nn.Module):
    """A network that is monotone on a box whatever its weights are: at every step of its training.

    ``y = mlp(x) + Σ_c s_c · relu(margin - b_c) · (x_c - m_c)`` with s the direction, m the middle
    of the box (0 where that is infinite) and b_c a lower bound of ``s_c · ∂mlp/∂x_c`` over the
    whole box. The bound is computed from the weights, once a call, and differentiated through, so
    that the network learns to need little of the linear term. A constant added to one slope moves
    no other, so every output rises (or falls) in every constrained column everywhere in the box.

    On the CPU the native kernels compute y, ``mlp`` and term in one, where they serve the network:
    the same but for rounding, under autocast of the weights as they are, in float32. Second
    derivatives are PyTorch's.

    The bound is rigorous, rounding included, for the weights as they are stored and exact
    arithmetic; a forward in floating point rounds as any network's does. Outside of the box nothing
    is promised. Weights that are NaN or infinite make y NaN or infinite.

    Args:
        mlp: the network, called as ``mlp(x)`` with x (..., d), output (..., D); afterwards
            ``.mlp``. Every operation in it must be a row-wise node of which the range over an
            interval is known: linear layers, the element-wise activations, PReLU, dropout, scales
            and shifts, sums, products, concatenations, LayerNorm, RMSNorm, softmax.
        lower, upper: the box, in the units of x: numbers, (d,) sequences or tensors, which are read
            to the host, or mappings from every column to its number (a dict, a Series). -inf and
            inf are allowed.
        direction: for each column of x +1 (no output decreases in it), -1 (none increases) or 0
            (free): (d,), or (D, d) with signs of each output's own; or a mapping from columns to
            signs, 0 for what it does not name.
        columns: the names of the d columns, by which a mapping names them.
        margin: the least slope, in its direction.
        parts: into how many parts the box is cut along the constrained columns for a tighter
            bound, at the price of one more row each.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came;
            also where some slope of the network has no finite bound on the box.
    """

    def __init__(
        self,
        mlp: nn.Module,
        lower: Any,
        upper: Any,
        *,
        direction: Any,
        columns: Any = None,
        margin: float = 0.0,
        parts: int = 1,
    ) -> None:
        super().__init__()
        check_module(mlp)
        check_number("margin", margin)
        if not math.isfinite(margin):
            raise ValueError(f"margin: expected a finite number, got {margin}")
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
            raise ValueError(f"parts: expected a number of parts >= 1, got {parts!r}")
        self.mlp = mlp
        self.margin, self.parts = float(margin), parts
        d = _columns(mlp, direction, columns, lower, upper)
        self.names = check_names(columns, d)
        signs = check_direction(direction, d, self.names, "d")
        if not signs.shape:
            raise ValueError("direction: expected (d,) or (D, d) signs, got a single number")
        self.lower, self.upper = check_box(lower, upper, d, self.names)
        self._constants: dict[tuple[torch.dtype, torch.device], Constants] = {}
        # What serves a program on operands of a dtype in the native library, where it does.
        self._lifts: dict[tuple[tuple[Node, ...], torch.dtype, float], cpu.Lift | None] = {}
        # In training or not, in a dtype, under autocast or not: whether a forward of one's own is
        # served in one.
        self._readable: dict[tuple[bool, torch.dtype, bool], bool] = {}
        x = torch.zeros(2, d, **_like(mlp))
        with _left_alone(mlp, x.device):
            D = self._outputs(x)
        flat = signs.for_network(D)
        rows = [flat[i : i + d] for i in range(0, len(flat), d)]
        self.direction = tuple(rows * D if len(rows) == 1 else rows)
        self.columns = _constrained(self.direction)
        self._boxes = cut(self.lower, self.upper, self.columns, self.parts)
        with _left_alone(mlp, x.device):
            self._check_bounded(x)

    def _outputs(self, x: Tensor) -> int:
        """D. A forward of one's own without numbers is not read before it has some."""
        mlp = network.unwrap(self.mlp)
        if not _without_numbers(x) or isinstance(network.read(mlp), network.Chain):
            return self._program().nodes[-1].width
        y = mlp(x)
        return int(y.shape[-1]) if y.dim() == x.dim() else 1

    def forward(self, x: Tensor) -> Tensor:
        """y (..., D), or as ``mlp`` squeezes it, for x (..., d)."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if not self.columns:
            return self.mlp(x)  # type: ignore[no-any-return]
        if torch._C._get_tracing_state() is not None:
            raise ValueError(TO_EXPORT)
        if x.shape[-1:] != (len(self.lower),):
            raise ValueError(f"x: expected shape (..., {len(self.lower)}), got {tuple(x.shape)}")
        if torch.compiler.is_dynamo_compiling():
            mlp = network.unwrap(self.mlp)
            inputs = check_inputs(x)
            if network.with_hooks(mlp) is None and _handed_over(mlp, inputs):
                asked = self.lower, self.upper, self.direction, self.margin, self.parts
                return capture.lift(_served, mlp, inputs, *asked)
        if _without_numbers(x):
            return self.mlp(x)  # type: ignore[no-any-return]
        native = self._in_one(x)
        if native is not None:
            return native
        with _computed_once(network.unwrap(self.mlp)):
            with _full_precision(x.device.type):
                # Before the network runs, which may draw numbers: the bound is of what it draws.
                W, b = self._linear_term(x)
                term = F.linear(x if x.dtype == W.dtype else x.to(W.dtype), W, b)
            y: Tensor = self.mlp(x)
        if y.dim() < x.dim():
            term = term.squeeze(-1)
        return y + (term if term.dtype == y.dtype else term.to(y.dtype))

    @property
    def bound(self) -> Tensor:
        """(D, d): the lower bound of ``direction · ∂mlp/∂x`` over the box, NaN where free."""
        x = self._example()
        _check_weights(self.mlp)
        with _full_precision(x.device.type), _left_alone(self.mlp, x.device):
            return self._spread(self._bound(x), math.nan)

    @property
    def lift(self) -> Tensor:
        """(D, d): the slope that the linear term adds in the direction of each output and column,
        0 where free. What the guarantee costs: 0 everywhere if the network needs none of it."""
        x = self._example()
        _check_weights(self.mlp)
        with _full_precision(x.device.type), _left_alone(self.mlp, x.device):
            bound = self._bound(x)
            own = self._constants_for(bound.dtype, bound.device)
            return self._spread(_lifted(bound, own, self.margin), 0.0)

    def frozen(self) -> nn.Module:
        """The network to deploy: a copy of ``mlp`` in evaluation mode and one linear layer with
        constants, rounded such that the promise holds for them. An ordinary module, with nothing of
        this package left in it."""
        x = self._example()
        _check_weights(self.mlp)
        mlp = copy.deepcopy(network.unwrap(self.mlp)).eval()
        own = Monotone.__new__(Monotone)  # whatever FSDP made of the class
        own.__dict__.update(self.__dict__, _modules={"mlp": mlp}, training=False)
        with torch.no_grad(), _full_precision(x.device.type):
            W, b = own._linear_term(x)
        W, b = _away_from_zero(W, x.dtype), b.to(x.dtype)
        if not (W.isfinite().all() and b.isfinite().all()):
            raise ValueError("mlp: expected weights with a finite bound on the box, got none")
        return Lifted(mlp, W, b)

    def extra_repr(self) -> str:
        names = "" if self.names is None else f", columns={self.names}"
        return f"direction={self.direction}{names}, margin={self.margin}, parts={self.parts}"

    def _linear_term(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its weight (D, d) and its bias (D,)."""
        bound = self._bound(x)
        return _line(bound, self._constants_for(bound.dtype, bound.device), self.margin)

    def _in_one(self, x: Tensor) -> Tensor | None:
        """y by the native kernels, network, bound and linear term in one, where they serve it."""
        if (
            not self.columns
            or not _is_plain(x)
            or x.dtype not in NATIVE
            or x.shape[-1:] != (len(self.lower),)
        ):
            return None
        mlp, inputs = network.unwrap(self.mlp), check_inputs(x)
        # Under autocast of the weights as they are, which to round would only lose digits.
        dtype = accumulate_dtype(operand_dtype(x)) if inputs.autocast else x.dtype
        found = self._readable_in_one(mlp, inputs, dtype)
        lift = None if found is None else self._lift(found.nodes, dtype)
        if found is None or lift is None:
            return None
        with _full_precision("cpu"):
            rows, params = found.operands(x)
            if inputs.autocast:
                if any(p is not None and p.dtype.itemsize > dtype.itemsize for p in params):
                    return None  # which PyTorch does not multiply with rows of float32
                rows, params = rows.to(dtype), [None if p is None else p.to(dtype) for p in params]
            y, _ = lift(rows, params)
        if x.dim() != 2:
            y = y.reshape(*x.shape[:-1], y.shape[-1])
        if inputs.autocast:
            y = y.to(_output_dtype(found, x))
        return y.squeeze(-1) if found.squeezed else y

    def _readable_in_one(
        self, mlp: nn.Module, inputs: Inputs, dtype: torch.dtype
    ) -> network.Chain | reading.Reading | None:
        """The network as it is in this call, where the library may take its parameters as exact in
        this dtype.

        The reading of a forward of one's own is its one run. So whether it leads anywhere is tried
        first, without a trace, and not again.
        """
        key = mlp.training, dtype, inputs.autocast
        served = self._readable.get(key)
        if not served:
            chain = network.read(mlp)
            if isinstance(chain, network.Chain):
                return chain if chain.widths[0] == len(self.lower) else None
        if served is None:
            tried = reading.read(mlp, inputs, rehearsal=True, fold=False)
            served = self._readable[key] = (
                not isinstance(tried, str)
                and _exact(mlp, tried, dtype)
                and self._lift(tried.nodes, dtype) is not None
            )
        if not served:
            return None
        found = reading.read(mlp, inputs, fold=False)
        return None if isinstance(found, str) or not _exact(mlp, found, dtype) else found

    def _lift(self, nodes: tuple[Node, ...], dtype: torch.dtype) -> cpu.Lift | None:
        """What serves such a program, on plain operands of a dtype, in the native library."""
        self._check_outputs(nodes)
        key = nodes, dtype, self.margin
        try:
            return self._lifts[key]
        except KeyError:
            from .backends import cpu  # the library is opened when it is first of use
        if len(self._lifts) == MOST_LIFTS:
            self._lifts.clear()  # a forward with a number that moves makes one after another
        own = self._constants_for(accumulate_dtype(dtype), torch.device("cpu"))
        lift = self._lifts[key] = cpu.lift(
            len(self.lower),
            nodes,
            dtype,
            self._boxes,
            self.columns,
            [[row[c] for c in self.columns] for row in self.direction],
            [_middle(self.lower[c], self.upper[c]) for c in self.columns],
            self.margin,
            partial(_by_pytorch, nodes, own, self.columns, self.margin),
        )
        return lift

    def _check_outputs(self, nodes: tuple[Node, ...]) -> None:
        """The network may have been changed since."""
        if nodes[-1].width != len(self.direction):
            raise ValueError(
                f"mlp: expected {len(self.direction)} outputs, as many as it had at the start, got "
                f"{nodes[-1].width}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # What is native stays in its process.
        return self.__dict__ | {"_constants": {}, "_lifts": {}, "_readable": {}}

    def _bound(self, x: Tensor) -> Tensor:
        """(D, k), over all parts of the box."""
        nodes, params, dtype, exact = self._program()
        lift = self._lift(nodes, dtype) if exact and _is_plain(x) else None
        if lift is not None:
            rows = x.new_empty(0, len(self.lower), dtype=dtype)
            return lift(rows, params)[1]  # type: ignore[arg-type]  # there is no Key
        self._check_outputs(nodes)
        return _bound(nodes, params, self._constants_for(dtype, x.device), self.columns)

    def _program(self) -> Program:
        """What ``mlp`` is. Raises where its ranges are not known."""
        mlp = network.unwrap(self.mlp)
        d = len(self.lower)
        chain = network.read(mlp)
        if isinstance(chain, network.Chain):
            if chain.widths[0] != d:
                raise ValueError(
                    f"direction: expected (..., {chain.widths[0]}) signs, one for each input of "
                    f"mlp's first layer, got {d}"
                )
            first = chain.linears[0]._parameters.get("weight")  # None where it is parametrized
            like: Tensor = torch.empty(0, **_like(mlp)) if first is None else first
            nodes = chain.nodes
            params: Sequence[Param] = chain.parameters(like)
            exact = True
        else:
            found: reading.Reading | str = chain.sentence(mlp)
            like = torch.zeros(2, d, **_like(mlp))
            coupled, part = network.batch_coupling(mlp), network.sharded(mlp)
            if coupled:
                found = f"{coupled} normalises with the statistics of the batch"
            elif part:
                raise ValueError(
                    f"mlp: expected fully_shard around the Monotone as a whole, got {part}"
                )
            elif torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
                raise ValueError(TO_EXPORT)
            elif not torch.compiler.is_compiling():
                found = reading.read(mlp, check_inputs(like), rehearsal=True, fold=False)
            if isinstance(found, str):
                raise ValueError(f"mlp: expected nodes of which a range is known, got {found}")
            # A dropout's bound holds for every mask, so any key will do.
            key = like.new_zeros(dropout.KEY)
            nodes, params = found.nodes, [key if type(p) is Key else p for p in found.params]
            exact = _exact(mlp, found, like.dtype)
            kind = without_range(nodes)
            if kind:
                raise ValueError(f"mlp: expected nodes of which a range is known, got a {kind}")
        dtype = accumulate_dtype(like.dtype)
        if dtype != like.dtype:
            params = [p.to(dtype) if isinstance(p, Tensor) else p for p in params]
        return Program(nodes, params, dtype, exact)

    def _check_bounded(self, x: Tensor) -> None:
        """A network with sound weights and no bound is one that this box does not fit."""
        params = list(self.mlp.parameters())
        if any(p.is_meta or isinstance(p, FakeTensor) for p in params):
            return
        with torch.no_grad():
            if not all(p.isfinite().all() for p in params):
                return
        with torch.no_grad(), _full_precision(x.device.type):
            bound = self._bound(x)
            own = self._constants_for(bound.dtype, bound.device)
        bad = (~bound.isfinite() & (own.sign != 0)).nonzero().tolist()
        if bad:
            i, c = bad[0]
            raise ValueError(
                "mlp: expected slopes that are bounded on the box, got no finite bound for output "
                f"{i} and column {self.columns[c]}"
            )

    def _example(self) -> Tensor:
        return torch.zeros(2, len(self.lower), **_like(self.mlp))

    def _spread(self, t: Tensor, free: float) -> Tensor:
        """(D, k) to (D, d)."""
        own = self._constants_for(t.dtype, t.device)
        t = t.masked_fill(own.sign == 0, free)
        full = t.new_full((t.shape[0], len(self.lower)), free)
        columns = torch.tensor(self.columns, dtype=torch.int64, device=t.device)
        return full.index_copy(1, columns, t)

    def _constants_for(self, dtype: torch.dtype, device: torch.device) -> Constants:
        found = self._constants.get((dtype, device))
        if found is not None:
            return found
        if traced():
            return self._made_for(dtype, device)
        with torch.inference_mode(False):  # a later call may want gradients
            made = self._constants[dtype, device] = self._made_for(dtype, device)
        return made

    def _made_for(self, dtype: torch.dtype, device: torch.device) -> Constants:
        box = self.lower, self.upper, self._boxes
        return _constants(*box, self.direction, self.columns, dtype, device)


# --- the arithmetic -------------------------------------------------------------------------------


def _constants(
    lower: Sequence[float], upper: Sequence[float], boxes: Boxes, direction: Signs,
    columns: Sequence[int], dtype: torch.dtype, device: torch.device,
) -> Constants:  # fmt: skip
    d, k = len(lower), len(columns)
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    low, high = (_tensor([box[end] for box in boxes], end, **like) for end in (0, 1))
    place = torch.zeros(k, d, **like)
    for i, c in enumerate(columns):
        place[i, c] = 1
    finite = all(map(math.isfinite, (*lower, *upper)))
    sign = torch.tensor([[row[c] for c in columns] for row in direction], **like)
    middle = torch.tensor([_middle(l, u) for l, u in zip(lower, upper, strict=True)], **like)
    return Constants(Interval(low, high, finite), sign, place, middle)


def _bound(
    nodes: tuple[Node, ...], params: Sequence[Param], own: Constants, columns: Sequence[int]
) -> Tensor:
    """(D, k), over all parts of the box."""
    lower, upper, _ = jacobian(nodes, params, own.box, columns)
    return torch.where(own.sign > 0, lower, -upper).amin(0)


def _lifted(bound: Tensor, own: Constants, margin: float) -> Tensor:
    """relu(margin - bound) (D, k), rounded up; 0 where free."""
    ε = 4 * torch.finfo(bound.dtype).eps
    lift = torch.relu((margin + ε * abs(margin)) - bound) * (1 + ε)
    return lift.masked_fill(own.sign == 0, 0.0)


def _line(bound: Tensor, own: Constants, margin: float) -> tuple[Tensor, Tensor]:
    """The linear term: its weight (D, d) and its bias (D,)."""
    W = (own.sign * _lifted(bound, own, margin)) @ own.place
    return W, -(W @ own.middle)


def _by_pytorch(
    nodes: tuple[Node, ...], own: Constants, columns: Sequence[int], margin: float,
    x: Tensor, params: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (N, D) of a program over x (N, d), with the linear term, and the bound (D, k)."""
    y = reference.value(nodes, x, params)
    wide = own.sign.dtype
    bound = _bound(nodes, [None if p is None else p.to(wide) for p in params], own, columns)
    term = F.linear(x.to(wide), *_line(bound, own, margin))
    return y + term.to(y.dtype), bound


def _handed_over(mlp: nn.Module, inputs: Inputs) -> bool:
    """Whether the compiler can hand over what it writes down of the forward, to be read."""
    return isinstance(capture.way(mlp, inputs, fusing=True), tuple)


def _served(
    mlp: nn.Module, inputs: Inputs, lower: tuple[float, ...], upper: tuple[float, ...],
    direction: Signs, margin: float, parts: int,
) -> Tensor:  # fmt: skip
    """``Monotone.forward`` of a forward that the compiler wrote down, once: network and bound have
    the same weights, also those that the forward computes."""
    if not isinstance(mlp, capture.Captured):  # it gave up, and goes on in Python
        model = Monotone(mlp, lower, upper, direction=direction, margin=margin, parts=parts)
        return model.forward(inputs.joined())
    found = reading.read(mlp, inputs, fold=False)
    kind = found if isinstance(found, str) else without_range(found.nodes)
    if isinstance(found, str) or kind:
        raise ValueError(f"mlp: expected nodes of which a range is known, got {kind}")
    x, columns = inputs.joined(), _constrained(direction)
    dtype = accumulate_dtype(operand_dtype(x)) if inputs.autocast else x.dtype
    boxes = cut(lower, upper, columns, parts)
    own = _constants(lower, upper, boxes, direction, columns, accumulate_dtype(dtype), x.device)
    with _full_precision(x.device.type):
        rows, params = found.operands(x)
        rows, params = rows.to(dtype), [None if p is None else p.to(dtype) for p in params]
        y, _ = _by_pytorch(found.nodes, own, columns, margin, rows, params)
    y = y.reshape(*inputs.batch, y.shape[-1]).to(_output_dtype(found, x))
    return y.squeeze(-1) if found.squeezed else y


class Lifted(nn.Module):
    """``mlp(x)`` and a linear term: what ``Monotone.frozen`` deploys."""

    def __init__(self, mlp: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.mlp = mlp
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.linear.weight, self.linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """y (..., D), or as ``mlp`` squeezes it, for x (..., d)."""
        y: Tensor = self.mlp(x)
        term: Tensor = self.linear(x).to(y.dtype)
        return y + (term.squeeze(-1) if y.dim() < x.dim() else term)


def cut(
    lower: Sequence[float], upper: Sequence[float], columns: Sequence[int], parts: int
) -> Boxes:
    """The box as at most ``parts`` boxes (lower, upper), cut along these columns in turn, but for
    those that are infinite or have no extent."""
    counts = {c: 1 for c in columns if 0 < upper[c] - lower[c] < math.inf}
    while counts:
        c = min(counts, key=lambda c: counts[c])
        if math.prod(counts.values()) // counts[c] * (counts[c] + 1) > parts:
            break
        counts[c] += 1
    edges = []
    for c, (l, u) in enumerate(zip(lower, upper, strict=True)):
        n = counts.get(c, 1)
        inner = [l + (u - l) * i / n for i in range(1, n)]
        edges.append(list(itertools.pairwise([l, *inner, u])))
    return [
        (tuple(l for l, _ in box), tuple(u for _, u in box)) for box in itertools.product(*edges)
    ]


MOST_LIFTS = 64
NATIVE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_plain(x: Tensor) -> bool:
    """Whether x has memory that a native kernel may be called with: nothing looks on."""
    dense = type(x) in PLAIN and x.layout is torch.strided
    return dense and x.device.type == "cpu" and not transformed() and not traced()


def _constrained(direction: Signs) -> tuple[int, ...]:
    """The columns in which some output has a sign."""
    return tuple(c for c in range(len(direction[0])) if any(row[c] for row in direction))


def _without_numbers(x: Tensor) -> bool:
    return type(x) in PLAIN and x.is_meta


def _check_weights(mlp: nn.Module) -> None:
    for p in mlp.parameters():
        if p.is_meta:
            raise ValueError("mlp: expected weights with numbers, got some on the meta device")
        if type(p) not in PLAIN:
            raise ValueError(
                f"mlp: expected weights in one piece, as FSDP's unshard() makes them, got a "
                f"{type(p).__name__}"
            )


def _computes_weights(mlp: nn.Module) -> bool:
    """Whether it is a chain with parametrized weights: to compute them may change them (the power
    iteration of spectral_norm). A forward of one's own is rehearsed for its bound, and leaves no
    trace of that."""
    chain = network.read(mlp)
    return isinstance(chain, network.Chain) and any(
        not {"weight", "bias"} <= linear._parameters.keys() for linear in chain.linears
    )


def _computed_once(mlp: nn.Module) -> Any:
    """Bound and network are to have the same weights."""
    return parametrize.cached() if _computes_weights(mlp) else nullcontext()


@contextmanager
def _left_alone(mlp: nn.Module, device: torch.device) -> Iterator[None]:
    """Who only asks changes nothing."""
    mlp = network.unwrap(mlp)
    if not _computes_weights(mlp):
        yield
        return
    with reading.State(list(mlp.modules()), device) as state:
        try:
            yield
        finally:
            state.restore()


def _output_dtype(found: network.Chain | reading.Reading, x: Tensor) -> torch.dtype:
    """That of y, autocast's where it is on."""
    rounds = not isinstance(found, reading.Reading) or found.rounded is not False
    return operand_dtype(x) if rounds else x.dtype


def _exact(mlp: nn.Module, found: network.Chain | reading.Reading, dtype: torch.dtype) -> bool:
    """Whether the native bound may take the parameters as exact. Those that a forward computes of
    what is stored (the scale and shift of a BatchNorm) are rounded to their dtype, for which, in
    float32, only the rounding terms of ``intervals.py`` have room."""
    if isinstance(found, network.Chain) or dtype == torch.float64:
        return True
    others = [p for p in found.params if type(p) is not nn.Parameter and isinstance(p, Tensor)]
    bases = [p if p._base is None else p._base for p in others]
    others = [p for p in bases if type(p) is not nn.Parameter]
    stored = {id(b) for b in mlp.buffers()} if others else set()
    return all(id(p) in stored for p in others)


def _middle(lower: float, upper: float) -> float:
    middle = 0.5 * lower + 0.5 * upper
    return middle if math.isfinite(middle) else 0.0


def _tensor(rows: Any, end: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Lower (``end`` 0) or upper ends, rounded outwards."""
    exact = torch.tensor(rows, dtype=torch.float64)
    t = exact.to(dtype)
    inwards = t.double() < exact if end else t.double() > exact
    t = torch.where(inwards, torch.nextafter(t, torch.full_like(t, ENDS[end])), t)
    return t.to(device)


def _away_from_zero(W: Tensor, dtype: torch.dtype) -> Tensor:
    """W in a dtype that may be shorter; no number becomes smaller."""
    t = W.to(dtype)
    ends = torch.full_like(t, math.inf).copysign(t)
    return torch.where(t.to(W.dtype).abs() < W.abs(), torch.nextafter(t, ends), t)


def _columns(mlp: nn.Module, direction: Any, names: Any, lower: Any, upper: Any) -> int:
    """How many columns it speaks of; a mapping leaves that to their names, to the box, or to the
    network."""
    if is_mapping(direction):
        sized = [given for given in (names, lower, upper) if hasattr(given, "__len__")]
        d = len(sized[0]) if sized else width_of(network.unwrap(mlp))
        if d is None:
            raise ValueError(
                "columns: expected the names of all columns to go with a direction by columns, got "
                "none"
            )
        return d
    try:
        shape = direction.shape if isinstance(direction, Tensor) else _shape(direction)
        return int(shape[-1])
    except (TypeError, IndexError):
        return 1


def _shape(direction: Any) -> tuple[int, ...]:
    if isinstance(direction, (int, float)):
        return ()
    return (len(direction), *(_shape(direction[0]) if len(direction) else ()))


def _like(mlp: nn.Module) -> dict[str, Any]:
    """The dtype and the device of its parameters."""
    for p in mlp.parameters():
        if p.dtype.is_floating_point:
            return {"dtype": p.dtype, "device": p.device}
    return {"dtype": torch.get_default_dtype(), "device": torch.device("cpu")}


def _full_precision(device_type: str) -> Any:
    """A bound in half precision would be none."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
