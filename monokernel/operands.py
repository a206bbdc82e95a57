"""What a kernel may be given: plain memory of the dtype, device and sizes that the problem says.

A kernel gets pointers. Between its forward and its backward the user's code runs, and may change
what lies behind them (``.data``, ``half()``, resized storage, hooks on saved tensors); and some
tensors have no memory to begin with. So both passes look before they call a kernel.
``csrc/boundary.cpp`` asks the same of its operands, in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .nodes import parameter_shapes
from .problem import Problem, accumulate_dtype
from .program import Node

__all__ = [
    "PLAIN",
    "Shapes",
    "check_forward",
    "check_gradients",
    "check_saveable",
    "check_saved",
    "has_memory",
    "holds",
    "kernel_weight",
    "shapes_of",
    "traced",
]

PLAIN = (Tensor, nn.Parameter)  # tensors as PyTorch makes them; a DTensor is none
Params = Sequence[Tensor | None]
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]  # and the dtypes


def has_memory(t: Tensor) -> bool:
    """Whether a tensor is PyTorch's own and no wrapper (MaskedTensor, DTensor, FakeTensor) whose
    subclass decides what an operation does."""
    if type(t) in PLAIN:
        return True
    return not torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python)


def traced(t: object) -> bool:
    """Whether it stands for a tensor of PyTorch's own while autograd's tracer or a FakeTensorMode
    is at work."""
    return type(t) in (FakeTensor, FunctionalTensor) and torch._C._len_torch_dispatch_stack() > 0


def check_forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """x (N, d), the hinge weight (D, k) or (N, D, k) and the parameters, as a kernel may read them:
    copied where their memory does not hold their values (a view that is only said to be negated,
    zeros that have no memory). Raises a RuntimeError for anything else that it may not read."""
    N, dtype, device = x.shape[0], x.dtype, x.device
    x = _operand("x1, x2", x, (N, problem.d), dtype, device)
    if weight is not None:
        shape = problem.D, problem.k
        full = shape if weight.dim() == 2 else (N, *shape)
        weight = _operand("weight", weight, full, accumulate_dtype(dtype), device)
    expected = _expected(problem.d, problem.nodes)
    linear = problem.cast or dtype
    if len(params) != len(expected):
        raise RuntimeError(f"params: expected {len(expected)}, got {len(params)}")
    operands: list[Tensor | None] = []
    for t, (name, sizes, optional, layer) in zip(params, expected, strict=True):
        own = linear if layer else dtype
        if t is None:
            if not optional:
                raise RuntimeError(f"{name}: expected a tensor, got None")
        elif not (  # ``_operand`` of the usual case, without its calls: there are many
            type(t) in PLAIN
            and t.dtype is own
            and t.shape in sizes
            and t.device == device
            and not t.is_neg()
            and t.is_contiguous()
            and t.storage_offset() == 0
            and t.untyped_storage().nbytes() >= t.nbytes
            and t.data_ptr() != 0
        ):
            t = _operand(name, t, sizes[-1] if t.shape == sizes[-1] else sizes[0], own, device)
        operands.append(t)
    return x, weight, operands


def kernel_weight(weight: Tensor | None, like: Tensor, problem: Problem) -> Tensor | None:
    """The hinge weight as the kernels take it, contiguous (D, k) or (N, D, k); ``like`` (*batch, d)
    are inputs of the call."""
    if weight is None:
        return None
    D, k = problem.D, problem.k
    weight = weight.to(device=like.device, dtype=accumulate_dtype(like.dtype))
    if weight.dim() <= 2:
        return weight.expand(D, k).contiguous()
    batch = like.shape[:-1]
    return weight.expand(*batch, D, k).reshape(math.prod(batch), D, k).contiguous()


def check_saveable(params: Iterable[Tensor | None]) -> None:
    """Autograd keeps parameters for the backward, but none that were made in inference mode."""
    if any(p is not None and p.is_inference() for p in params):
        raise RuntimeError(
            "mlp: expected parameters that autograd may keep, got some that were made under "
            "torch.inference_mode; make, load or clone them outside of it"
        )


def check_gradients(
    problem: Problem, x: Tensor, gy: Tensor | None, gout: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of y (N, D) and of the penalty (), the penalties or J (N, D, k), likewise."""
    N, hinge = x.shape[0], problem.hinge
    if gy is not None:
        gy = _operand("gradient of y", gy, (N, problem.D), x.dtype, x.device)
    if gout is not None:
        summed = hinge is not None and not hinge.elementwise
        shape = () if summed else (N, problem.D, problem.k)
        dtype = accumulate_dtype(x.dtype)
        gout = _operand("gradient of the penalty", gout, shape, dtype, x.device)
    return gy, gout


def shapes_of(saved: Sequence[Tensor]) -> Shapes:
    """What ``check_saved`` compares with."""
    return tuple([(t.shape, t.dtype) for t in saved])


def check_saved(saved: Sequence[Tensor], shapes: Shapes, device: torch.device) -> None:
    """What forward left for backward is still what it was."""
    if len(saved) != len(shapes):
        raise RuntimeError(f"saved: expected {len(shapes)} tensors, got {len(saved)}")
    for t, (shape, dtype) in zip(saved, shapes, strict=True):
        _operand("a tensor saved for the backward", t, shape, dtype, device)


@lru_cache(maxsize=1024)
def _expected(
    d: int, nodes: tuple[Node, ...]
) -> list[tuple[str, tuple[tuple[int, ...], ...], bool, bool]]:
    """Name and shapes (one or two) of each parameter, whether it may be None, and whether it is a
    linear layer's."""
    shapes = parameter_shapes(d, nodes)
    linears = [node for node in nodes if node.kind == "linear"]
    expected = []
    for place in range(len(shapes)):
        node, either = shapes[place]
        if not either:
            raise RuntimeError(f"mlp: expected layers that share a {node.kind} to be of one width")
        if node.kind != "linear":
            expected.append((f"mlp: the parameter of its {node.kind}", either, False, False))
            continue
        bias = place == node.params[1]
        name = f"mlp: the {'bias' if bias else 'weight'} of linear layer"
        expected.append((f"{name} {linears.index(node) + 1}", either, bias, True))
    return expected


def _operand(
    name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Costs 1.3 µs: a step asks it of every operand twice."""
    if (
        t.dtype is dtype
        and t.shape == shape
        and t.device == device
        and (type(t) in PLAIN or has_memory(t))
        and not t.is_neg()
        and holds(t)
    ):
        return t
    if has_memory(t) and (t.is_neg() or t._is_zerotensor()):
        return _operand(name, t.clone(), shape, dtype, device)
    raise RuntimeError(
        f"{name}: expected {_dtype(dtype)} of shape {tuple(shape)} on {device} in memory of its "
        f"own, got {_describe(t)}"
    )


def holds(t: Tensor) -> bool:
    """Whether its storage reaches to its last element."""
    held = t.untyped_storage().nbytes()
    if t.is_contiguous() and t.storage_offset() == 0:  # the usual case, at once
        return held >= t.nbytes and (t.nbytes == 0 or t.data_ptr() != 0)
    return held >= _bytes(t) and (t.numel() == 0 or t.data_ptr() != 0)


def _bytes(t: Tensor) -> int:
    """The bytes of its storage up to its last element."""
    elements = t.numel()
    if not t.is_contiguous():
        elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return int(t.storage_offset() + elements) * t.itemsize


def _describe(t: Any) -> str:
    text = f"{_dtype(t.dtype)} of shape {tuple(t.shape)} on {t.device}"
    if not has_memory(t):
        return f"{text}, a subclass or wrapper of a tensor"
    held = t.untyped_storage().nbytes() if t.data_ptr() else 0
    return text if held >= _bytes(t) else f"{text} with {held} of its {_bytes(t)} bytes"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
