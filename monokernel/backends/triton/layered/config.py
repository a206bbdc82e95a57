"""How a chain is cut into layers and tiles where it goes layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....problem import Problem, accumulate_dtype
from ... import Params
from ..constants import power_of_two
from ..target import processors, products

__all__ = [
    "Values",
    "kept_chain",
    "kept_layers",
    "reads_input",
    "row_tile",
    "rows_at_once",
    "saved_like",
    "slices_of",
    "tiles_of",
    "values_like",
    "weight_of",
]

ROWS = 64  # rows of an element-wise tile of 32 columns: 2048 elements for 4 warps
ROOM = 1 << 26  # numbers: 128 MiB in half precision
FEW = 64  # inputs with which the first layer's product is cheaper made again than read


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """Uninitialised buffers for what the backward needs again, in the order the forward fills them:

    a_l (N, H_l) for each layer whose value is not y itself, but the first where it is made again
    from x; when the adjoint chain is kept ∂a_L/∂h_l (N, H_l) of the hidden layers, but the last,
    where it is a row of W_L; ∂penalty/∂J (N, D, k) when there is a hinge.
    """
    N, widths, saved = x.shape[0], problem.widths, values_like(problem, x)
    if problem.keeps_adjoint:
        saved += [x.new_empty(N, H) for H in widths[1:-2]]
    if problem.hinge is not None:
        saved.append(x.new_empty(N, problem.D, problem.k, dtype=accumulate_dtype(x.dtype)))
    return saved


def values_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """Of those the a_l."""
    held = problem.widths[1 + reads_input(problem) : kept_layers(problem) + 1]
    return [x.new_empty(x.shape[0], H) for H in held]


def rows_at_once(problem: Problem, x: Tensor) -> int:
    """Of how many rows the active pairs are in memory at once: of all, but where each has several
    and so a layer's tangents could be ROOM numbers and more than the values of all rows."""
    pairs = problem.D if problem.mode == "adjoint" else problem.k
    N, widest = max(x.shape[0], 1), max(problem.widths[1:])
    if pairs == 1 or N * pairs * widest <= ROOM:
        return N
    rows = max(ROOM // (pairs * widest), -(-N // pairs))
    return -(-rows // 64) * 64  # so that blocks begin at multiples of 16 bytes, as the whole does


def reads_input(problem: Problem) -> bool:
    """Whether a_1 is made from x wherever it is needed, and never stored."""
    return problem.d <= FEW and problem.depth > 1


def kept_layers(problem: Problem) -> int:
    """The number of layers whose a_l the backward needs: all, but the last where y is a_L."""
    return problem.depth - (problem.activations[-1].kind == "identity")


def kept_chain(problem: Problem, saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """∂a_L/∂h_1, …, ∂a_L/∂h_{L-2} of all rows where the forward kept them."""
    if not problem.keeps_adjoint:
        return ()
    return saved[kept_layers(problem) - reads_input(problem) :][: max(problem.depth - 2, 0)]


def weight_of(params: Params, l: int) -> Tensor:
    W = params[2 * l]
    assert W is not None
    return W.contiguous()


class Values:
    """a_l of every layer as kernels take it: the tensor ``a[l]``, or x, W_1 and b_1."""

    def __init__(self, problem: Problem, x: Tensor, params: Params, a: list[Tensor | None]) -> None:
        self.problem, self.x, self.params, self.a = problem, x, params, a

    @classmethod
    def saved(cls, problem: Problem, x: Tensor, params: Params, saved: Sequence[Tensor]) -> Values:
        """Of what the forward kept."""
        first: list[Tensor | None] = [None] if reads_input(problem) else []
        return cls(problem, x, params, [*first, *saved][: kept_layers(problem)])

    def of(self, l: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """a, x, W, b of ``pre_activation``: of layer l."""
        if (a := self.a[l]) is not None:
            return a, None, None, None
        b = self.params[1]
        return None, self.x, weight_of(self.params, 0), None if b is None else b.contiguous()

    def inputs(self, l: int) -> dict[str, int]:
        """How many inputs layer l is made again from, and as a tile."""
        d = self.problem.d if self.a[l] is None else 0
        return {"FAN": d, "FAN_TILE": power_of_two(d, 16)}

    def takes_rows(self, l: int) -> bool:
        """Whether a kernel with more in registers makes layer l again and has room for more rows:
        AMD's waves repeat each other's products of 32 x 64; on sm_100 64 x 64 spilled 8 to 368
        bytes."""
        return self.a[l] is None and products(self.x.device) == "wave"


# --- tiles ----------------------------------------------------------------------------------------


def tiles_of(N: int, H: int, multiplies: bool = False) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of an element-wise kernel over (N, H); with more rows where it multiplies and
    has room for them: the weights are read by each tile."""
    BN = 32 if H <= 32 else 64
    BM = ROWS * 32 // BN * (2 if multiplies else 1)
    return (-(-N // BM), -(-H // BN)), {"BM": BM, "BN": BN}


def row_tile(N: int, H: int) -> tuple[tuple[int], dict[str, int]]:
    """The same of a kernel whose programs sum over all columns of their rows."""
    BM, BN = 32, min(128, power_of_two(H, 16))
    return (-(-N // BM),), {"BM": BM, "BN": BN}


def slices_of(problem: Problem, x: Tensor) -> int:
    """Into how many the rows are cut where programs sum over those of a slice."""
    N, H = x.shape[0], max(problem.widths[1:])
    (tiles, columns), _ = tiles_of(N, H)
    return max(1, min(tiles, -(-4 * processors(x.device) // columns)))
