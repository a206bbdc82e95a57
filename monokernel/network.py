"""What the network is: reads a module as a chain of linear layers and activations, or says why not.

Fused are (nested) ``nn.Sequential`` of ``nn.Linear``, the activations of the table, ``nn.Identity``
and dropout that is inactive. The structure is read anew at every call, since hooks, training mode
and parametrizations may change between two calls; no weight is touched until ``parameters``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.dropout import _DropoutNd

from .activations import Activation, of_module

__all__ = ["Chain", "batch_coupling", "read", "sharded", "unwrap"]


@dataclass(frozen=True)
class Chain:
    """L linear layers and the activation that follows each (identity where none does)."""

    linears: tuple[nn.Linear, ...]
    activations: tuple[Activation, ...]
    widths: tuple[int, ...]  # (d, H_1, …, D)

    def parameters(self) -> list[Tensor | None]:
        """[W_1, b_1 or None, W_2, …]. Each is read once, as a plain forward would: reading a
        parametrized weight computes it, and spectral_norm takes a power iteration each time."""
        params: list[Tensor | None] = []
        for linear in self.linears:
            params += (linear.weight, linear.bias)
        return params


def unwrap(mlp: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile(mlp)``, whose compiled form has no second derivative."""
    modules = mlp._modules if isinstance(mlp, nn.Module) else {}
    return modules.get("_orig_mod") or mlp


def read(mlp: nn.Module) -> Chain | str:
    """The chain that ``mlp`` is, or one sentence saying which part of it is not fused."""
    if _global_hooks():
        return "a global module hook is registered"
    steps: list[nn.Linear | Activation] = []
    reason = _collect(mlp, "", steps)
    if reason is not None:
        return reason
    linears: list[nn.Linear] = []
    activations: list[Activation] = []
    for step in steps:
        if isinstance(step, Activation):
            if not linears:
                return f"an activation ({step.kind}) comes before the first Linear layer"
            if activations[-1].kind != "identity":
                return f"two activations ({activations[-1].kind}, {step.kind}) follow each other"
            activations[-1] = step
            continue
        if linears and linears[-1].out_features != step.in_features:
            return (
                f"a Linear layer with {step.in_features} inputs follows one with "
                f"{linears[-1].out_features} outputs"
            )
        linears.append(step)
        activations.append(Activation("identity"))  # a new one: a shared one is traced by compile
    if not linears:
        return "it has no Linear layer"
    widths = (linears[0].in_features, *(m.out_features for m in linears))
    return Chain(tuple(linears), tuple(activations), widths)


def batch_coupling(mlp: nn.Module) -> str | None:
    """A batch normalisation that uses the statistics of the batch: its rows have no own slope."""
    for name, m in mlp.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (
            m.training or m.running_mean is None
        ):
            return f"{name or 'mlp'} ({type(m).__name__})"
    return None


def sharded(mlp: nn.Module) -> str | None:
    """A part that FSDP manages by itself: it frees its weights before the slopes are computed."""
    for name, m in mlp.named_modules():
        if any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(m).__mro__):
            return f"{name or 'mlp'} ({type(m).__name__})"
    return None


def _collect(m: nn.Module, name: str, steps: list[nn.Linear | Activation]) -> str | None:
    """Appends the layers of ``m`` to ``steps``; a sentence if it has one that is not fused."""
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return f"{_where(m, name)} has hooks"
    if "forward" in m.__dict__:
        return f"{_where(m, name)} has a forward of its own"
    if isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward:
        for key, child in m._modules.items():
            reason = _collect(child, f"{name}.{key}", steps)
            if reason is not None:
                return reason
        return None
    # A parametrized Linear is a subclass whose forward is still nn.Linear's.
    if isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward:
        if not _plain(m):
            return f"{_where(m, name)} has a weight that is no plain tensor"
        steps.append(m)
        return None
    if isinstance(m, _DropoutNd) and type(m).__module__ == _DropoutNd.__module__:
        return f"{_where(m, name)} is active" if m.training and m.p > 0 else None
    activation = of_module(m)
    if activation is None:
        return f"{_where(m, name)} is not a layer that is fused"
    if activation.kind != "identity":
        steps.append(activation)
    return None


def _where(m: nn.Module, name: str) -> str:
    return f"mlp{name} ({type(m).__name__})"


def _plain(m: nn.Linear) -> bool:
    """Whether its own parameters are ordinary dense tensors (a DTensor is not)."""
    for t in m._parameters.values():
        if t is not None and (
            type(t) not in (nn.Parameter, Tensor) or t.layout is not torch.strided
        ):
            return False
    return True


def _global_hooks() -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )
