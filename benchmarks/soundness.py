"""Is any bound contradicted by a point?

    python -m benchmarks soundness                   a hundred thousand pairs, a few minutes
    python -m benchmarks soundness --pairs 1000000
    python -m benchmarks soundness --of certify      the bounds of ``certify`` instead
    python -m benchmarks soundness --of programs     networks that are no chain of layers

Random networks and boxes: every activation with a range, one to three hidden layers, weights of
very different size in float32 and float64, a third of them made to cancel; boxes from a point to
all of space, a quarter of them at a kink or another turning point of a hidden unit. Slopes are
computed with more digits than float64 has (``digits.py``), so that a bound in float64 that is
rounded the wrong way is seen: at random points and corners, and then at points around those where
a slope came closest to what bounds it. They are held against the bounds of ``intervals.py``,
against those of the native library where it was built, and against the slopes that ``Monotone``
promises; with ``--of certify`` against the forms of all tiers, over bounded boxes, and where the
network is one of ReLUs against what deciding its neurons proves: with one hidden layer the bounds
of branches in which some of a point's switches are decided, with more a search for a margin just
above one of the slopes, or above all. Forms of the second order are tried both by the library and
by PyTorch's operations; ``--of quadratic`` takes only networks that have them, ``--of programs``
the networks of ``tests/zoo.py``, norms, gates and residuals among them, and slopes in float64.
Prints how many pairs were tried and how many points lie outside, and ends with an error if one
does. A network is named by its seed: ``--seed S`` begins with S and counts up.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from monokernel import (
    Monotone,
    forms,
    quadratic,
    several_layers,
    switches,
    value_and_jacobian,
)
from monokernel.activations import Activation
from monokernel.arguments import check_inputs
from monokernel.backends import cpu
from monokernel.branching import Boxes, Branches, Constraints
from monokernel.enclosures import Slopes
from monokernel.intervals import Interval, jacobian
from monokernel.layers import Layers, layers_of
from monokernel.monotone import _exact as parameters_exact
from monokernel.network import Chain, read
from monokernel.one_layer import OneLayer
from monokernel.program import Node
from monokernel.ranges import curves
from monokernel.reading import read as read_program
from monokernel.symbols import Param

from . import digits
from .options import parser_of

__all__ = ["certified", "every_bound", "main", "programs", "trial"]

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    lambda: nn.GELU("tanh"), nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid,
    nn.LogSigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Softshrink, nn.Tanhshrink,
)  # fmt: skip
# Those of which a chain is bounded by quadratic forms.
SMOOTH: tuple[Callable[[], nn.Module], ...] = (
    nn.GELU, lambda: nn.GELU("tanh"), nn.LogSigmoid, nn.Mish, nn.Sigmoid, nn.SiLU, nn.Tanh,
    nn.Tanhshrink,
)  # fmt: skip
BOXES, POINTS = 50, 12  # and as many points again
SEARCHED = 0.2  # seconds


def _network(activations: Sequence[Callable[[], nn.Module]] = ACTIVATIONS) -> nn.Sequential:
    hidden = int(torch.randint(1, 4, ()))
    widths = [int(torch.randint(2, 5, ())), *(int(w) for w in torch.randint(2, 13, (hidden,))), 2]
    σ = activations[int(torch.randint(len(activations), ()))]
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), σ()]
    net = nn.Sequential(*layers[:-1])
    dtype = torch.float32 if torch.rand(()) < 0.5 else torch.float64
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(float(10 ** (2 * torch.rand(()) - 0.7)))
    net = net.to(dtype)
    if torch.rand(()) < 0.3:
        _cancel(net)
    return net


@torch.no_grad()
def _cancel(net: nn.Sequential) -> None:
    """Pairs of hidden units that are equal but for the last digit, and taken from each other."""
    first, second = net[0], net[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    half = first.out_features // 2
    twins = first.weight[:half] * (1 + torch.finfo(first.weight.dtype).eps)
    first.weight[half : 2 * half] = twins
    first.bias[half : 2 * half] = first.bias[:half]
    second.weight[:, half : 2 * half] = -second.weight[:, :half]


def _boxes(d: int, dtype: torch.dtype, first: tuple[Tensor, Tensor, Activation] | None) -> Box:
    middle = torch.randn(BOXES, d, dtype=torch.float64) * 10 ** (2 * torch.rand(BOXES, 1) - 1)
    if first is not None:
        middle[::4] = _turning(middle[::4], *first)
    radius = 10 ** (7 * torch.rand(BOXES, 1, dtype=torch.float64) - 5.5) * torch.rand(BOXES, d)
    radius[::8] = 0
    radius[1::8] *= (torch.rand(radius[1::8].shape) < 0.5).double()  # some columns stand still
    lower, upper = (middle - radius).to(dtype), (middle + radius).to(dtype)
    if torch.rand(()) < 0.3:
        open_ = torch.rand(BOXES, d) < torch.rand(())
        lower = lower.masked_fill(open_ & (torch.rand(BOXES, d) < 0.7), -math.inf)
        upper = upper.masked_fill(open_ & (torch.rand(BOXES, d) < 0.7), math.inf)
    return lower, upper


def _turning(x: Tensor, W: Tensor, b: Tensor, σ: Activation) -> Tensor:
    """Points x (n, d) moved to where one hidden unit of each is at a turn of σ or σ', or at 0."""
    places = [0.0, *(turn.place for curve in curves(σ)[:2] for turn in curve.turns)]
    unit = torch.randint(len(W), (len(x),))
    at = torch.tensor(places, dtype=torch.float64)[torch.randint(len(places), (len(x),))]
    w = W.double()[unit]
    off = at - b.double()[unit] - (w * x).sum(1)
    return x + w * (off / w.square().sum(1)).unsqueeze(1)


def _points(lower: Tensor, upper: Tensor) -> Tensor:
    """(points, B, d) of each box, its corners among them; where it is infinite, far out too."""
    far = 10 ** (4 * torch.rand(POINTS, 1, 1, dtype=torch.float64))
    low, high = lower.double(), upper.double()
    low, high = (
        torch.where(low.isinf(), high.clamp(max=far) - far, low),
        torch.where(high.isinf(), low.clamp(min=-far) + far, high),
    )
    share = torch.rand(POINTS, *lower.shape, dtype=torch.float64)
    share[: POINTS // 3] = share[: POINTS // 3].round()
    return _within(low + (high - low) * share, lower, upper)


def _within(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, lower.double()), upper.double())


def _nearer(x: Tensor, S: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """As many points again as x (points, B, d), around those where slopes S (points, B, …) are the
    least or the greatest, closer and closer."""
    flat = S.flatten(2)
    which = torch.randint(flat.shape[2], (POINTS,))
    ends = torch.stack((flat.argmin(0), flat.argmax(0)))  # (2, B, slopes)
    best = ends[torch.randint(2, (POINTS,)), :, which]  # (points, B)
    extent = (upper.double() - lower.double()).nan_to_num(0, 1e3).clamp(max=1e3)
    step = extent * 10 ** (-6 * torch.rand(POINTS, 1, 1, dtype=torch.float64))
    centre = x.gather(0, best.unsqueeze(2).expand_as(x))
    return _within(centre + step * torch.randn(x.shape, dtype=torch.float64), lower, upper)


Box = tuple[Tensor, Tensor]
# Slopes (points, B, D, d) at points (points, B, d), and what they may be off by.
SlopesOf = Callable[[Tensor], tuple[Tensor, Tensor]]


def _tried(slopes_of: SlopesOf, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points, their slopes and what these may be off by: half of them chosen by the other half."""
    x = _points(lower, upper)
    S, noise = slopes_of(x)
    more = _nearer(x, S, lower, upper)
    return tuple(map(torch.cat, zip((x, S, noise), (more, *slopes_of(more)), strict=True)))  # type: ignore[return-value]


def _in_digits(layers: Sequence[tuple[Tensor, Tensor | None, Activation]]) -> SlopesOf:
    def slopes_of(x: Tensor) -> tuple[Tensor, Tensor]:
        S, noise = digits.slopes(layers, x.flatten(0, 1))
        return S.unflatten(0, x.shape[:2]), noise.unflatten(0, x.shape[:2])

    return slopes_of


def _native(
    nodes: tuple[Node, ...], params: Sequence[Param], lower: Tensor, upper: Tensor
) -> Box | None:
    """Both ends (B, D, d) by the native library: the least slopes upwards and downwards."""
    d, D = lower.shape[1], nodes[-1].width
    ends: list[list[Tensor]] = [[], []]
    for box in zip(lower.tolist(), upper.tolist(), strict=True):
        for side, sign in zip(ends, (1, -1), strict=True):
            direction = [[sign] * d] * D
            lift = cpu.lift(d, nodes, lower.dtype, [box], range(d), direction, [0.0] * d, 0.0)
            if lift is None:
                return None
            side.append(sign * lift(lower.new_empty(0, d), params)[1])  # type: ignore[arg-type]
    low, high = (torch.stack(side) for side in ends)
    return low, high


def _outside(
    nodes: tuple[Node, ...], params: Sequence[Param], lower: Tensor, upper: Tensor,
    S: Tensor, noise: Tensor, exact: bool = True,
) -> int:  # fmt: skip
    """How many slopes both sets of bounds leave out, or, where it is bounded, ends that are no
    number."""
    finite = (lower.isfinite() & upper.isfinite()).all(1)
    J = jacobian(nodes, params, Interval(lower, upper, bool(finite.all())), range(lower.shape[1]))
    native = _native(nodes, params, lower, upper) if exact else None
    outside = 0
    for low, high in (J[:2],) if native is None else (J[:2], native):
        outside += int(((low - noise > S) | (high + noise < S)).sum())
        outside += int((low.isnan() | high.isnan())[finite].sum())
    return outside


def _contradicted(net: nn.Module, lower: Tensor, upper: Tensor, S: Tensor, noise: Tensor) -> int:
    """Slopes (points, D, d) that break the promise itself over one box, as it is deployed."""
    direction = [int(s) for s in torch.randint(0, 2, (lower.shape[0],)) * 2 - 1]
    parts = int(torch.randint(1, 5, ()))
    model = Monotone(net, lower, upper, direction=direction, margin=0.01, parts=parts)
    term = model.frozen().linear.weight.double()  # type: ignore[union-attr, operator]
    kept = (S + term) * torch.tensor(direction) - 0.01
    return int((kept < -noise - 1e-16 * term.abs()).sum())


def trial(seed: int) -> tuple[int, int, str]:
    """Pairs tried with one network, points outside, and what network it was."""
    torch.manual_seed(seed)
    net = _network()
    chain = read(net)
    assert isinstance(chain, Chain)
    params = [p.detach() for p in net.parameters()]
    layers = _layers(chain, params)
    lower, upper = _boxes(chain.widths[0], params[0].dtype, layers[0])
    _, S, noise = _tried(_in_digits(layers), lower, upper)
    outside = _outside(chain.nodes, params, lower, upper, S, noise)
    i = int(torch.randint(BOXES, ()))
    outside += _contradicted(net, lower[i], upper[i], S[:, i], noise[:, i])
    return BOXES, outside, f"seed {seed}, {params[0].dtype}: {net}"


def _layers(chain: Chain, params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Activation]]:
    kinds = [(node.kind, *node.numbers) for node in chain.nodes if node.kind != "linear"]
    σ = [Activation(*kind) for kind in kinds]
    σ += [Activation("identity")] * (len(params) // 2 - len(σ))
    return list(zip(params[::2], params[1::2], σ, strict=True))


def programs(seed: int) -> tuple[int, int, str]:
    """As ``trial``, of a network that is no chain of layers."""
    from tests.zoo import ACTIVE, ZOO, network  # of a clone; an installed package has no tests

    torch.manual_seed(seed)
    names = [name for name in ZOO if name not in ACTIVE]
    name = names[int(torch.randint(len(names), ()))]
    dtype = torch.float32 if torch.rand(()) < 0.5 else torch.float64
    d = 3
    net = network(name, d, 1 if name == "squeezed" else 2, 6, dtype, seed)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(float(10 ** (0.8 * torch.rand(()) - 0.4)))
    for m in net.modules():
        if isinstance(m, nn.RMSNorm):
            m.eps = torch.finfo(dtype).eps  # which is that of its dtype otherwise
    rows = torch.zeros(2, d, dtype=dtype)
    found = read_program(net, check_inputs(rows[:, :0], rows), rehearsal=True, fold=False)
    assert not isinstance(found, str), found
    params = [p.detach() if isinstance(p, Tensor) else p for p in found.params]
    lower, upper = _boxes(d, dtype, None)
    exact = copy.deepcopy(net).double().eval()

    def slopes_of(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, 1)
        S = value_and_jacobian(exact, rows[:, :0], rows)[1].detach().unflatten(0, x.shape[:2])
        return S, (1e-10 * (1 + S.abs().amax((0, 1)))).expand_as(S)

    _, S, noise = _tried(slopes_of, lower, upper)
    taken = parameters_exact(net, found, dtype)
    outside = _outside(found.nodes, params, lower, upper, S, noise, taken)
    return BOXES, outside, f"seed {seed}, {dtype}: {name}"


def every_bound(
    layers: Layers, lower: Tensor, upper: Tensor, output: int
) -> Iterator[tuple[str, Slopes]]:
    """Of all slopes of one output by every tier, and by PyTorch what the native library does."""
    columns, tiers = torch.arange(layers.d), forms.tiers(layers)
    for tier in tiers:
        yield forms.TIERS[tier], forms.slopes(layers, lower, upper, output, columns, tier)
    if forms.QUADRATIC in tiers and cpu.isa() is not None:
        c, r = forms.centred(layers, lower, upper)
        moves = forms.moving(lower, upper)
        yield "by PyTorch", quadratic.by_pytorch(layers, c, r, moves, output, columns)


def certified(
    seed: int, activations: Sequence[Callable[[], nn.Module]] = ACTIVATIONS
) -> tuple[int, int, str]:
    """As ``trial``, of what ``certify`` rests on."""
    torch.manual_seed(seed)
    net = _network(activations)
    chain = read(net)
    assert isinstance(chain, Chain)
    d, dtype = chain.widths[0], chain.linears[0].weight.dtype
    found = layers_of(net, d)
    assert not isinstance(found, str)
    layers = found[0]
    assert isinstance(layers, Layers)
    each = list(zip(layers.W, layers.b, layers.σ, strict=True))
    lower, upper = (end.double() for end in _boxes(d, dtype, each[0]))
    middle = torch.randn(BOXES, d, dtype=torch.float64)
    lower = torch.where(lower.isinf() | upper.isinf(), middle, lower)
    upper = torch.where(upper.isinf() | (upper < lower), lower, upper)
    x, S, noise = _tried(_in_digits(each), lower, upper)
    outside = 0
    for output in range(layers.D):
        own, off = S[:, :, output], noise[:, :, output]
        for _, s in every_bound(layers, lower, upper, output):
            outside += int(((own - s.centre).abs() > s.radius() + off).sum())
            outside += int((s.centre.isnan() | s.error.isnan()).sum())
            outside += int(((s.lower - off > own) | (s.upper + off < own)).sum())
        if switches.serves(layers):
            of = _branches if len(layers.W) == 2 else _searched
            outside += of(layers, lower, upper, output, x, own, off)
    return BOXES, outside, f"seed {seed}, {dtype}: {net}"


def quadratics(seed: int) -> tuple[int, int, str]:
    """As ``certified``, of networks that quadratic forms serve."""
    return certified(seed, SMOOTH)


def _branches(
    layers: Layers, lower: Tensor, upper: Tensor, output: int, x: Tensor, S: Tensor, noise: Tensor
) -> int:
    """Points outside of the bounds of every column, in branches that the first point is in."""
    d = layers.d
    constraints = Constraints(
        torch.full((d,), output), torch.arange(d), torch.ones(d, dtype=torch.float64), 1e9
    )
    wanted = torch.ones(BOXES, d, dtype=torch.bool)
    start = Boxes(lower, upper, torch.arange(BOXES), wanted, wanted.double() - torch.inf)
    box, q = wanted.nonzero(as_tuple=True)
    bounds = OneLayer(layers, constraints, start, box, q)
    low, high = bounds.ranges()
    a = torch.cat(layers.values(x[0])[:-1], 1)[box]
    sided = a.abs() > 1e-10 * (1 + a.abs().amax())  # of others float64 does not know the side
    decided = (torch.rand(low.shape) < 0.5) & (low <= 0) & (high > 0) & sided
    on, off = decided & (a > 0), decided & (a < 0)
    switch = (on | (low > 0)).to(torch.int8) - (off | (high <= 0)).to(torch.int8)
    low, high = torch.where(on, low.clamp(min=0), low), torch.where(off, high.clamp(max=0), high)
    branches = Branches(torch.arange(len(q)), switch, low, high, start.known[box, q])
    bound = bounds.bounded(branches)[0]
    return int((S[0, box, q] + noise[0, box, q] < bound).sum()) + int(bound.isnan().sum())


def _searched(
    layers: Layers, lower: Tensor, upper: Tensor, output: int, x: Tensor, S: Tensor, noise: Tensor
) -> int:
    """Points outside of what a search says of every column, finished or not: with a margin just
    above the lowest of some pair's points, which must not be proved, or above all of them, so that
    every pair is bounded as closely as there is time."""
    d = layers.d
    lowest = (S + noise).amin(0)
    margin = lowest.flatten()[torch.randint(lowest.numel(), ())]
    margin = margin.nextafter(torch.tensor(torch.inf, dtype=torch.float64))
    if torch.rand(()) < 0.5:
        margin = 2 * S.abs().max() + 1
    constraints = Constraints(
        *(torch.full((d,), output), torch.arange(d), torch.ones(d, dtype=torch.float64)),
        margin.item(),
    )
    wanted = torch.ones(BOXES, d, dtype=torch.bool)
    start = Boxes(lower, upper, torch.arange(BOXES), wanted, wanted.double() - torch.inf)
    none = torch.zeros(BOXES, dtype=torch.bool)
    deadline = time.monotonic() + SEARCHED
    least, _, _, _ = several_layers.search(
        layers, constraints, start, lambda *_: none, deadline, lambda *_: None
    )
    return int((lowest.flatten() < least).sum()) + int(least.isnan().sum())


REPORTED = 100_000  # pairs
TRIALS = {
    "intervals": trial,
    "certify": certified,
    "quadratic": quadratics,
    "programs": programs,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("soundness", __doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", choices=TRIALS, default="intervals")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = outside = 0
    begin, seed = time.perf_counter(), options.seed
    while pairs < options.pairs:
        tried, bad, what = TRIALS[options.of](seed)
        pairs, outside, seed = pairs + tried, outside + bad, seed + 1
        if bad:
            print(f"{bad} points outside: {what}", flush=True)
        if pairs % REPORTED == 0 or pairs >= options.pairs:
            print(
                f"{pairs} pairs of {seed - options.seed} networks and {BOXES} boxes each, "
                f"{2 * pairs * POINTS} points: {outside} outside "
                f"({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
    if outside:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
