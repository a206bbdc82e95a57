"""The whole-network path: forward in 1 launch (2 with a summed penalty), backward in 2.

Serves networks whose hidden layers and outputs fit a tile in registers. Kernels that compile for
the shapes of the network are in ``network_forward.py`` and ``network_backward.py``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...problem import Problem, accumulate_dtype, shared_direction_table
from .config import (
    DEEPEST,
    WIDEST,
    NetworkConfig,
    backward_config,
    candidates,
    forward_config,
    power_of_two,
)
from .launch import (
    TL_DTYPES,
    accumulator,
    activation_table,
    compute_dtype,
    dot_precision,
    interpreting,
    launch,
    processors,
    products,
    register_limit,
)
from .network_backward import network_backward
from .network_forward import network_forward
from .reduce import reduce_gradients, reduce_sum
from .tuning import choose, enabled

__all__ = ["backward", "forward", "refuses", "saved_like"]

Params = Sequence[Tensor | None]


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why the network does not fit into one kernel, or None."""
    widest = WIDEST[x.element_size()]
    if max(problem.widths[1:]) > widest:
        return f"a layer is wider than {widest}, what one kernel serves in {x.dtype}"
    if problem.k > 128:
        return f"k = {problem.k} monotone inputs; one kernel serves up to 128"
    if problem.depth > DEEPEST:
        return f"{problem.depth} layers; one kernel serves up to {DEEPEST}"
    if x.shape[0] >= 2**31 - 2**16:
        return f"N = {x.shape[0]} rows; one kernel serves below 2^31"
    if x.dtype == torch.float32 and not interpreting() and _precision(x.dtype) == "ieee":
        return (
            "strict float32 products (torch.get_float32_matmul_precision() is 'highest') leave "
            "no tensor core to a fused network"
        )
    return None


def _precision(dtype: torch.dtype) -> str:
    """At "highest", MONOKERNEL_FP32=tf32x3 lets narrow networks use three TF32 products for one.

    Triton has none such for AMD.
    """
    wanted = "ieee" if torch.version.hip else os.environ.get("MONOKERNEL_FP32", "ieee")
    return dot_precision(dtype, highest=wanted)


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """∂penalty/∂J (N, D, k) where there is a hinge: activations are computed again."""
    if problem.hinge is None:
        return []
    N = x.shape[0]
    return [x.new_empty(N, problem.D, problem.k, dtype=accumulate_dtype(x.dtype))]


@lru_cache(maxsize=256)
def _shape(problem: Problem) -> dict[str, Any]:
    """What both kernels know of the network at compile time."""
    hidden = max(problem.widths[1:-1], default=16)
    return {
        "WIDTHS": problem.widths,
        "ACTS": activation_table(problem),
        "K": problem.k,
        # With one output and one column both modes are the same; the tangent's needs less.
        "ADJOINT": problem.mode == "adjoint" and not problem.k == problem.D == 1,
        "OUT": output_code(problem),
        "H": power_of_two(hidden),
        "PD": power_of_two(problem.D),
    }


def compiled(problem: Problem) -> Problem:
    """The problem without the numbers that are arguments of a kernel."""
    if problem.hinge is None:
        return problem
    return problem._replace(hinge=problem.hinge._replace(direction=(), margin=0.0))


def output_code(problem: Problem) -> int:
    """JACOBIAN, PENALTIES or PENALTY_SUM of ``device.py``."""
    return 0 if problem.hinge is None else 1 if problem.hinge.elementwise else 2


def _dtypes(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "C": TL_DTYPES[compute_dtype(dtype)],
        "A": accumulator(dtype),
        "PRECISION": _precision(dtype),
    }


def _split(params: Params) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(W_1, …) and (b_1, …), contiguous."""
    ws = tuple(W.contiguous() for W in params[::2] if W is not None)
    bs = tuple(None if b is None else b.contiguous() for b in params[1::2])
    return ws, bs


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = _shape(problem)
    config = forward_config(
        max(shape["H"], shape["PD"]),
        problem.depth,
        x.element_size(),
        shape["ADJOINT"],
        products(x.device),
        _precision(x.dtype) == "tf32x3",
    )
    if enabled(x.device) and x.shape[0]:
        config = choose(
            ("forward", compiled(problem), x.dtype, x.device, x.shape[0].bit_length(), save),
            candidates(config),
            lambda c: _forward(problem, x, weight, params, save, c),
        )
    return _forward(problem, x, weight, params, save, config)


def _forward(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    params: Params,
    save: bool,
    config: NetworkConfig,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    N, D, k, hinge = x.shape[0], problem.D, problem.k, problem.hinge
    wide = accumulate_dtype(x.dtype)
    saved = saved_like(problem, x) if save else []
    y = x.new_empty(N, D)
    summed = hinge is not None and not hinge.elementwise
    out = x.new_empty((), dtype=wide) if summed else x.new_empty(N, D, k, dtype=wide)
    if N == 0:
        return y, out.zero_(), saved
    shape = _shape(problem)
    tiles = -(-N // config.rows)
    P = min(tiles, processors(x.device) * config.per_processor)
    sums = x.new_empty(P, dtype=wide) if summed else None
    scratch = None
    if not config.in_registers:
        size = P * (problem.depth + 1) * config.rows * max(shape["H"], shape["PD"])
        scratch = x.new_empty(size, dtype=compute_dtype(x.dtype))
    ws, bs = _split(params)
    direction = None
    if hinge is not None:
        direction = shared_direction_table(hinge.direction, D, k, wide, x.device)
    launch(
        network_forward,
        (P,),
        x,
        x.contiguous(),
        weight,
        direction,
        ws,
        bs,
        y,
        None if summed else out,
        saved[0] if saved else None,
        sums,
        scratch,
        N,
        D * k if weight is not None and weight.dim() == 3 else 0,
        0.0 if hinge is None else float(hinge.margin),
        **shape,
        **_dtypes(x.dtype),
        BIAS=tuple(b is not None for b in bs),
        SQUARED=hinge is not None and hinge.squared,
        SAVE=bool(saved),
        PK=power_of_two(k),
        BK=min(power_of_two(problem.d), config.chunk),
        INNER=config.inner,
        BM=config.rows,
        **register_limit(x.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if sums is not None:
        launch(reduce_sum, (1,), x, sums, out, P, BLOCK=1024)
    return y, out, saved


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    shape = _shape(problem)
    config = backward_config(
        max(shape["H"], shape["PD"]),
        x.element_size(),
        products(x.device),
        _precision(x.dtype) == "tf32x3",
    )
    if enabled(x.device) and x.shape[0]:
        config = choose(
            (
                "backward",
                compiled(problem),
                x.dtype,
                x.device,
                x.shape[0].bit_length(),
                tuple(needs),
            ),
            candidates(config),
            lambda c: _backward(problem, gy, gout, x, params, saved, needs, c),
        )
    return _backward(problem, gy, gout, x, params, saved, needs, config)


def _backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    config: NetworkConfig,
) -> list[Tensor | None]:
    N, wide = x.shape[0], accumulate_dtype(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    wanted = tuple(n and p is not None for n, p in zip(needs[1:], params, strict=True))
    grads = tuple(
        torch.empty_like(p, memory_format=torch.contiguous_format)
        if p is not None and want
        else None
        for p, want in zip(params, wanted, strict=True)
    )
    if N == 0 or (gy is None and gout is None):
        return [None if g is None else g.zero_() for g in (dx, *grads)]
    shape = _shape(problem)
    BM = config.rows
    tiles = -(-N // BM)
    P = min(tiles, processors(x.device) * config.per_processor)
    offsets = _offsets(problem)
    size = P * (4 * problem.depth + 1) * BM * max(shape["H"], shape["PD"])
    scratch = x.new_empty(size, dtype=compute_dtype(x.dtype))
    partials = x.new_empty(P * offsets[-1], dtype=wide)
    rows = None if gout is None else x.new_empty(tiles * BM, dtype=torch.int32)
    ws, bs = _split(params)
    launch(
        network_backward,
        (P,),
        x,
        x.contiguous(),
        None if gy is None else gy.contiguous(),
        None if gout is None else gout.contiguous(),
        saved[0] if saved else None,
        ws,
        bs,
        dx,
        partials,
        rows,
        scratch,
        N,
        **shape,
        **_dtypes(x.dtype),
        BIAS=tuple(b is not None for b in bs),
        NEEDS=wanted,
        OFFSETS=offsets,
        # With 32 input columns at a time, 40 inputs with dx at width 64 spill up to 424 bytes in
        # Triton 3.6.
        BK=16,
        INNER=config.inner,
        BM=BM,
        SCAN=max(BM, 256),
        CHUNK=min(config.chunk, shape["H"]),
        **register_limit(x.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if any(wanted):
        block = 64
        launch(
            reduce_gradients,
            (-(-offsets[-1] // block),),
            x,
            partials,
            grads,
            P,
            OFFSETS=offsets,
            BLOCK=block,
            SLICES=32,
        )
    return [dx, *grads]


@lru_cache(maxsize=256)
def _offsets(problem: Problem) -> tuple[int, ...]:
    """Where W_1, b_1, W_2, … begin in a program's slice of the partial sums, and its size."""
    offsets = [0]
    for rows, columns in zip(problem.widths[1:], problem.widths, strict=False):
        offsets += [offsets[-1] + rows * columns, offsets[-1] + rows * columns + rows]
    return tuple(offsets)
