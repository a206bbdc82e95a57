"""A zoo of ordinary networks, as people write them: for the tests and for ``benchmarks/zoo.py``.

Each is a module from x (..., d) to y (..., D), row by row, of hidden width ``width``. Nothing here
knows of this package, and every class is a plain one that can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVE", "ZOO", "network"]

BLOCKS = 2


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.branch(x)
        return y


class TabularResNet(nn.Module):
    """The ResNet of Gorishniy et al. (2021), "Revisiting Deep Learning Models for Tabular Data"."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(d, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.BatchNorm1d(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(BLOCKS)
        )
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            z = F.relu(block["up"](block["norm"](x)))
            x = x + self.dropout(block["down"](self.dropout(z)))
        y: Tensor = self.head(F.relu(self.norm(x)))
        return y


class SwiGLU(nn.Module):
    """The feed-forward layer W₃(silu(W₁x) ∘ W₂x) of Shazeer (2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width + width // 2
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return y


class DeepCross(nn.Module):
    """DCN-v2 (Wang et al. 2021), parallel: cross layers x₀ ∘ (W x + b) + x beside an MLP."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(d, d) for _ in range(BLOCKS))
        self.deep = nn.Sequential(
            nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(d + width, D)

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for cross in self.crosses:
            z = x * cross(z) + z
        y: Tensor = self.head(torch.cat([z, self.deep(x)], dim=-1))
        return y


class WideAndDeep(nn.Module):
    """An MLP and a linear model of x, added (Cheng et al. 2016)."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(d, D)
        self.deep = mlp(d, D, width, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wide(x) + self.deep(x)
        return y


class Dense(nn.Module):
    """Every layer reads all that came before it, as in DenseNet (Huang et al. 2017)."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d + i * width, width) for i in range(BLOCKS))
        self.head = nn.Linear(d + BLOCKS * width, D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.gelu(layer(x))], dim=-1)
        y: Tensor = self.head(x)
        return y


class Additive(nn.Module):
    """A neural additive model (Agarwal et al. 2021): one small MLP for each column, summed."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.columns = nn.ModuleList(mlp(1, D, width, nn.Tanh) for _ in range(d))
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        parts = [column(x[..., i : i + 1]) for i, column in enumerate(self.columns)]
        return torch.stack(parts, dim=-1).sum(dim=-1) + self.bias


class Highway(nn.Module):
    """g ∘ h(x) + (1 - g) ∘ x with a gate g(x) (Srivastava et al. 2015)."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(d, width), nn.Linear(width, D)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(BLOCKS))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            g = torch.sigmoid(gate(x))
            x = g * torch.tanh(layer(x)) + (1 - g) * x
        y: Tensor = self.head(x)
        return y


class Classes(nn.Module):
    """D of D + 1 classes, as probabilities or their logarithms: the first is the rest of them."""

    def __init__(self, d: int, D: int, width: int, log: bool) -> None:
        super().__init__()
        self.logits, self.log = mlp(d, D + 1, width, nn.SiLU), log

    def forward(self, x: Tensor) -> Tensor:
        z = self.logits(x)
        p = F.log_softmax(z, dim=-1) if self.log else F.softmax(z, dim=-1)
        return p[..., 1:]


class Standardised(nn.Module):
    """Columns of x by their mean and standard deviation, buffers, before an MLP."""

    mean: Tensor
    std: Tensor

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(d))
        self.register_buffer("std", 0.5 + torch.rand(d))
        self.net = mlp(d, D, width, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net((x - self.mean) / self.std)
        return y


class Shared(nn.Module):
    """One hidden layer, used twice."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(d, width), nn.Linear(width, width)
        self.head = nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(2):
            x = torch.tanh(self.again(x))
        y: Tensor = self.head(x)
        return y


class Own(nn.Module):
    """A forward of one's own that is nothing but a chain of layers."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, width), nn.Linear(width, width)
        self.fc3 = nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        y: Tensor = self.fc3(x)
        return y


class Squeezed(nn.Module):
    """y (...,) where there is one output, as many a regression has it."""

    def __init__(self, d: int, D: int, width: int) -> None:
        super().__init__()
        self.net = mlp(d, D, width, nn.ELU)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.squeeze(-1)


class Experts(nn.Module):
    """A dense mixture of experts: their outputs, weighted by a softmax of a linear gate."""

    def __init__(self, d: int, D: int, width: int, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(d, count)
        self.experts = nn.ModuleList(mlp(d, D, width, nn.SiLU) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        g = torch.softmax(self.gate(x), dim=-1)
        y = [g[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]
        return sum(y[1:], y[0])


def mlp(d: int, D: int, width: int, σ: Callable[[], nn.Module], *between: nn.Module) -> nn.Module:
    """Two hidden layers with σ, and more between them and the next layer."""
    return nn.Sequential(
        nn.Linear(d, width), σ(), *between, nn.Linear(width, width), σ(), *between,
        nn.Linear(width, D),
    )  # fmt: skip


def _blocks(
    d: int, D: int, width: int, block: Callable[[], nn.Module], last: Sequence[nn.Module] = ()
) -> nn.Module:
    blocks = [block() for _ in range(BLOCKS)]
    return nn.Sequential(nn.Linear(d, width), *blocks, *last, nn.Linear(width, D))


def _pre_norm(norm: Callable[[int], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    def make(d: int, D: int, width: int) -> nn.Module:
        def block() -> nn.Module:
            up, down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            return Residual(norm(width), up, nn.SiLU(), down)

        return _blocks(d, D, width, block, [norm(width)])

    return make


def _glu(d: int, D: int, width: int) -> nn.Module:
    body = nn.Sequential(nn.Linear(width, 2 * width), nn.GLU())
    return nn.Sequential(
        nn.Sequential(nn.Linear(d, 2 * width), nn.GLU()),
        nn.Sequential(nn.Sequential(body), nn.Linear(width, D)),
    )


ZOO: dict[str, Callable[[int, int, int], nn.Module]] = {
    "MLP with dropout": lambda d, D, H: mlp(d, D, H, nn.ReLU, nn.Dropout(0.1)).eval(),
    "MLP with active dropout": lambda d, D, H: mlp(d, D, H, nn.SiLU, nn.Dropout(0.1)),
    "tabular ResNet": lambda d, D, H: TabularResNet(d, D, H).eval(),
    "pre-norm LayerNorm": _pre_norm(nn.LayerNorm),
    "pre-norm RMSNorm": _pre_norm(nn.RMSNorm),
    "SwiGLU": lambda d, D, H: _blocks(d, D, H, lambda: Residual(nn.RMSNorm(H), SwiGLU(H))),
    "DCN-v2": DeepCross,
    "wide and deep": WideAndDeep,
    "DenseNet": Dense,
    "additive": Additive,
    "highway": Highway,
    "PReLU": lambda d, D, H: mlp(d, D, H, lambda: nn.PReLU(H)),
    "softmax": lambda d, D, H: Classes(d, D, H, log=False),
    "log-softmax": lambda d, D, H: Classes(d, D, H, log=True),
    "standardised": Standardised,
    "shared layer": Shared,
    "Hardswish": lambda d, D, H: mlp(d, D, H, nn.Hardswish),
    "own forward": Own,
    "nested GLU": _glu,
    "squeezed": Squeezed,
    "mixture of experts": Experts,
}

# Those that draw random numbers when they are called.
ACTIVE = ("MLP with active dropout",)


def network(
    name: str, d: int, D: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """The network of this name, the same for the same seed.

    Weights are twice as large as PyTorch draws them, so that the slopes of some rows are negative
    and of others positive; statistics, scales and shifts are not those of a new layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ZOO[name](d, D, width)
        with torch.no_grad():
            for p in net.parameters():
                if p.dim() == 1:
                    p.mul_(1.5).add_(0.2 * torch.randn_like(p))
                else:
                    p.mul_(2)
            for m in net.modules():
                if isinstance(m, nn.BatchNorm1d):
                    assert m.running_mean is not None
                    assert m.running_var is not None
                    m.running_mean.normal_()
                    m.running_var.uniform_(0.5, 2)
    return net.to(dtype)
