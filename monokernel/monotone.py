"""Networks that are monotone by construction: a linear term on top of a bound from the weights."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import dropout, network, reading
from .arguments import (
    check_box,
    check_direction,
    check_inputs,
    check_module,
    check_names,
    check_number,
    is_mapping,
)
from .function import traced, transformed
from .intervals import ENDS, Interval, jacobian, without_range
from .operands import PLAIN
from .problem import accumulate_dtype
from .program import Node
from .symbols import Key, Param

if TYPE_CHECKING:
    from .backends import cpu

__all__ = ["Monotone"]


class Constants(NamedTuple):
    """What a forward needs besides weights, in one dtype on one device."""

    box: Interval  # ends (B, d) of the parts of the box
    sign: Tensor  # (D, k)
    place: Tensor  # (k, d), which columns of x the k are
    middle: Tensor  # (d,)
    # What serves a program on operands of a dtype in the native library, where it does.
    lifts: dict[tuple[tuple[Node, ...], torch.dtype, float], cpu.Lift | None]


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

    On the CPU the native kernels compute y, ``mlp`` and term in one, where they serve the network
    and x wants no gradient: the same but for rounding, differentiable once.

    The bound is rigorous, rounding included, for the weights as they are stored and exact
    arithmetic; a forward in floating point rounds as any network's does. Outside of the box nothing
    is promised. Weights that are NaN or infinite make y NaN or infinite.

    Args:
        mlp: the network, called as ``mlp(x)`` with x (..., d), output (..., D); afterwards
            ``.mlp``. Every operation in it must be a row-wise node of which the range over an
            interval is known: linear layers, the element-wise activations, PReLU, dropout, scales
            and shifts, sums, products, concatenations, LayerNorm, RMSNorm, softmax. Under
            ``torch.compile``, ``nn.Sequential`` of linear layers and activations.
        lower, upper: the box, in the units of x: numbers, or (d,) sequences or tensors, which are
            read to the host. -inf and inf are allowed.
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
        d = _columns(direction, columns, lower, upper)
        self.names = check_names(columns, d)
        signs = check_direction(direction, d, self.names)
        if not signs.shape:
            raise ValueError("direction: expected (d,) or (D, d) signs, got a single number")
        self.lower, self.upper = check_box(lower, upper, d)
        self._constants: dict[tuple[torch.dtype, torch.device], Constants] = {}
        # In training or not, for x of a dtype: whether a forward of one's own is served in one.
        self._readable: dict[tuple[bool, torch.dtype], bool] = {}
        x = torch.zeros(2, d, **_like(mlp))
        D = self._program().nodes[-1].width
        flat = signs.for_network(D)
        rows = [flat[i : i + d] for i in range(0, len(flat), d)]
        self.direction = tuple(rows * D if len(rows) == 1 else rows)
        self.columns = tuple(c for c in range(d) if any(row[c] for row in self.direction))
        self._boxes = cut(self.lower, self.upper, self.columns, self.parts)
        self._check_bounded(x)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., D), or as ``mlp`` squeezes it, for x (..., d)."""
        native = self._in_one(x)
        if native is not None:
            return native
        if not self.columns:
            return self.mlp(x)  # type: ignore[no-any-return]
        with _full_precision(x.device.type):
            # Before the network runs, which may draw numbers: the bound is of those that it draws.
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
        with _full_precision(x.device.type):
            return self._spread(self._bound(x), math.nan)

    @property
    def lift(self) -> Tensor:
        """(D, d): the slope that the linear term adds in the direction of each output and column,
        0 where free. What the guarantee costs: 0 everywhere if the network needs none of it."""
        x = self._example()
        with _full_precision(x.device.type):
            return self._spread(self._lifted(self._bound(x)), 0.0)

    def frozen(self) -> nn.Module:
        """The network to deploy: a copy of ``mlp`` in evaluation mode and one linear layer with
        constants, rounded such that the promise holds for them. An ordinary module, with nothing of
        this package left in it."""
        mlp = copy.deepcopy(network.unwrap(self.mlp)).eval()
        own = copy.copy(self)
        own._modules = {"mlp": mlp}
        own.training = False
        x = own._example()
        with torch.no_grad(), _full_precision(x.device.type):
            W, b = own._linear_term(x)
        if not (W.isfinite().all() and b.isfinite().all()):
            raise ValueError("mlp: expected weights with a finite bound on the box, got none")
        return Lifted(mlp, W, b)

    def extra_repr(self) -> str:
        names = "" if self.names is None else f", columns={self.names}"
        return f"direction={self.direction}{names}, margin={self.margin}, parts={self.parts}"

    def _linear_term(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its weight (D, d) and its bias (D,)."""
        lift = self._lifted(self._bound(x))
        own = self._constants_for(lift.dtype, lift.device)
        W = (own.sign * lift) @ own.place
        return W, -(W @ own.middle)

    def _in_one(self, x: Tensor) -> Tensor | None:
        """y by the native kernels, network, bound and linear term in one, where they serve these.

        They have no second derivative, which nobody asks for who asks for none of x.
        """
        if (
            not self.columns
            or not _is_plain(x)
            or x.dtype not in NATIVE
            or x.shape[-1:] != (len(self.lower),)
            or (x.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        mlp = network.unwrap(self.mlp)
        chain = network.read(mlp)
        found: network.Chain | reading.Reading
        if isinstance(chain, network.Chain):
            found = chain
            if chain.widths[0] != len(self.lower):
                return None
        else:
            # The reading is the network's one forward. So whether it leads anywhere is tried first,
            # without a trace, and not again.
            key = mlp.training, x.dtype
            if key not in self._readable:
                tried = reading.read(mlp, check_inputs(x), rehearsal=True, fold=False)
                self._readable[key] = (
                    not isinstance(tried, str)
                    and _exact(mlp, tried, x.dtype)
                    and self._lift(tried.nodes, x.dtype) is not None
                )
            read = reading.read(mlp, check_inputs(x), fold=False) if self._readable[key] else ""
            if isinstance(read, str):
                return None
            found = read
        lift = self._lift(found.nodes, x.dtype) if _exact(mlp, found, x.dtype) else None
        if lift is None:
            return None
        y, _ = lift(*found.operands(x))
        if x.dim() != 2:
            y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y.squeeze(-1) if found.squeezed else y

    def _lift(self, nodes: tuple[Node, ...], dtype: torch.dtype) -> cpu.Lift | None:
        """What serves such a program, on plain operands of a dtype, in the native library."""
        from .backends import cpu  # the library is opened when it is first of use

        self._check_outputs(nodes)
        own = self._constants_for(accumulate_dtype(dtype), torch.device("cpu"))
        if not own.box.finite and any(node.kind in NORMS for node in nodes):
            return None  # of an end that is infinite its gradient is not exact
        key = nodes, dtype, self.margin
        if len(own.lifts) == MOST_LIFTS and key not in own.lifts:
            own.lifts.clear()  # a forward with a number that moves makes one after another
        if key not in own.lifts:
            own.lifts[key] = cpu.lift(
                len(self.lower),
                nodes,
                dtype,
                self._boxes,
                self.columns,
                [[row[c] for c in self.columns] for row in self.direction],
                [_middle(self.lower[c], self.upper[c]) for c in self.columns],
                self.margin,
            )
        return own.lifts[key]

    def _check_outputs(self, nodes: tuple[Node, ...]) -> None:
        """The network may have been changed since."""
        if nodes[-1].width != len(self.direction):
            raise ValueError(
                f"mlp: expected {len(self.direction)} outputs, as many as it had at the start, got "
                f"{nodes[-1].width}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # What is native stays in its process.
        return self.__dict__ | {"_constants": {}, "_readable": {}}

    def _lifted(self, bound: Tensor) -> Tensor:
        """relu(margin - bound) (D, k), rounded up; 0 where free."""
        ε = 4 * torch.finfo(bound.dtype).eps
        own = self._constants_for(bound.dtype, bound.device)
        lift = torch.relu((self.margin + ε * abs(self.margin)) - bound) * (1 + ε)
        return lift.masked_fill(own.sign == 0, 0.0)

    def _bound(self, x: Tensor) -> Tensor:
        """(D, k), over all parts of the box."""
        nodes, params, dtype, exact = self._program()
        lift = self._lift(nodes, dtype) if exact and _is_plain(x) else None
        if lift is not None:
            rows = x.new_empty(0, len(self.lower), dtype=dtype)
            return lift(rows, params)[1]  # type: ignore[arg-type]  # there is no Key
        self._check_outputs(nodes)
        own = self._constants_for(dtype, x.device)
        lower, upper, _ = jacobian(nodes, params, own.box, self.columns)
        return torch.where(own.sign > 0, lower, -upper).amin(0)

    def _program(self) -> Program:
        """What ``mlp`` is."""
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
            coupled = network.batch_coupling(mlp)
            if coupled:
                found = f"{coupled} normalises with the statistics of the batch"
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
        if x.device.type == "meta" or not all(p.isfinite().all() for p in self.mlp.parameters()):
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
        return full.index_copy(1, torch.tensor(self.columns, device=t.device), t)

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
        d, k = len(self.lower), len(self.columns)
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        lower, upper = (_tensor([box[end] for box in self._boxes], end, **like) for end in (0, 1))
        place = torch.zeros(k, d, **like)
        for i, c in enumerate(self.columns):
            place[i, c] = 1
        pairs = zip(self.lower, self.upper, strict=True)
        finite = all(map(math.isfinite, (*self.lower, *self.upper)))
        box = Interval(lower, upper, finite)
        sign = torch.tensor([[row[c] for c in self.columns] for row in self.direction], **like)
        middle = torch.tensor([_middle(l, u) for l, u in pairs], **like)
        return Constants(box, sign, place, middle, {})


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
        term: Tensor = self.linear(x.to(self.linear.weight.dtype)).to(y.dtype)
        return y + (term.squeeze(-1) if y.dim() < x.dim() else term)


def cut(
    lower: Sequence[float], upper: Sequence[float], columns: Sequence[int], parts: int
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
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


NORMS = ("normalise", "root_mean_square")
MOST_LIFTS = 64
NATIVE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_plain(x: Tensor) -> bool:
    """Whether x has memory that a native kernel may be called with: nothing looks on."""
    dense = type(x) in PLAIN and x.layout is torch.strided
    return dense and x.device.type == "cpu" and not transformed() and not traced()


def _exact(mlp: nn.Module, found: network.Chain | reading.Reading, dtype: torch.dtype) -> bool:
    """Whether the native bound may take the parameters as exact. Those that a forward computes of
    what is stored (the scale and shift of a BatchNorm) are rounded to their dtype, for which, in
    float32, only the rounding terms of ``intervals.py`` have room."""
    if isinstance(found, network.Chain) or dtype == torch.float64:
        return True
    bases = [p if p._base is None else p._base for p in found.params if isinstance(p, Tensor)]
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


def _columns(direction: Any, names: Any, lower: Any, upper: Any) -> int:
    """How many columns it speaks of; a mapping leaves that to their names, or to the box."""
    if is_mapping(direction):
        sized = [given for given in (names, lower, upper) if hasattr(given, "__len__")]
        if not sized:
            raise ValueError(
                "columns: expected the names of all columns to go with a direction by columns, got "
                "none"
            )
        return len(sized[0])
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
