"""The general path: value and slopes of any module, by autograd alone. All orders of derivative.

The module is called exactly once, so that dropout has one mask for value and slopes, buffers are
updated once and hooks fire once. From its one graph the slopes are D reverse passes (adjoint mode).
What has none of these may be called once more in the backward, on the rows that violate alone
(``compaction.py``). And once in the life of a module in which some slope is 0 in every row, its
values are looked at, which leaves no trace in it (``probing.py``).
There is no tangent mode here: PyTorch's forward-mode rules may be silently wrong where they are
differentiated again. The parameter gradients of ``torch.func.jvp`` through LayerNorm and
InstanceNorm lack the terms of the statistics, and an operator without a forward-mode rule can give
a tangent of zero. A reverse pass is what every module that trains is known to do right.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import Direction, Inputs
from ..columns import Columns, take
from ..hinge import nan_rule
from ..network import ending, parts, uncompiled
from ..operands import check_saveable
from ..probing import WITHOUT_DERIVATIVE, without_slope
from ..problem import accumulate_dtype
from ..signs import direction_table
from .compaction import DENSE, Call, compacted, slope

__all__ = ["by_operators", "check_gradient", "readable", "value_and_jacobian"]

WITHOUT_GRADIENT = (
    "mlp: its output has no gradient (it was detached, or computed under no_grad), so its slopes "
    "cannot be known"
)

Violations = Callable[[Tensor, int, int], Tensor]

# The modules whose slopes were looked at; by identity and outside them, so that no copy, pickle or
# state_dict knows of it.
_judged: dict[int, weakref.ref[nn.Module]] = {}


def value_and_jacobian(
    mlp: nn.Module,
    inputs: Inputs,
    transformed: bool,
    running: bool = False,
    *,
    audited: bool = False,
    violations: Violations | None = None,
    signs: Direction | None = None,
) -> tuple[Tensor, Tensor]:
    """y as ``mlp`` gives it and J (*batch, D, k).

    ``transformed`` says that a functorch transform is at work, where ``torch.autograd.grad`` is not
    available and ``torch.func.vjp`` does the same. Under torch.compile two operators do, which its
    tracer takes as they are.

    With ``running`` batch normalisations in training mode give y by the statistics of the batch
    and J, in a second call, by the running statistics after this call's update, which are those
    that evaluation mode would use.

    ``violations`` says of the slopes (*batch, k) of output d of D which the loss will see: where
    they are few, J is given without a graph of all rows, and its backward is compacted. Without
    it J has that graph, since a loss of one's own may see every slope.

    An output that takes no part in autograd is a ValueError, and slopes that are all 0, in the
    columns that the ``signs`` constrain (in all without them), are worth a warning. With
    ``audited`` such slopes are 0 without a word: the audit finds out what it means.
    """
    compiling = torch.compiler.is_compiling() and not transformed
    if not (transformed or compiling):
        check_saveable(mlp.parameters())
    # Its tensors can take no part in autograd; those of a compiler are no such.
    if not (transformed or compiling) and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            copies = inputs._replace(blocks=tuple([t.clone() for t in inputs.blocks]))
            return value_and_jacobian(
                mlp, copies, transformed, running, audited=audited, signs=signs
            )
    trained = _call(mlp, inputs.joined()) if running else None
    if transformed:
        y, J = _by_func(mlp, inputs, running)
    elif compiling:
        y, J = by_operators(mlp, inputs, running)
        if not (audited or torch.compiler.is_exporting()):
            J = _looked_at(mlp, inputs, y, J, signs)
    else:
        y, J = _by_autograd(mlp, inputs, running, audited, violations, signs)
    J = nan_rule(y.reshape(J.shape[:-1]), J.to(accumulate_dtype(J.dtype)))
    return y if trained is None else trained, J


def _by_autograd(
    mlp: nn.Module,
    inputs: Inputs,
    running: bool,
    audited: bool,
    violations: Violations | None,
    signs: Direction | None,
) -> tuple[Tensor, Tensor]:
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # A node of its own, so that no path around the network counts as a slope.
        wanted = further and any(t.requires_grad for t in inputs.blocks)
        x = inputs.joined()
        x = x.view_as(x) if wanted else x.detach().requires_grad_()
        module = partial(_call, mlp, running=running)
        call = Call(mlp, x) if further and readable(x) else None
        with ending():
            y = module(x)
        if not (y.requires_grad or audited):
            raise ValueError(WITHOUT_GRADIENT)
        repeat = call.repeat(module, y, x, wanted, inputs.columns) if call else None
        few = _while_few(y, x, inputs, violations) if repeat and violations else None
        found = few or [_slope(y, x, inputs, d, further) for d in range(_width(y, inputs))]
        # Zeros that are a leaf, so that a loss made of nothing else still has a backward.
        zeros = _no_slopes(x, inputs).requires_grad_(further and few is None)
        J = _stacked([zeros if S is None else S for S in found], zeros)
        if repeat and (few or not violations):
            J = compacted(J, repeat, x)
    if not audited and id(mlp) not in _judged:
        reached = any(s is not None for s in found)
        _judge(mlp, inputs, y.detach(), J.detach(), reached, signs)
    return (y, J) if further else (y.detach(), J)


def check_gradient(mlp: nn.Module, inputs: Inputs) -> None:
    """Raises where the output takes no part in autograd, at the price of a call."""
    check_saveable(mlp.parameters())
    with torch.enable_grad():
        x = inputs.joined().detach().requires_grad_()
        if not _call(mlp, x).requires_grad:
            raise ValueError(WITHOUT_GRADIENT)


def _while_few(
    y: Tensor, x: Tensor, inputs: Inputs, violations: Violations
) -> list[Tensor | None] | None:
    """The slopes of every output, without a graph; None as soon as so many violate that their
    gradients are cheaper with one."""
    D = _width(y, inputs)
    left = DENSE * inputs.batch.numel() * D
    found = []
    for d in range(D):
        S = _slope(y, x, inputs, d, further=False)
        found.append(S)
        wrong = violations(_no_slopes(x, inputs) if S is None else S, d, D)
        left -= int(wrong.any(-1).sum())
        if left < 0:
            return None
    return found


def _slope(y: Tensor, x: Tensor, inputs: Inputs, d: int, further: bool) -> Tensor | None:
    """The slopes (*batch, k) of output d; None where no differentiable path leads to x."""
    if not y.requires_grad:
        return None
    seed = y.new_zeros(y.shape)
    _outputs(seed, inputs)[..., d] = 1
    return slope(y, x, inputs.columns, seed, further)


def _no_slopes(x: Tensor, inputs: Inputs) -> Tensor:
    return x.new_zeros(*inputs.batch, inputs.k)


def _judge(
    mlp: nn.Module, inputs: Inputs, y: Tensor, J: Tensor, reached: bool, signs: Direction | None
) -> None:
    """Warns, once for each module, of constrained columns in which every slope J (*batch, D, k) is
    0, and says whether y moves with them all the same.

    The graph alone seldom tells that a column is not ``reached``: where another takes a
    differentiable path out of x, it gets zeros by it. So the slopes are looked at, until for once
    they can be judged: rows that all have the same y (a last layer that starts at 0) say nothing.
    On a GPU that waits for the device, which is why it is done once.
    """
    if not J.numel() or not readable(y, J):
        return
    D, k = J.shape[-2:]
    wanted = torch.ones(D, k, dtype=torch.bool, device=J.device)
    if signs is not None:
        wanted = direction_table(signs.for_network(D), D, k, J.dtype, J.device) != 0
    J, rows = J.reshape(-1, D, k), y.reshape(-1, D)
    dead = wanted & (J == 0).all(0)
    if reached and dead.any() and not (rows != rows[0]).any():
        return
    key = id(mlp)
    _judged[key] = weakref.ref(mlp, lambda _: _judged.pop(key, None))
    if not dead.any():
        return
    labels = (signs and signs.names) or inputs.numbers
    name, x = inputs.argument(inputs.like), inputs.joined().detach().reshape(-1, inputs.d)
    for said in without_slope(mlp, x, J, wanted, inputs.columns, labels):
        warnings.warn(
            f"{name}: {said}",
            RuntimeWarning,
            stacklevel=8,  # where the public function was called
        )


def readable(*tensors: Tensor) -> bool:
    """Whether their numbers can be read: not while tracing, nor while a CUDA graph is recorded."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    if any(type(t) is not Tensor or t.is_meta for t in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _by_func(mlp: nn.Module, inputs: Inputs, running: bool) -> tuple[Tensor, Tensor]:
    # Numbers cannot be read here, so slopes that are all 0 go without the warning.
    def call(x: Tensor) -> Tensor:
        return _call(mlp, x, running)

    y, pull, *_ = torch.func.vjp(call, inputs.joined())
    out = _outputs(y, inputs)
    slopes = []
    for d in range(out.shape[-1]):
        e = torch.zeros_like(out)
        e[..., d] = 1
        slopes.append(take(pull(e.reshape(y.shape))[0], inputs.columns))
    return y, _stacked(slopes, _no_slopes(out, inputs))


# What torch.compile does not trace by itself: a leaf, and the derivative by it. Where it runs them,
# on fake tensors or on real ones, autograd is at work below the operators.
_library = torch.library.Library("monokernel", "FRAGMENT")
for _signature in (
    "leaf(Tensor(a) x) -> Tensor(a)",
    "slope(Tensor y, Tensor x, int[] columns, Tensor seed, bool further) -> Tensor",
):
    _library.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))


def _leaf(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _reverse(y: Tensor, x: Tensor, columns: Columns, seed: Tensor, further: bool) -> Tensor:
    S = slope(y, x, tuple(columns), seed, further)
    return x.new_zeros(*x.shape[:-1], len(columns)) if S is None else S


_library.impl("leaf", _leaf, "CompositeImplicitAutograd")
_library.impl("slope", _reverse, "CompositeImplicitAutograd")
_LEAF, _SLOPE = torch.ops.monokernel.leaf.default, torch.ops.monokernel.slope.default


def by_operators(mlp: nn.Module, inputs: Inputs, running: bool) -> tuple[Tensor, Tensor]:
    """The same under torch.compile."""
    further = torch.is_grad_enabled()
    with _in_one_graph(), torch.enable_grad():
        x = _LEAF(inputs.joined())
        y = _call(mlp, x, running)
        if not y.requires_grad:
            raise ValueError(WITHOUT_GRADIENT)
        slopes = []
        for d in range(_width(y, inputs)):
            seed = torch.zeros_like(y)
            _outputs(seed, inputs)[..., d] = 1
            slopes.append(_SLOPE(y, x, inputs.columns, seed, further))
        J = _stacked(slopes, _no_slopes(x, inputs))
    return (y, J) if further else (y.detach(), J.detach())


# The numbers of a compiled graph can be read as it runs. Which network it was of is not known then.
_library.define("look(Tensor J, Tensor y, str name, str labels, bool[] wanted) -> Tensor")
_looked: set[tuple[Any, ...]] = set()


def _look(J: Tensor, y: Tensor, name: str, labels: str, wanted: list[bool]) -> Tensor:
    """A copy of the slopes J (*batch, D, k), of which each line of ``labels`` calls a column.
    Warns, once for each class of network, of columns in which every one that is wanted (D·k) is 0,
    as soon as that can be judged."""
    key = name, labels, *wanted
    D, k = J.shape[-2:]
    if key not in _looked and J.numel() and readable(y, J):
        dead = (J == 0).reshape(-1, D, k).all(0)
        asked = torch.tensor(wanted, device=J.device).reshape(D, k)
        columns = ((dead | ~asked).all(0) & asked.any(0)).nonzero().flatten().tolist()
        rows = y.reshape(-1, D)
        if not columns or (rows != rows[0]).any():
            _looked.add(key)
            if columns:
                s = "s" * (len(columns) > 1)
                called = labels.split("\n")
                which = ", ".join(called[c] for c in columns)
                warnings.warn(
                    f"{name.format(f'column{s} {which}')} is exactly 0. If y moves with it all the "
                    f"same, as behind {WITHOUT_DERIVATIVE}, no penalty can see that, and 0 is no "
                    "all-clear; audit() tells",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return J.clone()


_library.impl("look", _look, "CompositeExplicitAutograd")
torch.library.register_fake("monokernel::look", lambda J, *_: torch.empty_like(J), lib=_library)
torch.library.register_autograd(
    "monokernel::look", lambda ctx, g: (g, None, None, None, None), lib=_library
)
_LOOK = torch.ops.monokernel.look.default


def _looked_at(
    mlp: nn.Module, inputs: Inputs, y: Tensor, J: Tensor, signs: Direction | None
) -> Tensor:
    D, k = J.shape[-2], inputs.k
    flat = (1,) if signs is None else signs.for_network(D)
    wanted = [s != 0 for s in flat] * (D * k // len(flat))
    argument = "x1" if len(inputs.blocks) == 1 else "x2"
    name = f"{argument}: in {{}} every slope of mlp ({type(mlp).__name__})"
    called = (signs and signs.names) or inputs.numbers
    labels = "\n".join([str(label).replace("\n", " ") for label in called])
    return _LOOK(J, y.detach(), name, labels, wanted)  # type: ignore[no-any-return]


def _in_one_graph() -> AbstractContextManager[Any]:
    """From the leaf to the slopes: in a graph of their own, slopes would be 0."""
    if torch.compiler.is_dynamo_compiling():
        return torch._dynamo.error_on_graph_break(True)
    return nullcontext()


def _stacked(slopes: list[Tensor], zeros: Tensor) -> Tensor:
    """J (*batch, D, k) of the slopes (*batch, k) of each output; there may be none."""
    return torch.stack(slopes, -2) if slopes else zeros.unsqueeze(-2)[..., :0, :]


def _call(mlp: nn.Module, x: Tensor, running: bool = False) -> Tensor:
    batch, modules = x.shape[:-1], parts(mlp)
    with (
        uncompiled(modules),
        _attention(modules),
        _recurrent(modules),
        _by_running_statistics(mlp) if running else nullcontext(),
    ):
        y = mlp(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"mlp: expected to return a tensor, got {type(y).__name__}")
    if y.shape != batch and (y.dim() == 0 or y.shape[:-1] != batch):
        raise ValueError(
            f"mlp: expected an output of shape {(*batch, 'D')} for inputs of leading shape "
            f"{tuple(batch)}, got {tuple(y.shape)}"
        )
    return y


def _outputs(y: Tensor, inputs: Inputs) -> Tensor:
    """y as (*batch, D); a network that squeezes its one output has D = 1."""
    return y.unsqueeze(-1) if y.shape == inputs.batch else y


def _width(y: Tensor, inputs: Inputs) -> int:
    return _outputs(y, inputs).shape[-1]


@contextmanager
def _by_running_statistics(mlp: nn.Module) -> Iterator[None]:
    """Batch normalisations in evaluation mode. They get copies of their statistics: autograd keeps
    what they used, and the next training step must not change that under a backward to come."""
    layers = [m for m in parts(mlp) if isinstance(m, _BatchNorm) and m.training]
    kept: list[Any] = [(m.running_mean, m.running_var) for m in layers]  # planning saw to it
    try:
        for m, (mean, var) in zip(layers, kept, strict=True):
            m.training, m.running_mean, m.running_var = False, mean.clone(), var.clone()
        yield
    finally:
        for m, (mean, var) in zip(layers, kept, strict=True):
            m.training, m.running_mean, m.running_var = True, mean, var


# Fused attention and cuDNN's recurrent layers have no second derivative; others have.


def _attention(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    used = any(isinstance(m, fused) for m in modules)
    return sdpa_kernel(SDPBackend.MATH) if used else nullcontext()


def _recurrent(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    used = torch.backends.cudnn.enabled and any(isinstance(m, nn.RNNBase) for m in modules)
    return torch.backends.cudnn.flags(enabled=False) if used else nullcontext()
