"""Certificates beside others: what is decided, how close bounds are, and what is exact.

    python -m benchmarks peers                      all of it, about fifteen minutes
    python -m benchmarks peers --only decided       networks trained with the penalty
    python -m benchmarks peers --only exact         ReLU, beside the exact minima by HiGHS (SciPy)
    python -m benchmarks peers --only bounds        one box, beside auto_LiRPA's Jacobian bounds
    python -m benchmarks peers --only false         a box of which they are false

Times are processor time of one thread, those of what is decided by the clock and on all threads. A
peer that is not installed is passed over with a line that says so: SciPy (HiGHS), gurobipy,
auto_LiRPA 0.7 or newer. A peer's bound that a point contradicts is counted. Rows are appended to a
CSV with the machine's name.
"""

from __future__ import annotations

import csv
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from monokernel import certify, forms, fused_mono_penalty
from monokernel.layers import Layers, layers_of

from .measure import machine
from .options import parser_of

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results" / "peers.csv"
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}
ROWS, TRAINING = 1000, 1500
SECONDS = 60.0  # by the clock on the wall, which a busy machine is behind
THREADS = torch.get_num_threads()
# Activation, widths, monotone columns (the last), weight decay, the penalty's margin, how fast the
# target changes with the free columns.
DECIDED = (
    ("tanh", (4, 5, 5, 1), 4, 0.01, 0.1, 0.5),
    ("silu", (6, 64, 64, 64, 1), 2, 0.1, 0.3, 0.5),
    ("silu", (10, 64, 64, 1), 3, 0.1, 0.3, 0.5),
    ("gelu", (8, 32, 32, 32, 1), 3, 0.3, 0.3, 0.5),
    ("relu", (13, 100, 1), 4, 0.3, 0.3, 0.5),
    ("relu", (13, 100, 1), 4, 0.3, 0.3, 1.0),
    ("relu", (6, 32, 32, 1), 2, 0.3, 0.3, 0.5),
)
EXACT = (("relu", (5, 30, 1), 1), ("relu", (8, 60, 1), 1), ("relu", (13, 100, 1), 4))
OFF = 1e-3  # of the exact minimum: so far below it we prove, so far above it we find a point
BOUNDS = (
    ("silu", (6, 64, 64, 64, 1)),
    ("tanh", (6, 32, 32, 1)),
    ("relu", (6, 32, 32, 1)),
)
BOXES, HALF_WIDTHS, POINTS = 8, (0.05, 0.25), 2000

Row = dict[str, object]


def network(activation: str, widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def _target(x: Tensor, k: int, seed: int, rough: float) -> Tensor:
    """Rises in the last k columns, more or less steeply by where the others are."""
    g = torch.Generator().manual_seed(100 + seed)
    free = x.shape[1] - k
    mixed = rough * torch.randn(free, 3, generator=g)
    rise = torch.rand(k, generator=g) + 0.3
    up = (torch.tanh(2 * x[:, free:]) * rise).sum(1)
    f = torch.sin(x[:, :free] @ mixed)
    return (f[:, 0] + up * (1 + 0.5 * f[:, 1]) + 0.3 * f[:, 2]).unsqueeze(1)


def trained(
    activation: str,
    widths: Sequence[int],
    k: int,
    seed: int,
    decay: float = 0.3,
    margin: float = 0.3,
    rough: float = 0.5,
) -> nn.Sequential:
    """On synthetic data in [-1, 1]ᵈ, penalised on it and on as many uniform points."""
    torch.manual_seed(seed)
    net, d = network(activation, widths), widths[0]
    x = torch.rand(ROWS, d) * 2 - 1
    t = _target(x, k, seed, rough) + 0.1 * torch.randn(ROWS, 1)
    t = (t - t.mean()) / t.std()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=decay)
    for _ in range(TRAINING):
        optimizer.zero_grad()
        p = torch.cat([x, torch.rand(ROWS, d) * 2 - 1])
        y, penalty = fused_mono_penalty(
            net, p[:, : d - k], p[:, d - k :], margin=margin, reduction="mean", return_output=True
        )
        ((y[:ROWS] - t).square().mean() + 10 * penalty).backward()
        optimizer.step()
    return net


def _name(activation: str, widths: Sequence[int]) -> str:
    return f"{activation} {'-'.join(map(str, widths))}"


def decided() -> Iterator[Row]:
    """Whole networks over [-1, 1]ᵈ, three seeds each."""
    for activation, widths, k, decay, margin, rough in DECIDED:
        for seed in range(3):
            net = trained(activation, widths, k, seed, decay, margin, rough)
            direction = [0] * (widths[0] - k) + [1] * k
            torch.set_num_threads(THREADS)
            begin = time.perf_counter()
            found = certify(net, -1.0, 1.0, direction=direction, seconds=SECONDS, progress=False)
            seconds = time.perf_counter() - begin
            torch.set_num_threads(1)
            yield {
                "what": f"decided, roughness {rough:g}",
                "network": _name(activation, widths),
                "seed": seed,
                "method": f"certify, {THREADS} threads",
                "seconds": seconds,
                "result": found.status,
                "value": found.open_share,
            }


def exact() -> Iterator[Row]:
    """min ∂y/∂x_c of one hidden layer over [-1, 1]ᵈ by a solver, and our verdicts beside it."""
    solvers = {"HiGHS": _highs, "Gurobi": _gurobi}
    if not find_spec("scipy"):
        print("exact minima: SciPy is not installed, passed over")
        return
    if not find_spec("gurobipy"):
        print("exact minima: gurobipy is not installed, passed over")
        del solvers["Gurobi"]
    for activation, widths, k in EXACT:
        for seed in range(2):
            net = trained(activation, widths, k, seed)
            c = widths[0] - 1
            row = {"what": "exact", "network": _name(activation, widths), "seed": seed}
            least = 0.0
            for name, solve in solvers.items():
                begin = time.process_time()
                least = solve(net, c)
                yield row | {
                    "method": name,
                    "seconds": time.process_time() - begin,
                    "value": least,
                }
            direction = [int(i == c) for i in range(widths[0])]
            for off in (-OFF, OFF):
                begin = time.process_time()
                found = certify(
                    net,
                    -1.0,
                    1.0,
                    direction=direction,
                    margin=least + off,
                    seconds=60,
                    progress=False,
                )
                yield row | {
                    "method": f"certify, margin {'below' if off < 0 else 'above'} by {OFF:g}",
                    "seconds": time.process_time() - begin,
                    "result": found.status,
                    "value": found.lower_bound[0, c].item(),
                }


def _parts(net: nn.Sequential, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W and b of the hidden layer, the step of each neuron, and the ends of its argument."""
    W, b, v = (p.detach().double() for p in (net[0].weight, net[0].bias, net[2].weight[0]))  # type: ignore[union-attr]
    reach = W.abs().sum(1)
    return W, b, v * W[:, c], b - reach, b + reach


def _highs(net: nn.Sequential, c: int) -> float:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    W, b, step, low, high = (t.numpy() for t in _parts(net, c))
    H, d = W.shape
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    # low (1 - z) <= a <= high z over the columns of x and z.
    over = LinearConstraint(np.hstack([W, -np.diag(high)]), -np.inf, -b)
    under = LinearConstraint(np.hstack([W, np.diag(low)]), low - b, np.inf)
    bounds = Bounds(np.r_[-np.ones(d), np.zeros(H)], np.ones(d + H))
    whole = np.r_[np.zeros(d), np.ones(H)]
    cost = np.r_[np.zeros(d), step]
    found = milp(
        cost,
        constraints=[over, under],
        integrality=whole,
        bounds=bounds,
        options={"time_limit": 120},
    )
    return float(found.fun)


def _gurobi(net: nn.Sequential, c: int) -> float:
    import gurobipy

    W, b, step, low, high = (t.numpy() for t in _parts(net, c))
    with gurobipy.Env(params={"OutputFlag": 0, "Threads": 1}) as env:
        model = gurobipy.Model(env=env)
        x = model.addMVar(W.shape[1], lb=-1.0, ub=1.0)
        z = model.addMVar(W.shape[0], vtype="B")
        model.addConstr(W @ x + b <= high.clip(min=0) * z)
        model.addConstr(W @ x + b >= low.clip(max=0) * (1 - z))
        model.setObjective(step @ z)
        model.optimize()
        return float(model.ObjVal)


Slopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of boxes (n, d), lower and upper


@cache
def _auto_lirpa_version() -> str:
    """ "" where it is not installed, which is then said once."""
    try:
        from auto_LiRPA import __version__
    except ImportError as error:
        print(f"bounds: auto_LiRPA is not installed ({error}), passed over")
        return ""
    return str(__version__)


def _bounding(net: nn.Sequential, d: int) -> tuple[Layers, dict[str, Slopes]]:
    """The network's layers, and everybody's bounds of its slopes."""
    found = layers_of(net, d)
    assert not isinstance(found, str)
    layers = found[0]
    assert isinstance(layers, Layers)
    methods: dict[str, Slopes] = {}
    if version := _auto_lirpa_version():
        for way, optimize in (("CROWN", False), ("optimised", True)):
            methods[f"auto_LiRPA {version}, {way}"] = _auto_lirpa(net, optimize)
    methods |= {f"monokernel, {forms.TIERS[t]}": _ours(layers, t) for t in forms.tiers(layers)}
    return layers, methods


def bounds() -> Iterator[Row]:
    """∂y/∂x over single boxes: mean width, time of a box, points outside."""
    for activation, widths in BOUNDS:
        torch.manual_seed(0)
        layers, methods = _bounding(network(activation, widths), widths[0])
        for half in HALF_WIDTHS:
            centre = torch.rand(BOXES, widths[0]) * 2 - 1
            lower, upper = centre.double() - half, centre.double() + half
            share = torch.rand(POINTS, *lower.shape, dtype=torch.float64)
            J = layers.slopes(torch.lerp(lower, upper, share).flatten(0, 1), 0)
            J = J.view(POINTS, BOXES, -1)
            for name, of in methods.items():
                of(lower, upper)
                begin = time.process_time()
                low, high = of(lower, upper)
                seconds = time.process_time() - begin
                outside = int((torch.maximum(low - J, J - high) > 1e-5).sum())
                yield {
                    "what": f"bounds, half-width {half:g}",
                    "network": _name(activation, widths),
                    "seed": 0,
                    "method": name,
                    "seconds": seconds / BOXES,
                    "result": f"{outside} points outside",
                    "value": (high - low).mean().item(),
                }


def false() -> Iterator[Row]:
    """Lower bounds of ∂y/∂x_0 in a box, and whether the slope at a point of it is below them."""
    torch.manual_seed(103)
    net = network("tanh", (2, 8, 8, 1))
    with torch.no_grad():
        for p in net.parameters():
            p *= 2
    layers, methods = _bounding(net, 2)
    centre = torch.tensor([[1.753267288208008, -1.3316242694854736]])
    point = torch.tensor([[1.7039785385131836, -1.3799184560775757]], dtype=torch.float64)
    lower, upper = centre.double() - 0.05, centre.double() + 0.05
    assert bool(((lower < point) & (point < upper)).all())
    slope = float(layers.slopes(point, 0)[0, 0])
    for name, of in methods.items():
        begin = time.process_time()
        low, high = (float(end[0, 0]) for end in of(lower, upper))
        yield {
            "what": "one slope in a box",
            "network": _name("tanh", (2, 8, 8, 1)),
            "seed": 103,
            "method": name,
            "seconds": time.process_time() - begin,
            "result": f"{'holds' if low <= slope <= high else 'is false'}: {slope:.5f} there",
            "value": low,
        }


def _ours(layers: Layers, tier: int) -> Slopes:
    def of(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        s = forms.slopes(layers, lower, upper, 0, torch.arange(layers.d), tier)
        return s.lower, s.upper

    return of


def _auto_lirpa(net: nn.Module, optimize: bool) -> Slopes:
    """Its Jacobian bounds; optimised ones are its default. Box by box: in a batch those of ReLUs
    came out 50 times as wide."""
    from auto_LiRPA import BoundedModule, BoundedTensor
    from auto_LiRPA.jacobian import JacobianOP
    from auto_LiRPA.perturbations import PerturbationLpNorm

    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")

    class Jacobian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = JacobianOP.apply(self.net(x), x)
            return found

    d = next(net.parameters()).shape[1]
    bounded = BoundedModule(Jacobian(), torch.zeros(1, d))

    def one(x_L: Tensor, x_U: Tensor) -> tuple[Tensor, Tensor]:
        around = PerturbationLpNorm(norm=float("inf"), x_L=x_L, x_U=x_U)
        box = BoundedTensor(0.5 * x_L + 0.5 * x_U, around)
        low, high = bounded.compute_jacobian_bounds(box, optimize=optimize)
        return low.detach().view(1, d).double(), high.detach().view(1, d).double()

    def of(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(lower.float().split(1), upper.float().split(1), strict=True)
        low, high = zip(*(one(l, u) for l, u in pairs), strict=True)
        return torch.cat(low), torch.cat(high)

    return of


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "decided": decided,
    "exact": exact,
    "bounds": bounds,
    "false": false,
}
COLUMNS = ("what", "network", "seed", "method", "seconds", "result", "value")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("peers", __doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    own = machine()
    new = not options.csv.exists()
    with options.csv.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *own])
        if new:
            writer.writeheader()
        for part in [options.only] if options.only else PARTS:
            for row in PARTS[part]():
                writer.writerow(
                    {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} | own
                )
                file.flush()
                print(_line(row), flush=True)


def _line(row: Row) -> str:
    value, result = row["value"], row.get("result", "")
    return (
        f"{row['what']!s:24} {row['network']!s:22} {row['seed']} {row['method']!s:28} "
        f"{row['seconds']:>9.4f} s {value:>10.5f} {result}"
    )


if __name__ == "__main__":
    main()
