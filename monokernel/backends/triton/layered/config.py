"""How a chain is cut into layers and tiles where it goes layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....problem import Problem, accumulate_dtype
from ... import Params

__all__ = ["kept_chain", "kept_layers", "saved_like", "tiles_of", "weight_of"]

ROWS = 64  # rows of an element-wise tile of 32 columns: 2048 elements for 4 warps


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """Uninitialised buffers for what the backward needs again, in the order the forward fills them:

    a_l (N, H_l) for each layer whose value is not y itself, P_l (N, H_l) of the hidden layers when
    the adjoint chain is kept, ∂penalty/∂J (N, D, k) when there is a hinge.
    """
    N, widths = x.shape[0], problem.widths
    saved = [x.new_empty(N, H) for H in widths[1 : kept_layers(problem) + 1]]
    if problem.keeps_adjoint:
        saved += [x.new_empty(N, H) for H in widths[1:-1]]
    if problem.hinge is not None:
        saved.append(x.new_empty(N, problem.D, problem.k, dtype=accumulate_dtype(x.dtype)))
    return saved


def kept_layers(problem: Problem) -> int:
    """The number of layers whose a_l is saved: all, but the last where y is a_L."""
    return problem.depth - (problem.activations[-1].kind == "identity")


def kept_chain(problem: Problem, saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """P_1, …, P_{L-1} of all rows where the forward kept them."""
    return saved[kept_layers(problem) :][: problem.depth - 1] if problem.keeps_adjoint else ()


def weight_of(params: Params, l: int) -> Tensor:
    W = params[2 * l]
    assert W is not None
    return W.contiguous()


def tiles_of(N: int, H: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of an element-wise kernel over (N, H)."""
    BN = 32 if H <= 32 else 64
    BM = ROWS * 32 // BN
    return (-(-N // BM), -(-H // BN)), {"BM": BM, "BN": BN}
