"""The training step in every way a user might write it: task loss, penalty, backward.

Each rival is a function from a job to a step; running the step leaves the gradients in ``job.net``
and returns the loss. Those that compute another function (architectures that are
monotone by construction) say so and are compared by cost alone.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monokernel import fused_mono_penalty, plan

from .cases import FREE_INPUTS, Case, Job

__all__ = [
    "BASE",
    "COMPILED_JVP",
    "COMPILED_PLAIN",
    "JAX",
    "MONOKERNEL",
    "PLAIN",
    "Rival",
    "Step",
    "ours",
    "penalised_loss",
    "plain_loss",
    "rivals",
    "step_of",
    "usual",
]

PLAIN = "PyTorch plain step"
# PyTorch (2.11 to 2.14 at least) traces torch.autograd.grad into the graph if asked to.
TRACES_GRADIENTS = "trace_autograd_ops"


@dataclass
class Step:
    """``run`` does one whole step; ``outcome`` runs it and gives loss and flat gradient."""

    run: Callable[[], object]
    outcome: Callable[[], tuple[float, Tensor]]


@dataclass(frozen=True)
class Rival:
    """``make`` prepares a step for a job; ``bytes_needed`` estimates its memory where that can be
    too much for a machine; ``compiled`` says that the first call compiles for its shapes;
    ``pools`` that it then keeps its buffers, so that the peak of a step does not show them."""

    name: str
    make: Callable[[Job], Step]
    bytes_needed: Callable[[Case], float] = lambda case: 0.0
    penalised: bool = True
    same_function: bool = True
    compiled: bool = False
    pools: bool = False


def step_of(
    job: Job, loss_of: Callable[[], Tensor], parameters: list[nn.Parameter] | None = None
) -> Step:
    """The step of an eager loss: gradients anew, loss, backward."""
    params = parameters or job.parameters()

    def run() -> Tensor:
        for p in params:
            p.grad = None
        loss = loss_of()
        loss.backward()
        return loss

    def outcome() -> tuple[float, Tensor]:
        loss = run().item()
        return loss, torch.cat([p.grad.flatten() for p in params if p.grad is not None])

    return Step(run, outcome)


def plain_loss(job: Job) -> Tensor:
    return job.task_loss(job.net(torch.cat([job.x1, job.x2], -1)))


def plain(job: Job) -> Step:
    return step_of(job, lambda: plain_loss(job))


def penalised_loss(job: Job, backend: str = "auto", mode: str = "auto") -> Tensor:
    y, penalty = fused_mono_penalty(
        job.net,
        job.x1,
        job.x2,
        margin=job.margin,
        return_output=True,
        backend=backend,
        mode=mode,
    )
    return job.loss(y, penalty)


def monokernel(backend: str, mode: str = "auto") -> Callable[[Job], Step]:
    return lambda job: step_of(job, lambda: penalised_loss(job, backend, mode))


def _loop_loss(job: Job, x2: Tensor) -> Tensor:
    y = job.net(torch.cat([job.x1, x2], -1))
    penalty: Tensor | float = 0.0
    for d in range(y.shape[1]):
        (slope,) = torch.autograd.grad(y[:, d].sum(), x2, create_graph=True)
        penalty = penalty + job.hinge(slope)
    return job.loss(y, penalty)


def double_backward(job: Job) -> Step:
    """One differentiable backward pass for each output: the recipe that is right for any D."""
    return step_of(job, lambda: _loop_loss(job, job.x2.detach().requires_grad_()))


def sum_of_outputs(job: Job) -> Step:
    """One differentiable backward pass for the sum of the outputs: right only for one output."""

    def loss() -> Tensor:
        x2 = job.x2.detach().requires_grad_()
        y = job.net(torch.cat([job.x1, x2], -1))
        (slope,) = torch.autograd.grad(y.sum(), x2, create_graph=True)
        return job.loss(y, job.hinge(slope))

    return step_of(job, loss)


def func_jvp(job: Job) -> Step:
    """Forward mode, one pass for each column, and reverse mode through it."""

    def loss() -> Tensor:
        def f(x2: Tensor) -> Tensor:
            y: Tensor = job.net(torch.cat([job.x1, x2], -1))
            return y

        penalty: Tensor | float = 0.0
        for c in range(job.case.columns):
            direction = torch.zeros_like(job.x2)
            direction[:, c] = 1
            y, slope = torch.func.jvp(f, (job.x2,), (direction,))[:2]
            penalty = penalty + job.hinge(slope)
        return job.loss(y, penalty)

    return step_of(job, loss)


def vmap_jacrev(job: Job) -> Step:
    """The Jacobian of one row, mapped over the rows."""

    def row(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y = job.net(torch.cat([x1, x2], -1))
        return y, y

    slopes_and_output = torch.func.vmap(torch.func.jacrev(row, argnums=1, has_aux=True))

    def loss() -> Tensor:
        slopes, y = slopes_and_output(job.x1, job.x2)
        return job.loss(y, job.hinge(slopes))

    return step_of(job, loss)


# --- under torch.compile --------------------------------------------------------------------------


def compiled(loss_of: Callable[[Job], Tensor]) -> Callable[[Job], Step]:
    """The backward of a compiled loss is compiled with it."""

    def make(job: Job) -> Step:
        fast = torch.compile(loss_of, fullgraph=True, dynamic=False)
        return step_of(job, lambda: fast(job))

    return make


def compiled_double_backward(job: Job) -> Step:
    """Whole, which needs a switch that is off by default and x2 made a leaf outside the graph."""
    x2 = job.x2.detach().requires_grad_()
    fast = torch.compile(_loop_loss, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch({TRACES_GRADIENTS: True}):
        fast(job, x2)
    return step_of(job, lambda: fast(job, x2))


Layers = list[tuple[Tensor, Tensor]]


def _derivative(activation: str, a: Tensor) -> Tensor:
    if activation == "relu":
        return (a > 0).to(a.dtype)
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _layers(job: Job) -> Layers:
    return [(m.weight, m.bias) for m in job.net if isinstance(m, nn.Linear)]


def _jvp_loss(job: Job) -> Tensor:
    """Value and all k tangents forward, by hand; PyTorch differentiates and compiles the whole."""
    layers = _layers(job)
    h, h_dot = torch.cat([job.x1, job.x2], -1), None
    value = F.relu if job.case.activation == "relu" else F.silu
    for l, (W, b) in enumerate(layers):
        a = F.linear(h, W, b)
        a_dot = W[:, FREE_INPUTS:].t().unsqueeze(1) if h_dot is None else F.linear(h_dot, W)
        if l == len(layers) - 1:
            return job.loss(a, job.hinge(a_dot))
        h, h_dot = value(a), _derivative(job.case.activation, a) * a_dot
    raise AssertionError("no layers")


def _vjp_loss(job: Job) -> Tensor:
    """Value forward and the one output's slopes backward, by hand."""
    layers = _layers(job)
    h, derivatives = torch.cat([job.x1, job.x2], -1), []
    value = F.relu if job.case.activation == "relu" else F.silu
    for W, b in layers[:-1]:
        a = F.linear(h, W, b)
        derivatives.append(_derivative(job.case.activation, a))
        h = value(a)
    W, b = layers[-1]
    y, p = F.linear(h, W, b), W
    for derivative, (W, _) in zip(reversed(derivatives), reversed(layers[:-1]), strict=True):
        p = (derivative * p) @ W
    return job.loss(y, job.hinge(p[:, FREE_INPUTS:]))


# --- architectures that are monotone by construction: another function, compared by cost ----------


class PositiveWeights(nn.Module):
    """Weights made non-negative wherever the monotone inputs pass: x2's columns of the first layer
    and every later layer."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        h = torch.cat([x1, x2], -1)
        first = True
        for m in self.net:
            if isinstance(m, nn.Linear):
                W = m.weight
                W = (
                    torch.cat([W[:, :FREE_INPUTS], W[:, FREE_INPUTS:].abs()], 1)
                    if first
                    else W.abs()
                )
                h, first = F.linear(h, W, m.bias), False
            else:
                h = m(h)
        return h


def positive_weights(job: Job) -> Step:
    net = PositiveWeights(job.net)
    return step_of(job, lambda: job.task_loss(net(job.x1, job.x2)))


def lipschitz_monotone(job: Job) -> Step:
    """monotonicnetworks: weight-normalised layers, GroupSort, and a linear term in x2."""
    import monotonicnetworks as lmn

    case = job.case
    layers: list[nn.Module] = []
    inputs = FREE_INPUTS + case.columns
    for l in range(case.depth + 1):
        outputs = case.width if l < case.depth else case.outputs
        layers.append(lmn.LipschitzLinear(inputs, outputs, kind="inf" if l else "one-inf"))
        if l < case.depth:
            layers.append(lmn.GroupSort(2))
        inputs = outputs
    net = lmn.MonotonicWrapper(
        nn.Sequential(*layers), monotonic_constraints=[0] * FREE_INPUTS + [1] * case.columns
    )
    params = list(net.parameters())
    return step_of(job, lambda: job.task_loss(net(torch.cat([job.x1, job.x2], -1))), params)


# --- JAX ------------------------------------------------------------------------------------------


def jax_jit(job: Job) -> Step:
    """``jit`` of ``value_and_grad`` over forward mode, or over reverse mode where D = 1."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes the whole card
    import jax
    import jax.numpy as jnp

    case = job.case
    if (jax.default_backend() == "cpu") != (job.device == "cpu"):
        raise RuntimeError(f"JAX runs on the {jax.default_backend()} here")
    if job.device != "cpu":
        exact = {"fp32": "highest", "tf32": "tensorfloat32"}.get(case.precision)
        jax.config.update("jax_default_matmul_precision", exact)
    dtype = {"fp16": jnp.float16, "bf16": jnp.bfloat16}.get(case.precision, jnp.float32)

    def array(t: Tensor) -> jax.Array:
        """Through float32: NumPy has no bfloat16."""
        return jnp.asarray(t.detach().float().cpu().numpy(), dtype)

    params = [array(p) for p in job.parameters()]
    x1, x2, target = array(job.x1), array(job.x2), array(job.target)
    value = jax.nn.relu if case.activation == "relu" else jax.nn.silu

    def f(params: list[jax.Array], x1: jax.Array, x2: jax.Array) -> jax.Array:
        h = jnp.concatenate([x1, x2], -1)
        for l in range(case.depth + 1):
            h = h @ params[2 * l].T + params[2 * l + 1]
            h = value(h) if l < case.depth else h
        return h

    def loss(params: list[jax.Array], x1: jax.Array, x2: jax.Array, t: jax.Array) -> jax.Array:
        if case.mode == "adjoint":
            y, pull = jax.vjp(lambda x2: f(params, x1, x2), x2)
            (slopes,) = pull(jnp.ones_like(y))
        else:
            # A push for each column: vmap over them, jacfwd and jacrev took 1.3 to 6 times as long.
            y, push = jax.linearize(lambda x2: f(params, x1, x2), x2)
            columns = jnp.eye(case.columns, dtype=dtype)
            slopes = jnp.stack([push(jnp.broadcast_to(e, x2.shape)) for e in columns])
        penalty = jax.nn.relu(job.margin - slopes).sum(dtype=jnp.float32)
        return (jnp.square(y - t).sum(dtype=jnp.float32) + penalty) / case.rows

    step = jax.jit(jax.value_and_grad(loss))

    def run() -> object:
        return jax.block_until_ready(step(params, x1, x2, target))

    def outcome() -> tuple[float, Tensor]:
        value, gradients = step(params, x1, x2, target)
        flat = jnp.concatenate([g.ravel() for g in gradients]).astype(jnp.float32)
        return float(value), torch.from_numpy(jax.device_get(flat).copy()).to(job.device)

    return Step(run, outcome)


# --- the list -------------------------------------------------------------------------------------


def _jacobian_bytes(case: Case) -> float:
    """Batched chains of all outputs, kept for the backward: about six tensors for each layer."""
    return 24.0 * case.rows * case.width * case.depth * max(case.outputs, 1)


BASE = Rival(PLAIN, plain, penalised=False)
MONOKERNEL = Rival("monokernel", monokernel("auto"))
COMPILED_PLAIN = Rival("compiled plain step", compiled(plain_loss), penalised=False, compiled=True)
COMPILED_JVP = Rival("compiled hand-written jvp", compiled(_jvp_loss), compiled=True)
JAX = Rival("JAX jit", jax_jit, compiled=True)


def ours(job: Job, mode: str = "auto") -> Iterator[Rival]:
    """monokernel by every backend that serves the job on this machine."""
    for backend in ("triton", "cpu", "torch"):
        if backend == "triton" and job.device == "cpu":
            continue  # its interpreter is for tests
        if not plan(job.net, job.x1, job.x2, backend=backend).serves:
            continue
        suffix = "" if mode == "auto" else f", {mode} mode"
        yield Rival(f"monokernel {backend}{suffix}", monokernel(backend, mode))


def usual(job: Job) -> Rival:
    """What people write today."""
    if job.case.outputs == 1:
        return Rival("sum of outputs", sum_of_outputs)
    return Rival("loop of double backward", double_backward, bytes_needed=_jacobian_bytes)


def rivals(job: Job, with_compiled: bool, with_peers: bool) -> Iterator[Rival]:
    """Those that compute the job's loss, and the peers, as far as this machine has them."""
    yield BASE
    yield from ours(job)
    yield usual(job)
    yield Rival("torch.func.jvp", func_jvp)
    yield Rival("vmap(jacrev)", vmap_jacrev, bytes_needed=_jacobian_bytes)
    if with_compiled:
        torch._dynamo.reset()
        yield COMPILED_PLAIN
        yield Rival("compiled monokernel", compiled(penalised_loss), compiled=True, pools=True)
        if hasattr(torch._dynamo.config, TRACES_GRADIENTS):
            yield Rival("compiled double backward", compiled_double_backward, compiled=True)
        yield COMPILED_JVP
        if job.case.outputs == 1:
            yield Rival("compiled hand-written vjp", compiled(_vjp_loss), compiled=True)
    if not with_peers:
        return
    if job.device == "cpu" and importlib.util.find_spec("jax"):
        yield JAX
    yield Rival("positive weights", positive_weights, penalised=False, same_function=False)
    if importlib.util.find_spec("monotonicnetworks"):
        yield Rival("monotonicnetworks", lipschitz_monotone, penalised=False, same_function=False)
