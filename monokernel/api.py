"""The public calls: check the arguments, choose who serves, run it, give it its shape."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import capture
from . import hinge as hinges
from .again import keep, repeated, twice
from .arguments import (
    BACKEND_CHOICES,
    BATCH_STATS,
    MODES,
    AskedBackend,
    AskedBatchStats,
    AskedHinge,
    AskedMode,
    AskedReduction,
    Direction,
    Inputs,
    Names,
    check_choice,
    check_chosen,
    check_constraints,
    check_hinge,
    check_inputs,
    check_module,
    check_multiplier,
    check_named,
    check_penalty,
    check_weight,
    plain,
)
from .backends import BACKENDS, general, reference
from .boundary import evaluate, operand_dtype
from .columns import take
from .network import unwrap
from .operands import check_saveable, has_memory, kernel_weight, traced
from .planning import Route, choose, not_read
from .problem import Hinge, Problem, accumulate_dtype
from .reading import Reading

__all__ = ["MonotonePenalty", "fused_mono_penalty", "value_and_jacobian"]


@overload
def fused_mono_penalty(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor | None = ...,
    *,
    direction: Any = ...,
    columns: Any = ...,
    margin: Any = ...,
    hinge: AskedHinge = ...,
    weight: Tensor | float | None = ...,
    reduction: AskedReduction = ...,
    return_output: Literal[False] = ...,
    mode: AskedMode = ...,
    backend: AskedBackend = ...,
    batch_stats: AskedBatchStats = ...,
) -> Tensor: ...


@overload
def fused_mono_penalty(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor | None = ...,
    *,
    direction: Any = ...,
    columns: Any = ...,
    margin: Any = ...,
    hinge: AskedHinge = ...,
    weight: Tensor | float | None = ...,
    reduction: AskedReduction = ...,
    return_output: Literal[True],
    mode: AskedMode = ...,
    backend: AskedBackend = ...,
    batch_stats: AskedBatchStats = ...,
) -> tuple[Tensor, Tensor]: ...


def fused_mono_penalty(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    direction: Any = 1,
    columns: Any = None,
    margin: Any = 0.0,
    hinge: AskedHinge = "linear",
    weight: Tensor | float | None = None,
    reduction: AskedReduction = "sum",
    return_output: bool = False,
    mode: AskedMode = "auto",
    backend: AskedBackend = "auto",
    batch_stats: AskedBatchStats = "error",
) -> Tensor | tuple[Tensor, Tensor]:
    """Penalty on every slope ∂y/∂x2 of ``y = mlp(cat[x1, x2])`` that has the wrong sign.

    Sums ``weight · h(margin - direction · ∂y[n, d]/∂x2[n, c])`` over rows n, outputs d and columns
    c, with h = relu ("linear") or relu² ("squared"). One forward serves y and the slopes; the
    backward is first-order, so nothing is differentiated twice. Rows of the batch must not
    influence each other.

    Args:
        mlp: called as ``mlp(torch.cat([x1, x2], -1))``, output (..., D). Chains of Linear layers
            and element-wise activations are fused. A forward of one's own is run on symbols and
            served as the program of row-wise operations that it is; what is none takes the general
            path.
        x1: the free inputs (..., d1), floating point; d1 may be 0. Where x2 is left out all inputs
            x (..., d), of which ``direction`` says which are constrained.
        x2: the monotone inputs (..., k), or (...,) read as k = 1; shape, dtype and device go with
            x1.
        direction: +1 the output must not decrease, -1 must not increase, 0 free: a scalar, (k,) or
            (D, k), as numbers or a tensor (which is read to the host). Where x2 is left out (d,) or
            (D, d): k are then the columns that any output constrains, in the order of x. In either
            case also a mapping (a dict, a pandas Series) from a column to its sign, or to its (D,)
            signs: 0 for what it does not name.
        columns: the names of the columns of x, or of x2 if it is given, by which a mapping names
            them; without it they go by their numbers.
        margin: the slope, in its direction, from which on there is no penalty: a number, (k,) or
            (D, k), or a mapping as ``direction`` (0 for what it does not name).
        hinge: "linear" or "squared".
        weight: multiplies the penalties: a number or a tensor that broadcasts to (D, k) or
            (..., D, k), one multiplier per constraint say, or (...,), one for each row; not below
            0, which is looked at on the CPU alone (under torch.compile by an assertion in the
            graph). Gradients reach it if it requires them.
        reduction: "sum"; "mean" over the constrained entries (0 where there are none, no row say);
            "none" gives (..., D, k).
        return_output: also return y, which shares the forward.
        mode: "tangent" (one pass per column), "adjoint" (one chain per output) or "auto", the
            cheaper of the two.
        backend: "auto", "triton", "cpu", "torch" (hand-written backward in PyTorch operations) or
            "reference" (autograd, all orders of derivative).
        batch_stats: "error", or "running" for a network with BatchNorm in training mode: y by the
            statistics of the batch, as the module gives it in training, and slopes by the running
            statistics after this call's update, those of the network in evaluation mode. That is a
            second call of the module: active dropout draws another mask for the slopes.

    Returns:
        ``penalty``, or ``(y, penalty)`` with ``return_output=True``. The penalty is float32 for
        half-precision networks, else of the network's dtype.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came;
            also for a backend asked for by name that cannot serve.

    Warns:
        RuntimeWarning: once for each network, of constrained columns that its forward does not
            use; and on the general path of those in which every slope is exactly 0, of all outputs
            or of some: behind an embedding or a rounding say, where no penalty can see whether y
            rises. It says whether y moves with them. Under torch.compile once for each class of
            network on the general path, and of columns alone; not in a functorch transform, where
            numbers cannot be read.
    """
    route = mode, backend, batch_stats
    asked = direction, columns, hinge, reduction, *route
    found = repeated(mlp, x1, x2, margin, weight, asked)
    if found is not None:
        y, penalty, problem = found
        if reduction == "mean":
            assert problem.hinge is not None
            N, signs = y.shape[:-1].numel(), problem.hinge.direction
            penalty = hinges.mean(penalty, signs, N, problem.D, problem.k)
        return (y, penalty) if return_output else penalty
    mlp, inputs = unwrap(mlp), check_inputs(x1, x2)
    inputs, given, own, _ = check_constraints(inputs, direction, columns, margin)
    static = check_hinge(given.flat, own, hinge, reduction)
    y, penalty = twice(_serve, mlp, inputs, weight, given, static, *route)
    keep(mlp, inputs, margin, asked, route, static)
    if reduction == "mean":
        D = y.shape[-1] if y.dim() == inputs.like.dim() else 1
        penalty = hinges.mean(penalty, static.direction, math.prod(inputs.batch), D, inputs.k)
    return (y, penalty) if return_output else penalty


def value_and_jacobian(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    columns: Any = None,
    names: Any = None,
    mode: AskedMode = "auto",
    backend: AskedBackend = "auto",
    batch_stats: AskedBatchStats = "error",
) -> tuple[Tensor, Tensor]:
    """y = mlp(cat[x1, x2]) and its slopes, for losses of one's own.

    Args:
        mlp, x1, x2, mode, backend, batch_stats: as for ``fused_mono_penalty``.
        columns: where x2 is left out, the k columns of x in which slopes are wanted: numbers, or
            names; all of them if it is left out too.
        names: the d names by which ``columns`` names them.

    Returns:
        y (..., D) and ∂y/∂x2 (..., D, k), or the slopes in ``columns`` in their order; float32 for
        half-precision networks. Both are differentiable once (to all orders with
        ``backend="reference"``).
    """
    route = mode, backend, batch_stats
    asked = columns, names, *route
    found = repeated(mlp, x1, x2, 0.0, None, asked)
    if found is not None:
        return found[:2]
    mlp = unwrap(mlp)
    inputs, order = check_inputs(x1, x2), None
    if columns is None and names is not None:
        check_named(inputs, names)
    if columns is not None:
        inputs, order = check_chosen(inputs, columns, names)
    y, J = twice(_serve, mlp, inputs, None, Direction((1,), ()), None, *route)
    if order is not None:
        return y, take(J, order)
    keep(mlp, inputs, 0.0, asked, route, None)
    return y, J


class MonotonePenalty(nn.Module):
    """A network together with its penalty: ``forward(x1, x2)`` or ``forward(x)`` gives
    ``(y, penalty)`` in training mode and ``y`` alone in evaluation mode.

    In evaluation mode it is ``mlp(cat[x1, x2])`` and nothing else, which ``torch.export``, ONNX and
    ``torch.jit.trace`` take; ``fused_mono_penalty(model.mlp, …)`` has the penalty there. An
    ordinary module around ``mlp``, so that DistributedDataParallel, FSDP, Lightning and
    ``torch.compile`` wrap it as they wrap any other. The arguments are those of
    ``fused_mono_penalty``; a tensor ``direction`` is read once, here, and a tensor ``weight``
    is a buffer that moves with the module. ``direction``, ``columns`` and ``margin`` are saved with
    the parameters: ``load_state_dict`` brings those that the saved module had.

    Args:
        mlp: the network; ``.mlp`` afterwards.
    """

    weight: Tensor | None
    columns: Names | None = None

    def __init__(
        self,
        mlp: nn.Module,
        *,
        direction: Any = 1,
        columns: Any = None,
        margin: Any = 0.0,
        hinge: AskedHinge = "linear",
        weight: Tensor | float | None = None,
        reduction: AskedReduction = "sum",
        mode: AskedMode = "auto",
        backend: AskedBackend = "auto",
        batch_stats: AskedBatchStats = "error",
    ) -> None:
        super().__init__()
        check_module(mlp)
        self.mlp = mlp
        self.direction, self.margin = plain(direction), plain(margin)
        self.columns = check_penalty(self.direction, columns, self.margin)
        check_hinge((), 0.0, hinge, reduction)
        check_choice("mode", mode, MODES)
        check_choice("backend", backend, BACKEND_CHOICES)
        check_choice("batch_stats", batch_stats, BATCH_STATS)
        self.hinge, self.reduction = hinge, reduction
        self.mode, self.backend, self.batch_stats = mode, backend, batch_stats
        if isinstance(weight, (int, float)):
            floating = (p.dtype for p in mlp.parameters() if p.is_floating_point())
            dtype = accumulate_dtype(next(floating, torch.get_default_dtype()))
            weight = torch.tensor(weight, dtype=dtype)
        check_multiplier(weight)
        self.register_buffer("weight", weight)

    def forward(self, x1: Tensor, x2: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y (..., D) and the penalty of ``x1`` (..., d1), ``x2`` (..., k), or of x (..., d); y
        alone in evaluation mode."""
        if not self.training:
            y: Tensor = self.mlp(_whole(x1, x2))
            return y
        if _written_down():
            raise ValueError(
                "MonotonePenalty: expected evaluation mode (.eval()), which gives y alone, to be "
                "exported or traced, got training mode"
            )
        return fused_mono_penalty(
            self.mlp,
            x1,
            x2,
            direction=self.direction,
            columns=self.columns,
            margin=self.margin,
            hinge=self.hinge,
            weight=self.weight,
            reduction=self.reduction,
            return_output=True,
            mode=self.mode,
            backend=self.backend,
            batch_stats=self.batch_stats,
        )

    def get_extra_state(self) -> Any:
        """What is constrained, as plain Python."""
        if torch.onnx.is_in_onnx_export():  # by TorchScript, which takes tensors alone
            return torch.empty(0)
        return {"direction": self.direction, "columns": self.columns, "margin": self.margin}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Of the module that was saved."""
        self.direction, self.columns = state["direction"], state["columns"]
        self.margin = state["margin"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # What was saved before this was a part of it has none, and keeps what it was made with.
        if (key := f"{prefix}_extra_state") not in state_dict:
            state_dict = {**state_dict, key: self.get_extra_state()}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        columns = "" if self.columns is None else f", columns={self.columns}"
        return f"direction={self.direction}{columns}, margin={self.margin}, hinge={self.hinge!r}"


def _written_down() -> bool:
    """Whether it is exported or traced."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None


def _whole(x1: Tensor, x2: Tensor | None) -> Tensor:
    """x itself; a trace would keep the outcome of a check as a constant, and warn of it."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
        return check_inputs(x1, x2).joined()
    if x2 is None:
        return x1
    return torch.cat([x1, x2 if x2.dim() == x1.dim() else x2.unsqueeze(-1)], -1)


def _serve(
    mlp: nn.Module,
    inputs: Inputs,
    weight: Tensor | float | None,
    signs: Direction,
    hinge: Hinge | None,
    mode: AskedMode,
    backend: AskedBackend,
    batch_stats: AskedBatchStats,
) -> tuple[Tensor, Tensor]:
    """y (..., D), or as ``mlp`` squeezes it, and the penalty, or J where there is no hinge."""
    route = choose(mlp, inputs, mode, backend, batch_stats)
    if route.broken:
        asked = mlp, inputs, weight, signs, hinge, mode, backend, batch_stats
        return capture.aside(_serve, route.broken, *asked)
    if route.captured:
        return capture.call(_serve, mlp, inputs, weight, signs, hinge, mode, backend, batch_stats)
    if type(route.network) is Reading and id(mlp) not in _looked_at:
        _look_at(mlp, inputs, route, signs)
    if hinge is None:
        return slopes(mlp, inputs, route)
    if route.network is None or route.backend == "reference":
        y, J = slopes(mlp, inputs, route, _violations(signs, hinge, weight, inputs), signs)
        D, k = J.shape[-2:]
        signs.for_network(D)
        penalty = hinges.penalties(J, hinge, check_weight(weight, inputs.like, D, k))
        return y, penalty if hinge.elementwise else penalty.sum()
    D = route.network.nodes[-1].width
    signs.for_network(D)
    return _fused(inputs, route, hinge, check_weight(weight, inputs.like, D, inputs.k))


# Networks of which it was said, or needs not be, that they do not use a constrained column.
_looked_at: dict[int, weakref.ref[nn.Module]] = {}


def _look_at(mlp: nn.Module, inputs: Inputs, route: Route, signs: Direction) -> None:
    """Warns, once for each network that is fused, of columns that it does not use."""
    if type(mlp) is capture.Captured:
        return
    key = id(mlp)
    _looked_at[key] = weakref.ref(mlp, lambda _: _looked_at.pop(key, None))
    for said in not_read(mlp, inputs, route, signs):
        name = inputs.argument(inputs.like)
        warnings.warn(f"{name}: {said}", RuntimeWarning, stacklevel=5)  # who called the public one


def slopes(
    mlp: nn.Module,
    inputs: Inputs,
    route: Route,
    violations: general.Violations | None = None,
    signs: Direction | None = None,
) -> tuple[Tensor, Tensor]:
    """y (..., D), or as ``mlp`` squeezes it, and J (..., D, k) by the backend of the route."""
    if route.network is None:
        return general.value_and_jacobian(
            mlp, inputs, route.transformed, route.running, violations=violations, signs=signs
        )
    if route.backend != "reference":
        return _fused(inputs, route, None, None)
    problem, x, params = _problem(inputs, route, None)
    aside = route.transformed or torch.compiler.is_compiling()
    if not (aside or torch.is_inference_mode_enabled()):
        check_saveable(params)
    y, J = reference.value_and_jacobian(problem, x, params)
    return _output(y, inputs, route), _leading(J, inputs)


def _violations(
    signs: Direction, hinge: Hinge, weight: Tensor | float | None, inputs: Inputs
) -> general.Violations:
    """Which slopes (..., k) of output d of D have a penalty."""

    def violate(S: Tensor, d: int, D: int) -> Tensor:
        k, flat, margin = inputs.k, signs.for_network(D), hinge.margin
        row = slice(d * k, d * k + k)
        if isinstance(margin, tuple) and len(margin) > k:
            margin = margin[row]
        own = hinge._replace(direction=flat[row] if len(flat) > k else flat, margin=margin)
        factor = check_weight(weight, inputs.like, D, k)
        if factor is not None:
            factor = factor.detach().expand(*inputs.batch, D, k)[..., d : d + 1, :]
        J = S.detach().unsqueeze(-2)
        return hinges.penalties(J, own, factor).squeeze(-2) != 0

    return violate


def _fused(
    inputs: Inputs, route: Route, hinge: Hinge | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (..., D) and the reduced penalty (or J) by a hand-written backend."""
    reduce = hinge is not None and not hinge.elementwise
    # A weight that wants a gradient, or is a subclass with operations of its own, is multiplied
    # outside: both are PyTorch's business.
    own = weight is not None and (
        weight.requires_grad or not (has_memory(weight) or traced(weight))
    )
    outside = weight if own else None
    if hinge is not None and outside is not None:
        hinge = Hinge(hinge.direction, hinge.margin, hinge.squared, True)
    problem, x, params = _problem(inputs, route, hinge)
    inside = None if outside is not None else kernel_weight(weight, inputs.like, problem)
    y, out = evaluate(problem, route.backend, x, inside, params)
    if inputs.autocast:  # the backend may have computed in a wider one
        y = y.to(inputs.like.dtype if _unrounded(route) else operand_dtype(inputs.like))
    y = _output(y, inputs, route)
    if out.dim():
        out = _leading(out, inputs)
    if outside is not None:
        out = hinges.weighted(out, outside)
    return y, out.sum() if reduce and out.dim() else out


def _unrounded(route: Route) -> bool:
    """Whether the output keeps the dtype of the input under autocast."""
    return isinstance(route.network, Reading) and route.network.rounded is False


def _problem(
    inputs: Inputs, route: Route, hinge: Hinge | None
) -> tuple[Problem, Tensor, list[Tensor | None]]:
    """The problem, its rows x (N, d) and its parameters, under autocast in the dtypes in which the
    backend computes."""
    network = route.network
    assert network is not None
    problem = Problem(inputs.d, network.nodes, inputs.columns, route.mode, hinge)
    x, params = network.operands(inputs.joined())
    if inputs.autocast:  # without it all dtypes are known to be equal
        dtype = linear = operand_dtype(x)
        way = BACKENDS[route.backend].autocast if route.backend in BACKENDS else "chains"
        if way == "wide":
            dtype = linear = accumulate_dtype(dtype)
        elif way == "mixed" and isinstance(network, Reading) and network.rounded is not None:
            dtype, problem = x.dtype, problem._replace(cast=linear)
        layers = {p for node in network.nodes if node.kind == "linear" for p in node.params}
        x, params = (
            x.to(dtype),
            [
                None if p is None else p.to(linear if i in layers else dtype)
                for i, p in enumerate(params)
            ],
        )
    return problem, x, params


def _output(y: Tensor, inputs: Inputs, route: Route) -> Tensor:
    """y (N, D) in the shape that ``mlp`` gives it."""
    y = _leading(y, inputs)
    return y.squeeze(-1) if route.network is not None and route.network.squeezed else y


def _leading(t: Tensor, inputs: Inputs) -> Tensor:
    """(N, …) back to (*batch, …)."""
    return t if len(inputs.batch) == 1 else t.reshape(*inputs.batch, *t.shape[1:])
