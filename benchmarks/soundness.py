"""Is any bound contradicted by a point?

    python -m benchmarks soundness                   a hundred thousand pairs, about two minutes
    python -m benchmarks soundness --pairs 1000000
    python -m benchmarks soundness --of certify      the bounds of ``certify`` instead

Random networks and boxes: every activation with a range, one to three hidden layers, weights of
very different size in float32 and float64, a third of them made to cancel; boxes from a point to
all of space. Slopes at random points and corners, computed in float64, are held against the bounds
of ``intervals.py``, against those of the native library where it was built, and against the slopes
that ``Monotone`` promises; with ``--of certify`` against the forms of all three tiers, over bounded
boxes, and where the network is one of ReLUs against the bounds of branches in which some of a
point's switches are decided. Prints how many pairs were tried and how many points lie outside, and
ends with an error if one does.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from monokernel import Monotone, forms, switches, value_and_jacobian
from monokernel.backends import cpu
from monokernel.branching import Boxes, Branches, Constraints
from monokernel.intervals import Interval, jacobian
from monokernel.layers import Layers, layers_of
from monokernel.network import Chain, read
from monokernel.one_layer import OneLayer

__all__ = ["certified", "main", "trial"]

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    lambda: nn.GELU("tanh"), nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid,
    nn.LogSigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Softshrink, nn.Tanhshrink,
)  # fmt: skip
BOXES, POINTS = 50, 24


def _network() -> nn.Sequential:
    hidden = int(torch.randint(1, 4, ()))
    widths = [int(torch.randint(2, 5, ())), *(int(w) for w in torch.randint(2, 13, (hidden,))), 2]
    σ = ACTIVATIONS[int(torch.randint(len(ACTIVATIONS), ()))]
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


def _boxes(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    middle = torch.randn(BOXES, d, dtype=torch.float64) * 10 ** (2 * torch.rand(BOXES, 1) - 1)
    radius = 10 ** (7 * torch.rand(BOXES, 1, dtype=torch.float64) - 5.5) * torch.rand(BOXES, d)
    radius[::8] = 0
    radius[1::8] *= (torch.rand(radius[1::8].shape) < 0.5).double()  # some columns stand still
    lower, upper = (middle - radius).to(dtype), (middle + radius).to(dtype)
    if torch.rand(()) < 0.3:
        open_ = torch.rand(BOXES, d) < torch.rand(())
        lower = lower.masked_fill(open_ & (torch.rand(BOXES, d) < 0.7), -math.inf)
        upper = upper.masked_fill(open_ & (torch.rand(BOXES, d) < 0.7), math.inf)
    return lower, upper


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
    x = low + (high - low) * share
    return torch.minimum(torch.maximum(x, lower.double()), upper.double())


def _native(
    chain: Chain, params: Sequence[Tensor], lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Both ends (B, D, d) by the native library: the least slopes upwards and downwards."""
    d, D = chain.widths[0], chain.widths[-1]
    ends: list[list[Tensor]] = [[], []]
    for box in zip(lower.tolist(), upper.tolist(), strict=True):
        for side, sign in zip(ends, (1, -1), strict=True):
            direction = [[sign] * d] * D
            lift = cpu.lift(d, chain.nodes, lower.dtype, [box], range(d), direction, [0.0] * d, 0.0)
            if lift is None:
                return None
            side.append(sign * lift(lower.new_empty(0, d), params)[1])
    low, high = (torch.stack(side) for side in ends)
    return low, high


def trial(seed: int) -> tuple[int, int, str]:
    """Pairs tried with one network, points outside, and what network it was."""
    torch.manual_seed(seed)
    net = _network()
    chain = read(net)
    assert isinstance(chain, Chain)
    d, dtype = chain.widths[0], chain.linears[0].weight.dtype
    params = [p.detach() for p in net.parameters()]
    lower, upper = _boxes(d, dtype)
    finite = bool((lower.isfinite() & upper.isfinite()).all())
    J = jacobian(chain.nodes, params, Interval(lower, upper, finite), range(d))
    native = _native(chain, params, lower, upper)
    x = _points(lower, upper)
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        rows = x.reshape(-1, d)
        S = value_and_jacobian(exact, rows[:, :0], rows)[1].reshape(POINTS, BOXES, -1, d)
        size = torch.eye(d, dtype=torch.float64)
        for layer in exact:
            if isinstance(layer, nn.Linear):
                size = layer.weight.abs() @ size
    # What float64 rounds the slopes by that were sampled.
    noise = 1e-13 * size * (1 + x.abs().amax(-1)[..., None, None].clamp(max=100))
    outside = 0
    for low, high in (J[:2],) if native is None else (J[:2], native):
        outside += int(((low - noise > S) | (high + noise < S)).sum())
        outside += int((low.isnan() | high.isnan()).sum())
    # The promise itself, for one of the boxes, as it is deployed.
    i = int(torch.randint(BOXES, ()))
    direction = [int(s) for s in torch.randint(0, 2, (d,)) * 2 - 1]
    model = Monotone(net, lower[i], upper[i], direction=direction, margin=0.01)
    term = model.frozen().linear.weight.double()  # type: ignore[union-attr, operator]
    kept = (S[:, i] + term) * torch.tensor(direction) - 0.01
    outside += int((kept < -noise[:, i]).sum())
    return BOXES, outside, f"seed {seed}, {dtype}: {net}"


def certified(seed: int) -> tuple[int, int, str]:
    """As ``trial``, of what ``certify`` rests on."""
    torch.manual_seed(seed)
    net = _network()
    chain = read(net)
    assert isinstance(chain, Chain)
    d, dtype = chain.widths[0], chain.linears[0].weight.dtype
    lower, upper = (end.double() for end in _boxes(d, dtype))
    middle = torch.randn(BOXES, d, dtype=torch.float64)
    lower = torch.where(lower.isinf() | upper.isinf(), middle, lower)
    upper = torch.where(upper.isinf() | (upper < lower), lower, upper)
    found = layers_of(net, d)
    assert not isinstance(found, str)
    layers = found[0]
    assert isinstance(layers, Layers)
    x = _points(lower, upper)
    size = torch.eye(d, dtype=torch.float64)
    for W in layers.W:
        size = W.abs() @ size
    outside = 0
    for output in range(layers.D):
        S = layers.slopes(x.reshape(-1, d), output).reshape(x.shape)
        noise = 1e-13 * size[output] * (1 + x.abs().amax(-1, keepdim=True).clamp(max=100))
        for tier in forms.tiers(layers):
            s = forms.slopes(layers, lower, upper, output, torch.arange(d), tier)
            outside += int(((S - s.centre).abs() > s.radius() + noise).sum())
            outside += int((s.centre.isnan() | s.error.isnan()).sum())
            outside += int(((s.lower - noise > S) | (s.upper + noise < S)).sum())
        if switches.serves(layers):
            outside += _branches(layers, lower, upper, output, x, S, noise)
    return BOXES, outside, f"seed {seed}, {dtype}: {net}"


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
    of = OneLayer if len(layers.W) == 2 else switches.Dual
    bounds = of(layers, constraints, start, box, q)
    low, high = bounds.ranges()
    a = torch.cat(layers.values(x[0])[:-1], 1)[box]
    decided = (torch.rand(low.shape) < 0.5) & (low <= 0) & (high > 0)
    on, off = decided & (a > 0), decided & (a < 0)
    switch = (on | (low > 0)).to(torch.int8) - (off | (high <= 0)).to(torch.int8)
    low, high = torch.where(on, low.clamp(min=0), low), torch.where(off, high.clamp(max=0), high)
    branches = Branches(torch.arange(len(q)), switch, low, high, start.known[box, q])
    bound = bounds.bounded(branches)[0]
    return int((S[0, box, q] + noise[0, box, 0 * q] * 10 < bound).sum()) + int(bound.isnan().sum())


TRIALS = {"intervals": trial, "certify": certified}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks soundness",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
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
    print(
        f"{pairs} pairs of {seed - options.seed} networks and {BOXES} boxes each, "
        f"{pairs * POINTS} points: {outside} outside ({time.perf_counter() - begin:.0f} s)"
    )
    if outside:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
