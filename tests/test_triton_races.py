"""What goes through memory between the threads of a program crosses a barrier, and none between
programs.

The interpreter runs a program as one thread, so it shows no race. Here it writes down which
addresses are loaded and stored between two barriers: a value that is stored and then loaded by
another operation, whose threads hold other elements, needs a barrier in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from monokernel.backends.triton import layered, narrow, programs, whole
from monokernel.backends.triton.target import assumed, interpreting
from monokernel.columns import last_columns
from monokernel.problem import Hinge, Mode, Problem
from tests.problems import inputs, problem, run
from tests.test_programs import CASES, operands

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs under TRITON_INTERPRET=1")


class Ledger:
    """The addresses that were touched: by the program since its last barrier, and by others."""

    def __init__(self) -> None:
        self.races: set[str] = set()
        self.launch()

    def launch(self) -> None:
        self.stored_before: set[int] = set()
        self.loaded_before: set[int] = set()
        self.stored_by_program: set[int] = set()
        self.loaded_by_program: set[int] = set()
        self.barrier()

    def program(self) -> None:
        self.stored_before |= self.stored_by_program
        self.loaded_before |= self.loaded_by_program
        self.stored_by_program, self.loaded_by_program = set(), set()
        self.barrier()

    def barrier(self) -> None:
        self.stored: set[int] = set()
        self.loads: list[tuple[list[int], set[int]]] = []

    def load(self, at: list[int], touched: set[int]) -> None:
        self._apart(touched, self.stored, "loaded with no barrier after the store")
        self._apart(touched, self.stored_before, "loaded, stored by another program")
        self.loads.append((at, touched))
        self.loaded_by_program |= touched

    def store(self, at: list[int], touched: set[int]) -> None:
        self._apart(touched, self.stored, "stored twice with no barrier in between")
        self._apart(touched, self.stored_before, "stored by two programs")
        self._apart(touched, self.loaded_before, "stored, loaded by another program")
        for where, loaded in self.loads:
            # What was loaded at the same places in the same order (x += …) waits for itself.
            if where != at:
                self._apart(touched, loaded, "stored with no barrier after the load")
        self.stored |= touched
        self.stored_by_program |= touched

    def _apart(self, touched: set[int], others: set[int], complaint: str) -> None:
        if not touched.isdisjoint(others):
            self.races.add(complaint)


def _places(at: Any, mask: Any) -> tuple[list[int], set[int]]:
    return at.data.ravel().tolist(), set(at.data[mask.data].tolist())


@contextmanager
def recorded(barriers: bool = True) -> Iterator[Ledger]:
    """Kernels that run inside write into the ledger, as if without barriers if asked."""
    ledger = Ledger()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    barrier, move = builder.create_barrier, builder.set_grid_idx

    def on_load(self: Any, at: Any, mask: Any, *rest: Any) -> Any:
        ledger.load(*_places(at, mask))
        return load(self, at, mask, *rest)

    def on_store(self: Any, at: Any, value: Any, mask: Any, *rest: Any) -> Any:
        ledger.store(*_places(at, mask))
        return store(self, at, value, mask, *rest)

    def on_barrier(self: Any) -> Any:
        if barriers:
            ledger.barrier()
        return barrier(self)

    def on_move(self: Any, x: int, y: int, z: int) -> Any:
        ledger.program() if x or y or z else ledger.launch()
        return move(self, x, y, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", on_load)
        patch.setattr(builder, "create_masked_store", on_store)
        patch.setattr(builder, "create_barrier", on_barrier)
        patch.setattr(builder, "set_grid_idx", on_move)
        yield ledger


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("way", ["wgmma", "tcgen05", "warp", "wave"])
@pytest.mark.parametrize("width", [20, 40, 70])
def test_no_race_in_one_kernel(mode: Mode, width: int, way: str) -> None:
    with assumed(way):
        _assert_no_race(whole, (6, width, width, 2), mode)


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_no_race_layer_by_layer(mode: Mode) -> None:
    _assert_no_race(layered, (6, 20, 20, 2), mode)


@pytest.mark.parametrize("hinge", [None, Hinge(margin=0.2)], ids=["jacobian", "hinge"])
def test_no_race_where_sums_have_a_kernel_of_their_own(hinge: Hinge | None) -> None:
    p = problem((6, 20, 20, 1), "silu", 2, "adjoint", hinge)
    x, params = inputs(p, 300, torch.float16)  # 3 tiles for 2 programs
    with recorded() as ledger:
        run(
            narrow, p, x, params, needs=[False] + [True] * 6,
            violating=torch.rand(300) < 0.3 if hinge is None else None,
        )  # fmt: skip
    assert ledger.races == set()


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_no_race_in_a_program(mode: Mode) -> None:
    d, nodes = CASES["gates"]
    x, params = operands(d, nodes, 70)
    with recorded() as ledger:
        run(
            programs,
            Problem(d, nodes, last_columns(d, 2), mode, None),
            x,
            params,
            violating=torch.rand(70) < 0.3,
        )
    assert ledger.races == set()


def _assert_no_race(path: ModuleType, widths: tuple[int, ...], mode: Mode) -> None:
    """With active rows and others, and with a hinge and an activation after the last layer."""
    for last, hinge in (("identity", None), ("softplus", Hinge(margin=0.2))):
        p = problem(widths, "silu", 2, mode, hinge, last)
        x, params = inputs(p, 140, torch.float16)  # 3 tiles for 2 programs
        violating = torch.rand(140) < 0.3 if hinge is None else None
        with recorded() as ledger:
            run(path, p, x, params, violating=violating)
        assert ledger.races == set()


def test_a_race_would_be_seen() -> None:
    p = problem((6, 40, 40, 1), "silu", 2, "adjoint", None)
    with assumed("warp"), recorded(barriers=False) as ledger:
        run(whole, p, *inputs(p, 100, torch.float16))
    assert "loaded with no barrier after the store" in ledger.races
    assert "stored with no barrier after the load" in ledger.races
