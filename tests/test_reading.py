"""A forward of one's own, read as a program: it computes what the module does, or is not read."""

from __future__ import annotations

import copy
import gc
import math
import re
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from monokernel import again, fused_mono_penalty, plan, value_and_jacobian
from monokernel.arguments import check_inputs
from monokernel.nodes import rule, wrong_nodes
from monokernel.program import chain_of
from monokernel.reading import Reading, _record, read
from monokernel.symbols import Value
from tests.support import HANDWRITTEN, assert_same, gradients, mlp, oracle, points

D1, K, D = 4, 2, 6
Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """A module of which the forward is a function of itself and x (..., 6)."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.run = run
        self.a, self.b, self.one = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, 1)
        self.bilinear = nn.Bilinear(D, D, 2)
        self.norm, self.batch_norm = nn.LayerNorm(D), nn.BatchNorm1d(D)
        self.p, self.q = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(1))
        self.W = nn.Parameter(torch.randn(D, 3))
        self.register_buffer("mean", torch.randn(D))
        self.register_buffer("std", torch.rand(D) + 0.5)
        self.calls = 0
        self.double().eval()
        self.batch_norm.running_mean.normal_()  # type: ignore[union-attr]
        self.batch_norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def reading(net: nn.Module, x: Tensor) -> Reading | str:
    return read(net, check_inputs(x[..., :D1], x[..., D1:]))


def values(found: Reading | str, x: Tensor) -> Tensor:
    """The program's output, node by node as the table has it."""
    assert not isinstance(found, str), found
    assert not wrong_nodes(found.d, found.nodes)
    rows, params = found.operands(x)
    v = [rows]
    for node in found.nodes:
        u, θ = [v[i] for i in node.inputs], [params[p] for p in node.params]
        θ = rule(node).at_rows(node, θ, torch.arange(len(rows)), rows.dtype)
        v.append(rule(node).value(node, u, θ))
        assert v[-1].shape == (len(rows), node.width), node
    y = v[-1].reshape(*x.shape[:-1], -1)
    return y.squeeze(-1) if found.squeezed else y


def in_place(method: str, *args: Any) -> Forward:
    def run(n: Net, x: Tensor) -> Tensor:
        h = n.a(x)
        other = h
        returned = getattr(h, method)(*args)
        return other + 2 * returned

    return run


def augmented(n: Net, x: Tensor) -> Tensor:
    h = n.a(x)
    other, g = h, h * 1
    h += x
    h *= 2.0
    h -= n.p
    h /= n.std
    g **= 2
    return h + 3 * other + g


def regular(n: Net, x: Tensor) -> Tensor:
    h = n.a(x)
    before = torch.stack([h, x])
    h += 1
    return before.sum(0) + h


EXPERTS = [lambda n, x: n.a(x), lambda n, x: n.b(x).tanh(), lambda n, x: F.relu(x)]

READ: dict[str, Forward] = {
    # linear layers
    "F.linear": lambda n, x: F.linear(x, n.a.weight, n.a.bias),
    "F.linear without bias": lambda n, x: F.linear(x, n.a.weight),
    "@": lambda n, x: x @ n.W,
    "@ W.T": lambda n, x: x @ n.a.weight.T + n.a.bias,
    "@ vector": lambda n, x: x @ n.p,
    "matmul": lambda n, x: torch.matmul(x, n.W),
    "mm": lambda n, x: torch.mm(x, n.W),
    "addmm": lambda n, x: torch.addmm(n.p, x, n.a.weight),
    "addmm scaled": lambda n, x: torch.addmm(n.p, x, n.a.weight, beta=0.5, alpha=3),
    "einsum": lambda n, x: torch.einsum("...i,oi->...o", x, n.a.weight),
    "einsum letters": lambda n, x: torch.einsum("bi, io -> bo", x, n.W),
    "computed weight": lambda n, x: F.linear(x, n.a.weight * n.p.exp(), n.a.bias.tanh()),
    # activations, as functions, methods and modules
    "F.relu": lambda n, x: F.relu(x),
    "torch.relu": lambda n, x: torch.relu(x),
    "x.relu": lambda n, x: x.relu(),
    "torch.tanh": lambda n, x: torch.tanh(x),
    "F.tanh": lambda n, x: F.tanh(x),
    "x.sigmoid": lambda n, x: x.sigmoid(),
    "F.sigmoid": lambda n, x: F.sigmoid(x),
    "F.silu": lambda n, x: F.silu(x),
    "F.gelu": lambda n, x: F.gelu(x),
    "F.gelu tanh": lambda n, x: F.gelu(x, approximate="tanh"),
    "F.leaky_relu": lambda n, x: F.leaky_relu(x, 0.3),
    "F.rrelu": lambda n, x: F.rrelu(x, 0.1, 0.4),
    "F.elu": lambda n, x: F.elu(x, 1.7),
    "F.selu": lambda n, x: F.selu(x),
    "torch.selu": lambda n, x: torch.selu(x),
    "F.celu": lambda n, x: F.celu(x, 0.5),
    "F.mish": lambda n, x: F.mish(x),
    "F.softplus": lambda n, x: F.softplus(x, beta=2.0, threshold=1.5),
    "F.softsign": lambda n, x: F.softsign(x),
    "F.logsigmoid": lambda n, x: F.logsigmoid(x),
    "F.hardtanh": lambda n, x: F.hardtanh(x, -0.4, 0.7),
    "F.relu6": lambda n, x: F.relu6(9 * x),
    "F.hardsigmoid": lambda n, x: F.hardsigmoid(3 * x),
    "F.hardswish": lambda n, x: F.hardswish(3 * x),
    "F.hardshrink": lambda n, x: F.hardshrink(x, 0.3),
    "F.softshrink": lambda n, x: F.softshrink(x, 0.3),
    "F.tanhshrink": lambda n, x: F.tanhshrink(x),
    "F.threshold": lambda n, x: F.threshold(x, 0.1, 0.2),
    "nn.Threshold": lambda n, x: nn.Threshold(0.1, 0.2)(x),
    "nn.Hardtanh": lambda n, x: nn.Hardtanh(-0.3, 0.3)(x),
    "nn.GELU": lambda n, x: nn.GELU()(x),
    "F.prelu": lambda n, x: F.prelu(x, n.p),
    "F.prelu of one": lambda n, x: F.prelu(x, n.q),
    "F.glu": lambda n, x: F.glu(n.a(x)),
    "nn.GLU": lambda n, x: nn.GLU(1)(n.a(x)),
    "clamp": lambda n, x: x.clamp(-0.5, 0.3),
    "clamp min": lambda n, x: torch.clamp(x, min=0.2),
    "clamp_max": lambda n, x: torch.clamp_max(x, 0.2),
    "abs": lambda n, x: abs(x) + x.abs() + torch.abs(x),
    "exp, log, sqrt": lambda n, x: (x.exp() + 1).log() + torch.sqrt(x.square() + 1),
    "rsqrt, reciprocal": lambda n, x: (x**2 + 1).rsqrt() + torch.reciprocal(x.exp()),
    "sin, cos": lambda n, x: torch.sin(x) + x.cos(),
    "erf": lambda n, x: torch.erf(x) + torch.special.erf(n.a(x)) + x.erf(),
    "softmax": lambda n, x: torch.softmax(x, -1),
    "F.softmax": lambda n, x: F.softmax(x, dim=1),
    "log_softmax": lambda n, x: x.log_softmax(-1),
    # arithmetic
    "numbers": lambda n, x: 2 - (1 + 3 * x - 0.5) / 4,
    "1 / x": lambda n, x: 1 / (2 + x.exp()),
    "parameters": lambda n, x: (n.q - n.p * x + n.a.bias) / n.std,
    "parameters first": lambda n, x: n.p + (n.std / (n.q.exp() + x.exp())),
    "(1, H)": lambda n, x: x * n.p.unsqueeze(0) + n.mean.reshape(1, -1),
    "()": lambda n, x: x * n.q.sum() + torch.tensor(3) - torch.tensor(0.5, dtype=torch.float32),
    "integers": lambda n, x: x * torch.tensor([1, 0, 1, 1, 0, 2]),
    "mask": lambda n, x: x * (n.p > 0),
    "Values": lambda n, x: n.a(x) - x + n.b(x) * x / (1 + x.square()),
    "widths 1 and H": lambda n, x: n.one(x) * x + n.one(x) - x,
    "H parameters and one column": lambda n, x: n.one(x) * n.p,
    "add with alpha": lambda n, x: torch.add(x, n.a(x), alpha=0.3).sub(n.p, alpha=2),
    "rsub": lambda n, x: torch.rsub(x, 2.0) + torch.rsub(x, n.a(x), alpha=3),
    "addcmul": lambda n, x: torch.addcmul(n.p, x, n.a(x), value=2).addcmul(n.p, n.q),
    "lerp": lambda n, x: torch.lerp(x, n.a(x), 0.3).lerp(n.b(x), x.sigmoid()),
    "neg": lambda n, x: -x + torch.neg(n.a(x)) + (+x),
    "powers": lambda n, x: x**2 + x**3 - x.pow(4) + x**1 + x.exp() ** -2 + x.exp() ** 0.5,
    "sum of a list": lambda n, x: sum([f(n, x) for f in EXPERTS]),
    "sum": lambda n, x: x.sum(-1, keepdim=True) + torch.sum(x, 1, keepdim=True) * x,
    "mean": lambda n, x: x.mean(dim=-1) + x.sum(-1),
    "centred": lambda n, x: x - x.mean(-1, keepdim=True),
    "augmented": augmented,
    # columns
    "cat": lambda n, x: torch.cat([x, n.a(x), x], -1),
    "cat dim 1": lambda n, x: torch.cat((n.one(x), x), dim=1),
    "hstack, concat": lambda n, x: torch.hstack([x, torch.concat([x, n.one(x)], 1)]),
    "slices": lambda n, x: x[:, 1:4] + x[..., ::2] * x[:, -3:],
    "slices of all": lambda n, x: x[:] + x[...] * x[:, :],
    "a column": lambda n, x: x[:, 2] * x[..., -1] + x.select(1, 0),
    "columns by a list": lambda n, x: x[:, [0, 2, 4]] + x[:, [5, 0, 1]] - x[:, range(3)],
    "columns by a tensor": lambda n, x: x[:, torch.tensor([4, 1])],
    "index_select": lambda n, x: x.index_select(1, torch.tensor([1, 1, 0])),
    "chunk": lambda n, x: torch.chunk(x, 2, -1)[1] * x.chunk(2, 1)[0],
    "chunk unevenly": lambda n, x: torch.cat(x.chunk(4, -1)[::-1], -1),
    "split": lambda n, x: torch.cat(x.split([1, 5], -1)[::-1], -1),
    "split by size": lambda n, x: torch.split(x, 4, 1)[1],
    "tensor_split": lambda n, x: x.tensor_split(4, -1)[1] + x.tensor_split([2, 4], -1)[2],
    "unbind": lambda n, x: (lambda a, b, *_: a * b)(*x.unbind(-1)),
    "narrow": lambda n, x: x.narrow(-1, 1, 3),
    "stack and sum": lambda n, x: torch.stack([f(n, x) for f in EXPERTS]).sum(0),
    "stack and mean": lambda n, x: torch.stack([f(n, x) for f in EXPERTS], -1).mean(-1),
    "torch.sum of a stack": lambda n, x: torch.sum(torch.stack([x, n.a(x)], 1), dim=1),
    "a stack is a copy": regular,
    "stack of columns": lambda n, x: torch.stack([x[:, 1], x[:, 0] * 2], -1),
    "expand": lambda n, x: n.one(x).expand(-1, 4) + n.one(x).expand_as(x)[:, :4],
    # shapes
    "squeeze": lambda n, x: n.one(x).squeeze(-1),
    "squeeze all": lambda n, x: n.one(x).squeeze() * 2,
    "squeeze and back": lambda n, x: n.one(x).squeeze(1).tanh().unsqueeze(-1) + x,
    "flatten": lambda n, x: n.one(x).flatten(),
    "flatten from 1": lambda n, x: nn.Flatten()(x) + torch.flatten(x, 1),
    "view": lambda n, x: n.a(x).view(len(x), -1).reshape(-1, D) + x.view(x.shape),
    "view of a column": lambda n, x: n.one(x).view(-1).reshape(-1, 1),
    "view_as": lambda n, x: n.a(x).view_as(x),
    "contiguous, clone": lambda n, x: x.contiguous().clone() + x[:, ::2].contiguous().sum(-1, True),
    "to": lambda n, x: x.to(torch.float64).to(x.device).double().to(n.p).type_as(x) + x,
    "asks": lambda n, x: x * x.shape[1] + x.size(-1) + x.dim() + len(x) + x.ndim + x.numel(),
    # norms, dropout
    "layer_norm": lambda n, x: F.layer_norm(x, (D,)) + n.norm(x),
    "rms_norm": lambda n, x: F.rms_norm(x, (D,), n.p, 1e-3) + nn.RMSNorm(D).double()(x),
    "batch_norm": lambda n, x: n.batch_norm(F.relu(n.batch_norm(x))) + x,
    "dropout": lambda n, x: F.dropout(F.alpha_dropout(x, 0.5), 0.0) + nn.Dropout().eval()(x),
    "dropout of all": lambda n, x: x + F.dropout(x, 1.0),
    # in place
    "relu_": in_place("relu_"),
    "add_": in_place("add_", 1),
    "clamp_": in_place("clamp_", 0, 1),
    "F.relu_": lambda n, x: (lambda h: h + F.relu_(h))(n.a(x)),
    "F.elu_": lambda n, x: (lambda h: h + F.elu_(h))(n.a(x)),
    "F.relu in place": lambda n, x: (lambda h: h + F.relu(h, inplace=True))(n.a(x)),
    "nn.SiLU in place": lambda n, x: (lambda h: h + nn.SiLU(inplace=True)(h))(n.a(x)),
    "nn.ELU in place": lambda n, x: (lambda h: h + nn.ELU(inplace=True)(h))(n.a(x)),
    "dropout, then in place": lambda n, x: F.relu(n.a(x).clone(), True) if 0 else x.clone().relu_(),
}


@pytest.mark.parametrize("name", READ)
def test_a_program_computes_what_the_module_does(name: str) -> None:
    net, x = Net(READ[name]), torch.randn(7, D, dtype=torch.float64)
    want = net(x.clone())
    got = values(reading(net, x), x)
    assert got.shape == want.shape
    assert_same([got], [want], 1e-14)


LEADING: dict[str, Forward] = {
    "layers": lambda n, x: n.b(F.silu(n.a(x))),
    "columns": lambda n, x: torch.cat([x[..., 1:3], x[:, :, :2].tanh(), n.one(x)], -1),
    "dim 2": lambda n, x: x.softmax(2) + x.sum(2, keepdim=True),
    "norms": lambda n, x: n.norm(x) * n.p,
    "squeeze": lambda n, x: n.one(x).squeeze(-1),
    "reshape": lambda n, x: n.a(x).reshape(*x.shape[:2], -1),
}


@pytest.mark.parametrize("name", LEADING)
def test_leading_axes(name: str) -> None:
    net, x = Net(LEADING[name]), torch.randn(3, 5, D, dtype=torch.float64)
    assert_same([values(reading(net, x), x)], [net(x)], 1e-14)


def test_one_row_without_an_axis() -> None:
    net = Net(lambda n, x: n.one(torch.cat([n.a(x), x[2:4], x.softmax(0)[:4]])).squeeze(0))
    net.one = nn.Linear(12, 1).double()
    x = torch.randn(D, dtype=torch.float64)
    assert_same([values(reading(net, x), x)], [net(x)], 1e-14)


class Branching(nn.Module):
    """Answers in words what it asks of x in numbers, catching what that raises."""

    def __init__(self, asks: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.asks = nn.Linear(D, 2).double(), asks

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x)
        try:
            answer = bool(self.asks(x))
        except Exception:
            answer = False
        return h.tanh() if answer else h


class Reversed(torch.autograd.Function):
    """Returns what it was given, with another derivative than that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class ReversedInTwo(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def without_grad(n: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = n.a(x)
    return h + x


def under_autocast(n: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return n.a(x)


def through_hooks(n: Net, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return n.a(x)


def keeping(n: Net, x: Tensor) -> Tensor:
    n.calls = n.a(x)
    return n.b(n.calls)


kept: list[Tensor] = []


def keeping_outside(n: Net, x: Tensor) -> Tensor:
    kept.append(n.a(x))
    return n.b(x)


def changed_below_a_view(n: Net, x: Tensor) -> Tensor:
    h = n.a(x)
    first = h[:, :3]
    h.relu_()
    return torch.cat([h, first], -1)


def changed_input(n: Net, x: Tensor) -> Tensor:
    x = x.view_as(x)
    x += 1
    return n.a(x)


def own_loop(n: Net, x: Tensor) -> Tensor:
    return torch.stack([n.a(row) for row in x])


def swallowed(n: Net, x: Tensor) -> Tensor:
    try:
        return torch.cumsum(x, -1)
    except Exception:
        return x


MIXING: dict[str, tuple[Forward, str]] = {
    "mean of the rows": (lambda n, x: x - x.mean(0), "Tensor.mean works along axis 0"),
    "mean of all": (lambda n, x: x - x.mean(), "Tensor.mean works along axis None"),
    "softmax of the rows": (lambda n, x: torch.softmax(x, 0), "torch.softmax works along axis 0"),
    "attention": (lambda n, x: torch.softmax(x @ x.T, -1) @ x, "Tensor.T is not known"),
    "sdpa": (lambda n, x: F.scaled_dot_product_attention(x, x, x), "dot_product_attention"),
    "matmul of Values": (lambda n, x: n.W.mT @ x.reshape(D, -1), "moves columns to the shape"),
    "outer": (lambda n, x: n.one(x).squeeze(-1) + n.one(x), "joins rows of different shapes"),
    "a row": (lambda n, x: x + x[0], "picks rows"),
    "half the rows": (lambda n, x: x[: len(x) // 2], "picks rows"),
    "rows by a mask": (lambda n, x: x[x[:, 0] > 0], "Tensor.__gt__"),
    "permuted": (lambda n, x: x.flip(0), "Tensor.flip"),
    "transposed": (lambda n, x: x.t(), "Tensor.t "),
    "reshaped": (lambda n, x: n.a(x).reshape(-1, 2 * D), "moves columns"),
    "expanded": (lambda n, x: x.unsqueeze(1).expand(-1, 3, -1).mean(1), "makes another axis"),
    "concatenated rows": (lambda n, x: torch.cat([x, x]), "works along axis 0"),
    "a constant for each row": (lambda n, x: x + torch.ones(len(x), 1), "joins rows and a tensor"),
    "constant rows beside": (lambda n, x: torch.cat([x, torch.ones_like(x)], -1), "ones_like"),
    "batch statistics": (
        lambda n, x: F.batch_norm(x, None, None, training=True),
        "statistics of the batch",
    ),
    "cumsum": (lambda n, x: x.cumsum(-1), "Tensor.cumsum is not known as a row-wise node"),
    "bilinear": (lambda n, x: n.bilinear(x, x), r"mlp.bilinear \(Bilinear\): torch.bilinear"),
    "maximum": (lambda n, x: torch.maximum(x, n.a(x)), "torch.maximum"),
    "where": (lambda n, x: torch.where(n.p > 0, x, -x), "torch.where"),
    "comparison": (lambda n, x: (x > 0) * x, "Tensor.__gt__"),
    "parameter compared": (lambda n, x: (n.p > x) * x, "Tensor.gt"),
    "rounding": (lambda n, x: x.round(), "Tensor.round"),
    "detach": (lambda n, x: n.a(x).detach(), "Tensor.detach"),
    "item": (lambda n, x: x * x[0, 0].item(), "picks rows"),
    "float": (lambda n, x: x * float(n.one(x)), "Tensor.__float__"),
    "no_grad": (without_grad, r"mlp.a \(Linear\): F.linear is under no_grad"),
    "autocast": (under_autocast, "autocast of its own"),
    "hooks on saved tensors": (through_hooks, "hooks on saved tensors"),
    "checkpoint": (lambda n, x: checkpoint(n.a, x, use_reentrant=False), "hooks|isinstance"),
    "reentrant checkpoint": (lambda n, x: checkpoint(n.a, x, use_reentrant=True), "isinstance"),
    "autograd.Function": (lambda n, x: Reversed.apply(n.a(x)), "autograd.Function"),
    "autograd.Function in two": (lambda n, x: ReversedInTwo.apply(n.a(x)), "autograd.Function"),
    "a compiled function": (
        lambda n, x: torch.compile(F.silu, backend="eager")(n.a(x)),
        "isinstance",
    ),
    "a hook on x": (lambda n, x: n.a(x).register_hook(lambda g: -g) and x, "register_hook"),
    "kept by the module": (keeping, "isinstance"),
    "kept elsewhere": (keeping_outside, "keeps a tensor that depends on its input"),
    "in place below a view": (changed_below_a_view, "what there is another view of"),
    "in place on the input": (changed_input, "what there is another view of"),
    "into a tensor": (lambda n, x: torch.zeros(7, D).double().add_(x), "writes into a tensor"),
    "an assignment": (lambda n, x: x.clone().__setitem__(0, 1), "Tensor.__setitem__"),
    "out=": (lambda n, x: torch.add(x, 1, out=torch.empty(0)), "out"),
    "dtype": (lambda n, x: x.float().double(), "changes the dtype"),
    "half precision in between": (lambda n, x: x.to(torch.bfloat16).double(), "moves or converts"),
    "another dtype": (lambda n, x: x.mul(torch.ones(D)), "tensor of torch.float32"),
    "a copy of its own": (lambda n, x: copy.copy(n.a(x)), "Tensor.__copy__"),
    "weights from the rows": (lambda n, x: F.layer_norm(x, (D,), x), "layer_norm takes a Value"),
    "rows one by one": (own_loop, "Tensor.__iter__"),
    "exception swallowed": (swallowed, "torch.cumsum"),
    "constant output": (lambda n, x: n.p.expand(7, D), "depends on its input"),
    "two outputs": (lambda n, x: (x, x), "its output is no tensor"),
    "wrong width": (lambda n, x: F.linear(x, n.W), "does not fit 6 columns"),
    "an error of its own": (lambda n, x: n.nothing, "AttributeError"),
    "printed": (lambda n, x: (str(x), x)[1], "Tensor.__str__"),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_is_no_row_wise_program_is_not_read_and_named(name: str) -> None:
    run, sentence = MIXING[name]
    net = Net(run)
    found = reading(net, torch.randn(7, D, dtype=torch.float64))
    assert isinstance(found, str)
    assert found.startswith("mlp")
    assert re.search(sentence, found), found


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum() > 0,
        lambda x: x[0, 0] > 0,
        lambda x: x.abs().max().item() > 1e-9,
        lambda x: float(x[0, 0]) == float(x[0, 0]),
        lambda x: x.isfinite().all(),
        lambda x: isinstance(x, Tensor),
        lambda x: torch.is_tensor(x),
        lambda x: x.numpy() is not None,
        lambda x: bool(x.new_ones(1)),
        lambda x: x in [x + 1, x],
    ],
)
def test_branches_on_the_data_are_not_read(asks: Callable[[Tensor], Any]) -> None:
    """Whatever becomes of the exception that a symbol raises."""
    net, (x1, x2) = Branching(asks), points(7, D1, K)
    assert isinstance(reading(net, torch.cat([x1, x2], -1)), str)
    assert_same(value_and_jacobian(net, x1, x2), oracle(net, x1, x2))


@pytest.mark.parametrize(
    ("run", "widths"),
    [
        (lambda n, x: n.one(F.silu(n.b(torch.tanh(n.a(x))))), [6, 6, 1]),
        (lambda n, x: n.one(F.relu(n.a((x - n.mean) / n.std))), [6, 1]),
        (lambda n, x: n.one(F.relu(n.batch_norm(n.a(x)))), [6, 1]),
        (lambda n, x: n.one(n.batch_norm(F.relu(n.b(x)))).squeeze(-1), [6, 1]),
        (lambda n, x: n.b(n.batch_norm(x)) * 2 + 1, [6]),
        (lambda n, x: n.p * n.b(torch.sigmoid(2 * n.a(x) - n.p)), [6, 6]),
        (lambda n, x: n.b(3 * torch.tanh(n.a(x + 0.5)) - n.q), [6, 6]),
    ],
)
@pytest.mark.parametrize("folded", [True, False])
def test_scales_and_shifts_are_folded_where_that_pays(
    run: Forward, widths: list[int], folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a chain of layers and activations; of few rows they stay nodes."""
    monkeypatch.setattr("monokernel.reading.FOLDS_FROM", -math.inf if folded else math.inf)
    net, (x1, x2) = Net(run), points(9, D1, K)
    x = torch.cat([x1, x2], -1)
    found = reading(net, x)
    assert_same([values(found, x)], [net(x)], 1e-13)
    assert isinstance(found, Reading)
    assert [node.width for node in found.nodes if node.kind == "linear"] == widths
    if folded:
        assert chain_of(D, found.nodes) is not None
    chosen = plan(net, x1, x2)
    assert chosen.backend == ("cpu" if "cpu" in HANDWRITTEN else "torch")
    for backend in (*HANDWRITTEN, "reference"):
        leaves = [x1.requires_grad_(), x2.requires_grad_(), *net.parameters()]
        got, want = value_and_jacobian(net, x1, x2, backend=backend), oracle(net, x1, x2)
        assert got[0].shape == net(x).shape
        assert_same(got, want)
        task = [torch.randn_like(t) for t in want]
        assert_same(
            gradients(sum((a * b).sum() for a, b in zip(got, task, strict=True)), *leaves),
            gradients(sum((a * b).sum() for a, b in zip(want, task, strict=True)), *leaves),
        )


@pytest.mark.parametrize(
    "run",
    [
        lambda n, x: n.one(F.relu(n.a((x - n.mean) / n.std))),
        lambda n, x: n.one(torch.cat([(x[:, :3] - n.mean[:3]) @ n.W[:3], x[:, 3:] * 0], -1)),
    ],
)
@pytest.mark.parametrize("folds_from", [-math.inf, math.inf])
def test_raw_inputs_far_from_zero_lose_no_digits(
    run: Forward, folds_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year, say: what is taken from it is taken before the product, in float32."""
    monkeypatch.setattr("monokernel.reading.FOLDS_FROM", folds_from)
    net = Net(run).float()
    net.mean.add_(1e6)
    x = net.mean + torch.randn(50, D)
    exact = copy.deepcopy(net).double()
    want = exact(x.double())
    error = (values(reading(net, x), x) - want).abs().max()
    assert error <= 2 * (net(x) - want).abs().max() + 1e-6


def test_a_value_that_is_read_twice_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monokernel.reading.FOLDS_FROM", -math.inf)

    def run(n: Net, x: Tensor) -> Tensor:
        h = x - n.mean
        g = n.a(h)
        return n.b(h * n.p) + g * n.std + g + x

    net, x = Net(run), torch.randn(7, D, dtype=torch.float64)
    assert_same([values(reading(net, x), x)], [net(x)], 1e-13)


def test_what_the_output_does_not_need_is_dropped() -> None:
    net = Net(lambda n, x: (n.a(x).tanh() * x, n.b(x))[1])
    x = torch.randn(7, D, dtype=torch.float64)
    found = reading(net, x)
    assert isinstance(found, Reading)
    assert [node.kind for node in found.nodes] == ["linear"]
    assert found.params[0] is net.b.weight
    found = reading(Net(lambda n, x: x), x)
    assert isinstance(found, Reading)
    assert [node.kind for node in found.nodes] == ["identity"]


# --- what changes between two calls --------------------------------------------------------------


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 5), nn.Linear(5, 2)
        self.act: Any = torch.tanh
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.ReLU())
        self.factor, self.deep = 2.0, {"shift": 1.0}
        self.register_buffer("scale", torch.ones(5))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.act(self.a(x)) * self.factor + self.deep["shift"])
        return self.b(h * self.scale)


def _attribute(net: Stateful) -> None:
    net.factor = -3.0


def _deep_attribute(net: Stateful) -> None:
    net.deep["shift"] = 0.25


def _layer(net: Stateful) -> None:
    net.a = nn.Linear(D, 5).double()


def _activation(net: Stateful) -> None:
    net.act = F.silu


def _inner_module(net: Stateful) -> None:
    net.inner[1] = nn.Softplus()


def _hook(net: Stateful) -> None:
    net.b.register_forward_hook(lambda m, args, out: out * 3)


def _parametrization(net: Stateful) -> None:
    nn.utils.parametrizations.weight_norm(net.a)
    with torch.no_grad():
        net.a.parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr]


def _forward(net: Stateful) -> None:
    net.forward = lambda x: net.b(net.a(x).sin())  # type: ignore[method-assign]


def _class_forward(net: Stateful) -> None:
    class Other(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).exp())

    net.__class__ = Other


def _buffer(net: Stateful) -> None:
    net.scale = torch.rand(5).double()


def _buffer_in_place(net: Stateful) -> None:
    net.scale.mul_(3)  # type: ignore[operator]


def _weights(net: Stateful) -> None:
    with torch.no_grad():
        net.a.weight.neg_()


def _unreadable(net: Stateful) -> None:
    net.act = lambda h: h - h.cumsum(-1)


CHANGES = [
    _attribute,
    _deep_attribute,
    _layer,
    _activation,
    _inner_module,
    _hook,
    _parametrization,
    _forward,
    _class_forward,
    _buffer,
    _buffer_in_place,
    _weights,
    _unreadable,
]


@pytest.mark.parametrize("change", CHANGES)
def test_no_answer_is_stale(change: Callable[[Stateful], None]) -> None:
    net, (x1, x2) = Stateful().eval(), points(7, D1, K)
    for _ in range(2):
        assert_same(value_and_jacobian(net, x1, x2, backend="reference"), oracle(net, x1, leaf(x2)))
    first = value_and_jacobian(net, x1, x2, backend="reference")[1]
    change(net)
    got = value_and_jacobian(net, x1, x2, backend="reference")
    assert_same(got, oracle(net, x1, leaf(x2)))
    assert (got[1] - first).abs().max() > 1e-3


def _chain() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(5, 4), nn.Softplus(1.5))
    return nn.Sequential(
        nn.Linear(D, 5), nn.Dropout(0.5), nn.LeakyReLU(0.1), inner, nn.Linear(4, 2)
    ).double()


def _swap(net: nn.Sequential, at: int, m: nn.Module) -> None:
    net[at] = m.double()


def _new_sizes(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.randn(7, D).double())
    net[0].bias = nn.Parameter(torch.randn(7).double())
    net[3][0].weight = nn.Parameter(torch.randn(4, 7).double())


def _no_bias(net: nn.Sequential) -> None:
    net[0].bias = None


def _bias_as_an_attribute(net: nn.Sequential) -> None:
    del net[0].bias
    net[0].bias = torch.randn(5).double()


def _own_class(net: nn.Sequential) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net[4].__class__ = Doubled


CHAIN_CHANGES: dict[str, Callable[[Any], object]] = {
    "a layer": lambda net: _swap(net, 0, nn.Linear(D, 5)),
    "an activation": lambda net: _swap(net, 2, nn.Tanh()),
    "an activation's number": lambda net: setattr(net[2], "negative_slope", -2.0),
    "an inner activation": lambda net: _swap(net[3], 1, nn.Tanh()),
    "an inner activation's number": lambda net: setattr(net[3][1], "beta", 0.2),
    "one layer more": lambda net: net.append(nn.Sigmoid()),
    "one inner layer more": lambda net: net[3].append(nn.Linear(4, 4).double()),
    "one layer less": lambda net: net.pop(2),
    "sizes": _new_sizes,
    "no bias": _no_bias,
    "a bias that is an attribute": _bias_as_an_attribute,
    "weights in place": lambda net: net[0].weight.data.neg_(),
    "a forward hook": lambda net: net[0].register_forward_hook(lambda m, x, y: y * 3),
    "a hook before the forward": lambda net: net.register_forward_pre_hook(lambda m, x: x[0] * 3),
    "an inner hook": lambda net: net[3].register_forward_hook(lambda m, x, y: y * 3),
    "a forward": lambda net: setattr(net[0], "forward", lambda x: F.linear(x, net[0].weight) * 3),
    "a class": _own_class,
    "a parametrization": lambda net: nn.utils.parametrize.register_parametrization(
        net[0], "weight", nn.Tanh()
    ),
}


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("change", CHAIN_CHANGES)
def test_no_answer_of_a_chain_is_stale(change: str, backend: str) -> None:
    net, (x1, x2) = _chain().eval(), points(7, D1, K)
    for _ in range(3):
        first = value_and_jacobian(net, x1, x2, backend=backend)
        assert_same(first, oracle(net, x1, leaf(x2)))
    CHAIN_CHANGES[change](net)
    got = value_and_jacobian(net, x1, x2)
    assert_same(got, oracle(net, x1, leaf(x2)))
    assert (got[1] - first[1]).abs().max() > 1e-3
    assert_same(value_and_jacobian(net, x1, x2), got)


def _not_dense(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse())


UNFIT: dict[str, Callable[[Any], object]] = {
    "another dtype": lambda net: setattr(net[4].weight, "data", net[4].weight.data.float()),
    "another layout": _not_dense,
    "another size": lambda net: setattr(net[4], "weight", nn.Parameter(torch.ones(2, 5).double())),
    "a device without numbers": lambda net: net[0].to("meta"),
    "no memory": lambda net: net[0].weight.untyped_storage().resize_(0),
    "no weight": lambda net: setattr(net[0], "weight", None),
    "no number": lambda net: delattr(net[2], "negative_slope"),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("change", UNFIT)
def test_what_no_longer_fits_is_said_as_at_first(change: str, backend: str) -> None:
    x1, x2 = points(7, D1, K)
    said = []
    for calls in (0, 2):
        net = _chain().eval()
        for _ in range(calls):
            value_and_jacobian(net, x1, x2, backend=backend)
        UNFIT[change](net)
        with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as raised:
            value_and_jacobian(net, x1, x2, backend=backend)
        said.append((raised.type, str(raised.value)))
    assert said[0] == said[1]


def test_what_is_asked_of_a_chain_is_seen() -> None:
    net, (x1, x2) = _chain().eval(), points(7, D1, K)
    for _ in range(3):
        value_and_jacobian(net, x1, x2)
    with pytest.raises(ValueError, match="mode: expected one of"):
        value_and_jacobian(net, x1, x2, mode="no mode")
    with pytest.raises(ValueError, match="batch_stats: expected one of"):
        value_and_jacobian(net, x1, x2, batch_stats="all")
    with pytest.raises(TypeError, match="x1: expected the dtype of mlp"):
        value_and_jacobian(net, x1.float(), x2.float())
    with pytest.raises(ValueError, match="x2: expected d1"):
        value_and_jacobian(net, x1, torch.cat((x2, x2), 1))
    net.float()  # the parameters are the same objects
    with pytest.raises(TypeError, match="x1: expected the dtype of mlp, float32, got float64"):
        value_and_jacobian(net, x1, x2)
    net.double()
    torch.manual_seed(0)
    still = value_and_jacobian(net, x1, x2)
    net.train()
    assert (value_and_jacobian(net, x1, x2)[0] - still[0]).abs().max() > 1e-3
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert value_and_jacobian(net.float(), x1.float(), x2.float())[0].dtype is torch.bfloat16
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: y * 2)
    try:
        got = value_and_jacobian(net.double(), x1, x2)
        assert_same(got, oracle(net, x1, leaf(x2)))
        assert (got[0] - still[0]).abs().max() > 1e-3
    finally:
        handle.remove()


def test_a_chain_that_was_served_is_let_go() -> None:
    net, (x1, x2) = _chain().eval(), points(7, D1, K)
    net[0].whole = [net]  # a part may hold the whole
    for _ in range(3):
        value_and_jacobian(net, x1, x2)
    gone, key = weakref.ref(net), id(net)
    assert key in again._served
    del net
    gc.collect()
    assert gone() is None
    assert key not in again._served


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def test_the_mode_of_a_part_is_seen() -> None:
    net, (x1, x2) = Stateful().eval(), points(7, D1, K)
    still = value_and_jacobian(net, x1, x2, backend="reference")
    net.inner[0].train()
    torch.manual_seed(3)
    got = value_and_jacobian(net, x1, x2, backend="reference")
    assert (got[0] - still[0]).abs().max() > 1e-3
    torch.manual_seed(3)
    assert_same(got, value_and_jacobian(net, x1, x2))


def test_dropout_has_pytorch_s_rate_and_scale_and_is_repeated_by_its_seed() -> None:
    net = Net(lambda n, x: F.dropout(x, 0.25))
    x = torch.ones(5000, D, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = (values(reading(net, x), x) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(values(reading(net, x), x), first)
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs((first == 0).double().mean().item() - 0.25) < 0.01


def test_a_plan_draws_no_mask() -> None:
    net, (x1, x2) = Net(lambda n, x: n.one(F.dropout(n.a(x)))), points(7, D1, K)
    before = torch.get_rng_state()
    plan(net, x1, x2)
    assert torch.equal(torch.get_rng_state(), before)


# --- the forward's own side effects --------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, readable: bool) -> None:
        super().__init__()
        self.a, self.calls, self.readable = nn.Linear(D, 1).double(), 0, readable
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("trace", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.trace = self.count * 2
        noise = torch.rand(())
        y: Tensor = self.a(x) * noise
        return y if self.readable else y + y.cumsum(-1)


@pytest.mark.parametrize("readable", [True, False])
def test_the_forward_takes_effect_exactly_once_a_call(readable: bool) -> None:
    net, (x1, x2) = Counting(readable), points(7, D1, K)
    for call in range(1, 4):
        torch.manual_seed(call)
        y, _ = value_and_jacobian(net, x1, x2, backend="reference")
        assert net.calls == net.count.item() == call
        assert net.trace is not None
        assert net.trace.item() == 2 * call
        twin = copy.deepcopy(net)
        torch.manual_seed(call)
        assert_same([y], [twin(torch.cat([x1, x2], -1))])


class Turning(Counting):
    """Readable in its first two calls."""

    def forward(self, x: Tensor) -> Tensor:
        self.readable = self.calls < 2
        return super().forward(x)


def test_the_call_in_which_a_network_becomes_unreadable_takes_effect_once() -> None:
    net, (x1, x2) = Turning(True), points(7, D1, K)
    for call in range(1, 5):
        twin = copy.deepcopy(net)
        torch.manual_seed(call)
        y, _ = value_and_jacobian(net, x1, x2, backend="reference")
        drawn = torch.get_rng_state()
        torch.manual_seed(call)
        assert_same([y], [twin(torch.cat([x1, x2], -1))])
        assert torch.equal(torch.get_rng_state(), drawn)
        assert net.calls == net.count.item() == call
        assert isinstance(reading(copy.deepcopy(net), torch.cat([x1, x2], -1)), str) == (call > 1)


@pytest.mark.parametrize("readable", [True, False])
def test_what_a_forward_adds_to_its_lists_it_adds_once(readable: bool) -> None:
    def run(n: Net, x: Tensor) -> Tensor:
        n.seen.append(x.shape)
        n.deep["list"].append(0)
        n.deep["counts"]["calls"] += 1
        n.deep["names"].add(len(n.seen))
        n.deep["last"].append(len(n.seen))
        n.deep["kept"][0].add_(1)
        n.deep["parts"][0].calls += 1
        y = n.a(x)
        return y if readable else y.cumsum(-1)

    net, (x1, x2) = Net(run), points(7, D1, K)
    net.seen = []
    net.deep = {"list": [], "counts": Counter(), "names": set(), "last": deque(maxlen=2)}
    net.deep |= {"kept": [torch.zeros(2)], "parts": [Counting(True)]}
    for call in range(1, 4):
        plan(net, x1, x2)
        fused_mono_penalty(net, x1, x2)
        plan(net, x1, x2)
        assert len(net.seen) == len(net.deep["list"]) == net.deep["counts"]["calls"] == call
        assert net.deep["names"] == set(range(1, call + 1))
        assert list(net.deep["last"]) == list(range(1, call + 1))[-2:]
        assert net.deep["kept"][0].tolist() == [call, call]
        assert net.deep["parts"][0].calls == call


@pytest.mark.parametrize("readable", [True, False])
def test_a_plan_leaves_no_trace(readable: bool) -> None:
    net, (x1, x2) = Counting(readable), points(7, D1, K)
    fused_mono_penalty(net, x1, x2, backend="reference")
    before, numbers = copy.deepcopy(net), torch.get_rng_state()
    plan(net, x1, x2)
    assert net.calls == 1
    assert net.count.item() == 1
    assert before.trace is not None
    assert torch.equal(net.trace, before.trace)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), numbers)


def test_an_unreadable_forward_is_not_tried_again_but_by_plan() -> None:
    runs = []

    def run(n: Net, x: Tensor) -> Tensor:
        runs.append(type(x) is Tensor)
        return x.cumsum(-1) + x.sum(-1, keepdim=True) if n.calls == 0 else n.a(x)

    net, (x1, x2) = Net(run), points(7, D1, K)
    for _ in range(3):
        fused_mono_penalty(net, x1, x2)
    assert runs == [False, True, True, True]
    assert "Tensor.cumsum" in plan(net, x1, x2).refused["torch"]
    runs.clear()
    net.train()  # another mode is another forward
    net.batch_norm.eval()
    fused_mono_penalty(net, x1, x2)
    assert runs == [False, True]
    net.eval()
    net.calls = 1
    assert isinstance(reading(net, torch.cat([x1, x2], -1)), str)
    plan(net, x1, x2)
    assert isinstance(reading(net, torch.cat([x1, x2], -1)), Reading)


def test_nothing_is_left_of_a_network_that_is_gone() -> None:
    for run in (lambda n, x: n.a(x), lambda n, x: x.cumsum(-1)):
        net, (x1, x2) = Net(run), points(7, D1, K)
        fused_mono_penalty(net, x1, x2)
        gone = weakref.ref(net)
        del net
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("readable", [True, False])
def test_symbols_and_computed_weights_are_gone_after_the_call(readable: bool) -> None:
    """Without waiting for the collector of cycles."""
    weights: list[weakref.ref[Tensor]] = []

    def run(n: Net, x: Tensor) -> Tensor:
        W = n.a.weight * 2
        weights.append(weakref.ref(W))
        y = F.linear(x, W)
        return y if readable else y.cumsum(-1)

    net, (x1, x2) = Net(run), points(7, D1, K)
    gc.collect()
    gc.disable()
    before = sum(type(o) is Value for o in gc.get_objects())
    try:
        with torch.no_grad():
            value_and_jacobian(net, x1, x2)
        assert sum(type(o) is Value for o in gc.get_objects()) == before
        assert [w() for w in weights] == [None] * len(weights)
    finally:
        gc.enable()


@pytest.mark.parametrize("own", [True, False])
def test_an_unreadable_forward_draws_what_it_would_have_drawn(own: bool) -> None:
    generator = torch.Generator() if own else None

    def run(n: Net, x: Tensor) -> Tensor:
        return n.a(x + torch.randn(x.shape, generator=generator, dtype=x.dtype))

    net, (x1, x2) = Net(run), points(7, D1, K)
    assert "joins rows and a tensor" in str(reading(copy.deepcopy(net), torch.cat([x1, x2], -1)))
    for _ in range(2):
        (generator or torch.default_generator).manual_seed(5)
        y, _ = value_and_jacobian(net, x1, x2)
        (generator or torch.default_generator).manual_seed(5)
        assert_same([y], [net(torch.cat([x1, x2], -1))])


# --- what is more than Python around functions ---------------------------------------------------


def test_modules_that_are_no_plain_python_are_not_read() -> None:
    x = torch.randn(7, D, dtype=torch.float64)
    own = Net(lambda n, x: n.extra(n.a(x)))
    own.extra = nn.ReLU()
    assert isinstance(reading(own, x), Reading)
    own.extra = torch.jit.script(nn.Sequential(nn.Linear(D, 2)).double())
    assert "scripted, distributed or quantised" in str(reading(own, x))
    own.extra = nn.Linear(D, 2).double()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        assert reading(own, x) == "a global module hook is registered"
    finally:
        handle.remove()
    own.extra.register_full_backward_hook(lambda m, gi, go: None)
    assert reading(own, x) == "mlp.extra (Linear) has hooks"


def test_batch_norm_in_training_mode_is_not_run() -> None:
    net, (x1, x2) = Net(lambda n, x: n.batch_norm(x)), points(7, D1, K)
    net.batch_norm.train()
    with pytest.raises(ValueError, match=r"batch_norm \(BatchNorm1d\) normalises with the stat"):
        fused_mono_penalty(net, x1, x2)
    assert net.batch_norm.num_batches_tracked == 0


def test_forwards_of_many_kinds_are_read() -> None:
    x = torch.randn(7, D, dtype=torch.float64)

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])
            self.heads = nn.ModuleDict({"a": nn.Linear(D, 1), "b": nn.Linear(D, 2)})
            self.gain = nn.ParameterList([nn.Parameter(torch.randn(D)) for _ in range(3)])
            nn.utils.parametrizations.spectral_norm(self.layers[1])
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = x + self.gain[i] * F.silu(layer(x))
            return torch.cat([head(x) for head in self.heads.values()], dim=-1)

    for net in (
        Listed(),
        nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.PReLU(), nn.Linear(D, 2)).double(),
        nn.Sequential(Listed(), nn.Softmax(-1)).double(),
        Net(lambda n, x: n.a(n.a(n.a(x).tanh()).tanh())),
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Tanh()).double()),
    ):
        assert_same([values(reading(net, x), x)], [net(x)], 1e-14)


def test_clamp_has_pytorch_s_slope_on_its_bounds() -> None:
    net = Net(lambda n, x: x.clamp(0, 1))
    x = torch.tensor([[0.0, 0.0, 1.0, 0.5, 0.0, 1.0], [2.0, -1.0, 1.0, 0.0, 2.0, -1.0]])
    x1, x2 = x.double().split([D1, K], -1)
    assert_same(value_and_jacobian(net, x1, x2, backend="reference"), oracle(net, x1, leaf(x2)))


def test_squeezed_outputs_keep_their_shape_in_every_call() -> None:
    net, (x1, x2) = Net(lambda n, x: n.one(F.silu(n.a(x))).squeeze(-1)), points(7, D1, K)
    y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, reduction="none")
    assert (y.shape, penalty.shape) == ((7,), (7, 1, K))
    y, J = value_and_jacobian(net, x1.reshape(7, 1, D1), x2.reshape(7, 1, K), backend="reference")
    assert (y.shape, J.shape) == ((7, 1), (7, 1, 1, K))


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_a_function_of_its_own_derivative_is_seen_without_gradients_too(grad: Any) -> None:
    net, (x1, x2) = Net(lambda n, x: Reversed.apply(n.a(x))), points(7, D1, K)
    with grad():
        got = value_and_jacobian(net, x1, x2)
    assert_same(got, [t.detach() for t in oracle(net, x1, x2)])


def test_autocast_needs_to_know_the_dtype_of_the_output() -> None:
    """A parameter that is added to the output decides, and may be of another dtype."""
    x1, x2 = points(7, D1, K, torch.float32)
    shifted = Net(lambda n, x: n.one(F.relu(n.a(x - n.mean)))).float()
    unknown = Net(lambda n, x: n.one(F.relu(n.a(x))) + n.q.sum().reshape(1)).float()
    with torch.autocast("cpu", torch.bfloat16):
        for net in (shifted, unknown):
            y, _ = value_and_jacobian(net, x1, x2)
            assert y.dtype == net(torch.cat([x1, x2], -1)).dtype
        assert "under autocast" in plan(unknown, x1, x2).refused["cpu"]
        with pytest.raises(ValueError, match="under autocast backend 'torch' serves chains"):
            value_and_jacobian(shifted, x1, x2, backend="torch")
    assert math.isfinite(fused_mono_penalty(shifted, x1, x2).item())


# What autocast makes of what a linear layer gives, on CUDA.
ON_CUDA: dict[str, Forward] = {
    "an activation": lambda n, x: F.silu(n.a(x)),
    "a residual": lambda n, x: n.a(x) + n.b(F.gelu(n.a(x))),
    "x beside it": lambda n, x: n.a(x) + x,
    "concatenated with x": lambda n, x: torch.cat([n.a(x), x], -1),
    "the mean of a stack": lambda n, x: torch.stack([n.a(x), n.b(x)]).mean(0),
    "the sum of a stack": lambda n, x: torch.stack([n.a(x), n.b(x)]).sum(0),
    "a norm": lambda n, x: n.norm(n.a(x)),
    "a norm and a layer": lambda n, x: n.one(n.norm(n.a(x))),
    "softmax": lambda n, x: n.a(x).softmax(-1),
    "log-softmax": lambda n, x: F.log_softmax(n.a(x), -1),
    "exp": lambda n, x: n.a(x).exp(),
    "exp in place": lambda n, x: n.a(x).exp_(),
    "log": lambda n, x: torch.log(n.a(x)),
    "softplus": lambda n, x: F.softplus(n.a(x)) + n.b(x),
    "a power": lambda n, x: n.a(x) ** 2,
    "a square": lambda n, x: n.a(x).square(),
    "its square": lambda n, x: F.relu(n.a(x)) * n.a(x),
    "a root": lambda n, x: n.a(x).sqrt(),
    "one by a root": lambda n, x: n.a(x).rsqrt(),
    "a reciprocal": lambda n, x: n.a(x).reciprocal(),
    "a number by it": lambda n, x: 2 / n.a(x),
    "a quotient": lambda n, x: n.a(x) / n.b(x),
    "a total": lambda n, x: n.a(x).sum(-1, keepdim=True),
    "a mean": lambda n, x: n.a(x).mean(-1, keepdim=True),
    "dropout": lambda n, x: F.dropout(n.a(x), 0.5, True),
}


@pytest.mark.parametrize("what", ON_CUDA)
def test_the_dtype_of_the_output_under_autocast_on_cuda(what: str) -> None:
    """Asked of PyTorch by tensors that have no memory: no GPU is needed."""
    net: Any = Net(ON_CUDA[what]).float()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, x1, x2 = (torch.randn(7, n, device="cuda") for n in (D, D1, K))
        for m in net.modules():
            for held in (m._parameters, m._buffers):
                for name, t in held.items():
                    if t is not None and t.is_floating_point():
                        # Without a gradient, for which autograd would look for a GPU.
                        held[name] = torch.empty_like(t, device="cuda", requires_grad=False)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            plain = net(x)
            found = _record(net, check_inputs(x1, x2), fold=True)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
    assert isinstance(found, Reading), found
    rounded = True if found.rounded is None else found.rounded  # of a chain of layers
    assert plain.dtype == (torch.bfloat16 if rounded else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_rms_norm_without_an_eps_has_pytorch_s(dtype: torch.dtype) -> None:
    """Seen where the squares are small beside it."""
    net = Net(lambda n, x: n.one(F.rms_norm(1e-3 * n.a(x), (D,)))).to(dtype)
    x1, x2 = points(9, D1, K, dtype)
    assert plan(net, x1, x2).backend == "cpu"
    y, _ = value_and_jacobian(net, x1, x2)
    assert_same([y], [net(torch.cat([x1, x2], -1))], 8 * torch.finfo(dtype).eps)


def test_structural_chains_are_not_run() -> None:
    """Their layers are read by type, which costs less."""
    net = mlp(D1, K, 1)
    x1, x2 = points(4, D1, K)
    net[1].__class__ = type("SiLU", (nn.SiLU,), {"forward": lambda self, x: x * x.sigmoid()})
    assert_same(value_and_jacobian(net, x1, x2, backend="reference"), oracle(net, x1, x2))


def test_who_walks_over_all_objects_meets_no_symbol_that_refuses() -> None:
    """As memory profilers do, which ask every object whether it is a tensor."""
    kept: list[Any] = []

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            kept.append(x)
            return self.layer(x).tanh()

    fused_mono_penalty(Keeps(), torch.randn(4, 2), torch.randn(4, 1))
    assert kept
    assert not isinstance(kept[0], Tensor)
    gc.collect()  # the compiler's garbage may refuse as well
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) > 0
