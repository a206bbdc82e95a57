"""What ``plan`` says beyond who serves: what a step costs, and what to change for a cheaper one."""

from __future__ import annotations

import re

from .problem import Mode

__all__ = ["FEW", "advice", "cost", "products"]

FEW = 0.05  # the share of violating rows once training has begun to work


def products(mode: Mode, D: int, k: int, v: float, curved: bool = True) -> float:
    """Matrix products of a hidden layer in a penalised step, of which a share v of the pairs
    violates; a plain step has 3. ``curved``: σ'' is not zero everywhere."""
    if mode == "tangent":
        return 3 + k + 3 * k * v
    if D == 1:
        return 3 + (3 if curved else 2) * v
    return 3 + D + 3 * D * v


def cost(backend: str, mode: Mode, D: int, k: int, running: bool) -> tuple[float, float]:
    """A penalised step in plain steps, while few rows violate and when all do.

    Fused, by the matrix products of a hidden layer (a plain step has 3), which is what a step costs
    where the network is wide; autograd differentiating twice by what was measured, 3.6 to 4.1 plain
    steps with one output and 18.6 to 19.4 with eight. A second call of the module by the running
    statistics is a plain step more."""
    if backend == "reference":
        twice = 2.0 * (1 + D) + running
        return twice, twice
    return products(mode, D, k, FEW) / 3, products(mode, D, k, 1.0) / 3


RUNNING = (
    "for slopes as deployed: batch_stats='running', in the call or in MonotonePenalty(mlp, …); y "
    "and the statistics are as in training, slopes go by the running statistics, in a second call "
    "of the module"
)
FROZEN = (
    "{}for the fused step, once the statistics have settled: put the layer into evaluation mode "
    "after every mlp.train(): `[m.eval() for m in mlp.modules() if isinstance(m, nn.BatchNorm1d)]`"
)
PLAIN = (
    "written with linear layers, activations, norms, +, -, *, cat, slices of columns, softmax and "
    "sums over columns it would be fused"
)
AUTO = "backend='auto' and mode='auto' take what serves"
# What a reason or an error says, and what to do about it; the first that fits.
WAYS: tuple[tuple[str, str], ...] = (
    ("under no_grad", "what is computed under no_grad has no derivative, and no penalty sees it"),
    (
        r"Tensor\.(round|floor|ceil|trunc|sign|detach|item|gt|ge|lt|le|eq|ne|__(gt|ge|lt|le|eq|ne)__)"
        r" |torch\.(round|floor|ceil|sign|bucketize)",
        "what comes out of it has no derivative in x, and no penalty sees that part of y",
    ),
    (
        r"embedding|Tensor\.(long|int) |F\.one_hot",
        "look categories up outside of mlp and give what was found as free inputs: a category has "
        "no slope, and the rest of the network would be fused",
    ),
    ("hook", "take the hooks off while training with the penalty, or do their work in forward"),
    (
        "scripted, distributed or quantised",
        "give the module as it was before; DistributedDataParallel and fully_shard go around "
        "MonotonePenalty(mlp)",
    ),
    (
        "statistics of the batch",
        FROZEN.format(""),
    ),
    (
        "works along (axis|the rows)",
        "along the columns (dim=-1) it would be fused; along the rows it lets them influence each "
        "other, and then none has a slope of its own",
    ),
    ("has an index|picks rows|asks for column", "slices and lists of columns would be fused"),
    ("autograd.Function", "written with PyTorch's own operations it would be fused"),
    ("keeps a tensor", "let forward store nothing that depends on x (on self, in a list)"),
    (
        r"__bool__|bool\(|does not run on symbols|Tensor\.(any|all|tolist) ",
        f"use torch.where instead of branching on values; {PLAIN}",
    ),
    ("operations of its own", "give plain tensors as inputs"),
    ("row-wise node|is fused|(forward|call) of its own|joins|takes|changes", PLAIN),
)
ERRORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layer that keeps none", ("make it with track_running_stats=True, or use LayerNorm",)),
    ("normalises with the statistics of the batch", (RUNNING, FROZEN.format("or, "))),
    (
        "is sharded on its own",
        ("fully_shard(MonotonePenalty(mlp)) as a whole, and no part of it before",),
    ),
    ("has no gradient", ("let mlp neither detach its output nor compute it under no_grad",)),
    (
        "the dtype of mlp|must have the same dtype",
        ("convert the inputs, as in x.to(next(mlp.parameters()).dtype)",),
    ),
    (
        "on the device of mlp|on the same device",
        ("move the inputs, as in x.to(next(mlp.parameters()).device)",),
    ),
    ("was asked for but", (AUTO,)),
)


def advice(reason: str, error: str, refused: dict[str, str]) -> tuple[str, ...]:
    """What to change, for the reason that a network is not fused or the error that a call gives."""
    for pattern, ways in ERRORS if error else ():
        if re.search(pattern, error):
            return ways
    said = [way for pattern, way in WAYS if not error and re.search(pattern, reason)][:1]
    if "native kernel" in refused.get("cpu", ""):
        said.append(
            "for the native kernel install again where there is a C++ compiler; "
            "`python -m monokernel` shows what is missing"
        )
    if "float64" in refused.get("triton", ""):
        said.append("in float32 the Triton kernels serve")
    return tuple(said)
