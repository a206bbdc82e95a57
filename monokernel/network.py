"""What the network is: reads a module as a chain of linear layers and activations, or says why not.

Fused are (nested) ``nn.Sequential`` of ``nn.Linear``, the activations of the table, ``nn.Identity``
and dropout that is inactive. The structure is read anew at every call, since hooks, training mode
and parametrizations may change between two calls; no weight is touched until ``parameters``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.dropout import _DropoutNd

from .activations import Activation, of_module
from .arguments import check_parameter
from .operands import PLAIN
from .program import Node, nodes_of

__all__ = [
    "Chain",
    "Known",
    "Unfused",
    "batch_coupling",
    "ending",
    "global_hooks",
    "hooked",
    "known",
    "parts",
    "read",
    "sharded",
    "uncompiled",
    "unwrap",
    "where",
    "with_hooks",
]


class Chain(NamedTuple):
    """L linear layers and the activation that follows each (identity where none does)."""

    linears: tuple[nn.Linear, ...]
    widths: tuple[int, ...]  # (d, H_1, …, D)
    nodes: tuple[Node, ...]
    plain: list[Tensor | None] | None = None  # its parameters, where they were looked at already

    @property
    def squeezed(self) -> bool:
        """Its output is (*batch, D), never (*batch,)."""
        return False

    def operands(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The rows (N, d) and the parameters of the program, for the input x (*batch, d)."""
        params = self.parameters(x)
        return x if x.dim() == 2 else x.reshape(-1, self.widths[0]), params

    def parameters(self, x: Tensor) -> list[Tensor | None]:
        """[W_1, b_1 or None, W_2, …] for inputs x. Each is read once, as a plain forward would:
        reading a parametrized weight computes it, and spectral_norm takes a power iteration."""
        if self.plain is not None:
            return self.plain
        params: list[Tensor | None] = []
        for l, linear in enumerate(self.linears):
            own = linear._parameters  # nn.Module's look-up of attributes takes ten times as long
            params.append(own["weight"] if "weight" in own else self._computed("weight", l, x))
            params.append(own["bias"] if "bias" in own else self._computed("bias", l, x))
        return params

    def _computed(self, name: str, l: int, x: Tensor) -> Tensor | None:
        """A parametrized weight or bias, which only now can be seen to fit: a kernel would read
        past the end of a smaller one, or nothing at all."""
        t: Tensor | None = getattr(self.linears[l], name)
        if t is None and name == "bias":
            return None
        if t is None or type(t) not in PLAIN or t.layout is not torch.strided:
            came = t.layout if t is not None and type(t) in PLAIN else type(t).__name__
            raise TypeError(
                f"mlp: expected a parametrized {name} that is a plain dense tensor, got {came}"
            )
        size = (self.widths[l + 1], self.widths[l])[: 2 if name == "weight" else 1]
        if t.shape != size:
            raise ValueError(
                f"mlp: expected a parametrized {name} of shape {size}, as its layer says, got "
                f"{tuple(t.shape)}"
            )
        check_parameter(t, x)
        return t


def unwrap(mlp: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile(mlp)``, whose compiled form has no second derivative."""
    # A scripted module has a mapping of its own here, which knows no ``get``.
    if isinstance(mlp, nn.Module) and "_orig_mod" in mlp._modules:
        return mlp._modules["_orig_mod"] or mlp
    return mlp


def uncompiled(inside: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Has those of these modules that were compiled run as they were written: a compiled form has
    no second derivative and takes no symbols."""
    if torch.compiler.is_compiling():  # with the rest
        return nullcontext()
    if not any("_compiled_call_impl" in m.__dict__ or "_orig_mod" in m._modules for m in inside):
        return nullcontext()
    as_written: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return as_written


class Known(NamedTuple):
    """A chain of PyTorch's own layers that was read, so that a look at each part tells whether it
    would be read the same again, but for the sizes, dtypes and devices of its parameters, at which
    whoever is given their memory looks anyway. By weak references: it must not keep a network
    alive."""

    # Of each part its class, and the attributes that are to be what they were, or, of an
    # nn.Sequential, the identities of its own parts.
    parts: tuple[tuple[Callable[[], Any], Any, Any], ...]
    kinds: tuple[Any, ...]  # the classes
    widths: tuple[int, ...]
    nodes: tuple[Node, ...]

    def again(self) -> Chain | None:
        """The chain, if it is what it was."""
        call = nn.Module.__call__
        for kind in self.kinds:
            if kind.__call__ is not call:
                return None
        if global_hooks():
            return None
        linears: list[nn.Linear] = []  # list[nn.Linear]() would make that type anew
        params: list[Tensor | None] = []
        for part, kind, held in self.parts:
            m = part()
            if type(m) is not kind:
                return None
            own = m.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return None
            if kind is nn.Linear:
                has = own["_parameters"]
                if len(has) != 2 or "weight" not in has or "bias" not in has:
                    return None
                for t in has.values():
                    if t is not None and type(t) not in PLAIN:
                        return None
                linears.append(m)
                params += has["weight"], has["bias"]
            elif kind is nn.Sequential:
                if [*map(id, own["_modules"].values())] != held:
                    return None
            else:
                for name, value in held:
                    if own.get(name) is not value:
                        return None
        return Chain(tuple(linears), self.widths, self.nodes, params)


def known(mlp: nn.Module, chain: Chain) -> Known | None:
    """What is to be looked at in the next call; None where a part is more than a layer of PyTorch's
    own with parameters of its own."""
    parts: list[tuple[Callable[[], Any], Any, Any]] = []
    left = [mlp]
    while left:
        m = left.pop()
        kind, own = type(m), m.__dict__
        held: Any = None
        if kind is nn.Linear:
            if own["_parameters"].get("weight") is None or "bias" not in own["_parameters"]:
                return None
        elif kind is nn.Sequential:
            left += reversed(own["_modules"].values())
            held = [*map(id, own["_modules"].values())]
        elif isinstance(m, _DropoutNd) and kind.__module__ == _DropoutNd.__module__:
            held = ("training", m.training), ("p", m.p)
        elif of_module(m) is not None:
            held = tuple([item for item in own.items() if item[0] not in _OF_EVERY_MODULE])
            if any(type(value) not in (bool, int, float, str) for _, value in held):
                return None  # it could change and be the same object
        else:
            return None
        parts.append((weakref.ref(m), kind, held))
    kinds = tuple(dict.fromkeys(kind for _, kind, _ in parts))
    return Known(tuple(parts), kinds, chain.widths, chain.nodes)


_OF_EVERY_MODULE = nn.Module().__dict__.keys()


class Unfused(NamedTuple):
    """Why ``mlp`` is no chain: what is so of which part of it. To name the part takes a walk, which
    most calls need not pay for: another reader comes next."""

    part: nn.Module | None
    why: str

    def sentence(self, mlp: nn.Module) -> str:
        return self.why if self.part is None else f"{where(mlp, self.part)} {self.why}"


def read(mlp: nn.Module) -> Chain | Unfused:
    """The chain that ``mlp`` is, or which part of it is not fused.

    Raises ValueError for an ``nn.Sequential`` inside itself, which has no end.
    """
    if global_hooks():
        return Unfused(None, "a global module hook is registered")
    linears: list[nn.Linear] = []
    activations: list[Activation | None] = []
    widths: list[int] = []
    left = [mlp]
    Linear, forward = nn.Linear, nn.Linear.forward
    entered: list[tuple[int, nn.Module]] = []  # each Sequential, and its place in ``left``
    while left:
        m = left.pop()
        own, kind = m.__dict__, type(m)
        if why := _own_way(m):
            return Unfused(m, why)
        # A parametrized Linear is a subclass whose forward is still nn.Linear's.
        if isinstance(m, Linear) and kind.forward is forward:
            size = _size(m)
            if isinstance(size, Unfused):
                return size
            out, inputs = size
            if widths and widths[-1] != inputs:
                before = f"one with {widths[-1]} outputs"
                return Unfused(None, f"a Linear layer with {inputs} inputs follows {before}")
            widths += [out] if widths else [inputs, out]
            linears.append(m)
            activations.append(None)
        elif (activation := of_module(m)) is not None:
            if activation.kind == "identity":
                continue
            if not linears:
                why = f"an activation ({activation.kind}) comes before the first Linear layer"
                return Unfused(None, why)
            if (first := activations[-1]) is not None:
                return Unfused(
                    None, f"two activations ({first.kind}, {activation.kind}) follow each other"
                )
            activations[-1] = activation
        elif (
            isinstance(m, nn.Sequential)
            and kind.forward is nn.Sequential.forward
            and type(m).__iter__ is nn.Sequential.__iter__
        ):
            # It lies within those whose place, which their parts took over, is not below it.
            while entered and entered[-1][0] > len(left):
                entered.pop()
            if any(outer is m for _, outer in entered):
                part = where(mlp, m)
                raise ValueError(f"mlp: expected layers that end, got {part} inside itself")
            entered.append((len(left), m))
            left += reversed(own["_modules"].values())
        elif isinstance(m, _DropoutNd) and kind.__module__ == _DropoutNd.__module__:
            if m.training and m.p > 0:
                return Unfused(m, "is active")
        else:
            return Unfused(m, "is not a layer that is fused")
    if not linears:
        return Unfused(None, "it has no Linear layer")
    # A new identity each time: torch.compile would trace into a shared one.
    each = [σ or Activation("identity") for σ in activations]
    sizes = tuple(map(int, widths))
    return Chain(tuple(linears), sizes, nodes_of(sizes, tuple(each)))


def _own_way(m: nn.Module) -> str:
    """What a module does besides what its class says, or in its place, or ""."""
    if hooked(m):
        return "has hooks"
    if "forward" in m.__dict__:
        return "has a forward of its own"
    return "" if type(m).__call__ is nn.Module.__call__ else "has a call of its own"


def _size(m: nn.Linear) -> tuple[int, int] | Unfused:
    """The outputs and inputs of a layer, as its weight has them, which may have been replaced by
    one of another size; a parametrized one is taken at its word until it is computed."""
    own, kind = m.__dict__, type(m)
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    if bias is None:
        bias = own.get("bias")  # an attribute, in the place of a parameter
    if weight is None:
        weight = own.get("weight")
        if weight is None and not hasattr(kind, "weight"):  # nor a parametrization's
            return Unfused(m, "has no weight")
    for t in (weight, bias):
        if t is not None and not (type(t) in PLAIN and t.layout is torch.strided):
            return Unfused(m, "has a weight that is no plain tensor")
    size = (m.out_features, m.in_features) if weight is None else weight.shape
    if len(size) != 2:
        return Unfused(m, f"has a weight of {len(size)} dimensions")
    out, inputs = size
    if bias is not None and bias.shape != (out,):
        return Unfused(m, "has a bias of another size than its weight")
    return out, inputs


@contextmanager
def ending() -> Iterator[None]:
    """Says of ``mlp`` what recurses without end in it."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(
            "mlp: expected layers that end, got a module that calls itself without end"
        ) from error


def parts(mlp: nn.Module) -> dict[nn.Module, str]:
    """Every module in it and its name, as ``named_modules`` has them, which torch.compile does not
    follow through a module in which an attribute was set before."""
    found: dict[nn.Module, str] = {}
    left = [("", mlp)]
    while left:
        name, m = left.pop()
        if m in found:
            continue
        found[m] = name
        within = f"{name}." if name else ""
        inner = [(within + own, part) for own, part in m._modules.items() if part is not None]
        left += reversed(inner)
    return found


def batch_coupling(mlp: nn.Module) -> str | None:
    """A batch normalisation that uses the statistics of the batch: its rows have no own slope."""
    for m, name in parts(mlp).items():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (
            m.training or m.running_mean is None
        ):
            return f"{name or 'mlp'} ({type(m).__name__})"
    return None


def sharded(mlp: nn.Module) -> str | None:
    """A part that FSDP manages by itself: it frees its weights before the slopes are computed."""
    for m, name in parts(mlp).items():
        if any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(m).__mro__):
            return f"{name or 'mlp'} ({type(m).__name__})"
    return None


def where(root: nn.Module, m: nn.Module) -> str:
    """The path of a part from ``mlp`` on, and its class."""
    name = parts(root)[m]
    return f"mlp{'.' if name else ''}{name} ({type(m).__name__})"


def hooked(m: nn.Module) -> bool:
    """Whether the module itself has hooks of any kind."""
    own = m.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def with_hooks(mlp: nn.Module) -> Unfused | None:
    """A part that has hooks, under torch.compile. There a hook that is added later goes unseen, as
    PyTorch guards no dictionary of hooks unless its length is asked for: so of each, always."""
    found = [m for m in parts(mlp) if sum(len(m.__dict__[hooks]) for hooks in HOOKS)]
    return Unfused(found[0], "has hooks") if found else None


HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def global_hooks() -> bool:
    """Whether every module has them."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )
