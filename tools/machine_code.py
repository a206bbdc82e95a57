"""What a compiled kernel executes: its instructions by class, outside loops and in each of them.

Of NVIDIA's SASS and AMD's assembly, which the compile report reads already. A class is what an
instruction asks of the card (see ``cards.py``); of memory it is bytes (of loads and stores; the
stores again by themselves), of tensor cores operations. "near" are the loads that ask the L1 cache
to keep what they read (evict last): a bias, or a number for each row, which all lanes of a column
or a row load, and every tile again. They are no traffic of the L2 cache.
Everything is for one warp (or wave).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Counts", "Section", "sections_of"]

# By class, for one warp: instructions ("special", "arithmetic", "integer", "shuffle", "barrier";
# all are in "issue"), operations ("tensor") or bytes ("shared", "memory", "stores", "near").
Counts = Counter[str]


class Section(NamedTuple):
    """A part of a kernel that runs as often as its loop goes round: ``depth`` loops are around it,
    0 for what is in none. The sections of a kernel are in the order of their first instructions."""

    depth: int
    counts: Counts


def sections_of(code: str, amd: bool) -> list[Section]:
    """What is in no loop, and each loop without those within it."""
    found = {0: Section(0, Counter())}
    classify = _amd_class if amd else _nvidia_class
    for text, loop, depth in _amd_code(code) if amd else _nvidia_code(code):
        counts = found.setdefault(loop, Section(depth, Counter())).counts
        counts["issue"] += 1
        for name, amount in classify(text):
            counts[name] += amount
    return [*found.values()]


# Instructions: what is shorter is the branch to itself behind the end of a program, or a wait.
SHORTEST = 4


def _nvidia_code(code: str) -> Iterator[tuple[str, int, int]]:
    """The instructions, each with its innermost loop (0 if none) and how many are around it. A
    branch back makes a loop."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = len(found)
        elif body := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?\s*([A-Z].*)", line):
            found.append(body.group(1))
    ends: dict[int, int] = {}  # of loops, by where they begin
    for at, text in enumerate(found):
        target = re.search(r"BRA.*`\((\.L\w+)\)", text)
        begin = labels.get(target.group(1), at) if target else at
        if begin + SHORTEST <= at:
            ends[begin] = max(at, ends.get(begin, 0))
    for at, text in enumerate(found):
        around = [begin for begin, end in ends.items() if begin <= at <= end]
        yield text, max(around, default=-1) + 1, len(around)


def _amd_code(code: str) -> Iterator[tuple[str, int, int]]:
    """The same, by what LLVM says of each block in its comments."""
    loop, depth, block = 0, 0, 0
    for line in code.splitlines():
        if label := re.match(r"(?:\.LBB\d+_(\d+):|; %bb\.\d+:)", line):
            loop, depth, block = 0, 0, int(label.group(1) or 0)
        if within := re.search(r"in Loop: Header=BB\d+_(\d+) Depth=(\d+)", line):
            loop, depth = int(within.group(1)) + 1, int(within.group(2))
        elif head := re.search(r"=>\s*This (?:Inner )?Loop Header: Depth=(\d+)", line):
            loop, depth = block + 1, int(head.group(1))
        text = line.split(";")[0].strip()
        if re.match(r"(?:[vs]_|ds_|global_|buffer_|flat_|scratch_)\w+", text):
            yield text, loop, depth


def _nvidia_class(text: str) -> Iterator[tuple[str, int]]:
    name = text.split()[0].rstrip(";")
    kind, *more = name.split(".")
    if kind in ("HMMA", "HGMMA", "QGMMA"):
        yield "tensor", _nvidia_operations(kind, more)
    elif kind == "MUFU":
        yield "special", 1
    elif kind in ("SHFL", "REDUX", "VOTE", "MATCH"):
        yield "shuffle", 1
    elif kind in ("LDSM", "STSM"):
        yield "shared", 128 * int(more[-1] if more[-1].isdigit() else 1)
    elif kind in ("LDS", "STS", "ATOMS"):
        yield "shared", 32 * _width(more)
    elif kind in ("LDG", "STG", "LDGSTS", "LDL", "STL", "RED", "ATOMG"):
        yield "near" if "EL" in more else "memory", 32 * _width(more)
        if kind in ("STG", "RED", "STL"):
            yield "stores", 32 * _width(more)
    elif kind == "BAR":
        yield "barrier", 1
    elif kind in ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"):
        yield "arithmetic", 1
    elif re.match(
        r"(?:I|LEA|LOP|SHF|SEL|FSEL|FSET|FMNMX|FCHK|F2F|PRMT|MOV|CS2R|P2R|R2P|PLOP)", kind
    ):
        yield "integer", 1


def _nvidia_operations(kind: str, more: list[str]) -> int:
    """Of one of its warps: of wgmma a quarter of four."""
    if kind == "HMMA":
        rows, columns, inner = 16, 8, int(more[0][3:])
        return 2 * rows * columns * inner
    rows, columns, inner = map(int, more[0].split("x"))
    return 2 * rows * columns * inner // 4


def _width(more: list[str]) -> int:
    """Bytes of a thread."""
    for part in more:
        if part in ("128", "64"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def _amd_class(text: str) -> Iterator[tuple[str, int]]:
    kind = text.split()[0]
    if product := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", kind):
        rows, columns, inner, blocks = (int(n or 1) for n in product.groups())
        yield "tensor", 2 * rows * columns * inner * blocks
    elif re.match(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_", kind):
        yield "special", 1
    elif kind.startswith(("ds_bpermute", "ds_permute", "ds_swizzle")):
        yield "shuffle", 1
    elif kind.startswith("ds_"):
        yield "shared", 64 * _amd_width(kind)
    elif kind.startswith(("global_", "buffer_", "flat_", "scratch_")):
        yield "memory", 64 * _amd_width(kind)
        if "_store" in kind:
            yield "stores", 64 * _amd_width(kind)
    elif kind == "s_barrier":
        yield "barrier", 1
    elif re.match(r"v_(?:pk_)?(?:add|sub|mul|fma|fmac|mac|mad)_f", kind):
        yield "arithmetic", 1
    elif kind.startswith("v_"):
        yield "integer", 1


def _amd_width(kind: str) -> int:
    """Bytes of a thread: ``dwordx4``, ``b128``, ``ushort``; twice that of ``read2``."""
    if found := re.search(r"dwordx(\d)", kind):
        return 4 * int(found.group(1))
    if found := re.search(r"_b(\d+)", kind):
        return int(found.group(1)) // 8 * (2 if re.match(r"ds_(?:read|write)2", kind) else 1)
    return 2 if "short" in kind else 1 if "byte" in kind else 4
