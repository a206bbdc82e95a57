"""Any module: the general path against the oracle, called exactly once."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monokernel import MonotonePenalty, audit, fused_mono_penalty, plan, value_and_jacobian
from monokernel.backends import general
from tests.support import (
    BACKENDS,
    HANDWRITTEN,
    WITHOUT_DERIVATIVE,
    Attention,
    Cube,
    Reads,
    Recurrent,
    assert_same,
    gradients,
    mlp,
    oracle,
    oracle_penalties,
    points,
    quantized,
)

D1, K = 3, 2


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Handwritten(nn.Module):
    """Squeezes, multiplies inputs, uses a custom autograd function of the old style."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D1 + K, 6), nn.Linear(6, D)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.a(x)) * x.prod(-1, keepdim=True)
        return Cube.apply(self.b(h))


class Subclass(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked() -> nn.Sequential:
    net = mlp(D1, K, 2)
    net[1].register_forward_hook(lambda m, args, out: 0.5 * out)
    return net


def batch_norm() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(D1 + K, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 2))
    net(torch.randn(50, D1 + K))  # running statistics that are not the initial ones
    return net.eval()


MODULES = {
    "layer-norm": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)
    ),
    "batch-norm-eval": batch_norm,
    "residual": lambda: nn.Sequential(nn.Linear(5, 6), Residual(6), Residual(6), nn.Linear(6, 2)),
    "one-output": lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 1)),
    "handwritten": lambda: Handwritten(3),
    "hooks": hooked,
    "sequential-subclass": lambda: Subclass(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)),
    "activation-first": lambda: nn.Sequential(nn.Tanh(), nn.Linear(5, 2)),
    "two-activations": lambda: nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Sigmoid()),
    # PyTorch's forward mode loses terms of the parameter gradients in these two.
    "layer-norm-last": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6)),
    "instance-norm": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "attention": lambda: Attention(D1 + K, 6),
    "recurrent": lambda: Recurrent(D1 + K, 2),
    "weight-norm-by-hook": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(5, 6)), nn.SiLU(), nn.Linear(6, 2)
    ),
}


# Those of which every operation is a node: they are served as programs.
PROGRAMS = {
    "layer-norm", "batch-norm-eval", "residual", "one-output", "sequential-subclass",
    "activation-first", "two-activations", "layer-norm-last",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["auto", "adjoint"])
@pytest.mark.parametrize("name", MODULES)
def test_against_the_oracle(name: str, mode: str) -> None:
    net = MODULES[name]().double()
    x1, x2 = (t.requires_grad_() for t in points(9, D1, K))
    inputs = [x1, x2, *net.parameters()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y, J = oracle(net, x1, x2)
    want = oracle_penalties(J, torch.tensor([1.0, -1.0]), 0.1).sum()
    got_y, got = fused_mono_penalty(
        net, x1, x2, direction=[1, -1], margin=0.1, return_output=True, mode=mode
    )
    task = torch.randn_like(y)
    assert_same([got_y, got], [y, want])
    assert_same(
        gradients((got_y * task).sum() + got, *inputs), gradients((y * task).sum() + want, *inputs)
    )
    chosen = plan(net, x1, x2)
    if name in PROGRAMS:
        assert chosen.backend in HANDWRITTEN
        return
    assert chosen.backend == "reference"
    assert set(chosen.refused) == {"triton", "cpu", "torch"}
    for backend in HANDWRITTEN:
        with pytest.raises(ValueError, match=f"backend: '{backend}' was asked for but cannot"):
            fused_mono_penalty(net, x1, x2, backend=backend)


@pytest.mark.parametrize("name", ["layer-norm", "layer-norm-last", "instance-norm"])
def test_gradcheck_of_normalisations(name: str) -> None:
    """By finite differences, since the oracle shares PyTorch's rules with what it judges."""
    net = MODULES[name]().double()
    x1, x2 = points(4, D1, K)
    params = dict(net.named_parameters())

    def f(*values: Tensor) -> Tensor:
        bound = dict(zip(params, values, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(net, bound):
            return value_and_jacobian(net, x1, x2)[1]

    assert torch.autograd.gradcheck(f, list(params.values()))


def test_tangent_mode_is_refused_and_says_why() -> None:
    with pytest.raises(ValueError, match=r"mode: 'tangent' was asked for .* \(Unflatten\)"):
        fused_mono_penalty(MODULES["instance-norm"]().double(), *points(4, D1, K), mode="tangent")


def test_plan_names_the_part_that_is_not_fused() -> None:
    x1, x2 = points(4, D1, K)
    others = set(MODULES) - PROGRAMS
    reasons = {name: plan(MODULES[name]().double(), x1, x2).refused["torch"] for name in others}
    assert reasons["hooks"] == "mlp.1 (SiLU) has hooks"
    unknown = "is not known as a row-wise node"
    assert reasons["instance-norm"] == f"mlp.1 (Unflatten): Tensor.unflatten {unknown}"
    assert reasons["handwritten"] == f"mlp (Handwritten): Tensor.prod {unknown}"
    assert reasons["attention"] == "mlp (Attention): Tensor.unsqueeze makes another axis"


def test_replaced_weights_of_another_size() -> None:
    """The widths are those of the weights, not what the layers say of themselves."""
    net = mlp(D1, K, 2, [7, 5], nn.Tanh())
    net[0].weight = nn.Parameter(net[0].weight[:4].detach())
    net[0].bias = nn.Parameter(net[0].bias[:4].detach())
    net[2].weight = nn.Parameter(net[2].weight[:, :4].detach())
    x1, x2 = points(6, D1, K)
    want = oracle(net, x1, x2)
    for backend in ("reference", *HANDWRITTEN):
        assert_same(value_and_jacobian(net, x1, x2, backend=backend), want)
    net[2].bias = nn.Parameter(net[2].bias[:1].detach())  # PyTorch broadcasts it
    reason = "mlp.2 (Linear): F.linear has a bias of another size than its weight"
    assert plan(net, x1, x2).refused["torch"] == reason
    assert_same(value_and_jacobian(net, x1, x2), oracle(net, x1, x2))


class Half(nn.Module):
    """A parametrization that changes the shape, or the dtype."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight[:2] if self.dtype is None else weight.to(self.dtype)


@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        (
            None,
            r"mlp: expected a parametrized weight of shape \(4, 5\), as its layer says, got \(2",
        ),
        (torch.float32, "x1: expected the dtype of mlp, float32, got float64"),
    ],
)
def test_a_parametrization_that_does_not_fit(dtype: torch.dtype | None, sentence: str) -> None:
    net = mlp(D1, K, 1, [4], nn.Tanh(), bias=False)
    half = Half(dtype)
    nn.utils.parametrize.register_parametrization(net[0], "weight", half, unsafe=True)
    with pytest.raises((ValueError, TypeError), match=sentence):
        fused_mono_penalty(net, *points(4, D1, K))


def test_the_module_is_called_exactly_once() -> None:
    net, calls = hooked(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    fused_mono_penalty(net, *points(4, D1, K), return_output=True)
    assert len(calls) == 1


def test_active_dropout_has_one_mask_for_value_and_slopes() -> None:
    """With a linear network and dropout on its inputs, each slope is the weight or zero, and the
    value says which."""
    linear = nn.Linear(1 + 2, 1, bias=False).double()
    net = nn.Sequential(nn.Dropout(0.5), linear)
    x1, x2 = torch.zeros(200, 1).double(), torch.ones(200, 2).double()
    y, J = value_and_jacobian(net, x1, x2)
    assert_same([J.sum(-1)], [y])
    assert 0 < (J == 0).double().mean() < 1
    assert plan(net, x1, x2).backend != "reference"
    assert plan(net.eval(), x1, x2).backend != "reference"
    assert plan(nn.Sequential(nn.Dropout(0.0), linear).train(), x1, x2).backend != "reference"


def test_batch_norm_in_training_mode_is_refused() -> None:
    net = batch_norm().double().train()
    before = net[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"mlp: 1 \(BatchNorm1d\) normalises with the statistics"):
        fused_mono_penalty(net, *points(6, D1, K))
    assert torch.equal(net[1].running_mean, before)
    report = audit(net, *points(6, D1, K))  # audits in evaluation mode, and puts the mode back
    assert report.rows == 6
    assert net.training
    assert net[1].training


def test_outputs_of_other_shapes() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(D1, K, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze(-1)

    net, (x1, x2) = Squeezed(), points(7, D1, K)
    y, J = value_and_jacobian(net, x1, x2)
    want = value_and_jacobian(net.net, x1, x2)
    assert y.shape == (7,)
    assert_same([y.unsqueeze(-1), J], want)
    y, J = value_and_jacobian(hooked(), x1.reshape(7, 1, D1), x2.reshape(7, 1, K))
    assert (y.shape, J.shape) == ((7, 1, 2), (7, 1, 2, K))

    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0)

    with pytest.raises(ValueError, match="mlp: expected an output of shape"):
        fused_mono_penalty(Pooled(), x1, x2)

    class Tuple(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="mlp: expected to return a tensor, got tuple"):
        fused_mono_penalty(Tuple(), x1, x2)


@pytest.mark.parametrize("net", [mlp(D1, K, 0), nn.Sequential(mlp(D1, K, 0), nn.Flatten())])
def test_a_network_without_outputs(net: nn.Module) -> None:
    x1, x2 = points(7, D1, K)
    fused = isinstance(net[-1], nn.Linear)
    for backend in BACKENDS if fused else ["reference"]:
        for mode in ("tangent", "adjoint") if fused else ["auto"]:
            for weight in (None, torch.rand(7, 1, 1), torch.rand(7, 1, 1, requires_grad=True)):
                y, penalty = fused_mono_penalty(
                    net, x1, x2, weight=weight, return_output=True, mode=mode, backend=backend
                )
                (y.sum() + penalty).backward()
                assert (y.shape, penalty.item()) == ((7, 0), 0)
            _, J = value_and_jacobian(net, x1, x2, mode=mode, backend=backend)
            assert J.shape == (7, 0, K)
    _, J = torch.func.vmap(partial(value_and_jacobian, net))(x1[None], x2[None])
    assert J.shape == (1, 7, 0, K)
    report = audit(net, x1, x2, sample=3)
    assert report.rate.shape == (0, K)
    assert report.violation_rate != report.violation_rate


class Negated(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return -super().__call__(x)


class Reversed(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(self._modules.values()))


@pytest.mark.parametrize(
    "net",
    [
        Negated(D1 + K, 2),
        nn.Sequential(Negated(D1 + K, 4), nn.Tanh(), nn.Linear(4, 2)),
        Reversed(nn.Linear(D1 + K, D1 + K), nn.Tanh()),
    ],
)
def test_a_subclass_that_is_not_called_as_its_base(net: nn.Module) -> None:
    net, (x1, x2) = net.double(), points(7, D1, K)
    assert_same(value_and_jacobian(net, x1, x2), oracle(net, x1, x2))


def test_scripted_and_traced_networks() -> None:
    net, (x1, x2) = mlp(D1, K, 2), points(7, D1, K)
    x = torch.cat([x1, x2], -1)
    want = value_and_jacobian(net, x1, x2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch means to retire them
        found = [torch.jit.script(net), torch.jit.trace(net, x)]
    for scripted in found:
        assert_same(value_and_jacobian(scripted, x1, x2), want)
        assert plan(scripted, x1, x2).backend == "reference"
        assert audit(scripted, x1, x2).rate.tolist() == audit(net, x1, x2).rate.tolist()


def test_a_detached_output_is_no_zero_slope() -> None:
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    with pytest.raises(ValueError, match="its output has no gradient"):
        fused_mono_penalty(Detached(), *points(7, D1, K))


def test_a_network_blind_to_x2_has_zero_slopes() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(D1, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[..., :D1])

    _, J = value_and_jacobian(Blind(), *points(7, D1, K))
    assert J.shape == (7, 3, K)
    assert not J.any()


ZERO = "^x2: in column 1 every slope of mlp .Reads. is exactly 0"


def warned(*calls: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [str(w.message) for w in caught if w.category is RuntimeWarning]


@pytest.mark.parametrize("kind", WITHOUT_DERIVATIVE)
def test_slopes_that_are_all_zero_are_warned_of_once_for_each_module(kind: str) -> None:
    x1, x2 = points(20, D1, K, torch.float32)
    net = Reads(WITHOUT_DERIVATIVE[kind])
    with pytest.warns(RuntimeWarning, match=ZERO) as caught:
        fused_mono_penalty(net, x1, 3 * x2).backward()
    assert caught[0].filename == __file__
    assert not warned(
        partial(fused_mono_penalty, net, x1, x2),
        partial(value_and_jacobian, net, x1, x2),
        partial(MonotonePenalty(net), x1, x2),
    )
    another = Reads(net.how)
    with pytest.warns(RuntimeWarning, match=ZERO) as caught:
        value_and_jacobian(another, x1, 3 * x2)
    assert caught[0].filename == __file__
    for context in (torch.no_grad(), torch.inference_mode()):
        another = Reads(net.how)
        with pytest.warns(RuntimeWarning, match=ZERO), context:
            MonotonePenalty(another)(x1, 3 * x2)


@pytest.mark.parametrize("kind", ["embedding", "rounding", "detach", "step"])
def test_a_compiled_penalty_warns_of_slopes_that_are_all_zero(kind: str) -> None:
    x1, x2 = points(20, D1, K, torch.float32)
    net = Reads(WITHOUT_DERIVATIVE[kind])
    general._looked.clear()
    compiled = torch.compile(MonotonePenalty(net), fullgraph=True, backend="aot_eager")
    constant = torch.zeros_like(x1), torch.zeros_like(x2)
    assert not warned(lambda: compiled(*constant))  # rows that are all the same say nothing
    with pytest.warns(RuntimeWarning, match=ZERO):
        y, penalty = compiled(x1, 3 * x2)
    assert not warned(lambda: compiled(x1, 3 * x2))
    found = gradients(y.square().sum() + penalty, *net.smooth.parameters())
    want, penalty = MonotonePenalty(net)(x1, 3 * x2)
    loss = want.square().sum() + penalty
    assert_same(found, gradients(loss, *net.smooth.parameters()), 1e-5)
    other = MonotonePenalty(net, direction=[1, 0])
    assert not warned(lambda: torch.compile(other, fullgraph=True, backend="aot_eager")(x1, x2))


def test_the_warning_tells_outputs_and_columns_that_y_moves_with_or_not() -> None:
    class Half(nn.Module):
        """The first output reads both columns, the second the rounding of the last alone."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            a, b = x[..., -2], x[..., -1]
            y = torch.stack([a + b, x[..., 0] + b.round()], -1)
            return y if y.sum() < 1e9 else -y

    x1, x2 = points(20, D1, K)
    asked = partial(fused_mono_penalty, x1=x1, x2=3 * x2)
    (said,) = warned(lambda: asked(Half()))
    assert said.startswith("x2: in column 1 every slope of output 1 of mlp (Half) is exactly 0, ye")
    assert not warned(lambda: asked(Half(), direction=[[1, 1], [1, 0]]))
    (said,) = warned(lambda: asked(Half(), direction=[[0, 1], [1, 0]]))
    assert said == (
        "x2: in column 0 every slope of mlp (Half) is exactly 0, and y was not seen to move: "
        "nothing is constrained there"
    )
    found = warned(lambda: asked(Half(), direction=[[0, 0], [1, 1]]))
    assert ["yet y moves with it" in said for said in found] == [True, False]
    net = Half()
    warned(lambda: asked(net))
    assert net.calls == 1  # what the look at its values did is put back


@pytest.mark.parametrize("layers", [[nn.Linear], ["0"], ["4"]])
@pytest.mark.filterwarnings("ignore:quantized")
def test_a_quantised_network_is_warned_of(layers: list[Any]) -> None:
    net = quantized(layers)
    for call in (fused_mono_penalty, value_and_jacobian):
        net = copy.deepcopy(net)
        with pytest.warns(RuntimeWarning, match=r"in columns 0, 1 every slope of mlp .Sequential."):
            call(net, *points(1, D1, K, torch.float32))


def test_the_warning_leaves_no_trace_in_the_module() -> None:
    x1, x2 = points(20, D1, K)
    net = nn.Sequential(Reads(_detached), nn.Linear(2, 2)).double()
    before = [set(m.__dict__) for m in net.modules()]
    assert len(warned(partial(fused_mono_penalty, net, x1, x2))) == 1
    assert [set(m.__dict__) for m in net.modules()] == before
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert len(warned(partial(fused_mono_penalty, twin, x1, x2))) == 1
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def _detached(net: Reads, c: Tensor) -> Tensor:
    return c.detach()


def test_a_network_whose_rows_all_agree_is_judged_when_they_differ() -> None:
    """A last layer that starts at zero has slopes of zero, and nothing to hide."""
    x1, x2 = points(20, D1, K)
    for body in (nn.LayerNorm(5), Reads(WITHOUT_DERIVATIVE["rounding"])):
        net = nn.Sequential(body, nn.Linear(5 if isinstance(body, nn.LayerNorm) else 2, 1)).double()
        nn.init.zeros_(net[1].weight)
        assert not warned(
            partial(fused_mono_penalty, net, x1, x2),
            partial(fused_mono_penalty, net, x1[:0], x2[:0]),
        )
        nn.init.ones_(net[1].weight)
        hidden = isinstance(body, Reads)
        for expected in (hidden, False):
            calls = warned(partial(fused_mono_penalty, net, x1, x2))
            assert len(calls) == expected


def test_slopes_are_not_read_where_numbers_cannot_be() -> None:
    x1, x2 = points(20, D1, K, torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x1, x2)]
        penalty = fused_mono_penalty(Reads(WITHOUT_DERIVATIVE["step"]), *fake)
    assert penalty.shape == ()
    net = Reads(WITHOUT_DERIVATIVE["step"]).to("meta")
    assert not warned(partial(fused_mono_penalty, net, x1.to("meta"), x2.to("meta")))


def test_slopes_do_not_run_through_x1() -> None:
    """x1 computed from x2: the slope is the partial derivative, x1 held fixed."""
    for net in (mlp(2, 2, 2), hooked_pair()):
        x2 = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        x1 = x2 * 3
        _, J = value_and_jacobian(net, x1, x2)
        _, want = oracle(net, x1.detach(), x2)
        assert_same([J], [want])


def hooked_pair() -> nn.Sequential:
    net = mlp(2, 2, 2)
    net[1].register_forward_hook(lambda m, args, out: 0.5 * out)
    return net


@pytest.mark.parametrize("weight", [None, 2.0, "trained"])
@pytest.mark.parametrize(("N", "direction"), [(7, 0), (7, [[0, 0], [0, 0]]), (0, 1), (0, 0)])
@pytest.mark.parametrize("backend", [*BACKENDS, "general"])
def test_the_mean_of_nothing_is_zero_and_so_are_its_gradients(
    backend: str, N: int, direction: Any, weight: Any
) -> None:
    net = hooked() if backend == "general" else mlp(D1, K, 2)
    x1, x2 = (t.requires_grad_() for t in points(N, D1, K))
    inputs = [x1, x2, *net.parameters()]
    if weight == "trained":
        weight = torch.ones(2, K, dtype=torch.float64, requires_grad=True)
        inputs.append(weight)
    options = {"direction": direction, "weight": weight, "reduction": "mean", "margin": 1.0}
    backend = "auto" if backend == "general" else backend
    y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, backend=backend, **options)
    assert penalty == 0
    task = net(torch.cat([x1, x2], -1)).sum()
    assert_same(gradients(y.sum() + penalty, *inputs), gradients(task, *inputs))


def test_the_mean_of_nothing_in_a_compiled_loss() -> None:
    net, (x1, x2) = mlp(D1, K, 2), points(7, D1, K)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        return fused_mono_penalty(net, x1, x2, direction=0, reduction="mean")

    for rows in (7, 5):  # the second makes the shape dynamic
        got = loss(x1[:rows], x2[:rows])
        assert got == 0
        assert not any(g.any() for g in gradients(got, *net.parameters()))


def test_all_orders_of_derivative() -> None:
    net = hooked()
    x1, x2 = points(4, D1, K)

    def f(x1: Tensor, x2: Tensor) -> Tensor:
        return fused_mono_penalty(net, x1, x2, margin=3.0, hinge="squared")

    assert torch.autograd.gradgradcheck(f, (x1.requires_grad_(), x2.requires_grad_()))


def test_without_grad_and_in_inference_mode() -> None:
    net, (x1, x2) = hooked(), points(4, D1, K)
    want = fused_mono_penalty(net, x1, x2).detach()
    with torch.no_grad():
        got = fused_mono_penalty(net, x1, x2)
    assert not got.requires_grad
    assert_same([got], [want])
    with torch.inference_mode():
        assert_same([fused_mono_penalty(net, x1, x2)], [want])
