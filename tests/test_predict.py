"""The model of ``tools/predict.py``: what it counts, what it makes of it, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tools.cards import CARDS
from tools.machine_code import Section, sections_of
from tools.predict import (
    PAGE,
    STEPS,
    Kernel,
    Known,
    _plain,
    _work,
    case_of,
    committed,
    compiled_for,
    launches,
    page,
    predict,
    read,
    worse,
    written,
)

ROOT = Path(__file__).parent.parent

SASS = """
kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R6, R4 ;
.L_x_1:
        /*0030*/                   LDS.64 R8, [R6] ;
        /*0040*/                   LDSM.16.MT88.4 R8, [R6] ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   HGMMA.64x32x16.F32 R8, gdesc[UR4], R8 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/              @!P1 STG.E.U16 desc[UR4][R2.64], R8 ;
        /*0090*/                   FFMA R1, R2, R3, R4 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
"""
AMD = """
kernel:
; %bb.0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
	global_load_dwordx4 v[0:3], v[4:5], off
	v_exp_f32_e32 v1, v2
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	ds_read2st64_b32 v[0:1], v2 offset1:1
	s_cbranch_scc1 .LBB0_2
; %bb.3:                                ;   in Loop: Header=BB0_1 Depth=1
	buffer_store_short v0, v1, s[0:3], 0 offen
	v_add_f32_e32 v0, v1, v2
	s_barrier
	s_cbranch_scc1 .LBB0_1
; %bb.4:
	s_endpgm
"""


@pytest.mark.parametrize(
    ("code", "amd", "inner", "around"),
    [
        (
            SASS,
            False,
            {"tensor": 2 * 16 * 8 * 16 + 2 * 64 * 32 * 16 // 4, "shared": 32 * 8 + 512, "issue": 5},
            {
                "memory": 32 * 18,
                "stores": 64,
                "special": 1,
                "arithmetic": 1,
                "barrier": 1,
                "issue": 6,
            },
        ),
        (
            AMD,
            True,
            {"tensor": 2 * 32 * 32 * 8, "shared": 64 * 8, "issue": 3},
            {
                "memory": 64 * 18,
                "stores": 128,
                "special": 1,
                "arithmetic": 1,
                "barrier": 1,
                "issue": 6,
            },
        ),
    ],
    ids=["NVIDIA", "AMD"],
)
def test_what_is_in_which_loop(
    code: str, amd: bool, inner: dict[str, int], around: dict[str, int]
) -> None:
    outside, outer, within = sections_of(code, amd)
    assert [s.depth for s in (outside, outer, within)] == [0, 1, 2]
    assert dict(within.counts) == inner
    assert dict(outer.counts) == around
    assert not outside.counts["memory"]


def products(width: int, active: bool, forward: bool) -> int:
    """Of one row, with the 8 inputs, one column and one output that a product takes as 16."""
    hidden, narrow = width * width, 16 * width
    if forward:  # values and tangents; of the first layer tangents are a column
        return 2 * (2 * 2 * hidden + 3 * narrow)
    # Up, the sums of the weights' gradients, down; the same for a pair's tangent and seed.
    return 2 * ((12 if active else 6) * hidden + (8 if active else 4) * narrow)


def test_the_products_of_a_tile_are_those_of_the_mathematics() -> None:
    """So that no loop, and no way round one, was missed."""
    checked = 0
    for (N, width, target), kernels in committed().items():
        for kernel, call in zip(kernels, launches(case_of(width, N), target), strict=True):
            if not kernel.name.startswith("whole"):
                continue
            for share in (0.0, 1.0):
                _, trips = _work(kernel, call, share)
                done = sum(
                    s.counts["tensor"] * n for s, n in zip(kernel.sections, trips, strict=True)
                )
                rows = -(-N // call.programs[0])
                forward = kernel.name == "whole_forward"
                ideal = rows * products(width, share == 1.0, forward)
                # Warps that have no columns of a narrow product to themselves repeat each other's.
                assert 0.999 <= done * kernel.warps / ideal <= 1.4, (N, width, target, share)
                checked += 1
    assert checked == 32


def test_the_products_of_a_narrow_chain_are_those_of_the_mathematics() -> None:
    """Of 1024 rows, all with an active pair or none: of hidden layers, and of 16 columns."""
    kernels, hidden, narrow = committed()[1024, 128, "sm_90"], 128 * 128, 16 * 128
    wanted = {
        "narrow_forward": (4 * hidden + narrow,) * 2,  # up and down; the slope is a sum
        # a_1, and the sums: two of hidden layers, the first's with its bias, and of two biases and
        # the output with 16 columns each. Of a pair the same sums, those of weights twice.
        "narrow_gradients": (2 * hidden + 5 * narrow, 6 * hidden + 10 * narrow),
        "narrow_pairs": (0, 4 * hidden + 2 * narrow),
    }
    for kernel, call in zip(kernels, launches(case_of(128), "sm_90"), strict=True):
        if kernel.name not in wanted:
            continue
        for share, ideal in zip((0.0, 1.0), wanted.pop(kernel.name), strict=True):
            programs, trips = _work(kernel, call, share)
            done = sum(s.counts["tensor"] * n for s, n in zip(kernel.sections, trips, strict=True))
            if not ideal:
                assert programs == 0
            else:
                assert 0.999 <= done * kernel.warps * programs / (2 * 1024 * ideal) <= 1.01
    assert not wanted


def test_the_products_and_bytes_of_a_wide_layer_are_those_of_the_mathematics() -> None:
    """Of launches over 1024 rows, or as many pairs, of hidden layers alone."""
    N, H, checked = 1024, 1024, Counter[str]()
    for target in ("sm_80", "sm_90", "gfx942"):
        kernels = committed()[1024, H, target]
        for kernel, call in zip(kernels, launches(case_of(H), target), strict=True):
            given = dict(zip(call.kernel.arg_names, call.args, strict=False)) | call.options
            programs, trips = _work(kernel, call, 1.0)

            def done(what: str) -> float:
                return sum(  # of all programs, as if each had what the busiest one has
                    s.counts[what] * n * kernel.warps * programs  # noqa: B023
                    for s, n in zip(kernel.sections, trips, strict=True)  # noqa: B023
                )

            if given.get("INPUTS") == given.get("OUTPUTS") == H:
                assert 0.999 <= done("tensor") / (2 * N * H * H) <= 1.01, (kernel.name, target)
            elif kernel.name == "chain_down" and not given["FAN"]:
                passes = 2 if given["TOP"] else 3
                assert 0.999 <= done("memory") / (passes * 2 * N * H) <= 1.6, (kernel.name, target)
            else:
                continue
            checked[kernel.name] += 1
    assert checked == {"pairs_product": 12, "pairs_weight": 6, "chain_down": 6}


def changed(known: Known, name: str, change: Callable[[Kernel], Kernel]) -> Known:
    return {
        key: [change(k) if k.name == name else k for k in kernels] for key, kernels in known.items()
    }


def with_more(kernel: Kernel, what: str, factor: float) -> Kernel:
    sections = []
    for section in kernel.sections:
        counts = Counter(section.counts)
        counts[what] = round(counts[what] * factor)
        sections.append(Section(section.depth, counts))
    return replace(kernel, sections=tuple(sections))


def test_nothing_is_worse_than_itself() -> None:
    assert worse(committed(), committed()) == []


@pytest.mark.parametrize("name", ["whole_forward", "narrow_gradients", "chain_down", "layer_back"])
def test_another_pass_over_memory_is_worse(name: str) -> None:
    """Bytes and instructions of every load and store once more."""
    known = committed()
    slower = changed(known, name, lambda k: with_more(with_more(k, "memory", 6.0), "issue", 1.5))
    found = worse(slower, known)
    assert any(sentence.startswith(name) for sentence in found)
    assert worse(known, slower) == []


def test_fewer_programs_at_a_time_are_worse() -> None:
    known = committed()
    one = changed(known, "whole_forward", lambda k: replace(k, shared=120 << 10))
    assert any(s.startswith("whole_forward on H200 at 65536 x 64") for s in worse(one, known))


def test_less_than_a_twentieth_is_let_pass() -> None:
    known = committed()
    little = changed(known, "whole_forward", lambda k: with_more(k, "issue", 1.03))
    assert worse(little, known) == []


def test_a_kernel_that_reads_one_more_tensor_takes_longer() -> None:
    """Compiled: the same launch with and without another operand."""
    code = """
import torch
from monokernel.backends.triton.launch import recorded
from monokernel.backends.triton.programs.operands import On
from tools.cards import CARDS
from tools.compile_report import compiled_code
from tools.predict import _kernel, seconds_of
t = torch.empty(1, 1 << 20, 64, dtype=torch.bfloat16)
with recorded() as calls:
    on = On(t[0], t.shape[1])
    on.combine(torch.empty_like(t), t)
    on.combine(torch.empty_like(t), t, base=torch.empty_like(t))
less, more = (_kernel(compiled_code(c, "sm_90"), c, "sm_90") for c in calls)
without = seconds_of(less, calls[0], CARDS["H200"], 0)
print(seconds_of(more, calls[1], CARDS["H200"], 0).seconds / without.seconds)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    assert 1.4 < float(found.stdout) < 1.6  # three passes for two


@pytest.mark.parametrize(("N", "width"), STEPS)
def test_the_plain_step_has_its_products(N: int, width: int) -> None:
    """Forward, and twice that backward, but for the first layer's input."""
    layers = [(8, width), (width, width), (width, width), (width, 1)]
    once = [2 * N * a * b for a, b in layers]
    assert sum(op.operations for op in _plain(N, width)) == 3 * sum(once) - once[0]


def test_cards_and_shares_are_in_their_order() -> None:
    for N, width in STEPS:
        kernels = committed()[compiled_for(N), width, "sm_90"]
        times = [predict(N, width, CARDS["H200"], kernels, v).ours for v in (0.0, 0.05, 1.0)]
        assert times == sorted(times)
        assert predict(N, width, CARDS["H100"], kernels).ours >= times[1]


def test_the_counts_are_read_as_they_were_written() -> None:
    assert read(written(committed())) == committed()
    assert json.loads((ROOT / "tools" / "kernel_counts.json").read_text())["triton"]


def test_the_page_shows_what_the_model_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, committed()) == text
