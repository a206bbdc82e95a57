"""The layer-by-layer path: wide networks, and strict float32.

Products over all rows are PyTorch's (cuBLAS), with fused element-wise kernels between them
(``elementwise.py``); products over the active pairs alone are Triton's (``layer.py``), since only a
kernel can take its number of rows from the device. Products per hidden layer, as in
``docs/mathematics.md``: the task's three, the forward's tangents or chains, and what follows v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem import Problem, accumulate_dtype, shared_direction_table
from .config import ROWS, LayerConfig, layer_candidates, layer_config
from .elementwise import hinge_slopes, layer_back, layer_down, layer_up
from .launch import (
    TL_DTYPES,
    accumulator,
    activation_table,
    compute_dtype,
    dot_precision,
    launch,
    processors,
    register_limit,
)
from .layer import pairs_down, pairs_up, pairs_weight
from .pairs import count_pairs, gather_inputs, list_pairs, seed_cotangents
from .reduce import reduce_sum
from .tuning import choose, enabled
from .whole import compiled, output_code

__all__ = [
    "backward",
    "forward",
    "hinged",
    "list_active",
    "product_config",
    "product_options",
    "product_tile",
    "refuses",
    "saved_like",
]

Params = Sequence[Tensor | None]
BLOCK = 1024  # pairs that one program lists


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


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why the layer-by-layer path cannot serve, or None."""
    pairs = x.shape[0] * (problem.D if problem.mode == "adjoint" else problem.k)
    if pairs >= 2**31 - BLOCK:
        return f"{pairs} row and column pairs; the kernels count to 2^31"
    return None


def _weight(params: Params, l: int) -> Tensor:
    W = params[2 * l]
    assert W is not None
    return W.contiguous()


def _tiles(N: int, H: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of an element-wise kernel over (N, H)."""
    BN = 32 if H <= 32 else 64
    BM = ROWS * 32 // BN
    return (-(-N // BM), -(-H // BN)), {"BM": BM, "BN": BN}


# --- forward ------------------------------------------------------------------------------------


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    N, D, k, L = x.shape[0], problem.D, problem.k, problem.depth
    wide = accumulate_dtype(x.dtype)
    saved = saved_like(problem, x) if save else []
    summed = problem.hinge is not None and not problem.hinge.elementwise
    if N == 0:
        out = x.new_zeros((), dtype=wide) if summed else x.new_empty(N, D, k, dtype=wide)
        return x.new_empty(N, D), out, saved
    if problem.mode == "tangent":
        y, J = _tangent_forward(problem, x.contiguous(), params, saved)
    else:
        keep = saved[: kept_layers(problem)] or [x.new_empty(N, H) for H in problem.widths[1:]]
        y = _values(problem, x.contiguous(), params, keep)
        kept = saved[kept_layers(problem) :][: L - 1] if save and problem.keeps_adjoint else []
        J = _adjoint_slopes(problem, params, keep, kept)
    return y, hinged(problem, J, y, weight, saved), saved


def _tangent_forward(
    problem: Problem, x: Tensor, params: Params, saved: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """y and J (N, D, k): one product over the stacked rows [h; ḣ_1; …; ḣ_k] for each layer."""
    N, k, D, L = x.shape[0], problem.k, problem.D, problem.depth
    table, z = activation_table(problem), x
    for l in range(L):
        W, b, H = _weight(params, l), params[2 * l + 1], problem.widths[l + 1]
        z = torch.mm(z, W.t())
        last_is_linear = l == L - 1 and problem.activations[l].kind == "identity"
        a = saved[l] if saved and l < kept_layers(problem) else None
        if last_is_linear and L > 1:
            y = z[:N] if b is None else z[:N] + b
            return y, z[N:].view(k, N, D).permute(1, 2, 0)
        h = x.new_empty((1 + k) * N, H)
        grid, tile = _tiles(N, H)
        launch(
            layer_up, grid, x, z, b if b is None else b.contiguous(), W, a, h, N,
            H=H, T=k, FIRST=l == 0, d=problem.d, K=k, ACT=table[l], **tile, A=accumulator(x.dtype),
        )  # fmt: skip
        z = h
    # y is a part of the stack: given out, it would keep all of it alive.
    return z[:N].clone(), z[N:].view(k, N, D).permute(1, 2, 0)


def _values(problem: Problem, x: Tensor, params: Params, keep: list[Tensor]) -> Tensor:
    """y, with a_l in ``keep``."""
    N, L, table, h = x.shape[0], problem.depth, activation_table(problem), x
    for l in range(L):
        W, b, H = _weight(params, l), params[2 * l + 1], problem.widths[l + 1]
        if l == L - 1 and problem.activations[l].kind == "identity":
            return torch.mm(h, W.t()) if b is None else torch.addmm(b, h, W.t())
        z = torch.mm(h, W.t())
        h = torch.empty_like(z)
        grid, tile = _tiles(N, H)
        launch(
            layer_up, grid, x, z, b if b is None else b.contiguous(), W, keep[l], h, N,
            H=H, T=0, FIRST=False, d=0, K=0, ACT=table[l], **tile, A=accumulator(x.dtype),
        )  # fmt: skip
    return h


def _adjoint_slopes(
    problem: Problem, params: Params, a: list[Tensor], kept: list[Tensor]
) -> Tensor:
    """J (N, D, k) by D stacked chains. ``kept`` receives P_l."""
    D, k, L, table = problem.D, problem.k, problem.depth, activation_table(problem)
    N, nonlinear = a[0].shape[0] if a else 0, problem.activations[-1].kind != "identity"
    first = _weight(params, 0)[:, problem.d - k :]
    if L == 1:
        J = first.unsqueeze(0)
        if nonlinear:
            return problem.activations[0].first(a[0]).unsqueeze(2) * J
        return J.expand(N, D, k)
    P = a[0]  # not read below the last layer
    for l in range(L - 2, -1, -1):
        H = problem.widths[l + 1]
        p = a[0].new_empty(D * N, H)
        top = l == L - 2
        if not top:
            below = _weight(params, l + 1)
            P = torch.mm(P, below, out=kept[l]) if kept else torch.mm(P, below)
        grid, tile = _tiles(N, H)
        launch(
            layer_down, grid, p, a[l], P, a[L - 1] if nonlinear else None,
            _weight(params, L - 1), p, kept[l] if kept and top else None, N,
            H=H, D=D, LAST=top, ACT=table[l], LAST_ACT=table[L - 1], **tile,
            A=accumulator(p.dtype),
        )  # fmt: skip
        P = p
    return torch.mm(P, first).view(D, N, k).transpose(0, 1)


def hinged(
    problem: Problem, J: Tensor, y: Tensor, weight: Tensor | None, saved: list[Tensor]
) -> Tensor:
    """The second output from the slopes J (N, D, k) of any strides."""
    N, D, k, hinge = y.shape[0], problem.D, problem.k, problem.hinge
    wide = accumulate_dtype(y.dtype)
    summed = hinge is not None and not hinge.elementwise
    out = y.new_empty((), dtype=wide) if summed else y.new_empty(N, D, k, dtype=wide)
    BE = min(32, 1 << (D * k - 1).bit_length())
    BM = max(16, 1024 // BE)
    P = min(-(-N // BM), 4 * processors(y.device))
    sums = y.new_empty(P, dtype=wide) if summed else None
    direction = None
    if hinge is not None:
        direction = shared_direction_table(hinge.direction, D, k, wide, y.device)
    launch(
        hinge_slopes, (P,), y, J, y, direction, weight,
        D * k if weight is not None and weight.dim() == 3 else 0,
        0.0 if hinge is None else float(hinge.margin),
        None if summed else out, saved[-1] if saved and hinge is not None else None, sums, N,
        *J.stride(), D=D, K=k, OUT=output_code(problem),
        SQUARED=hinge is not None and hinge.squared, SAVE=bool(saved) and hinge is not None,
        BM=BM, BE=BE, A=accumulator(y.dtype),
    )  # fmt: skip
    if sums is not None:
        launch(reduce_sum, (1,), y, sums, out, P, BLOCK=1024)
    return out


# --- backward -----------------------------------------------------------------------------------


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    config = product_config(x)
    if enabled(x.device) and x.shape[0] and gout is not None:
        config = choose(
            ("pairs", compiled(problem), x.dtype, x.device, x.shape[0].bit_length(), tuple(needs)),
            layer_candidates(config),
            lambda c: _backward(problem, gy, gout, x, params, saved, needs, c),
        )
    return _backward(problem, gy, gout, x, params, saved, needs, config)


def product_config(x: Tensor) -> LayerConfig:
    ieee = x.dtype == torch.float32 and dot_precision(x.dtype) == "ieee"
    return layer_config(ieee)


def product_options(dtype: torch.dtype, config: LayerConfig) -> dict[str, Any]:
    """How a kernel multiplies over the active pairs."""
    return {
        "C": TL_DTYPES[compute_dtype(dtype)],
        "A": accumulator(dtype),
        "PRECISION": dot_precision(dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def product_tile(config: LayerConfig) -> dict[str, int]:
    return {"BM": config.rows, "BN": config.columns, "BK": config.inner}


def _backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    config: LayerConfig,
) -> list[Tensor | None]:
    x = x.contiguous()
    wanted = [n and p is not None for n, p in zip(needs[1:], params, strict=True)]
    grads: list[Tensor | None] = [None] * len(params)
    dx: Tensor | None = None
    N, lowest = x.shape[0], _lowest(problem, needs[0], wanted)
    if N and gy is not None and lowest < problem.depth:
        dx = _task_backward(problem, gy, x, params, saved, wanted, needs[0], lowest, grads)
    if N and gout is not None and lowest < problem.depth:
        pairs = _Pairs.listed(problem, gout.contiguous(), x, params, saved, config)
        dx = pairs.backward(wanted, needs[0], lowest, grads, dx)
    for i, (want, p) in enumerate(zip(wanted, params, strict=True)):
        if want and grads[i] is None and p is not None:
            grads[i] = torch.zeros_like(p, memory_format=torch.contiguous_format)
    if needs[0] and dx is None:
        dx = torch.zeros_like(x)
    return [dx, *grads]


def _lowest(problem: Problem, dx: bool, wanted: Sequence[bool]) -> int:
    """The lowest layer whose cotangent is needed: depth if none is."""
    needed = [i // 2 for i, want in enumerate(wanted) if want]
    return 0 if dx else min(needed, default=problem.depth)


def _task_backward(
    problem: Problem,
    gy: Tensor,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
    needs_dx: bool,
    lowest: int,
    grads: list[Tensor | None],
) -> Tensor | None:
    """The plain backward. Where the adjoint chain P_l was kept no product is left but dW's."""
    N, L, table = x.shape[0], problem.depth, activation_table(problem)
    kept = saved[kept_layers(problem) :][: L - 1] if problem.keeps_adjoint else []
    gy = gy.contiguous()
    g = gy
    for l in range(L - 1, lowest - 1, -1):
        if l == L - 1 and problem.activations[l].kind != "identity":
            g = torch.empty_like(gy)
            grid, tile = _tiles(N, problem.D)
            launch(
                layer_back, grid, x, saved[l], gy, None, g, None, N,
                H=problem.D, ACT=table[l], **tile, A=accumulator(x.dtype),
            )  # fmt: skip
        if wanted[2 * l + 1]:
            grads[2 * l + 1] = g.sum(0)
        down: Tensor | None = None
        if l > lowest:
            H = problem.widths[l]
            P = kept[l - 1] if kept else torch.mm(g, _weight(params, l))
            down = x.new_empty(N, H)
        h = x
        if l > 0 and (down is not None or wanted[2 * l]):
            H = problem.widths[l]
            h = x.new_empty(N, H)
            grid, tile = _tiles(N, H)
            launch(
                layer_back, grid, x, saved[l - 1], P if down is not None else h,
                gy if kept else None, down, h, N,
                H=H, ACT=table[l - 1], **tile, A=accumulator(x.dtype),
            )  # fmt: skip
        if wanted[2 * l]:
            grads[2 * l] = torch.mm(g.t(), h)
        if down is not None:
            g = down
    return torch.mm(g, _weight(params, 0)) if needs_dx else None


class Active(NamedTuple):
    """The active pairs as the device lists them, of at most M: row (M), the place of each of the M
    in the list or -1, their number, ẋ (M, k) and s (M, D)."""

    rows: Tensor
    place: Tensor
    total: Tensor
    x_dot: Tensor
    seed: Tensor


def list_active(problem: Problem, gout: Tensor, S: Tensor | None, x: Tensor) -> Active:
    """Those of the rows x (N, d), of the cotangent gout and the hinge's derivatives S of theirs."""
    N, D, k, adjoint = x.shape[0], problem.D, problem.k, problem.mode == "adjoint"
    M = N * (D if adjoint else k)
    blocks = -(-M // BLOCK)
    found = Active(
        rows=x.new_empty(M, dtype=torch.int32),
        place=x.new_empty(M, dtype=torch.int32),
        total=x.new_empty((), dtype=torch.int32),
        x_dot=x.new_empty(M, k),
        seed=x.new_empty(M, D),
    )
    shape = {
        "D": D, "K": k, "ADJOINT": adjoint, "OUT": output_code(problem), "BLOCK": BLOCK,
        **register_limit(x.device),
    }  # fmt: skip
    counts = x.new_empty(blocks, dtype=torch.int32)
    launch(count_pairs, (blocks,), x, gout, S, counts, N, **shape)
    launch(
        list_pairs, (blocks,), x, gout, S, counts, found.rows, found.place, found.x_dot,
        found.seed, found.total, N, **shape,
    )  # fmt: skip
    return found


@dataclass
class _Pairs:
    """The active pairs of a backward (see ``Active``)."""

    problem: Problem
    x: Tensor
    params: Params
    saved: Sequence[Tensor]
    rows: Tensor
    place: Tensor
    total: Tensor
    x_dot: Tensor
    seed: Tensor
    config: LayerConfig

    @classmethod
    def listed(
        cls,
        problem: Problem,
        gout: Tensor,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        config: LayerConfig,
    ) -> _Pairs:
        S = None if problem.hinge is None else saved[-1]
        active = list_active(problem, gout, S, x)
        return cls(problem, x, params, saved, *active, config)

    @property
    def dots(self) -> dict[str, Any]:
        return product_options(self.x.dtype, self.config)

    @property
    def tile(self) -> dict[str, int]:
        return product_tile(self.config)

    def grid(self, columns: int) -> tuple[int, int]:
        return -(-len(self.rows) // self.config.rows), -(-columns // self.config.columns)

    def backward(
        self,
        wanted: Sequence[bool],
        needs_dx: bool,
        lowest: int,
        grads: list[Tensor | None],
        dx: Tensor | None,
    ) -> Tensor | None:
        a_dot, h_dot = self.tangents()
        p, q = self.seeds(a_dot)
        L = self.problem.depth
        for l in range(L - 1, lowest - 1, -1):
            self.weight(l, p, q, h_dot[l - 1] if l else self.x_dot, wanted, grads)
            if l > lowest:
                p, q = self.down(l, p, q, a_dot[l - 1])
        return self.inputs(q, dx) if needs_dx else None

    def tangents(self) -> tuple[list[Tensor], list[Tensor]]:
        """ȧ_l and ḣ_l of every layer (ḣ_l of the hidden ones)."""
        problem, x, L = self.problem, self.x, self.problem.depth
        M, table = len(self.rows), activation_table(problem)
        a_dots: list[Tensor] = []
        h_dots: list[Tensor] = []
        h_dot, inputs = self.x_dot, problem.k
        for l in range(kept_layers(problem)):
            W, H = _weight(self.params, l), problem.widths[l + 1]
            # The last k columns of W_1 are those of ẋ.
            W = W[:, problem.d - problem.k :] if l == 0 else W
            a_dot = x.new_empty(M, H)
            below, h_dot_in = None, h_dot
            if l < L - 1:
                h_dot = x.new_empty(M, H)
                h_dots.append(h_dot)
                below = self.saved[l]
            launch(
                pairs_up, self.grid(H), x, h_dot_in, W, self.rows, self.total, below, a_dot,
                h_dot if l < L - 1 else None,
                INPUTS=inputs, OUTPUTS=H, W_ROW=W.stride(0), ACT=table[l], **self.tile, **self.dots,
            )  # fmt: skip
            a_dots.append(a_dot)
            inputs = H
        return a_dots, h_dots

    def seeds(self, a_dot: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """p_L and q_L."""
        σ, l = self.problem.activations[-1], self.problem.depth - 1
        if σ.kind == "identity":
            return self.seed, None
        p = torch.empty_like(self.seed)
        q = None if σ.piecewise_linear else torch.empty_like(self.seed)
        launch(
            seed_cotangents, (-(-p.numel() // BLOCK),), p, self.saved[l], a_dot[l], self.seed,
            self.rows, self.total, p, q,
            D=self.problem.D, ACT=activation_table(self.problem)[l], BLOCK=BLOCK,
            A=accumulator(p.dtype),
        )  # fmt: skip
        return p, q

    def down(
        self, l: int, p: Tensor, q: Tensor | None, a_dot: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """p_{l-1} and q_{l-1}."""
        σ, H = self.problem.activations[l - 1], self.problem.widths[l]
        p_out = self.x.new_empty(len(self.rows), H)
        q_out = None if q is None and σ.piecewise_linear else torch.empty_like(p_out)
        launch(
            pairs_down, self.grid(H), p, p, q, _weight(self.params, l), self.rows, self.total,
            self.saved[l - 1], a_dot, p_out, q_out,
            OUTPUTS=self.problem.widths[l + 1], INPUTS=H,
            ACT=activation_table(self.problem)[l - 1], CURVED=not σ.piecewise_linear, ADD=False,
            **self.tile, **self.dots,
        )  # fmt: skip
        return p_out, q_out

    def weight(
        self,
        l: int,
        p: Tensor,
        q: Tensor | None,
        h_dot: Tensor,
        wanted: Sequence[bool],
        grads: list[Tensor | None],
    ) -> None:
        """dW_l and db_l, added to what the task's backward left."""
        W, b = self.params[2 * l], self.params[2 * l + 1]
        fresh = grads[2 * l] is None and grads[2 * l + 1] is None
        if W is not None and wanted[2 * l] and grads[2 * l] is None:
            grads[2 * l] = torch.empty_like(W, memory_format=torch.contiguous_format)
        if b is not None and wanted[2 * l + 1] and grads[2 * l + 1] is None:
            grads[2 * l + 1] = torch.empty_like(b, memory_format=torch.contiguous_format)
        if not (wanted[2 * l] or wanted[2 * l + 1]):
            return
        O, I = self.problem.widths[l + 1], self.problem.widths[l]
        config = self.config
        launch(
            pairs_weight, (-(-O // config.rows), -(-I // config.columns)), p, p, q, h_dot,
            self.saved[l - 1] if l else self.x, self.rows, self.total, grads[2 * l],
            grads[2 * l + 1],
            OUTPUTS=O, INPUTS=I, TANGENTS=I if l else self.problem.k, BELOW_ROW=I,
            ACT=activation_table(self.problem)[l - 1] if l else (0, 0.0, 0.0, 0.0), FRESH=fresh,
            BM=config.rows, BN=config.columns, BR=config.inner, **self.dots,
        )  # fmt: skip

    def inputs(self, q: Tensor | None, dx: Tensor | None) -> Tensor | None:
        """dx with what comes by q_1: nothing where every σ'' is zero."""
        if q is None:
            return dx
        problem, x = self.problem, self.x
        d, N = problem.d, x.shape[0]
        part = x.new_empty(len(self.rows), d)
        launch(
            pairs_down, self.grid(d), x, q, q, _weight(self.params, 0), self.rows, self.total,
            None, None, None, part,
            OUTPUTS=problem.widths[1], INPUTS=d, ACT=(0, 0.0, 0.0, 0.0), CURVED=False, ADD=False,
            **self.tile, **self.dots,
        )  # fmt: skip
        fresh = dx is None
        dx = torch.empty_like(x) if dx is None else dx
        grid, tile = _tiles(N, d)
        launch(
            gather_inputs, grid, x, dx, part, self.place, N,
            d=d, ROW=d, COLUMN=1, T=problem.D if problem.mode == "adjoint" else problem.k,
            FRESH=fresh,
            **tile, A=accumulator(x.dtype),
        )  # fmt: skip
        return dx
