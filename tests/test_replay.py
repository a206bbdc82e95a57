"""Steps of the Triton kernels that were written down, run by ``csrc/replay.cpp``.

The driver is Python here: what the operator launches comes to a callback with addresses and bits,
as it would to a device's, and runs in Triton's interpreter. So the plans' every allocation,
operation, address and number is met with values. ``test_triton_driver.py`` has the launches of
compiled kernels.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

from monokernel import MonotonePenalty, boundary, fused_mono_penalty, value_and_jacobian
from monokernel.backends import operators
from monokernel.backends.triton import launch, recording, replay
from monokernel.backends.triton.target import interpreting
from monokernel.backends.triton.whole import config
from tests.support import mlp, points
from tests.zoo import network

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs under TRITON_INTERPRET=1"),
    pytest.mark.skipif(operators.opened() is None, reason="the operators were not built"),
]

FORMATS = {torch.float32: "f", torch.float64: "d"}


@dataclass
class Driver:
    """What it was told to launch, by the number that stands for the function."""

    kernels: dict[int, tuple[Any, tuple[object, ...], dict[str, Any]]] = field(default_factory=dict)
    launches: int = 0
    asked: int = 0  # how often the operator asked Python for a pass
    error: BaseException | None = None

    def call(
        self, kernel: Any, compiled: Any, args: tuple[object, ...], options: dict[str, Any]
    ) -> recording.DriverCall:
        number = len(self.kernels) + 1
        self.kernels[number] = kernel, args, options
        found: list[Tensor | int | None] = []
        for name, value in zip(kernel.arg_names, args, strict=False):
            _flatten(name, value, found)
        return recording.DriverCall(number, 1, 0, found)

    def launch(self, function: int, x: int, y: int, z: int, *rest: Any) -> int:
        try:
            kernel, args, options = self.kernels[function]
            addresses = iter(rest[5])
            own = tuple(
                _filled(name, value, addresses)
                for name, value in zip(kernel.arg_names, args, strict=False)
            )
            kernel[(x, y, z)](*own, **options)
            self.launches += 1
        except BaseException as error:
            self.error = error
            return 1
        return 0


def _flatten(name: str, value: object, found: list[Tensor | int | None]) -> None:
    if isinstance(value, tuple):
        for part in value:
            _flatten(name, part, found)
    elif isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, float):
        found.append(None if name == "margin" else recording._bits("d", value))
    elif value is not None:
        assert isinstance(value, int)
        found.append(value)


def _filled(name: str, value: object, addresses: Iterator[int]) -> Any:
    """The argument that the driver was given in place of the one that was written down."""
    if isinstance(value, tuple):
        return tuple(_filled(name, part, addresses) for part in value)
    if value is None:
        return None
    (bits,) = (ctypes.c_int64 * 1).from_address(next(addresses))
    if isinstance(value, float):
        if name == "margin":
            return struct.unpack("<f", struct.pack("<q", bits)[:4])[0]
        return struct.unpack("<d", struct.pack("<q", bits))[0]
    if isinstance(value, Tensor):
        if bits == 0:
            return value.new_empty(0)
        size = value.untyped_storage().nbytes() - value.storage_offset() * value.itemsize
        memory = (ctypes.c_char * size).from_address(bits)
        return torch.frombuffer(memory, dtype=value.dtype).as_strided(
            value.shape, value.stride(), 0
        )
    return bits


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    addresses, number = ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_size_t, *(number,) * 6, number, ctypes.c_void_p, addresses, addresses
    )

    def called(*given: Any) -> int:
        function, x, y, z, *rest = given
        return made.launch(function, x, y, z, *rest[:5], rest[5])

    callback = kind(called)
    library = operators.opened()
    assert library is not None
    monkeypatch.setattr(replay, "driver_functions", lambda: [callback, None, None, None, None])
    monkeypatch.setattr(recording, "driver_call", made.call)
    run = launch._run

    def outside(*given: Any) -> Any:
        """The interpreter's own operations on tensors are none of the step's."""
        with _disable_current_modes():
            return run(*given)

    monkeypatch.setattr(launch, "_run", outside)
    written = replay._written

    def asked(*given: Any) -> Any:
        made.asked += 1
        return written(*given)

    monkeypatch.setattr(replay, "_written", asked)
    replay._connected.cache_clear()
    boundary.preparing.cache_clear()
    library.mk_device_forget()
    yield made
    replay._connected.cache_clear()
    boundary.preparing.cache_clear()
    library.mk_device_forget()


# --- the same bits --------------------------------------------------------------------------------

Step = Callable[[], list[Tensor | None]]


@contextmanager
def by_python() -> Iterator[None]:
    """Nothing is replayed."""
    with mock.patch.object(launch, "watched", return_value=True):
        yield


def both(step: Step) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What a step gives as it is, and by Python."""
    state = torch.get_rng_state()
    ours = step()
    torch.set_rng_state(state)
    with by_python():
        return ours, step()


def assert_replays(driver: Driver, step: Step) -> None:
    """The third call of a kind asks nothing of Python, and gives the same bits."""
    for _ in range(2):
        step()
    before = driver.asked
    state = torch.get_rng_state()
    ours = step()
    assert driver.error is None
    assert driver.asked == before
    assert driver.launches > 0
    torch.set_rng_state(state)
    with by_python():
        assert_bits(ours, step())


def assert_bits(ours: list[Tensor | None], truth: list[Tensor | None]) -> None:
    assert len(ours) == len(truth)
    for a, b in zip(ours, truth, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def gradients_of(tensors: list[Tensor]) -> list[Tensor | None]:
    found = [None if t.grad is None else t.grad.clone() for t in tensors]
    for t in tensors:
        t.grad = None
    return found


def stepping(
    net: nn.Module,
    d1: int = 3,
    k: int = 2,
    dtype: torch.dtype = torch.float64,
    N: int = 19,
    dx: bool = False,
    task: bool = True,
    slopes: bool = True,
    of: Callable[..., Any] = fused_mono_penalty,
    weight: Callable[[], Tensor] | None = None,
    **options: Any,
) -> Step:
    """Forward and backward on new points."""

    def step() -> list[Tensor | None]:
        x1, x2 = points(N, d1, k, dtype)
        if dx:
            x1.requires_grad_()
            x2.requires_grad_()
        given = dict(options)
        if of is fused_mono_penalty:
            given |= {"return_output": True, "margin": 0.25 * int(torch.randint(4, ()))}
            if weight is not None:
                given["weight"] = weight()
        y, out = of(net, x1, x2, backend="triton", **given)
        loss = torch.zeros((), dtype=torch.float64)
        if task:
            loss = loss + y.double().square().sum()
        if slopes:
            loss = loss + (out.double() * 0.5).sum()
        loss.backward()
        leaves = [x1, x2, *net.parameters()]
        return [y.detach(), out.detach(), *gradients_of(leaves)]

    return step


def frozen(net: nn.Module) -> nn.Module:
    for p in list(net.parameters())[:2]:
        p.requires_grad_(False)
    return net


HALF, SINGLE = torch.bfloat16, torch.float32
STEPS: dict[str, Callable[[], Step]] = {
    "two layers": lambda: stepping(mlp(3, 2, 1, (16,))),
    "tangent mode": lambda: stepping(mlp(3, 1, 2, (16, 16)), k=1, mode="tangent"),
    "adjoint mode, two outputs": lambda: stepping(mlp(3, 1, 2, (16,)), k=1, mode="adjoint"),
    "each penalty, signs": lambda: stepping(
        mlp(3, 2, 1, (16,)), reduction="none", direction=(1, -1), hinge="squared"
    ),
    "bfloat16": lambda: stepping(mlp(3, 2, 1, (16, 16), dtype=HALF), dtype=HALF),
    "gradients of the inputs": lambda: stepping(mlp(3, 2, 1, (16,)), dx=True),
    "a frozen layer, no bias": lambda: stepping(frozen(mlp(3, 2, 1, (16, 16), bias=False))),
    "y alone": lambda: stepping(mlp(3, 2, 1, (16,)), slopes=False),
    "the penalty alone": lambda: stepping(mlp(3, 2, 1, (16,)), task=False),
    "a weight for each row": lambda: stepping(
        mlp(3, 2, 1, (16,)), weight=lambda: torch.rand(19, 1, 2, dtype=torch.float64)
    ),
    "Jacobian": lambda: stepping(mlp(3, 2, 1, (16,)), of=value_and_jacobian),
    "x1 without a column": lambda: stepping(mlp(0, 2, 1, (16,)), d1=0),
    "up to 128 units": lambda: stepping(mlp(3, 2, 1, (72,), dtype=HALF), dtype=HALF),
    "layer by layer": lambda: stepping(mlp(3, 2, 1, (16, 16), dtype=SINGLE), dtype=SINGLE),
    "layer by layer, tangent mode": lambda: stepping(
        mlp(3, 1, 2, (144,), dtype=HALF), k=1, dtype=HALF, N=9
    ),
    "PReLU": lambda: stepping(network("PReLU", 5, 1, 8, torch.float64), N=9),
    "shared layer, dx": lambda: stepping(
        network("shared layer", 4, 2, 8, torch.float64), k=1, dx=True, N=9
    ),
    "active dropout": lambda: stepping(
        network("MLP with active dropout", 5, 1, 8, torch.float64), N=9
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_gives_the_same_bits(driver: Driver, name: str) -> None:
    assert_replays(driver, STEPS[name]())


# --- kinds of calls -------------------------------------------------------------------------------


def test_another_kind_is_another_plan(driver: Driver) -> None:
    """Of each of the things that a kernel or a grid follows from."""
    net = mlp(3, 2, 1, (16,))
    step = stepping(net)
    for _ in range(3):
        step()
    weight = net[0].weight

    def changed(*change: Any) -> None:
        before = driver.asked
        assert_bits(*both(stepping(net, **dict([change]))))
        assert driver.asked > before

    changed("N", 20)
    changed("dx", True)
    changed("task", False)
    changed("reduction", "none")
    changed("direction", -1)
    weight.requires_grad_(False)
    assert_bits(*both(step))
    weight.requires_grad_(True)
    memory = torch.empty(weight.numel() + 1, dtype=weight.dtype)
    memory[1:] = weight.detach().flatten()
    weight.data = memory[1:].view(weight.shape)  # at no multiple of 16 bytes
    before = driver.asked
    assert_bits(*both(step))
    assert driver.asked > before
    before = driver.asked
    net.zero_grad()
    weight.data = weight.data.clone()
    step()
    assert driver.asked == before  # the first plan still serves


def test_margins_of_each_column_that_move_have_no_plan(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))
    for turn in range(4):
        torch.manual_seed(turn)
        x1, x2 = points(19, 3, 2, torch.float64)

        def step(x1: Tensor = x1, x2: Tensor = x2, turn: int = turn) -> list[Tensor | None]:
            margin = (0.25 * turn, 0.5)
            y, out = fused_mono_penalty(
                net, x1, x2, margin=margin, return_output=True, backend="triton"
            )
            (y.sum() + out).backward()
            return [y, out, *gradients_of(list(net.parameters()))]

        assert_bits(*both(step))


def test_the_module(driver: Driver) -> None:
    model = MonotonePenalty(mlp(3, 2, 1, (16,)), weight=torch.ones(1, 2), backend="triton")

    def step() -> list[Tensor | None]:
        model.margin = float(torch.randint(3, ()))
        y, penalty = model(*points(19, 3, 2, torch.float64))
        (y.sum() + penalty).backward()
        return [y, penalty, *gradients_of(list(model.parameters()))]

    assert_replays(driver, step)


def test_without_gradients(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))

    def step() -> list[Tensor | None]:
        with torch.no_grad():
            return list(
                fused_mono_penalty(
                    net, *points(19, 3, 2, torch.float64), return_output=True, backend="triton"
                )
            )

    assert_replays(driver, step)


def test_a_backward_may_come_twice_and_later(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))
    step = stepping(net)
    for _ in range(3):
        step()
    held = [
        fused_mono_penalty(net, *points(19, 3, 2, torch.float64), backend="triton")
        for _ in range(2)
    ]
    step()
    before = driver.asked
    first = torch.autograd.grad(held[0], list(net.parameters()), retain_graph=True)
    again = torch.autograd.grad(held[0], list(net.parameters()))
    assert_bits(list(first), list(again))
    torch.autograd.grad(held[1], list(net.parameters()))
    assert driver.asked <= before + 2  # of the penalty alone, which is another kind


def test_what_is_not_contiguous_is_copied(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))
    net[0].weight.data = net[0].weight.data.t().contiguous().t()

    def step() -> list[Tensor | None]:
        x = torch.randn(5, 19, dtype=torch.float64).t()
        y, out = fused_mono_penalty(
            net, x, direction=(0, 0, 0, 1, 1), return_output=True, backend="triton"
        )
        (y.expand(-1, 2).sum() + out).backward()
        return [y, out, *gradients_of(list(net.parameters()))]

    assert_replays(driver, step)


# --- what is refused, or goes by Python -----------------------------------------------------------


def test_a_second_derivative_raises(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))
    for _ in range(3):
        penalty = fused_mono_penalty(net, *points(19, 3, 2, torch.float64), backend="triton")
        (g,) = torch.autograd.grad(penalty, [net[0].weight], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            g.sum().backward()


def test_memory_that_was_taken_away(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))
    step = stepping(net)
    for _ in range(3):
        step()
    penalty = fused_mono_penalty(net, *points(19, 3, 2, torch.float64), backend="triton")
    net[0].weight.data = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mlp: the weight of linear layer 1: expected float64"):
        penalty.backward()


def test_saved_tensors_that_a_hook_changed(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))
    step = stepping(net)
    for _ in range(3):
        step()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
        penalty = fused_mono_penalty(net, *points(19, 3, 2, torch.float64), backend="triton")
    with pytest.raises(RuntimeError, match="expected"):
        penalty.backward()


def test_a_weight_that_is_a_part_of_another_goes_by_python(driver: Driver) -> None:
    """Of two operands in one place none can tell which a kernel is given."""
    net = mlp(3, 2, 1, (16, 16))
    net[4].weight.data = net[2].weight.data[:1]
    step = stepping(net)
    for _ in range(3):
        assert_bits(*both(step))
    before = driver.asked
    step()
    assert driver.asked > before


def test_float32_precision_that_is_set_before_the_backward(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which path a backward takes follows from what was saved, as it does without the operator."""
    monkeypatch.setattr(config, "interpreting", lambda: False)  # strict float32 is none of it then
    net = mlp(3, 2, 1, (16, 16), dtype=SINGLE)
    before = torch.get_float32_matmul_precision()
    try:
        for earlier, later in (("highest", "high"), ("high", "highest")) * 3:
            torch.set_float32_matmul_precision(earlier)
            y, penalty = fused_mono_penalty(
                net, *points(19, 3, 2, SINGLE), return_output=True, backend="triton"
            )
            parameters = list(net.parameters())
            truth = torch.autograd.grad(y.sum() + penalty, parameters, retain_graph=True)
            torch.set_float32_matmul_precision(later)
            found = torch.autograd.grad(y.sum() + penalty, parameters)
            torch.testing.assert_close(found, truth)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_backward_comes_when_there_are_too_many_problems(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those the older ones are forgotten alone."""
    monkeypatch.setattr(replay, "KEPT", 4)
    net = mlp(3, 2, 1, (8,))
    before = None
    for first in (-1, 0, 1):
        for second in (-1, 1):
            x1, x2 = points(4, 3, 2, torch.float64)
            penalty = fused_mono_penalty(net, x1, x2, direction=(first, second), backend="triton")
            if before is not None:
                before.backward()
            before = penalty


def test_a_number_that_nobody_was_given(driver: Driver) -> None:
    stepping(mlp(3, 2, 1, (16,)))()
    operator = torch.ops.monokernel.device_step.default
    x = torch.ones(3, 5)
    with pytest.raises(RuntimeError, match="expected the number of one of the last"):
        operator(10**9, True, [0.0], x, None, [x])
    with pytest.raises(ValueError, match="margin: expected one number"):
        operator(1, True, [], x, None, [x])


def test_a_driver_that_refuses(driver: Driver) -> None:
    net = mlp(3, 2, 1, (16,))
    step = stepping(net)
    for _ in range(3):
        step()
    driver.kernels.clear()
    with pytest.raises(RuntimeError, match="the driver refused to launch a kernel, with error 1"):
        step()


def test_what_a_recorder_saw_is_freed() -> None:
    """As without one: a pass that is written down takes no more memory than any other."""
    x = torch.ones(1000)
    recorder = recording.Recorder([x])
    with recorder:
        y = x + 1
        storages = [StorageWeakRef(y.untyped_storage())]
        y = y.exp()
        storages.append(StorageWeakRef(y.untyped_storage()))
        for _ in range(3):  # might lie where the first did
            y = y[:500] * 2
            y = torch.cat([y, y])
    assert [s.expired() for s in storages] == [True, True]
    recorder.plan([y])
    assert recorder.why is None


def test_what_cannot_be_written_down() -> None:
    x = torch.ones(3)

    def why(operation: Callable[[], Any]) -> str | None:
        recorder = recording.Recorder([x])
        with recorder:
            found = operation()
        recorder.plan([found] if isinstance(found, Tensor) else [])
        return recorder.why

    assert why(lambda: x + 1) is None
    assert "more than tensors" in str(why(lambda: x.sum().item()))
    assert "depends on values" in str(why(lambda: x.nonzero()))
    other = torch.ones(3)
    assert "neither given nor made" in str(why(lambda: x + other))
    assert "neither given nor made" in str(why(lambda: other))
    assert "share a part" in str(recording.Recorder([x, x[1:]]).why)
