"""Memory that changes under a kernel, or was never there: a sentence, never a crash.

Every case runs in a subprocess (a crash would take the tests with it), once for each way to the
kernel: ``python -m tests.test_operands BACKEND`` prints what became of each case as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monokernel import fused_mono_penalty, value_and_jacobian
from monokernel.backends import cpu
from monokernel.problem import unpack
from tests.support import HANDWRITTEN, gradients

ROOT = Path(__file__).resolve().parent.parent
N, D1, H = 64, 4, 64

# What a case may end in: a sentence of ours, one of PyTorch's, or the right numbers ("").
MEMORY = r"^RuntimeError: .*: expected \w+ of shape \(.*\) on cpu in memory of its own, got \w+ of "
CASES: dict[str, tuple[Callable[[str], None], str]] = {}


def ends_in(pattern: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def register(case: Callable[[str], None]) -> Callable[[str], None]:
        CASES[case.__name__] = case, pattern
        return case

    return register


right = ends_in(r"^$")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(D1 + 1, H), nn.SiLU(), nn.Linear(H, H), nn.SiLU(), nn.Linear(H, 1)
    )


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, D1).to(dtype), torch.randn(N, 1).to(dtype)


def loss(net: nn.Module, x1: Tensor, x2: Tensor, backend: str, **options: Any) -> Tensor:
    y, penalty = fused_mono_penalty(net, x1, x2, backend=backend, return_output=True, **options)
    return y.sum() + penalty


def monotone_in_all(net: nn.Module, x: Tensor, backend: str) -> Tensor:
    """The loss with no free input, so that x itself is what the kernel reads."""
    return loss(net, torch.empty(*x.shape[:-1], 0, dtype=x.dtype), x, backend)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# --- between forward and backward ----------


@ends_in(MEMORY + r"shape \(2, 2\) on cpu$")
def a_smaller_weight(backend: str) -> None:
    net = network()
    total = loss(net, *data(), backend)
    net[2].weight.data = torch.zeros(2, 2)
    total.backward()


@ends_in(MEMORY + r"shape \(64, 64\) on cpu$")
def a_weight_of_another_dtype(backend: str) -> None:
    net = network()
    total = loss(net, *data(), backend)
    net[2].weight.data = net[2].weight.data.half()
    total.backward()


@ends_in(r"^RuntimeError: mlp: the weight of linear layer 1: expected float32 .* got float16")
def a_network_made_half(backend: str) -> None:
    net = network()
    total = loss(net, *data(), backend)
    net.half()
    total.backward()


@ends_in(MEMORY + r"shape \(64, 64\) on cpu with 0 of its 16384 bytes$")
def a_weight_freed(backend: str) -> None:
    net = network()
    total = loss(net, *data(), backend)
    net[2].weight.untyped_storage().resize_(0)
    total.backward()


@ends_in(MEMORY + r"shape \(64, 64\) on cpu with 8 of its 16384 bytes$")
def a_weight_that_shrank(backend: str) -> None:
    net = network()
    total = loss(net, *data(), backend)
    net[2].weight.untyped_storage().resize_(8)
    total.backward()


@ends_in(r"^RuntimeError: mlp: the bias of linear layer 2: .* with 0 of its 256 bytes$")
def a_bias_freed(backend: str) -> None:
    net = network()
    total = loss(net, *data(), backend)
    net[2].bias.untyped_storage().resize_(0)
    total.backward()


@ends_in(r"^RuntimeError: x1, x2: .* with 0 of its 1280 bytes$")
def inputs_freed(backend: str) -> None:
    net, x = network(), torch.randn(N, D1 + 1)
    total = monotone_in_all(net, x, backend)
    x.untyped_storage().resize_(0)
    total.backward()


@ends_in(MEMORY)
def a_hook_that_saves_in_half(backend: str) -> None:
    net = network()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
        total = loss(net, *data(), backend)
    total.backward()


@ends_in(r"^RuntimeError: ")
def a_hook_that_saves_one_number(backend: str) -> None:
    net = network()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.flatten()[:1].clone(), lambda t: t):
        total = loss(net, *data(), backend)
    total.backward()


@ends_in(r"^RuntimeError: mlp: the weight of linear layer 1: expected bfloat16 .* got float32 of")
def a_half_network_made_float(backend: str) -> None:
    net = network().to(torch.bfloat16)
    total = loss(net, *data(torch.bfloat16), backend)
    net.float()
    total.backward()


@ends_in(r"^RuntimeError: mlp: the weight of linear layer 1: expected bfloat16 .* got float16 of")
def a_network_of_the_other_half(backend: str) -> None:
    net = network().to(torch.bfloat16)
    total = loss(net, *data(torch.bfloat16), backend)
    net.half()
    total.backward()


@ends_in(MEMORY + r"shape \(64, 64\) on cpu with 8 of its 8192 bytes$")
def a_half_weight_that_shrank(backend: str) -> None:
    net = network().to(torch.float16)
    total = loss(net, *data(torch.float16), backend)
    net[2].weight.untyped_storage().resize_(8)
    total.backward()


@ends_in(r"^RuntimeError: x1, x2: .* with 0 of its 640 bytes$")
def half_inputs_freed(backend: str) -> None:
    net, x = network().to(torch.bfloat16), torch.randn(N, D1 + 1).bfloat16()
    total = monotone_in_all(net, x, backend)
    x.untyped_storage().resize_(0)
    total.backward()


@right
def a_hook_that_copies(backend: str) -> None:
    net = network()
    want = gradients(loss(net, *data(), backend), *net.parameters())
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        total = loss(net, *data(), backend)
    for got, truth in zip(gradients(total, *net.parameters()), want, strict=True):
        assert torch.equal(got, truth)


@right
def a_hook_that_gives_back_a_view(backend: str) -> None:
    """Of the same sizes, but with other numbers between its own, or with all in one place."""
    net = network()

    def total() -> Tensor:
        return loss(net, *data(), backend, margin=0.3)

    def between(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    want = gradients(total(), *net.parameters())
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, between):
        got = total()
    for g, truth in zip(gradients(got, *net.parameters()), want, strict=True):
        same(g, truth)

    def at_once(t: Tensor) -> Tensor:
        return t.new_ones(()).expand(t.shape)

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, at_once):
        one = total()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.ones_like):
        many = total()
    for g, truth in zip(*(gradients(t, *net.parameters()) for t in (one, many)), strict=True):
        same(g, truth)


@right
def a_weight_sharded_and_gathered(backend: str) -> None:
    """As FSDP does it: freed after the forward, back in other memory before the backward."""
    net = network()
    want = gradients(loss(net, *data(), backend), *net.parameters())
    total = loss(net, *data(), backend)
    storage, kept = net[2].weight.untyped_storage(), net[2].weight.detach().clone()
    storage.resize_(0)
    elsewhere = torch.empty(H, H)  # may take the place that was freed
    storage.resize_(kept.nbytes)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(net[2].weight):
        net[2].weight.copy_(kept)
    for got, truth in zip(gradients(total, *net.parameters()), want, strict=True):
        assert torch.equal(got, truth)
    del elsewhere


# --- what is not a chain of layers ----------


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(D1 + 1, H), nn.LayerNorm(H), nn.SiLU(), nn.Linear(H, H), nn.LayerNorm(H),
        nn.Linear(H, 1),
    )  # fmt: skip


def one_prelu() -> nn.Sequential:
    """After layers of two widths."""
    torch.manual_seed(0)
    σ = nn.PReLU()
    return nn.Sequential(nn.Linear(D1 + 1, H), σ, nn.Linear(H, 7), σ, nn.Linear(7, 1))


def dropping() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D1 + 1, H), nn.SiLU(), nn.Dropout(0.3), nn.Linear(H, 1))


@ends_in(r"^RuntimeError: mlp: the parameter of its scale: .* with 0 of its 256 bytes$")
def a_scale_freed(backend: str) -> None:
    net = normed()
    total = loss(net, *data(), backend)
    net[1].weight.untyped_storage().resize_(0)
    total.backward()


@ends_in(r"^RuntimeError: mlp: the parameter of its shift: .* with 8 of its 256 bytes$")
def a_shift_that_shrank(backend: str) -> None:
    net = normed()
    total = loss(net, *data(), backend)
    net[1].bias.untyped_storage().resize_(8)
    total.backward()


@ends_in(r"^RuntimeError: mlp: the parameter of its scale: .* with 0 of its 256 bytes$")
def a_scale_freed_before(backend: str) -> None:
    net = normed()
    net[1].weight.untyped_storage().resize_(0)
    loss(net, *data(), backend)


@ends_in(
    r"^RuntimeError: mlp: the parameter of its prelu: .* shape \(1,\) .* with 0 of its 4 bytes$"
)
def a_prelu_freed(backend: str) -> None:
    net = one_prelu()
    total = loss(net, *data(), backend)
    net[1].weight.untyped_storage().resize_(0)
    total.backward()


@ends_in(MEMORY + r"shape \(64, 64\) on cpu with 8 of its 16384 bytes$")
def a_weight_past_a_norm_that_shrank(backend: str) -> None:
    net = normed()
    total = loss(net, *data(), backend)
    net[3].weight.untyped_storage().resize_(8)
    total.backward()


@ends_in(r"^RuntimeError: mlp: the weight of linear layer 1: expected float32 .* got float16")
def a_normed_network_made_half(backend: str) -> None:
    net = normed()
    total = loss(net, *data(), backend)
    net.half()
    total.backward()


@ends_in(r"^RuntimeError: ")
def a_hook_that_saves_half_of_a_key(backend: str) -> None:
    net = dropping()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t[: N // 2].clone(), lambda t: t):
        total = loss(net, *data(), backend)
    total.backward()


@right
def a_hook_that_copies_a_key(backend: str) -> None:
    net, found = dropping(), []
    for pack in (torch.clone, lambda t: t):
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            total = loss(net, *data(), backend)
        found.append(gradients(total, *net.parameters()))
    assert all(map(torch.equal, *found))


# --- before forward ----------


@ends_in(MEMORY + r"shape \(64, 64\) on cpu with 0 of its 16384 bytes$")
def a_weight_freed_before(backend: str) -> None:
    net = network()
    net[2].weight.untyped_storage().resize_(0)
    loss(net, *data(), backend)


@ends_in(r"^RuntimeError: mlp: the bias of linear layer 2: .* with 0 of its 256 bytes$")
def a_bias_freed_before(backend: str) -> None:
    net = network()
    net[2].bias.untyped_storage().resize_(0)
    loss(net, *data(), backend)


@ends_in(r"^RuntimeError: x1, x2: .* with 0 of its 1280 bytes$")
def inputs_freed_before(backend: str) -> None:
    x = torch.randn(N, D1 + 1)
    x.untyped_storage().resize_(0)
    monotone_in_all(network(), x, backend)


@ends_in(r"^\w+Error: .*weight")
def no_weight(backend: str) -> None:
    net = network()
    net[2].weight = None
    loss(net, *data(), backend)


@ends_in(r"^RuntimeError: .*(storage|memory)")
def a_hinge_weight_freed(backend: str) -> None:
    weight = torch.ones(N, 1, 1)
    weight.untyped_storage().resize_(0)
    loss(network(), *data(), backend, weight=weight)


# --- tensors without memory of their own, or whose memory is not their value ----------


@right
def zeros_without_memory(backend: str) -> None:
    net, zeros = network(), torch._efficientzerotensor((N, D1 + 1))
    same(monotone_in_all(net, zeros, backend), monotone_in_all(net, zeros.clone(), backend))
    x1, x2 = zeros[:, 1:], zeros[:, :1]
    same(loss(net, x1, x2, backend), loss(net, x1.clone(), x2.clone(), backend))


@right
def a_hinge_weight_of_zeros(backend: str) -> None:
    net, zeros = network(), torch._efficientzerotensor((N, 1, 1))
    got = loss(net, *data(), backend, margin=5.0, weight=zeros)
    same(got, loss(net, *data(), backend, margin=5.0, weight=zeros.clone()))


@right
def gradients_of_zeros(backend: str) -> None:
    net = network()
    y, penalty = fused_mono_penalty(net, *data(), backend=backend, return_output=True)
    zeros = torch._efficientzerotensor((N, 1))
    torch.autograd.backward([y, penalty], [zeros, torch._efficientzerotensor(())])
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


class Zeros(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch._efficientzerotensor(weight.shape)


@right
def a_parametrization_of_zeros(backend: str) -> None:
    net = network()
    parametrize.register_parametrization(net[2], "weight", Zeros())
    y, _ = fused_mono_penalty(net, *data(), backend=backend, return_output=True)
    same(y, net(torch.cat(data(), 1)))


@right
def views_to_be_negated(backend: str) -> None:
    net, x = network(), torch.randn(N, D1 + 1)
    same(monotone_in_all(net, torch._neg_view(x), backend), monotone_in_all(net, -x, backend))
    y, penalty = fused_mono_penalty(net, *data(), backend=backend, return_output=True, margin=2.0)
    ones, one = torch.ones(N, 1), torch.ones(())
    got = torch.autograd.grad(
        [y, penalty],
        list(net.parameters()),
        [torch._neg_view(ones), torch._neg_view(one)],
        retain_graph=True,
    )
    want = torch.autograd.grad([y, penalty], list(net.parameters()), [-ones, -one])
    assert all(map(torch.equal, got, want))
    weight = -torch.rand(N, 1, 1)
    got_loss = loss(net, *data(), backend, margin=2.0, weight=torch._neg_view(weight))
    same(got_loss, loss(net, *data(), backend, margin=2.0, weight=-weight))


@ends_in(r"^\w+Error: .*(MaskedTensor|serve)")
def a_masked_tensor(backend: str) -> None:
    masked = torch.masked.masked_tensor(torch.randn(N, D1 + 1), torch.ones(N, D1 + 1).bool())
    monotone_in_all(network(), masked, backend)


@ends_in(r"^ValueError: backend: .* x2 is a TwoTensor, with operations of its own")
def a_wrapper(backend: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x1, x2 = data()
    loss(network(), x1, TwoTensor(x2, x2), backend)


@right
def a_wrapper_on_the_general_path(backend: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    net, (x1, x2) = network(), data()
    got = loss(net, x1, TwoTensor(x2, x2 + 1), "auto")
    same(got.a, loss(net, x1, x2, backend))
    same(got.b, loss(net, x1, x2 + 1, backend))


@right
def a_hinge_weight_that_is_a_wrapper(backend: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    net, w = network(), torch.rand(N, 1, 1)
    got = loss(net, *data(), backend, margin=3.0, weight=TwoTensor(w, 2 * w))
    same(got.a, loss(net, *data(), backend, margin=3.0, weight=w))


@ends_in(r"^\w+Error: .*(FakeTensor|serve)")
def a_fake_tensor_mixed_in(backend: str) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.randn(N, D1 + 1)
    monotone_in_all(network(), fake, backend)


@right
def fake_tensors_throughout(backend: str) -> None:
    from torch._subclasses import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        net, (x1, x2) = network(), data()
        total = loss(net, x1, x2, "auto")
        total.backward()
        assert isinstance(total, FakeTensor)
        assert all(isinstance(p.grad, FakeTensor) for p in net.parameters())


@ends_in(r"^(RuntimeError|NotImplementedError): ")
def gradients_in_a_batch(backend: str) -> None:
    net = network()
    y, _ = fused_mono_penalty(net, *data(), backend=backend, return_output=True)
    torch.autograd.grad(y, net[0].weight, torch.ones(3, N, 1), is_grads_batched=True)


# --- who traces sees operators, never what a kernel has yet to write ----------


@right
def traced_by_make_fx(backend: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    net, (x1, x2) = network(), data()
    params = list(net.parameters())

    def step(x1: Tensor, x2: Tensor) -> list[Tensor]:
        return gradients(loss(net, x1, x2, backend, margin=0.5), *params)

    for mode in ("real", "symbolic"):
        traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x1, x2)
        for got, want in zip(traced(x1 + 1, x2 - 1), step(x1 + 1, x2 - 1), strict=True):
            assert torch.equal(got, want)


@ends_in(r"^RuntimeError: unsupported input list type")  # as TorchScript says of every such list
def traced_by_jit(backend: str) -> None:
    net = network().requires_grad_(False)
    torch.jit.trace(lambda a, b: loss(net, a, b, backend), data())


# --- the registered operators, called by anybody ----------

# One linear layer and SiLU: for each node its width and counts, what it reads, its parameters.
SHAPES = [*(H, 1, 2, 0), 0, 0, 1, *(H, 1, 0, 3), 1]
HINGE: list[Any] = [[4], "adjoint", True, [1], [0.0], False, False]
PROBLEM: list[Any] = [5, ["linear", "silu"], SHAPES, [0.0, 0.0, 0.0], *HINGE]


def operator(backend: str, problem: list[Any] = PROBLEM, **changed: Any) -> None:
    given = {"x": torch.randn(4, 5), "weight": None, "params": [torch.randn(H, 5), None]} | changed
    torch.ops.monokernel.forward(*given.values(), True, backend, *problem)


def backward_operator(backend: str, **changed: Any) -> None:
    x, params = torch.randn(4, 5), [torch.randn(H, 5), None]
    y, out, *saved = torch.ops.monokernel.forward(x, None, params, True, backend, *PROBLEM)
    given = {"gy": y, "gout": out, "x": x, "params": params}
    given |= {"saved": saved, "needs": [True, True, False]} | changed
    torch.ops.monokernel.backward(*given.values(), backend, *PROBLEM)


@right
def the_operators(backend: str) -> None:
    operator(backend)
    backward_operator(backend)


@ends_in(MEMORY + r"shape \(1, 2\) on cpu$")
def an_operator_with_a_small_weight(backend: str) -> None:
    operator(backend, params=[torch.randn(1, 2), None])


@ends_in(r"^RuntimeError: mlp: the weight of linear layer 1: expected float16 .* got float32 of")
def an_operator_of_two_dtypes(backend: str) -> None:
    operator(backend, x=torch.randn(4, 5).half())


@ends_in(r"^RuntimeError: mlp: the weight of linear layer 1: expected a tensor, got None$")
def an_operator_without_a_weight(backend: str) -> None:
    operator(backend, params=[None, None])


@ends_in(r"^RuntimeError: params: expected 2, got 1$")
def an_operator_with_few_parameters(backend: str) -> None:
    operator(backend, params=[torch.randn(H, 5)])


@ends_in(r"^ValueError: x: expected shape \(N, 5\), got \(5,\)$")
def an_operator_with_one_row(backend: str) -> None:
    operator(backend, x=torch.randn(5))


@ends_in(r"^RuntimeError: weight: expected float32 of shape \(4, 64, 1\)")
def an_operator_with_a_small_hinge_weight(backend: str) -> None:
    operator(backend, weight=torch.ones(2, H, 1))


@ends_in(r"^ValueError: backend: expected one of .*, got 'none'$")
def an_operator_of_no_backend(backend: str) -> None:
    operator("none")


@right
def an_operator_with_a_false_problem(backend: str) -> None:
    wrong = {
        0: [-1, 0],
        1: [["linear", "step"], [], ["silu", "linear"]],
        2: [[], SHAPES[:-1], [*SHAPES, 0], [-H, *SHAPES[1:]], [*SHAPES[:-1], 2], [9, *SHAPES[1:]]],
        3: [[0.0], [0.0] * 4],
        4: [[], [5], [-1], [1, 1], [2, 1]],
        5: ["both"],
        7: [[1, 1], [2], []],
        8: [[], [0.0, 0.0]],
    }
    for place, values in wrong.items():
        for value in values:
            problem = [*PROBLEM[:place], value, *PROBLEM[place + 1 :]]
            with pytest.raises((ValueError, RuntimeError), match="expected"):
                operator(backend, problem)


# Two layers with all between them that has parameters: a norm's scale and shift, a PReLU,
# a dropout.
BETWEEN: list[list[int]] = [
    *([H, 1, 2, 0, 0, 0, 1], [H, 1, 0, 1, 1], [H, 1, 1, 0, 2, 2], [H, 1, 1, 0, 3, 3]),
    *([H, 1, 1, 0, 4, 4], [H, 1, 1, 2, 5, 5], [1, 1, 2, 0, 6, 6, 7]),
]
KINDS = ["linear", "normalise", "scale", "shift", "prelu", "dropout", "linear"]
PROGRAM: list[Any] = [5, KINDS, [n for node in BETWEEN for n in node], [1e-5, 0.3, 0.0], *HINGE]
# Of each parameter its name and shape, by place; of the biases too.
NAMES = [
    *("weight of linear layer 1", "bias of linear layer 1"),
    *(f"parameter of its {kind}" for kind in ("scale", "shift", "prelu", "dropout")),
    *("weight of linear layer 2", "bias of linear layer 2"),
]
SIZES = [(H, 5), (H,), (H,), (H,), (H,), (8,), (1, H), (1,)]
# One PReLU after layers of 64 and of 7 columns, with one number for all of them.
TWICE: list[Any] = [
    5,
    ["linear", "prelu", "linear", "prelu"],
    [*(H, 1, 2, 0, 0, 0, 1), *(H, 1, 1, 0, 1, 2), *(7, 1, 2, 0, 2, 3, 4), *(7, 1, 1, 0, 3, 2)],
    [],
    *HINGE,
]
TWICE_SIZES = [(H, 5), (H,), (1,), (7, H), (7,)]


def wrong_operands() -> list[tuple[list[Tensor | None], str]]:
    """Parameters for four rows of ``PROGRAM`` with one wrong, and what is said of it."""
    found: list[tuple[list[Tensor | None], str]] = []
    for place, (name, size) in enumerate(zip(NAMES, SIZES, strict=True)):
        wrongs: list[Tensor | None] = [
            torch.randn(*size, 1),
            torch.randn(*size[:-1], 2),
            torch.randn(3, *size[1:]),
            torch.randn(size, dtype=torch.float64),
            torch.randn(0),
            *([] if "bias" in name else [None]),
        ]
        freed = torch.randn(size)
        freed.untyped_storage().resize_(freed.nbytes // 2 // 4 * 4)
        for wrong in (*wrongs, freed):
            params: list[Tensor | None] = [torch.randn(s) for s in SIZES]
            params[place] = wrong
            found.append((params, f"mlp: the {name}: expected"))
    return found


def wrong_numbers() -> list[list[Tensor | None]]:
    """Of ``TWICE``: as many as one of the layers has columns, of which the other is not."""
    return [
        [torch.randn(n if place == 2 else size) for place, size in enumerate(TWICE_SIZES)]
        for n in (H, 7, 2)
    ]


@right
def an_operator_of_a_program(backend: str) -> None:
    operator(backend, PROGRAM, params=[torch.randn(s) for s in SIZES])
    operator(
        backend, PROGRAM, params=[torch.randn(s) for s in (*SIZES[:2], *[(1,)] * 3, *SIZES[5:])]
    )
    for params, said in wrong_operands():
        with pytest.raises(RuntimeError, match=said):
            operator(backend, PROGRAM, params=params)
    operator(backend, TWICE, params=[torch.randn(s) for s in TWICE_SIZES])
    for params in wrong_numbers():
        with pytest.raises(RuntimeError, match=r"prelu: expected float32 of shape \(1,\)"):
            operator(backend, TWICE, params=params)


@right
def a_backward_operator_of_a_program(backend: str) -> None:
    x, good = torch.randn(4, 5), [torch.randn(s) for s in SIZES]
    y, out, *saved = torch.ops.monokernel.forward(x, None, good, True, backend, *PROGRAM)
    needs = [True] * (1 + len(SIZES))

    def run(params: list[Tensor | None], saved: list[Tensor], needs: list[bool]) -> list[Tensor]:
        found: list[Tensor] = torch.ops.monokernel.backward(
            y, out, x, params, saved, needs, backend, *PROGRAM
        )
        return found

    for params, said in wrong_operands():
        with pytest.raises(RuntimeError, match=said):
            run(params, saved, needs)
    with pytest.raises(RuntimeError, match=r"saved.*: expected"):
        run([*good], [t[: t.shape[0] // 2] for t in saved], needs)
    with pytest.raises(RuntimeError, match="a dropout that is drawn, got one to be trained"):
        run([*good], saved, needs)
    needs[6] = False
    assert [t.shape for t in run([*good], saved, needs)] == [
        (4, 5), *(s for i, s in enumerate(SIZES) if i != 5)
    ]  # fmt: skip


@right
def a_step_of_a_program(backend: str) -> None:
    """The C++ operator, which looks at its operands itself."""
    value_and_jacobian(network(), *data(), backend=backend)
    step = getattr(torch.ops.monokernel, "cpu_step", None)
    if step is None or backend != "cpu":
        return
    own = cpu._native(unpack(*PROGRAM), torch.float32)
    for params, said in wrong_operands():
        with pytest.raises(RuntimeError, match=said):
            step(own.handle, torch.randn(4, 5), None, params)
    twice = cpu._native(unpack(*TWICE), torch.float32)
    for params in wrong_numbers():
        with pytest.raises(RuntimeError, match=r"prelu: expected float32 of shape \(1,\)"):
            step(twice.handle, torch.randn(4, 5), None, params)
    good = [torch.randn(s) for s in SIZES]
    for few in (good[:-1], [*good, good[0]]):
        with pytest.raises(RuntimeError, match=f"params: expected 8, got {len(few)}"):
            step(own.handle, torch.randn(4, 5), None, few)
    few = [*good[:5], good[5][:4], *good[6:]]
    with pytest.raises(RuntimeError, match=r"dropout: expected float32 of shape \(8,\)"):
        step(own.handle, torch.randn(3, 5), None, few)
    y, _ = step(own.handle, torch.randn(4, 5), None, [t.requires_grad_() for t in good])
    with pytest.raises(RuntimeError, match="a dropout that is drawn, got one to be trained"):
        y.sum().backward()


@ends_in(r"^RuntimeError: .*saved.*: expected")
def a_backward_operator_with_little_saved(backend: str) -> None:
    backward_operator(backend, saved=[torch.randn(1)])


@ends_in(r"^RuntimeError: gradient of y: expected float32 of shape \(4, 64\)")
def a_backward_operator_with_a_small_gradient(backend: str) -> None:
    backward_operator(backend, gy=torch.randn(1, H))


@ends_in(r"^ValueError: needs: expected 3 values, got 1$")
def a_backward_operator_with_few_needs(backend: str) -> None:
    backward_operator(backend, needs=[True])


@right
def a_step_with_a_false_handle(backend: str) -> None:
    """The C++ operator takes a problem by its handle, a number."""
    value_and_jacobian(network(), *data(), backend=backend)  # it is registered when first used
    step = getattr(torch.ops.monokernel, "cpu_step", None)
    if step is None:
        return
    for handle in (0, -1, 12_345_678, id(step)):
        with pytest.raises(ValueError, match="problem: expected the handle of a problem"):
            step(handle, torch.randn(4, 5), None, [torch.randn(1, 5), None])
    with pytest.raises(RuntimeError, match="expected"):
        step(1, torch.randn(4, 3), None, [torch.randn(1, 3)])


# --- every case, in a subprocess for each way ----------


def outcome(case: Callable[[str], None], backend: str) -> str:
    try:
        case(backend)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


@cache
def outcomes(backend: str, boundary: str) -> dict[str, str]:
    """What became of each case; the process ends itself, or the last line names where it died."""
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.test_operands", backend],
        env={**os.environ, "MONOKERNEL_BOUNDARY": boundary},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"died of {ran.returncode}\n{ran.stdout}\n{ran.stderr[-4000:]}"
    found: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    return found


WAYS = [(name, way) for name in HANDWRITTEN for way in (("1", "0") if name == "cpu" else ("1",))]


@pytest.mark.parametrize(("backend", "boundary"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_ends_in_a_sentence(name: str, backend: str, boundary: str) -> None:
    came = outcomes(backend, boundary)[name]
    assert re.search(CASES[name][1], came), came


def test_both_boundaries_say_the_same() -> None:
    if "cpu" not in HANDWRITTEN:
        pytest.skip("no native kernel")
    one, other = outcomes("cpu", "1"), outcomes("cpu", "0")
    # Which of two wrong operands is met first, and PyTorch's own words, may differ.
    own = {name for name, said in one.items() if "in memory of its own" in said}
    own -= {"a_hook_that_saves_in_half", "a_hook_that_saves_half_of_a_key", "gradients_in_a_batch"}
    assert len(own) >= 10
    assert {name: one[name] for name in own} == {name: other[name] for name in own}


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    for name, (case, _) in CASES.items():
        print(name, flush=True)
        found[name] = outcome(case, sys.argv[1])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
