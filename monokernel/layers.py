"""A network as a chain of layers in float64, where all that is stored is exact."""

from __future__ import annotations

import copy
import ctypes
import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import network, reading
from .activations import ACTIVATIONS, IDENTITY, Activation
from .arguments import check_inputs
from .intervals import without_range
from .nodes import rule
from .program import Node, nodes_of

__all__ = ["Layers", "Straight", "layers_of", "width_of"]

FOLDED = 8  # roundings in a weight that a scale, a shift or a norm was folded into


class Layers(NamedTuple):
    """A chain in float64: W_l (H_l, H_{l-1}), b_l (H_l,) and σ_l. ``offsets`` are added to x first;
    ``folded`` is how many roundings made each weight out of those that are stored."""

    W: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    σ: tuple[Activation, ...]
    offsets: tuple[Tensor, ...] = ()
    folded: int = 0

    def to(self, device: torch.device) -> Layers:
        """The same on another device."""
        W, b, offsets = (tuple([t.to(device) for t in ts]) for ts in (self.W, self.b, self.offsets))
        return Layers(W, b, self.σ, offsets, self.folded)

    def straight(self) -> Straight:
        """The same as a program of nodes."""
        widths = (self.d, *(len(W) for W in self.W))
        params = tuple([p for pair in zip(self.W, self.b, strict=True) for p in pair])
        return Straight(self.d, nodes_of(widths, self.σ), params, self.offsets)

    def digest(self, dtype: str) -> str:
        """SHA-256, in hexadecimal, of a dtype's name and of all activations, shapes and numbers."""
        digest = hashlib.sha256(f"{dtype} {[tuple(σ) for σ in self.σ]}".encode())
        _add(digest, (*self.W, *self.b, *self.offsets))
        return digest.hexdigest()

    @property
    def d(self) -> int:
        return self.W[0].shape[1]

    @property
    def D(self) -> int:
        return self.W[-1].shape[0]

    def values(self, x: Tensor) -> list[Tensor]:
        """Every a_l (N, H_l) at the points x (N, d), rounded as it comes."""
        for offset in self.offsets:
            x = x + offset
        found = []
        for W, b, σ in zip(self.W, self.b, self.σ, strict=True):
            found.append(torch.addmm(b, x, W.mT))
            x = σ.value(found[-1])
        return found

    def slopes(self, x: Tensor, output: int) -> Tensor:
        """∂y_output/∂x (N, d) at the points x (N, d), rounded as it comes."""
        a = self.values(x)
        P = a[-1].new_ones(len(x), 1)
        for l in range(len(self.W) - 1, -1, -1):
            W, a_l = self.W[l], a[l]
            if l == len(self.W) - 1:
                W, a_l = W[output : output + 1], a_l[:, output : output + 1]
            P = (P * self.σ[l].first(a_l)) @ W
        return P


class Straight(NamedTuple):
    """Any other program of which every node has a range, in float64, over d columns of x."""

    d: int
    nodes: tuple[Node, ...]
    params: tuple[Tensor | None, ...]
    offsets: tuple[Tensor, ...] = ()

    @property
    def D(self) -> int:
        return self.nodes[-1].width

    def digest(self, dtype: str) -> str:
        """As ``Layers.digest``."""
        digest = hashlib.sha256(f"{dtype} {[tuple(node) for node in self.nodes]}".encode())
        _add(digest, (*self.params, *self.offsets))
        return digest.hexdigest()

    def to(self, device: torch.device) -> Straight:
        """The same on another device."""
        params = tuple([None if p is None else p.to(device) for p in self.params])
        return self._replace(params=params, offsets=tuple([t.to(device) for t in self.offsets]))

    def jacobian(self, x: Tensor) -> Tensor:
        """∂y/∂x (N, D, d) at the points x (N, d), differentiable."""
        for offset in self.offsets:
            x = x + offset
        values: list[Tensor] = [x]
        tangents: list[Tensor | None] = [torch.eye(self.d, dtype=x.dtype, device=x.device)[:, None]]
        for node in self.nodes:
            u, t = [values[i] for i in node.inputs], [tangents[i] for i in node.inputs]
            θ, of = [self.params[i] for i in node.params], rule(node)
            v = of.value(node, u, θ)
            moves = any(a is not None for a in t)
            values.append(v)
            tangents.append(of.push(node, u, v, t, θ) if moves else None)
        y, t_y = values[-1], tangents[-1]
        found = y.new_zeros(self.d, *y.shape) if t_y is None else t_y.expand(self.d, *y.shape)
        return found.permute(1, 2, 0)


def _add(digest: Any, tensors: Iterable[Tensor | None]) -> None:
    for t in tensors:
        if t is not None:
            digest.update(str(tuple(t.shape)).encode())
            t = t.cpu().contiguous()
            digest.update(ctypes.string_at(t.data_ptr(), t.nbytes))  # NumPy may not be there


def layers_of(mlp: nn.Module, d: int) -> tuple[Layers | Straight, str] | str:
    """The network in evaluation mode, of d columns, and the name of its own dtype; or what was
    expected of it and what it is instead. Folding and parametrizations are computed in float64."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in mlp.parameters()}
    if len(dtypes) != 1:
        return f"parameters of one dtype, got {', '.join(sorted(dtypes)) or 'none'}"
    with torch.no_grad():
        try:
            wide = copy.deepcopy(mlp).cpu().double().eval()
        except Exception as error:  # whatever a module of one's own says to being copied
            return f"a network that can be copied, got {type(error).__name__}: {error}"
        chain = network.read(wide)
        x = torch.zeros(2, d, dtype=torch.float64)
        offsets: tuple[Tensor | float, ...] = ()
        folded = 0
        found: network.Chain | reading.Reading
        if isinstance(chain, network.Chain):
            found = chain
        else:
            own = reading.read(wide, check_inputs(x), rehearsal=True)
            if isinstance(own, str):
                return f"a network that can be read, got one where {own}"
            found, offsets, folded = own, own.offsets, FOLDED
        activations = _activations(found.nodes)
        _, params = found.operands(x)
        moved = tuple([torch.as_tensor(offset, dtype=torch.float64) for offset in offsets])
        if activations is None:
            if kind := without_range(found.nodes):
                return f"a network of which every node has a range, got one with a {kind} node"
            held = tuple([None if p is None else p.detach() for p in params])
            return Straight(d, found.nodes, held, moved), dtypes.pop()
    W = tuple([p.detach() for p in params[::2] if p is not None])
    b = [
        W_l.new_zeros(len(W_l)) if p is None else p.detach()
        for W_l, p in zip(W, params[1::2], strict=True)
    ]
    return Layers(W, tuple(b), activations, moved, folded), dtypes.pop()


def width_of(mlp: nn.Module) -> int | None:
    """How many columns the network takes: as its first layer says, or else the first of its linear
    layers' widths with which it can be read; None where there is none."""
    chain = network.read(mlp)
    if isinstance(chain, network.Chain):
        return chain.widths[0]
    widths = dict.fromkeys(m.in_features for m in mlp.modules() if isinstance(m, nn.Linear))
    return next((d for d in widths if not isinstance(layers_of(mlp, d), str)), None)


def _activations(nodes: tuple[Node, ...]) -> tuple[Activation, ...] | None:
    """The activation behind each linear layer of a chain; None for what is none."""
    found = list[Activation]()
    for i, node in enumerate(nodes):
        if node.inputs == (i,) and node.kind == "linear":
            found.append(IDENTITY)
        elif node.inputs == (i,) and node.kind in ACTIVATIONS and found and found[-1] is IDENTITY:
            found[-1] = Activation(node.kind, *node.numbers)
        else:
            return None
    return tuple(found)
