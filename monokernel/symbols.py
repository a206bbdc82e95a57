"""What a forward does to its input, written down: symbols in the place of tensors, and a tape.

A :class:`Value` is handed to the forward in the place of x. PyTorch's functions come to it by
``__torch_function__``, methods and operators by name; each is one entry of the tables below, which
adds nodes to the :class:`Tape` and answers with Values. Everything else is refused: what might mix
rows, read the numbers, have a derivative of its own, or is not known here.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch.nn import functional as F

from .activations import SELU_ALPHA, SELU_SCALE
from .arguments import Inputs
from .boundary import operand_dtype
from .network import where
from .operands import PLAIN, traced
from .problem import accumulate_dtype
from .program import Node

__all__ = ["Key", "Param", "Tape", "Unreadable", "Value", "place", "placed", "said"]


class Key(NamedTuple):
    """In the place of the key of active dropouts, which ``Reading.operands`` draws once a call."""


Param = Tensor | Key | None


def placed(params: list[Param], more: Sequence[Param]) -> tuple[int, ...]:
    """The places of ``more``, which join ``params``; all dropouts share one key."""
    if more and type(more[0]) is Key:
        for place, param in enumerate(params):
            if type(param) is Key:
                return (place,)
    first = len(params)
    params += more
    return tuple(range(first, first + len(more)))


class Unreadable(Exception):  # noqa: N818  # it is no error of anybody's
    """Why a network cannot be read. A forward that catches it is unreadable all the same."""


class Tape:
    """What one forward has done so far: a program's nodes, and the parameters at their places."""

    __slots__ = (
        "autocast", "batch", "casts", "device", "device_type", "dtype", "ended", "full", "hooks",
        "lead", "mlp", "nodes", "params", "requires_grad", "sentence", "values",
    )  # fmt: skip

    def __init__(self, mlp: nn.Module, inputs: Inputs) -> None:
        blocks, batch, _, _, self.autocast = inputs
        x = blocks[-1]
        self.mlp = mlp
        self.batch = batch
        self.lead = len(batch)
        self.dtype, self.device = x.dtype, x.device
        self.requires_grad = x.requires_grad or blocks[0].requires_grad
        self.device_type = self.device.type
        self.casts = self.autocast and operand_dtype(x) != x.dtype
        self.full: set[int] = set()  # values that autocast sees to it are float32
        self.hooks = _saving(False)
        self.nodes: list[Node] = []
        self.params: list[Param] = []
        self.values: list[Value] = []
        self.sentence = ""
        self.ended = False  # nobody records any more

    def end(self) -> None:
        """Lets go of the Values, which hold the tape, and of what they were computed with."""
        self.ended = True
        self.values.clear()
        self.params.clear()

    def value(self, at: int, width: int, flat: bool, shared: bool = False) -> Value:
        # What is done without a gradient, between hooks on saved tensors (a checkpoint) or in
        # another dtype is not what the table of nodes says.
        if (
            not is_grad_enabled()
            or _saving(False) != self.hooks
            or is_autocast_enabled(self.device_type) is not self.autocast
        ):
            raise Unreadable("is under no_grad, hooks on saved tensors or autocast of its own")
        v = _fresh(Value)  # and no __init__: a call of it is a fifth of a node
        v.tape, v.at, v.width, v.flat, v.shared = self, at, width, flat, shared
        self.values.append(v)
        return v

    def node(
        self,
        kind: str,
        inputs: tuple[int, ...],
        width: int,
        numbers: tuple[float, ...] = (),
        params: tuple[Param, ...] = (),
        flat: bool = False,
        shared: bool = False,
    ) -> Value:
        places = placed(self.params, params) if params else ()
        # As Node(...), without a call of a function written in Python.
        self.nodes.append(tuple.__new__(Node, (kind, inputs, places, numbers, width)))
        return self.value(len(self.nodes), width, flat, shared)

    def made_in_full(self, before: int) -> None:
        """Of all but the first ``before`` nodes."""
        if self.casts and self.device_type == "cuda":
            self.full.update(range(before + 1, len(self.nodes) + 1))

    def refuse(self, what: str, why: object = "is not known as a row-wise node") -> Unreadable:
        """The exception to raise; the first one stands, whatever becomes of it."""
        if not self.sentence:
            self.sentence = f"{place(self.mlp, sys._getframe(1))}: {what} {why}"
        return Unreadable(self.sentence)


_fresh = object.__new__
# The hooks on saved tensors that are at work, None as a rule.
_saving = torch._C._autograd._top_saved_tensors_default_hooks


def place(mlp: nn.Module, frame: FrameType | None) -> str:
    """The innermost part of ``mlp`` whose code is at work."""
    parts = {id(m) for m in mlp.modules()}
    while frame is not None:
        owner = frame.f_locals.get("self")
        if id(owner) in parts and isinstance(owner, nn.Module):
            return where(mlp, owner)
        frame = frame.f_back
    return where(mlp, mlp)


class Symbol:
    """In the place of a tensor that depends on x. What is not told here of it is unreadable."""

    __slots__ = ("tape",)

    tape: Tape
    __array_ufunc__ = None  # NumPy's numbers leave the operators to it
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        handler = _FUNCTIONS.get(func)
        if handler is None:
            raise _tape((args, kwargs)).refuse(_name(func))
        try:
            return handler(*args, **kwargs) if kwargs else handler(*args)
        except Exception as error:
            raise _tape((args, kwargs)).refuse(_name(func), _why(error)) from None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Asked for by ``isinstance`` alone, to which there is no good answer: it is no tensor.
        That is also how an ``autograd.Function``, with a derivative of its own, shows itself.
        Once the forward is over, who walks over all objects (a memory profiler) may ask."""
        if self.tape.ended:
            return type(self)
        raise self.tape.refuse("isinstance or an autograd.Function", "asks for the type of it")

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name):
            raise self.tape.refuse(f"Tensor.{name}")
        raise AttributeError(name)


class Value(Symbol):
    """A tensor (*batch, width), or (*batch,) where it is ``flat``: value number ``at`` of the
    program. ``shared`` says that another Value is a view of the same memory, which an operation in
    place would change too."""

    __slots__ = ("at", "flat", "shared", "width")

    at: int
    width: int
    flat: bool
    shared: bool

    @property
    def axes(self) -> int:
        return self.tape.lead + (not self.flat)

    @property
    def shape(self) -> torch.Size:
        return self.tape.batch if self.flat else torch.Size((*self.tape.batch, self.width))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.axes

    ndim = property(dim)
    ndimension = dim

    def numel(self) -> int:
        return math.prod(self.shape)

    nelement = numel

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return True

    @property
    def dtype(self) -> torch.dtype:
        if self.tape.casts:
            raise self.tape.refuse("Tensor.dtype", "is autocast's to say")
        return self.tape.dtype

    @property
    def device(self) -> torch.device:
        return self.tape.device

    @property
    def is_cuda(self) -> bool:
        return self.tape.device.type == "cuda"

    @property
    def requires_grad(self) -> bool:
        return self.tape.requires_grad


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, Unreadable) else f"cannot be read ({said(error)})"


def said(error: Exception) -> str:
    try:
        return repr(error)
    except Unreadable:  # it tells of a Value
        return type(error).__name__


def _tape(given: Any) -> Tape:
    """That of a Value somewhere in (args, kwargs)."""
    args = given[0]
    found: Symbol = args[0] if args and type(args[0]) is Value else next(_values(given))
    return found.tape


def _values(given: Any) -> Iterator[Any]:
    kind = type(given)
    if kind is Value or kind is Stack:
        yield given
    elif kind in (tuple, list, dict):
        for part in given.values() if kind is dict else given:
            yield from _values(part)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if hasattr(func, "__objclass__"):
        return f"Tensor.{name}"
    home = getattr(func, "__module__", None) or "torch"
    return f"F.{name}" if home in (F.__name__, "torch._C._nn") else f"{home.split('.')[0]}.{name}"


# --- what may be done to a Value -----------------------------------------------------------------
# Each function here has the arguments of PyTorch's own, and raises where its rows would be mixed.

Numbers = (int, float)


def _columns(v: Any) -> Value:
    """v, of which the last axis holds its columns."""
    if type(v) is not Value:
        raise Unreadable("takes a tensor where rows were expected")
    if v.flat:
        raise Unreadable("works along the rows")
    return v


def _last(v: Value, dim: Any) -> Value:
    """v, of which dim is the axis of the columns."""
    _columns(v)
    if type(dim) in (tuple, list) and len(dim) == 1:
        (dim,) = dim
    if type(dim) is not int or dim not in (-1, v.tape.lead):
        raise Unreadable(f"works along axis {dim}, not along the columns")
    return v


def _new(v: Value, kind: str, numbers: tuple[float, ...] = (), *params: Param) -> Value:
    """A node with the width of its input."""
    return v.tape.node(kind, (v.at,), v.width, numbers, params, v.flat)


def _copy(v: Value) -> Value:
    return v.tape.value(v.at, v.width, v.flat)


def _view(v: Value, flat: bool) -> Value:
    v.shared = True
    return v.tape.value(v.at, v.width, flat, shared=True)


def _plain(t: Any) -> Tensor:
    if (type(t) not in PLAIN and not traced(t)) or t.layout is not torch.strided:
        raise Unreadable(f"takes a {type(t).__name__}, which is no plain tensor")
    plain: Tensor = t
    return plain


def _operand(tape: Tape, t: Any) -> Tensor:
    """A weight or bias, which a product takes as it is."""
    plain = _plain(t)
    dtype = plain.dtype
    if dtype is not tape.dtype and not (tape.casts and dtype.is_floating_point):
        raise Unreadable(f"takes {dtype} to rows of {tape.dtype}")
    if plain.device != tape.device:
        raise Unreadable(f"takes a tensor on {t.device} to rows on {tape.device}")
    return plain


def _constant(v: Value, t: Any) -> tuple[Value, Tensor]:
    """v and a tensor to go with each of its rows, (H,) or (1,)."""
    t, tape = _plain(t), v.tape
    size = t.shape
    if len(size) > v.axes or size.numel() != (1 if v.flat or not size else size[-1]):
        raise Unreadable(f"joins rows and a tensor of shape {tuple(size)}")
    if t.dtype is not tape.dtype:
        if t.dtype.is_complex or (t.dim() and t.dtype.is_floating_point):
            raise Unreadable(f"joins rows and a tensor of {t.dtype}")
        t = t.to(tape.dtype)
    if t.device != tape.device:
        if t.dim():
            raise Unreadable(f"joins rows and a tensor on {t.device}")
        t = t.to(tape.device)
    if len(size) != 1:  # a view costs autograd a node
        t = t.reshape(-1)
    return (v if size.numel() == 1 else _wide(v, size[-1])), t


def _wide(v: Value, width: int) -> Value:
    if v.width == width:
        return v
    if v.width != 1 or v.flat:
        raise Unreadable(f"joins {v.width} columns and {width}")
    return v.tape.node("expand", (v.at,), width)


def _pair(a: Value, b: Value) -> tuple[Value, Value]:
    """Two Values of one shape."""
    if a.tape is not b.tape or a.flat is not b.flat:
        raise Unreadable("joins rows of different shapes")
    width = max(a.width, b.width)
    return _wide(a, width), _wide(b, width)


def _line(v: Value, p: float, q: float) -> Value:
    if p == 1 and q == 0:
        return _copy(v)
    return _new(v, "line", (float(p), float(q)))


def _combined(p: float, a: Any, q: float, b: Any) -> Value:
    """p·a + q·b, one of them a Value."""
    if type(a) is not Value:
        p, a, q, b = q, b, p, a
    if type(b) is Value:
        v, w = _pair(a, b)
        return v.tape.node("sum", (v.at, w.at), v.width, (float(p), float(q)), flat=v.flat)
    if isinstance(b, Numbers):
        return _line(a, p, q * b)
    v, t = _constant(a, b)
    t = t if q == 1 else -t if q == -1 else q * t  # a number in a product is another tensor to make
    return _new(v if p == 1 else _line(v, p, 0), "shift", (), t)


def _add(a: Any, b: Any, *, alpha: float = 1) -> Value:
    return _combined(1, a, alpha, b)


def _sub(a: Any, b: Any, *, alpha: float = 1) -> Value:
    return _combined(1, a, -alpha, b)


def _rsub(a: Any, b: Any, *, alpha: float = 1) -> Value:
    return _combined(1, b, -alpha, a)


def _mul(a: Any, b: Any) -> Value:
    if type(a) is not Value:
        a, b = b, a
    if type(b) is Value:
        if a.at == b.at and a.flat is b.flat:
            return _new(a, "square", (0.0, 0.0, 0.0))
        v, w = _pair(a, b)
        return v.tape.node("product", (v.at, w.at), v.width, flat=v.flat)
    if isinstance(b, Numbers):
        return _line(a, b, 0)
    v, t = _constant(a, b)
    return _new(v, "scale", (), t)


def _div(a: Any, b: Any) -> Value:
    if type(b) is Value:
        return _mul(_element(b, "reciprocal"), a)
    if isinstance(b, Numbers):
        return _line(a, 1 / b, 0)
    v, t = _constant(a, b)
    return _new(v, "scale", (), t.reciprocal())


def _neg(v: Value) -> Value:
    return _line(v, -1, 0)


def _addcmul(v: Any, a: Any, b: Any, *, value: float = 1) -> Value:
    if type(a) is not Value and type(b) is not Value:
        return _add(v, a * b, alpha=value)
    return _add(v, _mul(a, b), alpha=value)


def _lerp(a: Any, b: Any, weight: Any) -> Value:
    return _add(a, _mul(_sub(b, a), weight))


def _pow(v: Value, exponent: Any) -> Value:
    if type(exponent) not in Numbers:
        raise Unreadable("has an exponent that is no number")
    if exponent < 0:
        return _element(_pow(v, -exponent), "reciprocal")
    if exponent == 0.5:
        return _element(v, "sqrt")
    if exponent not in (1, 2, 3, 4):
        raise Unreadable(f"has the exponent {exponent}")
    if exponent == 1:
        return _copy(v)
    square = _element(v, "square")
    return square if exponent == 2 else _mul(square, v if exponent == 3 else square)


def _element(v: Value, kind: str, p: float = 0.0, q: float = 0.0, r: float = 0.0) -> Value:
    """A kind of the activation table."""
    return v.tape.node(kind, (v.at,), v.width, (float(p), float(q), float(r)), flat=v.flat)


Handler = Callable[..., Any]


def _kind(kind: str, p: float = 0.0, q: float = 0.0, r: float = 0.0) -> Handler:
    """An activation without arguments."""
    numbers = p, q, r

    def activation(v: Value, *, inplace: bool = False) -> Value:
        if inplace:
            changed: Value = _inplace(activation)(v)
            return changed
        return v.tape.node(kind, (v.at,), v.width, numbers, (), v.flat)

    return activation


def _inplace(handler: Handler) -> Handler:
    def changed(v: Value, *args: Any, **kwargs: Any) -> Value:
        if type(v) is not Value:
            raise Unreadable("writes into a tensor")
        if v.shared:
            raise Unreadable("changes in place what there is another view of")
        w = handler(v, *args, **kwargs)
        if (w.width, w.flat) != (v.width, v.flat):
            raise Unreadable("changes the shape in place")
        v.at = w.at
        return v

    return changed


def _switched(handler: Handler) -> Handler:
    """With PyTorch's argument ``inplace``."""
    changed = _inplace(handler)

    def switched(*args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        return (changed if inplace else handler)(*args, **kwargs)

    return switched


def _leaky_relu(v: Value, negative_slope: float = 0.01) -> Value:
    return _element(v, "leaky_relu", negative_slope)


def _rrelu(v: Value, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Value:
    if training:
        raise Unreadable("draws its slopes")
    return _element(v, "leaky_relu", (lower + upper) / 2)


def _hardtanh(v: Value, min_val: float = -1.0, max_val: float = 1.0) -> Value:
    return _element(v, "hardtanh", min_val, max_val)


def _elu(v: Value, alpha: float = 1.0) -> Value:
    return _element(v, "elu", 1.0, alpha, 1.0)


def _celu(v: Value, alpha: float = 1.0) -> Value:
    return _element(v, "elu", 1.0, alpha, 1.0 / alpha)


def _gelu(v: Value, approximate: str = "none") -> Value:
    return _element(v, {"none": "gelu", "tanh": "gelu_tanh"}[approximate])


def _softplus(v: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    return _element(v, "softplus", beta, threshold)


def _shrink(kind: str) -> Handler:
    return lambda v, lambd=0.5: _element(v, kind, lambd)


def _threshold(v: Value, threshold: float, value: float) -> Value:
    return _element(v, "threshold", threshold, value)


def _clamp(v: Value, min: Any = None, max: Any = None) -> Value:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    if not isinstance(low, Numbers) or not isinstance(high, Numbers) or low > high:
        raise Unreadable("has bounds that are no range of numbers")
    return _element(v, "clamp", low, high)


def _rsqrt(v: Value) -> Value:
    return _element(_element(v, "sqrt"), "reciprocal")


def _prelu(v: Value, weight: Any) -> Value:
    t = _plain(weight)
    if t.dtype != v.tape.dtype or (t.numel() != 1 and (t.numel() != v.width or v.tape.lead != 1)):
        raise Unreadable("has a weight for each of the rows' axes")
    return _new(_columns(v), "prelu", (), t.reshape(-1))


def _glu(v: Value, dim: int = -1) -> Value:
    half, odd = divmod(_last(v, dim).width, 2)
    if odd:
        raise Unreadable(f"halves {v.width} columns")
    gate = _element(_part(v, half, 1, half), "sigmoid")
    return v.tape.node("product", (_part(v, 0, 1, half).at, gate.at), half)


def _linear(v: Any, weight: Any, bias: Any = None) -> Value:
    tape = _columns(v).tape
    W, b = _operand(tape, weight), None if bias is None else _operand(tape, bias)
    size = W.shape
    if len(size) != 2 or size[1] != v.width:
        raise Unreadable(f"does not fit {v.width} columns")
    out = size[0]
    if b is not None and b.shape != (out,):
        raise Unreadable("has a bias of another size than its weight")
    return tape.node("linear", (v.at,), out, (), (W, b))


def _matmul(v: Any, W: Any) -> Value:
    W = _plain(W)
    if W.dim() == 1:
        out = _linear(v, W.unsqueeze(0))
        return out.tape.value(out.at, 1, flat=True)
    return _linear(v, W.mT)


def _mm(v: Any, W: Any) -> Value:
    if _columns(v).tape.lead != 1:
        raise Unreadable("takes two axes")
    return _matmul(v, W)


def _addmm(t: Any, v: Any, W: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    return _add(_mm(v, W) if alpha == 1 else _line(_mm(v, W), alpha, 0), t, alpha=beta)


def _einsum(equation: str, *operands: Any) -> Value:
    """A linear layer written with letters, "...i,oi->...o"."""
    found = re.fullmatch(r"(\.{3}|\w*)(\w),(\w)(\w)->(\.{3}|\w*)(\w)", equation.replace(" ", ""))
    v, W = _columns(operands[0]), _plain(operands[1])
    if found is not None and len(operands) == 2:
        rows, i, first, second, again, o = found.groups()
        letters = v.tape.lead + 2 if rows != "..." else 2
        if rows == again and i != o and len({*rows, i, o} - {"."}) == letters:
            if (first, second) == (o, i):
                return _linear(v, W)
            if (first, second) == (i, o):
                return _linear(v, W.mT)
    raise Unreadable(f"has the equation {equation!r}")


def _layer_norm(
    v: Value, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Value:  # fmt: skip
    return _affine(_normalised(v, "normalise", normalized_shape, eps), weight, bias)


def _rms_norm(
    v: Value, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Value:
    if eps is None:
        eps = _usual_eps(v.tape.dtype, v.tape.device_type)
    return _affine(_normalised(v, "root_mean_square", normalized_shape, eps), weight, None)


@lru_cache
def _usual_eps(dtype: torch.dtype, device_type: str) -> float:
    """PyTorch's own eps of an RMSNorm: of the dtype that it computes in, or, in some versions, of
    the input's. On the CPU it shows which."""
    own = torch.finfo(dtype).eps
    if accumulate_dtype(dtype) is dtype:
        return own
    if device_type != "cpu":
        raise Unreadable(f"leaves it to PyTorch what eps is for {dtype}")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        small = F.rms_norm(torch.full((1,), 1e-4, dtype=dtype), (1,))  # 1e-4 / √eps
    usual = torch.finfo(accumulate_dtype(dtype)).eps
    return min((own, usual), key=lambda eps: abs(float(small) - 1e-4 / math.sqrt(eps)))


def _normalised(v: Value, kind: str, shape: Sequence[int], eps: float) -> Value:
    if tuple(shape) != (_columns(v).width,):
        raise Unreadable(f"normalises axes of shape {tuple(shape)}")
    return _new(v, kind, (float(eps),))


def _affine(v: Value, scale: Any, shift: Any) -> Value:
    for kind, t in (("scale", scale), ("shift", shift)):
        if t is not None:
            v, t = _constant(v, t)
            v = _new(v, kind, (), t)
    return v


def _batch_norm(
    v: Value, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Value:  # fmt: skip
    if training or running_mean is None or running_var is None:
        raise Unreadable("normalises with the statistics of the batch")
    if _columns(v).tape.lead != 1:
        raise Unreadable("normalises along another axis than the columns")
    for t in (running_mean, running_var, weight, bias):
        if t is not None:
            _plain(t)  # the operations below would take anything
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    dtype = v.tape.dtype
    if v.at == 0:  # far from 0 inputs lose digits unless their mean goes first
        return _affine(_sub(v, running_mean.to(dtype)), scale.to(dtype), bias)
    if bias is None:
        shift = -running_mean * scale
    else:  # as one operation, which is one node for autograd
        shift = torch.addcmul(bias, running_mean, scale, value=-1)
    if scale.dtype is not dtype:
        scale, shift = scale.to(dtype), shift.to(dtype)
    return _affine(v, scale, shift)


def _dropout(v: Value, p: float = 0.5, training: bool = True) -> Value:
    if not training:
        return v
    if not 0 < p <= 1:
        return _view(v, v.flat)
    number = sum([node.kind == "dropout" for node in v.tape.nodes])
    return _new(v, "dropout", (p, float(number)), Key())


def _inactive(v: Value, p: float = 0.5, training: bool = True) -> Value:
    """Dropout of whole channels, or to other values than 0."""
    if training:
        raise Unreadable("is active")
    return v


def _softmax(kind: str) -> Handler:
    def softmax(v: Value, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
        _same(v, dtype)
        return _new(_last(v, dim), kind)

    return softmax


def _same(v: Value, dtype: Any) -> None:
    if dtype is not None and dtype != v.dtype:
        raise Unreadable(f"changes the dtype to {dtype}")


def _cat(tensors: Sequence[Any], dim: int = 0) -> Value:
    parts = [_last(v, dim) for v in tensors]
    if any(v.tape is not parts[0].tape for v in parts):
        raise Unreadable("joins rows of different calls")
    if len(parts) == 1:
        return _copy(parts[0])
    return parts[0].tape.node("concat", tuple([v.at for v in parts]), sum(v.width for v in parts))


def _hstack(tensors: Sequence[Any]) -> Value:
    if len(tensors[0].shape) > 2:
        raise Unreadable("works along the rows")
    return _cat(tensors, -1)


class Stack(Symbol):
    """Values side by side along a new axis, of which only a sum or a mean is read."""

    __slots__ = ("axis", "parts")

    def __init__(self, parts: list[Value], axis: int) -> None:
        self.tape, self.parts, self.axis = parts[0].tape, parts, axis

    def sum(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
        found = self._combined("sum", dim, keepdim, dtype, 1.0)
        self.tape.made_in_full(found.at - 1)
        return found

    def mean(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
        return self._combined("mean", dim, keepdim, dtype, 1.0 / len(self.parts))

    def _combined(self, what: str, dim: Any, keepdim: bool, dtype: Any, c: float) -> Value:
        first = self.parts[0]
        ours = self.axis, self.axis - first.axes - 1
        if dim not in ours or keepdim or dtype is not None:
            raise self.tape.refuse(f"Tensor.{what}", "of a stack works along another axis")
        at, numbers = tuple([v.at for v in self.parts]), (c,) * len(self.parts)
        return self.tape.node("sum", at, first.width, numbers, flat=first.flat)


def _stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    first = tensors[0]
    shapes = {(v.tape, v.width, v.flat) if type(v) is Value else None for v in tensors}
    axis = dim + first.axes + 1 if dim < 0 else dim
    if len(shapes) > 1 or None in shapes or not 0 <= axis <= first.axes:
        raise Unreadable("joins rows of different shapes")
    if first.flat and axis == first.axes:
        return _cat([v.tape.value(v.at, 1, flat=False) for v in tensors], -1)
    return Stack([_copy(v) for v in tensors], axis)


def _sum(v: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    if type(v) is Stack:
        return v.sum(dim, keepdim, dtype=dtype)
    _same(_last(v, dim), dtype)
    total: Value = v if v.width == 1 else v.tape.node("total", (v.at,), 1)
    return total.tape.value(total.at, 1, not keepdim)


def _mean(v: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    if type(v) is Stack:
        return v.mean(dim, keepdim, dtype=dtype)
    return _line(_sum(v, dim, keepdim, dtype=dtype), 1 / v.width, 0)


def _part(v: Value, start: int, step: int, width: int, flat: bool = False) -> Value:
    """Columns start, start + step, …"""
    if (start, width) == (0, v.width):
        return _view(v, flat)
    v.shared = True
    return v.tape.node(
        "columns", (v.at,), width, (float(start), float(step)), flat=flat, shared=True
    )


def _chunk(v: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    width = _last(v, dim).width
    return _split(v, max(1, -(-width // chunks)), dim)


def _split(v: Value, split_size: Any, dim: int = 0) -> tuple[Value, ...]:
    width = _last(v, dim).width
    if isinstance(split_size, int):
        sizes = [min(split_size, width - at) for at in range(0, width, split_size)]
    else:
        sizes = [operator.index(size) for size in split_size]
    if sum(sizes) != width or not sizes:
        raise Unreadable(f"splits {width} columns into {sizes}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple([_part(v, at, 1, size) for at, size in zip(starts, sizes, strict=True)])


def _tensor_split(v: Value, indices_or_sections: Any, dim: int = 0) -> tuple[Value, ...]:
    width = _last(v, dim).width
    if isinstance(indices_or_sections, int):
        n, more = divmod(width, indices_or_sections)
        return _split(v, [n + (i < more) for i in range(indices_or_sections)], dim)
    ends = [*indices_or_sections, width]
    return _split(v, [b - a for a, b in zip([0, *ends], ends, strict=False)], dim)


def _unbind(v: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple([_select(v, dim, i) for i in range(_last(v, dim).width)])


def _narrow(v: Value, dim: int, start: int, length: int) -> Value:
    width = _last(v, dim).width
    start = start + width if start < 0 else start
    return _part(v, start, 1, length)


def _select(v: Value, dim: int, index: int) -> Value:
    width = _last(v, dim).width
    if not -width <= index < width:
        raise Unreadable(f"asks for column {index} of {width}")
    return _part(v, index % width, 1, 1, flat=True)


def _index_select(v: Value, dim: int, index: Any) -> Value:
    return _picked(_last(v, dim), index)


def _picked(v: Value, columns: Any) -> Value:
    """Any columns in any order, as a copy: as few regular slices as a greedy reader finds."""
    if isinstance(columns, Tensor):
        host = columns.device.type == "cpu" and not traced(columns)
        if not host or columns.dtype in (torch.bool, torch.uint8):
            raise Unreadable("has an index that is no list of columns on the host")
        columns = columns.tolist()
    if any(isinstance(c, bool) for c in columns):
        raise Unreadable("has an index that is no list of columns")
    left = [range(v.width)[c] for c in columns]
    parts = []
    while left:
        step = max(left[1] - left[0], 1) if len(left) > 1 else 1
        n = 1
        while n < len(left) and left[n] == left[0] + n * step:
            n += 1
        parts.append(_part(v, left[0], step, n))
        left = left[n:]
    return _cat(parts, -1)


def _getitem(v: Value, index: Any) -> Value:
    index = index if type(index) is tuple else (index,)
    if any(type(i) is Value for i in index) or sum(i is ... for i in index) > 1:
        raise Unreadable("has an index that depends on the rows")
    if ... in [i for i in index if i is ...]:
        at = next(n for n, i in enumerate(index) if i is ...)
        before, after = index[:at], index[at + 1 :]
        index = (*before, *[slice(None)] * (v.axes - len(index) + 1), *after)
    index = (*index, *[slice(None)] * (v.axes - len(index)))
    rows = index if v.flat else index[:-1]
    if len(index) != v.axes or any(
        not _whole(i, n) for i, n in zip(rows, v.tape.batch, strict=True)
    ):
        raise Unreadable("picks rows")
    if v.flat:
        return _view(v, flat=True)
    columns = index[-1]
    if isinstance(columns, slice):
        start, stop, step = columns.indices(v.width)
        if step < 1:
            raise Unreadable("has a slice that runs backwards")
        return _part(v, start, step, max(0, -(-(stop - start) // step)))
    if isinstance(columns, int) and not isinstance(columns, bool):
        return _select(v, -1, columns)
    if isinstance(columns, (list, range, Tensor)) and not (
        isinstance(columns, Tensor) and columns.dim() != 1
    ):
        return _picked(v, columns)
    raise Unreadable("has an index that is no slice or list of columns")


def _whole(index: Any, n: Any) -> bool:
    if not isinstance(index, slice):
        return False
    if type(n) is SymInt:  # any number of rows
        return index.start in (None, 0) and index.stop in (None, n) and index.step in (None, 1)
    return index.indices(n) == (0, n, 1)


def _squeeze(v: Value, dim: Any = None) -> Value:
    if dim is None:
        if 1 in v.tape.batch:
            raise Unreadable("may squeeze an axis of the rows")
        return _view(v, v.flat or v.width == 1)
    _last(v, dim)
    return _view(v, v.width == 1)


def _unsqueeze(v: Value, dim: int) -> Value:
    if not v.flat or dim not in (-1, v.tape.lead):
        raise Unreadable("makes another axis")
    return _view(v, flat=False)


def _flatten(v: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    axes = v.axes
    if axes and (start_dim - end_dim) % axes == 0:
        return _view(v, v.flat)
    if (v.tape.lead, v.flat, v.width) == (1, False, 1):
        return _view(v, flat=True)
    raise Unreadable("joins axes")


def _reshape(v: Value, *shape: Any) -> Value:
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    sizes = [n if type(n) is SymInt else operator.index(n) for n in shape]
    if sizes.count(-1) == 1:
        rest = math.prod(n for n in sizes if n != -1)
        if rest:
            sizes[sizes.index(-1)] = v.numel() // rest
        else:  # no rows: PyTorch refuses it unless the rest tells
            raise Unreadable("has a shape that does not tell the columns")
    if sizes == [*v.tape.batch, v.width]:
        return _view(v, flat=False)
    if sizes == list(v.tape.batch) and v.width == 1:
        return _view(v, flat=True)
    raise Unreadable(f"moves columns to the shape {tuple(shape)}")


def _view_as(v: Value, other: Any) -> Value:
    return _reshape(v, *other.shape)


def _expand(v: Value, *sizes: Any) -> Value:
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        sizes = tuple(sizes[0])
    *rows, width = sizes
    same = all(n in (-1, m) for n, m in zip(rows, v.tape.batch, strict=False))
    if v.flat or len(sizes) != v.axes or not same:
        raise Unreadable("repeats rows")
    wide = _view(v, flat=False) if width in (-1, v.width) else _wide(v, width)
    v.shared = wide.shared = True
    return wide


def _expand_as(v: Value, other: Any) -> Value:
    return _expand(v, *other.shape)


def _contiguous(v: Value, memory_format: Any = torch.contiguous_format) -> Value:
    return _view(v, v.flat)


def _clone(v: Value, *, memory_format: Any = None) -> Value:
    return _copy(v)


def _to(v: Value, *args: Any, **kwargs: Any) -> Value:
    for to in (*args, *kwargs.values()):
        if isinstance(to, torch.dtype):
            same = to == v.dtype
        elif isinstance(to, (str, torch.device)):
            same = torch.device(to) == v.device
        elif isinstance(to, Tensor):
            same = to.dtype == v.dtype and to.device == v.device
        else:
            same = type(to) is bool and not kwargs.get("copy") and len(args) < 3
        if not same:
            raise Unreadable("moves or converts")
    return v


def _converted(dtype: torch.dtype) -> Handler:
    def converted(v: Value) -> Value:
        _same(v, dtype)
        return v

    return converted


def _type_as(v: Value, other: Any) -> Value:
    return _to(v, other.dtype, other.device)


# By PyTorch's name, for torch.NAME, Tensor.NAME and Value.NAME where they exist, and with _ behind
# it in place.
_NAMED: dict[str, Handler] = {
    "abs": _kind("abs"),
    "absolute": _kind("abs"),
    "add": _add,
    "addcmul": _addcmul,
    "addmm": _addmm,
    "cat": _cat,
    "celu": _celu,
    "chunk": _chunk,
    "clamp": _clamp,
    "clamp_max": lambda v, max: _clamp(v, None, max),
    "clamp_min": lambda v, min: _clamp(v, min),
    "clip": _clamp,
    "clone": _clone,
    "concat": _cat,
    "concatenate": _cat,
    "contiguous": _contiguous,
    "cos": _kind("cos"),
    "div": _div,
    "divide": _div,
    "double": _converted(torch.float64),
    "einsum": _einsum,
    "erf": _kind("erf"),
    "exp": _kind("exp"),
    "expand": _expand,
    "expand_as": _expand_as,
    "flatten": _flatten,
    "float": _converted(torch.float32),
    "half": _converted(torch.float16),
    "bfloat16": _converted(torch.bfloat16),
    "hardshrink": _shrink("hardshrink"),
    "hstack": _hstack,
    "index_select": _index_select,
    "lerp": _lerp,
    "log": _kind("log"),
    "log_softmax": _softmax("log_softmax"),
    "matmul": _matmul,
    "mean": _mean,
    "mm": _mm,
    "mul": _mul,
    "multiply": _mul,
    "narrow": _narrow,
    "neg": _neg,
    "negative": _neg,
    "numel": Value.numel,
    "pow": _pow,
    "prelu": _prelu,
    "reciprocal": _kind("reciprocal"),
    "relu": _kind("relu"),
    "reshape": _reshape,
    "reshape_as": _view_as,
    "rsqrt": _rsqrt,
    "rsub": _rsub,
    "select": _select,
    "selu": _kind("elu", SELU_SCALE, SELU_ALPHA, 1.0),
    "sigmoid": _kind("sigmoid"),
    "sin": _kind("sin"),
    "softmax": _softmax("softmax"),
    "split": _split,
    "sqrt": _kind("sqrt"),
    "square": _kind("square"),
    "squeeze": _squeeze,
    "stack": _stack,
    "sub": _sub,
    "subtract": _sub,
    "sum": _sum,
    "tanh": _kind("tanh"),
    "tensor_split": _tensor_split,
    "threshold": _threshold,
    "to": _to,
    "true_divide": _div,
    "type_as": _type_as,
    "unbind": _unbind,
    "unsqueeze": _unsqueeze,
    "view": _reshape,
    "view_as": _view_as,
}
_FUNCTIONS: dict[Any, Handler] = {
    torch.is_floating_point: Value.is_floating_point,
    torch.rms_norm: _rms_norm,
    torch.special.erf: _kind("erf"),
    F.alpha_dropout: _switched(_inactive),
    F.batch_norm: _batch_norm,
    F.celu: _switched(_celu),
    F.dropout: _switched(_dropout),
    F.dropout1d: _switched(_inactive),
    F.dropout2d: _switched(_inactive),
    F.dropout3d: _switched(_inactive),
    F.elu: _switched(_elu),
    F.feature_alpha_dropout: _switched(_inactive),
    F.gelu: _gelu,
    F.glu: _glu,
    F.hardshrink: _shrink("hardshrink"),
    F.hardsigmoid: _kind("hardsigmoid"),
    F.hardswish: _kind("hardswish"),
    F.hardtanh: _switched(_hardtanh),
    F.layer_norm: _layer_norm,
    F.leaky_relu: _switched(_leaky_relu),
    F.linear: _linear,
    F.log_softmax: _softmax("log_softmax"),
    F.logsigmoid: _kind("logsigmoid"),
    F.mish: _kind("mish"),
    F.prelu: _prelu,
    F.relu: _kind("relu"),
    F.relu6: _kind("hardtanh", 0.0, 6.0),
    F.rms_norm: _rms_norm,
    F.rrelu: _switched(_rrelu),
    F.selu: _kind("elu", SELU_SCALE, SELU_ALPHA, 1.0),
    F.silu: _kind("silu"),
    F.softmax: _softmax("softmax"),
    F.softplus: _softplus,
    F.softshrink: _shrink("softshrink"),
    F.softsign: _kind("softsign"),
    F.tanhshrink: _kind("tanhshrink"),
    F.threshold: _switched(_threshold),
}
# Without an own name in torch, but with one in place.
_FUNCTIONAL: dict[str, Handler] = {
    "elu": _elu,
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky_relu,
}
_OPERATORS: dict[str, Handler] = {
    "__abs__": _NAMED["abs"],
    "__add__": _add,
    "__getitem__": _getitem,
    "__matmul__": _matmul,
    "__mul__": _mul,
    "__neg__": _neg,
    "__pos__": lambda v: v,
    "__pow__": _pow,
    "__radd__": _add,
    "__rmul__": _mul,
    "__rsub__": _rsub,
    "__rtruediv__": lambda v, a: _div(a, v),
    "__sub__": _sub,
    "__truediv__": _div,
    "__iadd__": _inplace(_add),
    "__imul__": _inplace(_mul),
    "__ipow__": _inplace(_pow),
    "__isub__": _inplace(_sub),
    "__itruediv__": _inplace(_div),
}
# What Python would else find another way for, or say of a Value what is not so of the tensor.
_REFUSED = (
    "and array bool complex contains copy deepcopy delitem divmod eq float floordiv format ge "
    "gt iand ifloordiv ilshift imatmul imod index int invert ior irshift iter ixor le lshift lt "
    "mod ne or rand rdivmod reduce_ex repr reversed rfloordiv rlshift rmatmul rmod ror rpow "
    "rrshift rshift rxor setitem str xor "
)


# What autocast computes in float32 on CUDA, whatever it is given; in place it does not.
_IN_FULL = frozenset(
    ("exp", "layer_norm", "log", "log_softmax", "pow", "reciprocal", "rsqrt", "softmax", "softplus",
     "square", "sum", "__pow__", "__rtruediv__")
)  # fmt: skip


def _full(handler: Handler, *args: Any, **kwargs: Any) -> Any:
    """The handler, with what it makes marked on the tape where autocast sees to it."""
    tape = _tape((args, kwargs))
    before = len(tape.nodes)
    found = handler(*args, **kwargs)
    tape.made_in_full(before)
    return found


def _method(name: str, handler: Handler) -> Handler:
    if name in _IN_FULL:
        handler = partial(_full, handler)

    def method(self: Value, *args: Any, **kwargs: Any) -> Any:
        try:
            return handler(self, *args, **kwargs)
        except Exception as error:
            raise self.tape.refuse(f"Tensor.{name}", _why(error)) from None

    return method


def _refusal(name: str) -> Handler:
    def method(self: Symbol, *args: Any, **kwargs: Any) -> Any:
        raise self.tape.refuse(f"Tensor.{name}")

    return method


def _register() -> None:
    named = dict(_NAMED)
    for name, handler in (_NAMED | _FUNCTIONAL).items():
        changed = f"{name}_"
        if any(hasattr(home, changed) for home in (torch, F, Tensor)):
            named[changed] = _inplace(handler)
    for name, handler in named.items():
        for home in (torch, F, Tensor) if name.endswith("_") else (torch, Tensor):
            function = getattr(home, name, None)
            if callable(function):
                _FUNCTIONS.setdefault(function, handler)
        if hasattr(Tensor, name) and not hasattr(Value, name):
            setattr(Value, name, _method(name, handler))
    for name in _IN_FULL:
        for home in (torch, F, Tensor):
            function = getattr(home, name, None)
            if function in _FUNCTIONS:
                _FUNCTIONS[function] = partial(_full, _FUNCTIONS[function])
    for name, handler in _OPERATORS.items():
        setattr(Value, name, _method(name, handler))
    for name in (*_OPERATORS, *[f"__{name}__" for name in _REFUSED.split()]):
        setattr(Symbol, name, _refusal(name))


_register()
