"""Steps without Python: what a pass allocates and launches is written down once, as plain data, and
run by ``csrc/replay.cpp`` from then on.

A pass of the Triton kernels does the same for every call of a kind: the same kernels, on grids and
with numbers that follow from the problem and from dtypes, sizes and alignment of its operands. The
first call of a kind runs as ever, the second under a recorder (``recording.py``), and what that
wrote serves the third and all others. A margin for all constraints may move: it is a number that
the plan is given. What cannot be written down keeps going by Python, as does everything where the
operator was not built.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...operands import check_forward, check_gradients, check_saved, shapes_of
from ...problem import Problem
from ...signs import capturing
from .. import Params, Prepare, Step, load, operators
from . import launch
from .recording import Recorder
from .target import assumption, interpreting

__all__ = ["step"]

BACKEND = "triton"
KEPT = 1 << 16  # problems that a backward may still come for


# --- the step -------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A problem whose margin is 0 instead of a number that may move, the dtype of its rows, and
    what else the choice of kernels follows from when it is asked for."""

    problem: Problem
    dtype: torch.dtype
    settings: tuple[object, ...]


def _settings(dtype: torch.dtype) -> tuple[object, ...]:
    """How products of float32 are to be taken, and what a test assumes."""
    if dtype != torch.float32:
        return (assumption(),)
    precise = os.environ.get("MONOKERNEL_FP32")
    return torch.get_float32_matmul_precision(), precise, assumption()


_numbers: dict[Asked, int] = {}
_asked: dict[int, Asked] = {}
_next = itertools.count(1)


def _number(asked: Asked) -> int:
    """By what the operator knows it; never another's."""
    found = _numbers.get(asked)
    if found is None:
        if len(_asked) >= KEPT:
            for older in list(_asked)[: KEPT // 2]:  # a backward may come for the newer ones
                gone = _asked.pop(older, None)
                if gone is not None:
                    _numbers.pop(gone, None)
        found = next(_next)
        _asked[found] = asked
        _numbers[asked] = found
    return found


def step() -> Prepare | None:
    """What prepares y and the penalty or J by one operator that autograd knows, where it was built
    and the driver can be reached. ``boundary.py`` asks once."""
    if not _connected():
        return None
    operator: Any = torch.ops.monokernel.device_step.default

    def prepare(problem: Problem, dtype: torch.dtype) -> Step:
        hinge = problem.hinge
        margin: tuple[float, ...] = (0.0,)
        if hinge is not None and hinge.margin != 0.0:
            margin = hinge.margin if isinstance(hinge.margin, tuple) else (float(hinge.margin),)
            problem = problem._replace(hinge=hinge._replace(margin=0.0))
        asked = Asked(problem, dtype, _settings(dtype))
        number = _number(asked)

        def run(x: Tensor, weight: Tensor | None, params: Params) -> tuple[Tensor, Tensor]:
            nonlocal asked, number
            settings = _settings(dtype)
            if settings != asked.settings or number not in _asked:
                asked = asked._replace(settings=settings)
                number = _number(asked)
            replays = not launch.watched() and (not x.is_cuda or _streams_agree(x.get_device()))
            found: tuple[Tensor, Tensor] = operator(number, replays, margin, x, weight, params)
            return found

        return run

    return prepare


@cache
def _connected() -> bool:
    """Whether the operator is there, and knows the driver."""
    library = operators.opened()
    functions = None if library is None else driver_functions()
    if library is None or functions is None:
        return False
    library.mk_device_connect(operators.addresses_of(functions))
    library.mk_dtype_code.restype = ctypes.c_int64
    return True


def driver_functions() -> list[Any] | None:
    """What launches a compiled kernel, what PyTorch says of its stream, and what enters a device's
    context, which HIP has no need of; None where there is no driver."""
    if interpreting() or not launch.direct():
        return None
    try:
        if torch.version.hip is None:
            cuda = ctypes.CDLL("libcuda.so.1")
            own = cuda.cuDeviceGet, cuda.cuDevicePrimaryCtxRetain, cuda.cuCtxSetCurrent
            return [cuda.cuLaunchKernel, _current_stream(), *own]
        from triton.backends.amd import driver

        hip = ctypes.CDLL(driver._get_path_to_hip_runtime_dylib())
        return [hip.hipModuleLaunchKernel, _current_stream(), None, None, None]
    except (OSError, AttributeError, ImportError, RuntimeError):
        return None


@cache
def _current_stream() -> Any:
    """PyTorch's C function for its current stream; None in a PyTorch for CPUs."""
    name = "libtorch_cuda.so" if torch.version.hip is None else "libtorch_hip.so"
    library = Path(torch.__file__).parent / "lib" / name
    if not library.exists():
        return None
    return ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream


@cache
def _streams_agree(index: int) -> bool:
    """Whether that is the stream on which Triton launches."""
    own, stream = ctypes.c_void_p(), _current_stream()
    with torch.cuda.device(index):
        if stream is None or stream(ctypes.c_int32(index), ctypes.byref(own)) != 0:
            return False
        return (own.value or 0) == int(torch._C._cuda_getCurrentRawStream(index))


# --- what the operator asks of Python -------------------------------------------------------------

_library = torch.library.Library("monokernel", "FRAGMENT")
_library.define(
    "device_forward(int problem, float[] margin, Tensor x, Tensor? weight, Tensor?[] params, "
    "bool save, int[] key) -> Tensor[]"
)
_library.define(
    "device_backward(int problem, Tensor? gy, Tensor? gout, Tensor x, Tensor?[] params, "
    "Tensor[] saved, bool[] needs, int[] key) -> Tensor[]"
)


@torch.no_grad()
def _forward(
    number: int,
    margin: Sequence[float],
    x: Tensor,
    weight: Tensor | None,
    params: Params,
    save: bool,
    key: Sequence[int],
) -> list[Tensor]:
    """y, the penalty or J, and what the backward needs."""
    asked = _known(number)
    problem, backend = _with_margin(asked.problem, margin), load(BACKEND)
    x, weight, params = check_forward(problem, x, weight, params)

    def run() -> list[Tensor]:
        y, out, saved = backend.forward(problem, x, weight, params, save)
        return [y, out, *saved]

    return _written(run, [x, weight, *params], key, asked)


@torch.no_grad()
def _backward(
    number: int,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    key: Sequence[int],
) -> list[Tensor]:
    """The gradients that are needed, of x and the parameters."""
    asked = _known(number)
    problem, backend = asked.problem, load(BACKEND)
    x, _, params = check_forward(problem, x, None, params)
    gy, gout = check_gradients(problem, x, gy, gout)
    # The path that it was saved by may be another now, since the float32 precision may be set.
    saved_like: Any = backend.saved_like
    like = saved_like(problem, x.new_empty(x.shape, device="meta"), saved)
    check_saved(saved, shapes_of(like), x.device)

    def run() -> list[Tensor]:
        grads = backend.backward(problem, gy, gout, x, params, saved, needs)
        return [g for g in grads if g is not None]

    return _written(run, [gy, gout, x, *params, *saved], key, asked)


for _name, _function in (("device_forward", _forward), ("device_backward", _backward)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _known(number: int) -> Asked:
    asked = _asked.get(number)
    if asked is None:
        raise RuntimeError(
            f"problem: expected the number of one of the last {KEPT} problems, got {number}"
        )
    return asked


def _with_margin(problem: Problem, margin: Sequence[float]) -> Problem:
    hinge = problem.hinge
    if hinge is None or tuple(margin) == (0.0,):
        return problem
    own = margin[0] if len(margin) == 1 else tuple(margin)
    return problem._replace(hinge=hinge._replace(margin=own))


def _written(
    run: Callable[[], list[Tensor]],
    operands: Sequence[Tensor | None],
    key: Sequence[int],
    asked: Asked,
) -> list[Tensor]:
    """What ``run`` gives; with a key a plan of it goes to the operator."""
    device = next(t.device for t in operands if t is not None)
    if not key or asked.settings != _settings(asked.dtype) or capturing(device):
        return run()
    recorder = Recorder(operands)
    with recorder, launch.noted(recorder.launched):
        found = run()
    code, names = recorder.plan(found)
    library = operators.opened()
    assert library is not None
    library.mk_device_plan(
        (ctypes.c_int64 * len(key))(*key),
        ctypes.c_int64(len(key)),
        (ctypes.c_int64 * len(code))(*code),
        (ctypes.c_char_p * len(names))(*map(str.encode, names)),
    )
    return found
