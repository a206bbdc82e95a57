"""No bound is contradicted by a point; what is known is decided; bad input gets one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from itertools import count, pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("benchmarks", reason="the benchmarks are not part of the package")

from benchmarks.soundness import certified, every_bound
from monokernel import (
    Certificate,
    Monotone,
    MonotonePenalty,
    audit,
    branching,
    certify,
    forms,
    one_layer,
    quadratic,
    ranges,
    several_layers,
)
from monokernel.activations import IDENTITY, Activation
from monokernel.backends import cpu
from monokernel.certify import _read
from monokernel.enclosures import Slopes, box
from monokernel.layers import Layers
from tests.support import ACTIVATION_MODULES, mlp

JUMPING = ("Hardshrink", "Threshold")


def boxes(n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """n boxes of all sizes around the origin, every third degenerate in some columns."""
    c = torch.randn(n, d, dtype=torch.float64)
    r = 10 ** torch.empty(n, 1, dtype=torch.float64).uniform_(-6, 0.7) * torch.rand(n, d)
    r[::3] *= torch.rand(len(r[::3]), d) < 0.4
    lower, upper = (c - r).to(dtype).double(), (c + r).to(dtype).double()
    return lower, upper


def inside(lower: Tensor, upper: Tensor, n: int) -> Tensor:
    """Points (n, B, d), corners among them."""
    share = torch.rand(n, *lower.shape, dtype=torch.float64)
    share[: n // 4].round_()
    return torch.lerp(lower, upper, share).clamp(lower, upper)


def assert_sound(net: nn.Module, lower: Tensor, upper: Tensor, kinked: bool = False) -> None:
    """No slope at any of many points of the boxes is outside of the forms, of any tier."""
    layers, _ = _read(net, lower.shape[1])
    x = inside(lower, upper, 80)
    for output in range(layers.D):
        J = layers.slopes(x.flatten(0, 1), output).view(*x.shape)
        # The slopes at the points are rounded too.
        off = 1e-11 * (1 + J.abs())
        for name, s in every_bound(layers, lower, upper, output):
            assert not s.centre.isnan().any()
            outside = (J - s.centre).abs() - s.radius() > off
            assert not outside.any(), (name, outside.sum())
            outside = (s.lower - off > J) | (s.upper + off < J)
            assert not outside.any(), (name, outside.sum())
            # And not only by their radius: as functions of the point.
            share = ((x - 0.5 * (lower + upper)) / (0.5 * (upper - lower))).nan_to_num(0.0)
            at = s.centre + torch.einsum("nbm,bmk->nbk", share, s.slant)
            at = at + torch.einsum("nbm,bmk->nbk", 2 * share.square() - 1, s.bend)
            known = s.error.isfinite()
            outside = ((J - at).abs() - s.error > 1e-8 * (1 + J.abs() + at.abs())) & known
            assert not outside.any(), (name, outside.sum())


@pytest.mark.parametrize("name", [n for n in ACTIVATION_MODULES if n not in JUMPING])
def test_no_form_is_contradicted(name: str) -> None:
    for hidden, D, dtype in (((7,), 2, torch.float32), ((6, 5, 7), 1, torch.float64)):
        net = mlp(2, 2, D, hidden, ACTIVATION_MODULES[name], dtype=dtype)
        assert_sound(net, *boxes(30, 4, dtype))


@pytest.mark.parametrize("name", ["SiLU", "Tanh", "ReLU", "Softplus"])
def test_no_form_is_contradicted_behind_a_curved_output(name: str) -> None:
    net = mlp(2, 1, 2, (6, 6), ACTIVATION_MODULES[name], last=nn.Sigmoid())
    assert_sound(net, *boxes(40, 3))


@pytest.mark.parametrize("name", ["SiLU", "Tanh", "ReLU", "GELU"])
def test_no_form_is_contradicted_by_weights_that_cancel(name: str) -> None:
    """Two halves of a layer that are the same but for 1e-9, with opposite weights of 1e6."""
    net = mlp(1, 2, 1, (8, 6), ACTIVATION_MODULES[name])
    with torch.no_grad():
        first, last = net[0], net[2]
        first.weight[4:] = first.weight[:4] * (1 + 1e-9)
        first.bias[4:] = first.bias[:4]
        last.weight.mul_(1e6)
        last.weight[:, 4:] = -last.weight[:, :4]
    layers, _ = _read(net, 3)
    lower, upper = boxes(60, 3)
    x = inside(lower, upper, 60)
    J = layers.slopes(x.flatten(0, 1), 0).view(x.shape)
    for _, s in every_bound(layers, lower, upper, 0):
        # Slopes of 1e-3 out of terms of 1e6: the points' own rounding is 1e-10 of those.
        assert ((J - s.centre).abs() <= s.radius() + 1e-7).all()


def test_lines_hold_along_every_curve() -> None:
    c = torch.empty(200, 1, dtype=torch.float64).uniform_(-6, 6)
    r = 10 ** torch.empty(200, 1, dtype=torch.float64).uniform_(-9, 1.2)
    t = torch.linspace(-1, 1, 61, dtype=torch.float64)
    for name, module in ACTIVATION_MODULES.items():
        layers, _ = _read(nn.Sequential(nn.Linear(1, 1), module).double(), 1)
        σ = layers.σ[-1]
        for order, f in ((0, σ.value), (1, σ.first)):
            line = forms.line(σ, order, c, r)
            a = c + r * t
            off = (f(a) - line.slope * (a - c) - line.at).abs()
            slack = 1e-13 * (1 + a.abs() + line.slope.abs() * r) + 2.2e-9 * (name == "Softplus")
            assert (off <= line.off + slack).all(), (name, order)


def test_parabolas_hold_along_every_curve() -> None:
    c = torch.empty(300, 1, dtype=torch.float64).uniform_(-6, 6)
    far = 10 ** torch.empty(2, 300, 1, dtype=torch.float64).uniform_(-9, 1)
    ends = c - far[0], c + far[1]
    lost = 10 ** torch.empty(300, 1, dtype=torch.float64).uniform_(-9, 1)  # any will do
    a = torch.lerp(*ends, torch.linspace(0, 1, 101, dtype=torch.float64))
    for kind in ranges.THIRD:
        σ = Activation(kind)
        for order, f in ((0, σ.value), (1, σ.first)):
            p = quadratic._parabola(σ, order, c, ends, lost)
            assert p.off.isfinite().all()
            t = a - c
            off = (f(a) - p.at - p.slope * t - p.bend * t * t).abs()
            slack = 1e-13 * (1 + a.abs() + p.slope.abs() * t.abs() + p.bend.abs() * t * t)
            assert (off <= p.off + slack).all(), (kind, order)


def test_what_is_cubic_is_linear_and_something_within_its_size() -> None:
    for m in (1, 2, 3, 5):
        i, j = torch.triu_indices(m, m, 1)
        M = torch.randn(4, 2, 2 * m + len(i) - m, m, dtype=torch.float64)
        linear, size, _ = quadratic._reduced(M, m)
        ε = torch.rand(200, m, dtype=torch.float64) * 2 - 1
        ε[:100] = ε[:100].sign()
        terms = torch.cat((2 * ε * ε - 1, ε[:, i] * ε[:, j]), 1)
        cubic = torch.einsum("bkri,nr,ni->bkn", M, terms, ε)
        off = (cubic - torch.einsum("bki,ni->bkn", linear, ε)).abs().amax(2)
        assert (off <= size * (1 + 1e-12)).all()
        if m == 1:  # ε T(ε) - ε / 2 is T_3 / 2
            torch.testing.assert_close(off, size)


def test_weights_hold_the_tangents_of_every_point() -> None:
    for σ in (Activation("gelu"), Activation("tanh")):
        layers = chain((4, 9, 7, 1), σ, σ, IDENTITY)
        c, r = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
        r *= torch.logspace(-3, 0, 6, dtype=torch.float64).unsqueeze(1)
        moving, (W, V, _) = torch.arange(4), layers.W
        a = quadratic._through(
            quadratic.Form(c, *box(c, r, moving, quadratic._terms(4))), W, layers, layers.b[0], 4
        )
        first = W[:, :2].mT
        t = quadratic.Weights(
            first.expand(6, 2, 9),
            first.new_zeros(6, 2, 4, 9),
            first.new_zeros(6, 2, 9),
            first.abs().amax(0).expand(6, 9),
        )
        t = t.times(quadratic._along(a, σ, 1, 4), 4).through(V.mT, layers, 4)
        ε = torch.rand(300, 6, 4, dtype=torch.float64) * 2 - 1
        ε[:150] = ε[:150].sign()
        slope = σ.first((c + r * ε) @ W.mT + layers.b[0])
        found = torch.einsum("nbh,kh,oh->nbko", slope, first, V)
        off = found - t.at - torch.einsum("nbi,bkio->nbko", ε, t.linear)
        assert (off.abs() <= t.rest).all()
        assert (found.abs() <= t.whole.unsqueeze(1)).all()
        assert t.rest[0].max() < 1e-3 * t.at[0].abs().max()  # of the narrowest box


def test_quadratic_forms_are_exact_to_the_second_order() -> None:
    """Of a box half as wide an eighth of the error remains, once pairs of columns are exact."""
    net = mlp(2, 2, 1, (9, 8), nn.SiLU())
    layers, _ = _read(net, 4)
    c, every = torch.randn(20, 4, dtype=torch.float64), torch.arange(4)
    errors = []
    for r in (1e-2, 5e-3, 2.5e-3):
        radius = torch.full_like(c, r)
        radius[:, 1:] = 0  # one column, so that no pair is in the error
        q = quadratic.slopes(layers, c, radius, every[:1], 0, every)
        errors.append(q.error.mean())
    assert errors[0] / errors[1] > 7
    assert errors[1] / errors[2] > 7


def chain(widths: tuple[int, ...], *σ: Activation) -> Layers:
    """Random; each layer's rows are of the size of 1."""
    W = [torch.randn(n, m, dtype=torch.float64) / m**0.5 for m, n in pairwise(widths)]
    return Layers(tuple(W), tuple([torch.randn(len(w), dtype=torch.float64) for w in W]), σ, (), 2)


@pytest.mark.skipif(cpu.isa() is None, reason="the native kernel was not built")
@pytest.mark.parametrize("kind", ranges.THIRD)
def test_the_native_forms_are_those_of_pytorch(kind: str) -> None:
    σ = Activation(kind)
    for layers in (
        chain((5, 7, 9, 3), σ, σ, IDENTITY),
        chain((3, 17, 34, 18, 2), σ, σ, σ, Activation("sigmoid")),
        chain((4, 8, 6, 5, 2), IDENTITY, σ, IDENTITY, σ),
        chain((4, 8, 2), σ, IDENTITY),
        chain((4, 2), σ),
        chain((4, 3, 2), IDENTITY, IDENTITY),
    ):
        d, output = layers.d, layers.D - 1
        for moving in (torch.tensor([2, 0]), torch.arange(d), torch.arange(0)):
            c, r = torch.randn(2, 12, d, dtype=torch.float64)
            r = r.abs() * torch.logspace(-4, 0, 12, dtype=torch.float64).unsqueeze(1)
            r[3] = 0
            r = torch.zeros_like(r).index_copy_(1, moving, r[:, moving])
            columns, wanted = torch.tensor([2, 0, 1]), torch.rand(12, 3) < 0.7
            want = quadratic.by_pytorch(layers, c, r, moving, output, columns)
            got = cpu.chain_slopes(layers, c, r, moving, output, columns, wanted)
            for name, a, b in zip(Slopes._fields, got, want, strict=True):
                a, b = (t.movedim(-1, 1)[wanted] for t in (a, b))
                largest = b[b.isfinite()].abs().amax()
                assert a.shape == b.shape
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * (1e-3 + largest.item()),
                                           msg=lambda text, at=name: f"{at}: {text}")  # fmt: skip
            assert (got.lower[~wanted] == -torch.inf).all()
            assert (got.upper[~wanted] == torch.inf).all()


def test_quadratic_forms_of_weights_that_are_no_numbers_bound_nothing() -> None:
    σ = Activation("silu")
    for bad, place in product((torch.nan, torch.inf, -torch.inf), range(5)):
        layers = chain((3, 7, 9, 1), σ, σ, IDENTITY)
        (layers.W[0], layers.b[0], layers.W[1], layers.b[1], layers.W[2])[place].flatten()[-1] = bad
        for name, s in every_bound(layers, *boxes(8, 3), 0):
            if name in (forms.TIERS[forms.QUADRATIC], "by PyTorch"):
                assert (s.lower == -torch.inf).all(), (bad, place)
                assert (s.upper == torch.inf).all(), (bad, place)
                assert (s.error == torch.inf).all(), (bad, place)
                assert not s.blame.isnan().any()


def test_smooth_chains_are_bounded_by_quadratic_forms() -> None:
    net = mlp(3, 2, 1, (16, 16), nn.SiLU())
    found = certify(net, -1.0, 1.0, direction=[0, 0, 0, 1, 1], margin=-5.0, progress=False)
    assert found.methods["linear bounds"] == 0
    net = mlp(3, 2, 1, (16, 16), nn.ELU())  # whose σ'' jumps
    found = certify(net, -1.0, 1.0, direction=[0, 0, 0, 1, 1], margin=-5.0, progress=False)
    assert found.methods["quadratic forms"] == 0


def pairs(
    kind: str, margin: float
) -> tuple[Layers, Tensor, branching.Constraints, branching.Boxes, Any]:
    """A network with two outputs and boxes in its four columns; every slope is constrained."""
    net = mlp(2, 2, 2, (9,), ACTIVATION_MODULES[kind])
    layers, _ = _read(net, 4)
    assert isinstance(layers, Layers)
    table = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    outputs, columns = (table != 0).nonzero(as_tuple=True)
    constraints = branching.Constraints(outputs, columns, table[outputs, columns], margin)
    lower, upper = boxes(12, 4)
    n, Q = len(lower), len(columns)
    start = branching.Boxes(
        *(lower, upper, torch.arange(n), torch.ones(n, Q, dtype=torch.bool)),
        torch.full((n, Q), -math.inf, dtype=torch.float64),
    )
    box, q = start.wanted.nonzero(as_tuple=True)
    return layers, table, constraints, start, one_layer.OneLayer(layers, constraints, start, box, q)


def branches_of(layers: Layers, start: branching.Boxes, bounds: Any, x: Tensor) -> Any:
    """Of every pair the branch with about half of the switches decided, as the point has them."""
    low, high = bounds.ranges()
    a = torch.cat(layers.values(x)[:-1], 1)[start.wanted.nonzero()[:, 0]]
    on, off = (low > 0) | (a > 0), (high <= 0) | (a <= 0)
    some = (torch.rand(low.shape) < 0.5) | (low > 0) | (high <= 0)
    switch = torch.where(some, torch.where(on & ~(high <= 0), 1, -1), 0).to(torch.int8)
    low = torch.where((switch > 0) & on, low.clamp(min=0), low)
    high = torch.where((switch < 0) & off, high.clamp(max=0), high)
    known = torch.full((len(low),), -math.inf, dtype=torch.float64)
    return branching.Branches(torch.arange(len(low)), switch, low, high, known)


@pytest.mark.parametrize("kind", ["ReLU", "LeakyReLU"])
def test_no_bound_of_a_branch_is_contradicted(kind: str) -> None:
    """In any branch, with the switches that a point in it has."""
    layers, table, constraints, start, bounds = pairs(kind, 100.0)
    box, q = start.wanted.nonzero(as_tuple=True)
    for x in inside(start.lower, start.upper, 5):
        branches = branches_of(layers, start, bounds, x)
        bound, at, _ = bounds.bounded(branches)
        assert ((at >= start.lower[box]) & (at <= start.upper[box])).all()
        assert bound.isfinite().all()
        J = torch.stack([layers.slopes(x, o) for o in range(2)], 1) * table
        slope = J[box, constraints.outputs[q], constraints.columns[q]]
        assert (slope >= bound - 1e-11 * (1 + bound.abs())).all()


@pytest.mark.parametrize("kind", ["ReLU", "LeakyReLU"])
def test_what_violates_stays_in_narrowed_ranges(kind: str) -> None:
    shrunk = 0
    for _ in range(6):
        layers, table, constraints, start, bounds = pairs(kind, -0.3)
        box, q = start.wanted.nonzero(as_tuple=True)
        xs = inside(start.lower, start.upper, 40)
        branches = branches_of(layers, start, bounds, xs[0])
        bound, at, score = bounds.bounded(branches)
        open_ = bound < constraints.margin
        branches = branches._replace(known=bound).at(open_)
        found = bounds.narrowed(branches, at[open_], score[open_])
        shrunk += int(((found.high - found.low) < (branches.high - branches.low)).sum())
        for x in xs:
            J = torch.stack([layers.slopes(x, o) for o in range(2)], 1) * table
            slope = J[box, constraints.outputs[q], constraints.columns[q]][open_]
            a = layers.values(x)[0][box][open_]
            off = 1e-11 * (1 + a.abs())
            there = ((a >= branches.low - off) & (a <= branches.high + off)).all(1)
            there &= slope < constraints.margin
            kept = (a >= found.low - off) & (a <= found.high + off)
            assert kept[there].all()
            assert ((found.switch >= 0) | (a <= off))[there].all()
            assert ((found.switch <= 0) | (a >= -off))[there].all()
    assert shrunk > 5


def least_slopes(net: nn.Sequential, lower: Tensor, upper: Tensor) -> Tensor:
    """min ∂y/∂x (d,) over all patterns of neurons whose cell in the box has an inside."""
    optimize = pytest.importorskip("scipy.optimize")
    *hidden, last = [m for m in net if isinstance(m, nn.Linear)]
    left, d = getattr(net[1], "negative_slope", 0.0), hidden[0].in_features
    least = torch.full((d,), math.inf, dtype=torch.float64)
    bounds = [*zip(lower.tolist(), upper.tolist(), strict=True), (0.0, 1.0)]
    goal = [0.0] * d + [-1.0]
    patterns = product(*(product((0.0, 1.0), repeat=h.out_features) for h in hidden))
    for pattern in patterns:
        J, at = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
        rows, ends = [], []
        for layer, switch in zip(hidden, pattern, strict=True):
            W, b, z = layer.weight.detach(), layer.bias.detach(), torch.tensor(switch).double()
            J, at, sign = W @ J, W @ at + b, 2 * z - 1
            rows.append(torch.cat([-sign.unsqueeze(1) * J, J.norm(dim=1, keepdim=True)], 1))
            ends.append(sign * at)
            steep = left + (1 - left) * z
            J, at = steep.unsqueeze(1) * J, steep * at
        cell = optimize.linprog(
            goal, torch.cat(rows).numpy(), torch.cat(ends).numpy(), bounds=bounds
        )
        if cell.status == 0 and cell.x[-1] > 1e-7:
            least = torch.minimum(least, last.weight.detach()[0] @ J)
    return least


@pytest.mark.parametrize("kind", ["ReLU", "LeakyReLU"])
@pytest.mark.parametrize("hidden", [(6,), (4, 4), (3, 3, 2)])
def test_networks_of_kinks_are_decided_up_to_the_least_slope(
    kind: str, hidden: tuple[int, ...]
) -> None:
    """As the enumeration of all their patterns says, on both sides of it."""
    if len(hidden) > 1 and cpu.isa() is None:
        pytest.skip("the native kernel was not built")
    for _ in range(2):
        net = mlp(3, 1, 1, hidden, ACTIVATION_MODULES[kind])
        box = -torch.ones(4), torch.ones(4)
        for column, least in enumerate(least_slopes(net, *box).tolist()):
            direction = [int(c == column) for c in range(4)]
            for off, status in ((-1e-6, "proved"), (1e-6, "violated")):
                margin = least + off
                found = certify(net, *box, direction=direction, margin=margin, progress=False)
                assert found.status == status, str(found)
                assert found.lower_bound[0, column] <= least + 1e-9
                assert status == "violated" or found.methods["neuron splitting"]


SIGNS = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)


def searched(layers: Layers, lower: Tensor, upper: Tensor, margin: float, rounds: int) -> Any:
    """Of every pair of box and column (n, d): bounds, what is left open, and the slopes of all
    points that the search came to, one row for each (N, 2), with the pair's number."""
    n, d = lower.shape
    wanted = torch.ones(n, d, dtype=torch.bool)
    start = branching.Boxes(lower, upper, torch.arange(n), wanted, wanted.double() - math.inf)
    outputs, columns = torch.zeros(d, dtype=torch.long), torch.arange(d)
    constraints = branching.Constraints(outputs, columns, SIGNS, margin)
    met = [torch.zeros(0, 2, dtype=torch.float64)]

    def witness(x: Tensor, owner: Tensor, q: Tensor) -> Tensor:
        assert ((x >= lower[owner]) & (x <= upper[owner])).all()
        slope = (layers.slopes(x, 0) * SIGNS)[torch.arange(len(q)), q]
        met.append(torch.stack([owner * d + q, slope], 1))
        return torch.zeros(n, dtype=torch.bool)

    clock = count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several_layers, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        least, left, _, _ = several_layers.search(
            layers, constraints, start, witness, rounds, lambda *_: None
        )
    return least.view(n, d), left.view(n, d), torch.cat(met)


@pytest.mark.skipif(cpu.isa() is None, reason="the native kernel was not built")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_search_of_several_layers_leaves_no_piece_out(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a margin above all slopes it comes to every linear piece; with a lower one to each that
    is below. Interrupted, its bounds hold."""
    monkeypatch.setattr(several_layers, "BRANCHES", 3)  # searches are shared among the threads
    monkeypatch.setattr(several_layers, "SIDE_BY_SIDE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    decided = unfinished = pieces = 0
    try:
        for kind, hidden in (("ReLU", (7, 6)), ("LeakyReLU", (6, 5)), ("ReLU", (4, 5, 4))):
            net = mlp(2, 2, 1, hidden, ACTIVATION_MODULES[kind])
            layers, _ = _read(net, 4)
            assert isinstance(layers, Layers)
            lower, upper = boxes(6, 4)
            lower[0], upper[0] = -1.0, 1.0
            x = inside(lower, upper, 300).flatten(0, 1)
            slopes = layers.slopes(x, 0).view(-1, 6, 4) * SIGNS
            least, left, every = searched(layers, lower, upper, slopes.max().item() + 1, 10**6)
            assert left.all()
            lowest = slopes.amin(0)
            assert (least <= lowest + 1e-11).all()
            lowest.view(-1).scatter_reduce_(0, every[:, 0].long(), every[:, 1], "amin")
            torch.testing.assert_close(least, lowest, rtol=0, atol=1e-9)
            pieces += len(every)
            for margin in (every[:: len(every) // 4, 1] + 1e-6).tolist():
                least, left, met = searched(layers, lower, upper, margin, 10**6)
                assert (left == (lowest < margin)).all()
                assert (least[~left] == margin).all()
                assert (met[:, 1] < margin).all()
                below = every[every[:, 1] < margin]
                near = (below.unsqueeze(1) - met).abs().amax(2) < 1e-9
                assert near.any(1).all()
                decided += int((~left).sum())
                least, left, _ = searched(layers, lower, upper, margin, 3)
                assert (least <= lowest + 1e-11).all()
                assert (least[~left] == margin).all()
                unfinished += int(((lowest >= margin) & left).sum())
    finally:
        torch.set_num_threads(before)
    assert decided > 100
    assert unfinished > 10
    assert pieces > 500


def test_without_the_native_library_boxes_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: "it was not built")
    net = mlp(2, 1, 1, (4, 4), nn.ReLU())
    found = certify(net, -0.1, 0.1, direction=[0, 0, 1], margin=-9.0, seconds=5, progress=False)
    assert found.status == "proved"
    assert "neuron splitting" not in found.methods


def test_kinks_on_the_edges_of_the_box() -> None:
    """y = |x_0| + x_1, its kink exactly where a box ends or has no extent: there the slope on one
    side of it is that of no point of the box, and the rounding of a range leaves it open."""
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]]))
        net[0].bias.copy_(torch.tensor([0.0, 0, 5]))
        net[2].weight.fill_(1.0)
    given: dict[str, Any] = {"direction": [1, 1, 0], "progress": False}
    low, high = torch.tensor([0.0, -1, -1]), torch.ones(3)
    assert certify(net, low, high, seconds=0.5, **given).status != "violated"
    flat = torch.tensor([0.0, 1, 1])
    assert certify(net, low, flat, seconds=0.5, **given).status != "violated"
    assert certify(net, low - 1e-9, high, **given).status == "violated"
    assert certify(net, low + 1e-9, high, margin=0.5, **given).status == "proved"
    assert certify(net, low, high, margin=0.5, seconds=0.5, **given).status != "proved"


def test_boxes_of_a_wide_layer_are_decided_together() -> None:
    net = mlp(5, 1, 1, (40,), nn.ReLU())
    lower = torch.rand(8, 6, dtype=torch.float64) * 2 - 1
    upper = (lower + 0.7).clamp(max=1)
    upper[::4, 1] = lower[::4, 1]
    direction = [0, 0, 0, 0, 0, 1]
    points = torch.lerp(lower, upper, torch.rand(3000, 1, 6, dtype=torch.float64))
    slopes = _read(net, 6)[0].slopes(points.flatten(0, 1), 0)[:, 5].view(3000, 8).amin(0)
    margin = slopes.sort().values[3:5].mean().item()
    found = certify(net, lower, upper, direction=direction, margin=margin, progress=False)
    assert {"proved", "violated"} == set(found.verdicts)
    for slope, bound, verdict in zip(
        slopes.tolist(), found.lower_bound[:, 0, 5].tolist(), found.verdicts, strict=True
    ):
        assert bound <= slope
        assert verdict == "violated" or slope >= margin


@pytest.mark.parametrize("seed", range(12))
def test_no_point_contradicts_in_random_networks_and_boxes(seed: int) -> None:
    """A few hundred pairs of those that ``python -m benchmarks soundness`` tries in numbers."""
    pairs, outside, what = certified(10**6 + seed)
    assert pairs >= 50
    assert outside == 0, what


def steep(net: nn.Module, columns: list[int], at_least: float) -> nn.Module:
    """The network with a line added, through neurons that are on everywhere, that lifts slopes."""
    first, last = net[0], net[-1]
    wide = nn.Linear(first.in_features, first.out_features + 1).to(first.weight.dtype)
    out = nn.Linear(last.in_features + 1, last.out_features).to(first.weight.dtype)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:-1], wide.bias[:-1] = first.weight, first.bias
        wide.weight[-1, columns] = 1.0
        wide.bias[-1] = 30.0
        out.weight[:, :-1], out.bias[:] = last.weight, last.bias
        out.weight[:, -1] = at_least
    return nn.Sequential(wide, net[1], out)


@pytest.mark.parametrize("name", ["SiLU", "Softplus", "ReLU", "GELU", "LeakyReLU", "ELU"])
def test_what_rises_is_proved_and_what_falls_is_found(name: str) -> None:
    net = mlp(2, 1, 1, (6,), getattr(nn, name)(), dtype=torch.float32)
    low, high = -torch.ones(3), torch.ones(3)
    direction = [0, 0, 1]
    lifted = steep(net, [2], 4.0)
    found = certify(lifted, low, high, direction=direction, seconds=20, progress=False)
    assert found.status == "proved"
    assert found.verdicts == ("proved",)
    assert found.lower_bound[0, 2] >= 0
    assert found.lowest_found[0, 2] >= found.lower_bound[0, 2] - 1e-5
    assert found.lower_bound[0, :2].isnan().all()
    assert found.open_share == 0
    assert "PROVED" in str(found)
    # A margin above the lowest slope that was found cannot be.
    above = found.lowest_found[0, 2].item() + 1e-3
    bad = certify(lifted, low, high, direction=direction, margin=above, progress=False)
    assert bad.status == "violated"
    x = bad.witness[0, 2].float()
    assert ((x >= low) & (x <= high)).all()
    x.requires_grad_()
    (g,) = torch.autograd.grad(lifted(x).sum(), x)
    assert g[2].item() < above
    assert g[2].item() == pytest.approx(bad.lowest_found[0, 2].item(), abs=1e-5)


@pytest.mark.parametrize("hidden", [(6, 6), (5, 5, 5)])
def test_deep_networks_are_decided(hidden: tuple[int, ...]) -> None:
    for name in ("Tanh", "ReLU", "SiLU"):
        net = mlp(1, 1, 2, hidden, ACTIVATION_MODULES[name])
        for low in (-0.4, 0.3):
            box = torch.full((2,), low), torch.full((2,), low + 0.2)
            lowest = audit(net, *(torch.rand(4000, 2).double() * 0.2 + low).split(1, 1)).worst_slope
            direction = torch.tensor([[0, 1], [0, 1]])
            for margin, status in ((-0.3, "proved"), (0.3, "violated")):
                found = certify(
                    net,
                    *box,
                    direction=direction,
                    margin=lowest.min().item() + margin,
                    progress=False,
                    seconds=30,
                )
                assert found.status == status, (name, low, margin, str(found))


def test_a_batch_has_a_verdict_for_each() -> None:
    """y = sin-like in x_0: rows whose range lies where it rises are proved, others violated."""
    net = nn.Sequential(nn.Linear(2, 1), nn.SiLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
    lower = torch.tensor([[-1.0, 0.0], [-3.0, 1.0], [0.0, 2.0], [-9.0, 0.0]])
    upper = torch.tensor([[2.0, 0.0], [1.0, 1.0], [5.0, 2.0], [-2.0, 0.0]])
    found = certify(net, lower, upper, direction=[1, 0], progress=False)
    assert found.verdicts == ("proved", "violated", "proved", "violated")
    assert found.not_proved == [1, 3]
    assert found.status == "violated"
    assert found.lower_bound.shape == (4, 1, 2)
    assert found.witness.shape == (4, 1, 2, 2)
    assert "2 proved, 2 violated" in str(found)
    falling = certify(net, lower, upper, direction=[-1, 0], progress=False)
    assert falling.verdicts == ("violated", "violated", "violated", "proved")


class Behind(nn.Module):
    """A forward of one's own, of 3 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 1, 1, (4,))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) + x[:, 2:].square()
        return y


@pytest.mark.parametrize("kind", ["chain", "forward", "frozen"])
def test_a_box_in_numbers_for_all_columns(kind: str) -> None:
    """The network says how many there are."""
    net: nn.Module = Behind() if kind == "forward" else mlp(2, 1, 1, (4,))
    if kind == "frozen":
        net = Monotone(net, -1.0, 1.0, direction=[0, 0, 1], margin=0.1).frozen()
    for direction in ([0, 0, 1], {2: 1}, 1):
        given = {"direction": direction, "progress": False, "seconds": 5}
        found = certify(net, -1.0, 1.0, **given)
        want = certify(net, [-1.0] * 3, torch.ones(3), **given)
        assert found.lower.tolist() == [-1.0] * 3
        assert found.status == want.status
        torch.testing.assert_close(found.lower_bound, want.lower_bound, equal_nan=True)
    if kind == "frozen":
        assert certify(net, -1, 1, direction=[0, 0, 1], progress=False).status == "proved"


def test_boxes_by_name() -> None:
    """As the lowest and highest of a table's columns, in any order, and boxes as a table."""
    net, names = mlp(2, 1, 1, (4,)), ["a", "b", "c"]
    asked: dict[str, Any] = {"direction": {"c": 1}, "columns": names, "progress": False}
    asked |= {"seconds": 5}
    found = certify(net, {"c": -3, "a": -1, "b": -2}, {"a": 1, "b": 2, "c": 3}, **asked)
    assert found.lower.tolist() == [-1, -2, -3]
    assert found.upper.tolist() == [1, 2, 3]
    rows = {"c": torch.tensor([0.0, 1.0]), "a": [0.5, 0.5], "b": (0, 0)}
    assert certify(net, rows, 2.0, **asked).lower.tolist() == [[0.5, 0, 0], [0.5, 0, 1]]
    sure = Monotone(net, {"c": -3, "a": -1, "b": -2}, 4, direction={"c": 1}, columns=names)
    assert sure.lower == (-1, -2, -3)
    with pytest.raises(ValueError, match=r"^lower: .* got 'd'; the nearest is"):
        Monotone(net, {"d": 1}, 4, direction={"c": 1}, columns=names)
    with pytest.raises(ValueError, match=r"^upper: expected a number for each .* none for 'b'"):
        Monotone(net, -1, {"a": 1}, direction={"c": 1}, columns=names)
    groups = certify(net, 0, 1, one_hot=[["a", "b"]], **asked)
    assert groups.status == certify(net, 0, 1, one_hot=[[0, 1]], **asked).status
    assert groups.witness[0, 2, :2].sum() == 1


def test_one_hot_rows_alone_are_asked_about() -> None:
    """Rises in x_2 where exactly one of x_0, x_1 is 1, and falls where none is."""
    net = nn.Sequential(nn.Linear(3, 1), nn.Softplus(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[6.0, 6.0, 1.0]]))
        net[0].bias.fill_(-3.0)
        net[2].weight.fill_(1.0)
    lower, upper = torch.tensor([0.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 1.0])
    given = {"direction": [0, 0, 1], "margin": 0.5, "progress": False}
    assert certify(net, lower, upper, **given).status == "violated"
    found = certify(net, lower, upper, one_hot=[[0, 1]], **given)
    assert found.status == "proved"
    assert found.witness[0, 2, :2].sum() == 1


def test_what_is_not_finite_proves_nothing() -> None:
    for value in (math.nan, math.inf):
        for where in (0, 2):
            net = mlp(1, 1, 1, (4,), nn.Tanh())
            with torch.no_grad():
                net[where].weight[0, 0] = value
            found = certify(net, -1.0, 1.0, margin=-100.0, progress=False, seconds=0.3)
            assert found.status == "unknown"


def test_a_jump_proves_nothing() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Hardshrink(0.5), nn.Linear(1, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
        net[0].bias.zero_()
    assert certify(net, -1.0, 1.0, progress=False, seconds=0.3).status == "unknown"
    assert certify(net, 0.6, 1.0, progress=False).status == "proved"


def test_modules_that_read_as_chains() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first = nn.BatchNorm1d(3), nn.Linear(3, 4)
            self.last = nn.Linear(4, 1)
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(self.norm(x - 0.3)))).squeeze(-1)

    net = Own()
    x = torch.rand(500, 3) * 2 - 1
    net.eval()
    lowest = audit(net, x[:, :0], x).worst
    net.train()
    found = certify(net, -1.0 * torch.ones(3), torch.ones(3), margin=lowest - 0.2, progress=False)
    assert found.status == "proved"
    assert net.training
    found.check(net)


def test_time_is_kept_and_calls_repeat() -> None:
    net = mlp(6, 2, 1, (20, 20), nn.SiLU(), dtype=torch.float32)
    given: dict[str, Any] = {"direction": [0] * 6 + [1] * 2, "progress": False}
    found = certify(net, -1.0, 1.0, margin=-1e3, seconds=0.0, **given)
    assert found.status == "unknown"
    assert found.boxes == 0
    assert found.open_share == 1
    assert (found.lower_bound[0, 6:] == -math.inf).all()
    small = [certify(net, 0.0, 0.02, margin=-20.0, **given).to_dict() for _ in range(2)]
    for entry in small:
        entry.pop("seconds")
    assert small[0] == small[1]


def test_saved_and_checked(tmp_path: Path) -> None:
    net = mlp(1, 1, 1, (4,), nn.Tanh(), dtype=torch.float32)
    found = certify(net, -1.0, 1.0, direction=[0, 1], margin=-100.0, progress=False)
    found.save(tmp_path / "certificate.json")
    loaded = Certificate.load(tmp_path / "certificate.json")
    assert loaded.to_dict() == found.to_dict() == json.loads(json.dumps(found.to_dict()))
    assert str(loaded) == str(found)
    loaded.check(net)
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nextafter(net[0].weight[0, 0], torch.tensor(9.0))
    with pytest.raises(ValueError, match=r"^mlp: expected the certified layers and weights"):
        loaded.check(net)
    net[1] = nn.SiLU()
    with pytest.raises(ValueError, match=r"^mlp: expected the certified layers and weights"):
        loaded.check(net)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^path: expected a saved certificate"):
        Certificate.load(tmp_path / "other.json")


def test_a_step_that_rounding_cannot_hide() -> None:
    net = steep(mlp(2, 1, 1, (6,), nn.SiLU(), dtype=torch.float32), [2], 4.0)
    found = certify(net, -1.0, 1.0, direction=[0, 0, 1], margin=0.5, progress=False)
    assert found.status == "proved"
    step = found.float_step[0, 2].item()
    assert 0 < step < 0.1
    x = torch.rand(20000, 3) * 2 - 1
    x[:, 2] = x[:, 2].clamp(max=1 - 2 * step)
    above = x.clone()
    above[:, 2] += step
    with torch.no_grad():
        assert (net(above) > net(x)).all()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"lower": [0.0, 2.0, 0.0]}, ValueError, "lower: expected lower <= upper, got 2 > 1"),
        ({"lower": [0.0, 0.0]}, ValueError, r"lower: expected shape \(3,\) or \(B, 3\)"),
        ({"upper": math.nan}, ValueError, "upper: expected numbers, got NaN"),
        ({"upper": -math.inf}, ValueError, "upper: expected numbers or inf, got -inf"),
        ({"lower": math.inf}, ValueError, "lower: expected numbers or -inf, got inf"),
        ({"upper": "wide"}, TypeError, "upper: expected numbers, got str"),
        ({"lower": torch.zeros(2, 3), "upper": torch.ones(4, 3)}, ValueError, "lower: expected 4"),
        ({"direction": [1, 1]}, ValueError, "direction: expected a scalar"),
        ({"direction": 2}, ValueError, "direction: expected entries"),
        ({"margin": "0"}, TypeError, "margin: expected a number"),
        ({"margin": math.nan}, ValueError, "margin: expected a finite number, got nan"),
        ({"seconds": "1"}, TypeError, "seconds: expected a number"),
        ({"seconds": math.nan}, ValueError, "seconds: expected a number >= 0, got nan"),
        ({"direction": 0}, ValueError, r"direction: expected \+1 or -1 for at least one column"),
        ({"one_hot": [0, 1]}, TypeError, r"one_hot: expected groups of columns, as \[\[0, 1\]\]"),
        ({"one_hot": [["a"]]}, ValueError, "one_hot: expected to be given the names of the 3"),
        ({"lower": {0: 1.0}}, ValueError, "lower: expected a number for each of the 3 columns"),
        ({"lower": {0: 0, 1: (0, 1), 2: (0,)}}, ValueError, "lower: expected as many numbers in"),
        ({"mlp": nn.Tanh(), "direction": 1}, ValueError, "lower: expected \\(d,\\) numbers"),
        ({"mlp": MonotonePenalty(nn.Linear(3, 1))}, ValueError, "mlp: .* give its .mlp"),
        (
            {"mlp": Monotone(nn.Linear(3, 1), 0, 1, direction=[0, 0, 1])},
            ValueError,
            r"mlp: .* give its frozen\(\)",
        ),
        ({"one_hot": [[0, 3]]}, ValueError, "one_hot: expected columns 0 to 2"),
        ({"one_hot": [[0, 1]], "direction": 1}, ValueError, "one_hot: expected free columns"),
        ({"one_hot": [[0, 1]], "upper": 0.5}, ValueError, "one_hot: expected boxes with a row"),
        ({"mlp": "net"}, TypeError, "mlp: expected an nn.Module"),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    net = mlp(2, 1, 1, (4,), dtype=torch.float32)
    given = {"mlp": net, "lower": 0.0, "upper": 1.0, "direction": [0, 0, 1]} | change
    with pytest.raises(error, match=f"^{sentence}"):
        certify(given.pop("mlp"), given.pop("lower"), given.pop("upper"), **given)


@pytest.mark.parametrize("name", ["ReLU", "Tanh", "SiLU", "Softplus"])
def test_boxes_without_an_end(name: str) -> None:
    """Slopes of saturated neurons have ranges there, and no form has: what rises by those is
    proved, what falls somewhere is found at a finite point."""
    net = steep(mlp(2, 1, 1, (6,), getattr(nn, name)()), [2], 0.0)
    layers, _ = _read(net, 3)
    x = torch.randn(4000, 3, dtype=torch.float64) * 10
    x[:, 2] = x[:, 2].abs()
    lowest = layers.slopes(x, 0)[:, 2].amin().item()
    whole = sum((net[0].weight[:, 2] * net[2].weight[0]).abs().tolist()) * 1.2
    low, high = torch.tensor([-math.inf, -math.inf, 0.0]), torch.full((3,), math.inf)
    given: dict[str, Any] = {"direction": [0, 0, 1], "progress": False}
    proved = certify(net, low, high, margin=-whole, **given)
    assert proved.status == "proved"
    assert proved.lower_bound[0, 2] <= lowest
    assert proved.float_step.isnan().all()
    found = certify(net, low, high, margin=lowest + 1e-3, **given)
    assert found.status == "violated"
    witness = found.witness[0, 2]
    assert witness.isfinite().all()
    assert witness[2] >= 0
    again = Certificate(**{f.name: getattr(found, f.name) for f in fields(found)})
    assert again.to_dict()["upper"] == ["inf"] * 3
    again.check(net)


def test_a_box_without_an_end_is_cut_until_it_is_proved() -> None:
    """y = SiLU(x_0): rises from -1.27 on, but for a margin only behind the turning point."""
    net = nn.Sequential(nn.Linear(2, 1), nn.SiLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for p, values in zip(net.parameters(), ([[1.0, 0]], [0.0], [[1.0]], [0.0]), strict=True):
            p.copy_(torch.tensor(values))
    low, high = torch.tensor([[-1.2, -math.inf], [-1.4, 0]]), torch.full((2, 2), math.inf)
    found = certify(net, low, high, direction=[1, 0], progress=False)
    assert found.verdicts == ("proved", "violated")
    assert 0 <= found.lower_bound[0, 0, 0] < 0.06
    few = certify(net, low, high, direction=[1, 0], progress=False, seconds=0)
    assert few.status == "unknown"
    assert few.open_share == 1


class Gate(nn.Module):
    """Rises in x_0 where x_1 >= 0, at least by 0.3."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 1)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[0.0, 1.0]]))
            self.a.bias.fill_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * x[:, :1] + torch.tanh(x[:, 1:])


def test_programs_that_are_no_chain_are_bounded_by_intervals() -> None:
    given: dict[str, Any] = {"direction": [1, 0], "progress": False}
    found = certify(Gate(), torch.zeros(2), torch.ones(2), margin=0.25, **given)
    assert found.status == "proved"
    assert {name for name, n in found.methods.items() if n} == {"intervals"}
    found.check(Gate())
    low, high = torch.tensor([0.0, -1.0]), torch.ones(2)
    assert certify(Gate(), low, high, **given).status == "violated"
    assert certify(Gate(), torch.tensor([0.0, -0.2]), high, **given).status == "proved"


def test_what_is_monotone_by_construction_is_proved_at_once() -> None:
    net = mlp(2, 2, 2, (9, 7), nn.Tanh(), dtype=torch.float32)
    model = Monotone(net, -1.0, 1.0, direction=(0, 0, 1, -1), margin=0.1)
    given: dict[str, Any] = {"direction": (0, 0, 1, -1), "margin": 0.1, "progress": False}
    low, high = -torch.ones(4), torch.ones(4)
    assert certify(net, low, high, **given).status == "violated"
    found = certify(model.frozen(), low, high, **given)
    assert found.status == "proved"
    assert found.boxes == 1


def test_a_network_without_weights_is_refused() -> None:
    net = mlp(2, 1, 1, (4,)).to("meta")
    with pytest.raises(ValueError, match=r"^mlp: expected weights to certify, got .* meta device"):
        certify(net, -1.0, 1.0, progress=False)


def test_progress_is_a_line_or_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    net = mlp(4, 1, 1, (9,), nn.Hardshrink(), dtype=torch.float32)  # whose jumps are never proved
    certify(net, -1.0, 1.0, margin=-1e3, seconds=0.3, progress=True)
    assert "open" in capsys.readouterr().err
    certify(net, -1.0, 1.0, margin=-1e3, seconds=0.3, progress=False)
    assert capsys.readouterr().err == ""


def test_third_and_fourth_derivatives_are_bounded() -> None:
    a = torch.linspace(-30, 30, 1_200_001, dtype=torch.float64)
    for kind, (third, fourth) in ranges.THIRD.items():
        second = ranges.curves(Activation(kind))[2].formula(a)
        rise = (second[1:] - second[:-1]) / (a[1] - a[0])
        assert rise.abs().max() <= third
        few = rise[::20]  # closer together their own rounding is seen
        assert ((few[1:] - few[:-1]).abs() / (20 * (a[1] - a[0]))).max() <= fourth
