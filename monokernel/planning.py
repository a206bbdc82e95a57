"""Who serves a call, and for each backend refused, why. ``plan`` shows it to the user."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import network
from .arguments import BACKENDS, MODES, Inputs, check_choice, check_inputs, check_module
from .backends import DEVICES, MODULES, refusal
from .function import operand_dtype, transformed
from .problem import Mode, cheaper_mode

__all__ = ["Plan", "Route", "choose", "plan"]


@dataclass(frozen=True)
class Route:
    """The decision for one call. ``chain`` is None on the general path."""

    backend: str
    mode: Mode
    chain: network.Chain | None
    transformed: bool
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What would serve a call: ``backend``, ``mode`` and ``kernel``, and for every other backend
    that was considered the reason it was ``refused``. Prints as a few readable lines."""

    backend: str
    mode: str
    kernel: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, mode {self.mode}: {self.kernel}"]
        lines += [f"  not {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


KERNELS = {
    "triton": "fused Triton kernels",
    "cpu": "native C++ kernel",
    "torch": "hand-written backward in PyTorch operations",
    "reference": "autograd through the layer-by-layer reference",
    "general": "autograd through one call of the module",
}


def plan(
    mlp: nn.Module, x1: Tensor, x2: Tensor, *, mode: str = "auto", backend: str = "auto"
) -> Plan:
    """Which backend, mode and kernel would serve ``fused_mono_penalty(mlp, x1, x2)``, and why no
    other. Runs nothing of the network. ``x1`` (..., d1), ``x2`` (..., k) as there."""
    inputs = check_inputs(x1, x2)
    route = choose(network.unwrap(mlp), inputs, mode, backend)
    kernel = KERNELS["general" if route.chain is None else route.backend]
    return Plan(route.backend, route.mode, kernel, dict(route.refused))


def choose(mlp: nn.Module, inputs: Inputs, mode: str, backend: str) -> Route:
    """The route of a call; raises where ``backend`` was asked for by name and cannot serve."""
    check_choice("mode", mode, MODES)
    check_choice("backend", backend, BACKENDS)
    check_module(mlp)
    functional = transformed()
    chain = network.read(mlp)
    if isinstance(chain, str):
        return _general(mlp, chain, mode, backend, functional)
    _check_chain(chain, inputs)
    D, k = chain.widths[-1], inputs.k
    chosen: Mode = cheaper_mode(D, k) if mode == "auto" else mode  # type: ignore[assignment]
    refused: dict[str, str] = {}
    device = inputs.x2.device.type
    for name in MODULES if backend == "auto" else (backend,):
        if backend == "auto" and DEVICES.get(name, device) != device:
            refused[name] = f"the tensors are on {device}, it serves {DEVICES[name]}"
            continue
        why = _refusal(name, chain, inputs, chosen, functional)
        if why is None:
            return Route(name, chosen, chain, functional, refused)
        refused[name] = why
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend: {backend!r} was asked for but cannot serve: {refused[backend]}")
    return Route("reference", chosen, chain, functional, refused)


def _refusal(
    name: str, chain: network.Chain, inputs: Inputs, mode: Mode, functional: bool
) -> str | None:
    if name == "reference":
        return None
    if functional:
        return "a functorch transform or forward-mode AD is at work"
    kinds = tuple(σ.kind for σ in chain.activations)
    x = inputs.x2
    return refusal(name, chain.widths, kinds, inputs.k, mode, operand_dtype(x), x.device)


def _general(mlp: nn.Module, reason: str, mode: str, backend: str, functional: bool) -> Route:
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend: {backend!r} was asked for but cannot serve: {reason}")
    coupled = network.batch_coupling(mlp)
    if coupled is not None:
        raise ValueError(
            f"mlp: {coupled} normalises with the statistics of the batch, so a row has no slope of "
            "its own; expected evaluation mode (.eval()) with running statistics, got training mode"
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
    functional = functional or torch.compiler.is_compiling()
    refused = dict.fromkeys(MODULES, reason) if backend == "auto" else {}
    return Route("reference", "adjoint", None, functional, refused)


def _check_chain(chain: network.Chain, inputs: Inputs) -> None:
    """What PyTorch would complain about inside the first layer, said of the user's arguments."""
    d = chain.widths[0]
    if inputs.d != d:
        raise ValueError(
            f"x2: expected d1 + k = {d}, the inputs of mlp's first layer, got d1 = "
            f"{inputs.x1.shape[-1]} and k = {inputs.k}"
        )
    x = inputs.x2
    for linear in chain.linears:
        for t in linear._parameters.values():
            if t is None:
                continue
            if t.device != x.device:
                raise ValueError(f"x1: expected on the device of mlp, {t.device}, got {x.device}")
            if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"x1: expected the dtype of mlp, {str(t.dtype).removeprefix('torch.')}, got "
                    f"{str(x.dtype).removeprefix('torch.')}"
                )
