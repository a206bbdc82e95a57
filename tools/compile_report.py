"""``python -m tools.compile_report``: compiles every shipped configuration of the Triton kernels.

Without a GPU, for each target, and prints what the compiler made of it: registers, stack bytes
(spills), shared memory, tensor-core and special-function instructions. Exits with 1 if a kernel
spills, traps, lacks its tensor cores, or takes more shared or tensor memory than the target has.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from monokernel.backends.triton.launch import Launch
from monokernel.backends.triton.target import interpreting
from tools.kernel_cases import KNOWN_SPILLS, TARGETS, Case, every_case, launches, quick_cases

__all__ = ["Compiled", "compiled_code", "main", "source_of"]


# --- one kernel, one target ---------------------------------------------------------------------

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def source_of(call: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel with the types and constants of the call, as the launcher would specialise it."""
    names = call.kernel.arg_names
    values = dict(zip(names, call.args, strict=False))
    options = {k: v for k, v in call.options.items() if k in COMPILER_OPTIONS}
    values |= {k: v for k, v in call.options.items() if k not in COMPILER_OPTIONS}
    constexprs = {p.name for p in call.kernel.params if p.is_constexpr}
    general = {p.name for p in call.kernel.params if p.do_not_specialize}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def describe(value: object, at: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(v, (*at, i)) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            attributes[at] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if value is None:
            constants[at] = None
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        assert isinstance(value, int)
        if value == 1:
            constants[at] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[at] = [["tt.divisibility", 16]]
        return "i32"

    for i, name in enumerate(names):
        if name in constexprs:
            signature[name] = "constexpr"
            constants[(i,)] = values[name]
        elif name in general:
            signature[name] = "i32"
        else:
            signature[name] = describe(values[name], (i,))
    return ASTSource(call.kernel, signature, constants, attributes), options


class Compiled(NamedTuple):
    """What the compiler made of a launch: SASS or AMD assembly, and what a program takes."""

    registers: int
    stack: int
    shared: int
    warps: int
    code: str
    intermediate: dict[str, Any]  # by Triton's names of its forms
    tensor_memory: int


def compiled_code(call: Launch, target_name: str) -> Compiled:
    source, options = source_of(call)
    target = TARGETS[target_name].gpu
    if target.backend == "hip":
        options.pop("maxnreg", None)
    made = triton.compile(source, target=target, options=options)
    read = (
        read_amd(made.asm["amdgcn"]) if target.backend == "hip" else read_nvidia(made.asm["cubin"])
    )
    return Compiled(
        *read[:2], made.metadata.shared, made.metadata.num_warps, read[2], made.asm,
        getattr(made.metadata, "tmem_size", 0) or 0,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    kernel: str
    target: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    tensor_core: int
    special: int
    seconds: float
    complaints: tuple[str, ...] = ()
    warning: str = ""


def compile_one(case: Case, index: int, target_name: str) -> Row:
    """Compiles launch number ``index`` of the case's step and reads what came out."""
    call, target = launches(case, target_name)[index], TARGETS[target_name]
    began = time.perf_counter()
    name = call.kernel.__name__
    try:
        made = compiled_code(call, target_name)
    except Exception as error:  # the table shows which one failed, whatever the compiler raised
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        complaint = f"does not compile: {' '.join(str(root).split())[-200:]}"
        return Row(case.name, name, target_name, 0, 0, 0, 0, 0, 0, 0.0, (complaint,))
    seconds = time.perf_counter() - began
    stack, code = made.stack, made.code
    # wgmma takes 64 rows; what has fewer runs on the instruction of the older cards.
    few = call.options.get("BM", 64) < 64
    row = Row(
        case.name,
        name,
        target_name,
        made.registers,
        stack,
        made.shared,
        made.tensor_memory,
        tensor_core=len(re.findall(target.tensor_core + (r"|\bHMMA" if few else ""), code)),
        special=len(re.findall(r"\bMUFU|\bv_(?:exp|log|rcp|rsq|sqrt|sin|cos)_", code)),
        seconds=seconds,
    )
    known = known_spill(case, name, target_name)
    multiplies = "tt.dot" in made.intermediate["ttir"]
    found = complaints(row, call, known, multiplies)
    if re.search(r"^\s*trap;", made.intermediate.get("ptx", ""), re.M):
        found.append("a trap in the PTX")
    warning = f"known: spills {stack} bytes" if 0 < stack <= known else ""
    return replace(row, complaints=tuple(found), warning=warning)


def known_spill(case: Case, kernel: str, target: str) -> int:
    """Stack bytes that this kernel of the case is known to have on the target."""
    wide_dx = case.dx and case.widths[0] > 16
    return KNOWN_SPILLS.get((kernel, target, max(case.widths[1:-1]), wide_dx), 0)


def complaints(row: Row, call: Launch, known: int, multiplies: bool) -> list[str]:
    """What is wrong with a kernel by its figures; ``known`` bytes of stack are let pass."""
    target, found = TARGETS[row.target], list[str]()
    if row.stack > known:
        found.append(f"spills {row.stack} bytes")
    # No tensor core computes strict float32.
    strict = str(call.options.get("C")) == "fp32" and call.options.get("PRECISION") == "ieee"
    if multiplies and not strict and not row.tensor_core:
        found.append("no tensor-core instruction")
    if row.shared > target.shared:
        found.append(f"shared memory above {target.shared}")
    if row.tensor_memory > target.tensor_memory:
        found.append(f"tensor memory above {target.tensor_memory}")
    return found


def read_nvidia(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack bytes and SASS of a cubin, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    return registers, stack, code


def read_amd(assembly: str) -> tuple[int, int, str]:
    """Vector registers, scratch bytes and instructions of AMD assembly."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), number("private_segment_fixed_size"), assembly


def _output(*command: object) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True
    ).stdout


# --- the table ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="compile_report")
    parser.add_argument("--quick", action="store_true", help="small networks, sm_90 alone")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 1
    cases = [*(quick_cases() if options.quick else every_case())]
    targets = ["sm_90"] if options.quick else options.targets
    jobs = []
    seen: set[str] = set()
    for case, target in itertools.product(cases, targets):
        if case.precision == "tf32x3" and TARGETS[target].gpu.backend == "hip":
            continue  # Triton has no such products there, and nothing asks for them
        if options.match in case.name:
            for index, call in enumerate(launches(case, target)):
                source, chosen = source_of(call)
                kind = f"{target} {source.hash()} {chosen}"
                if kind not in seen:
                    seen.add(kind)
                    jobs.append((case, index, target))
    print(f"Triton {triton.__version__}: {len(jobs)} kernels")
    wide = max(len(case.name) for case, _, _ in jobs)
    head = f"{'network':{wide}} {'kernel':18} {'target':7} reg stack  shared tmem  dots  mufu     s"
    print(head + "\n" + "-" * len(head))
    failed = 0
    # Not forked: PyTorch's threads do not survive that.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        for row in pool.map(compile_one, *zip(*jobs, strict=True)):
            print(
                f"{row.case:{wide}} {row.kernel:18} {row.target:7} {row.registers:3} {row.stack:5} "
                f"{row.shared:7} {row.tensor_memory:4} {row.tensor_core:5} {row.special:5} "
                f"{row.seconds:5.1f}  {'; '.join(row.complaints) or row.warning}".rstrip(),
                flush=True,
            )
            failed += bool(row.complaints)
    print(f"{failed} of {len(jobs)} kernels fail" if failed else "every kernel passes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
