"""What cards can do, from their vendors: the one table of rates that predictions are made with.

Where a vendor gives no figure there is an assumption, named so. Nothing here was measured by us.

* [H100] NVIDIA H100 Tensor Core GPU data sheet and architecture white paper: SXM5, 132
  multiprocessors, 989.4 TFLOP/s bfloat16 dense, 3.35 TB/s, 50 MB of L2 cache, 228 KB of shared
  memory on a multiprocessor.
* [H200] NVIDIA H200 data sheet: SXM, the same processors, 141 GB at 4.8 TB/s.
* [A100] NVIDIA A100 data sheet and architecture white paper: SXM 80 GB, 108 multiprocessors,
  1.41 GHz, 312 TFLOP/s bfloat16 dense, 2.039 TB/s, 40 MB of L2 cache at 5120 bytes a clock, 164 KB
  of shared memory on a multiprocessor.
* [CUDA] NVIDIA CUDA C++ Programming Guide, arithmetic instructions: "Throughput of Native
  Arithmetic Instructions" for compute capabilities 8.0 and 9.0; four schedulers with one
  instruction a clock each; 4 clocks from an instruction to the next that depends on it; shared
  memory of 32 banks of 4 bytes.
* [MI300X] AMD Instinct MI300X data sheet: 304 compute units, 2.1 GHz, 1307.4 TFLOP/s bfloat16
  dense, 5.3 TB/s.
* [CDNA 3] AMD CDNA 3 white paper and instruction set guide: four SIMDs of 16 lanes in a compute
  unit, transcendental instructions at a quarter of the rate, 64 KB of LDS at 128 bytes a clock, 512
  registers for a lane; an L2 cache of 16 channels of 128 bytes a clock in each of 8 dies, 256 MB of
  Infinity Cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["CARDS", "GAP", "INDEPENDENT", "Card", "Unit"]

# Assumed: seconds from one kernel of a replayed CUDA graph to the next, for us and for PyTorch.
GAP = 1.5e-6
# Assumed: instructions of one warp, on average, that do not wait for each other.
INDEPENDENT = 2


class Unit(NamedTuple):
    """A part of a processor: what each class takes of it, and how much it does in a clock."""

    name: str
    takes: dict[str, int]
    per_clock: float


@dataclass(frozen=True)
class Card:
    target: str  # what is compiled for it
    processors: int
    clock: float
    units: tuple[Unit, ...]  # for each processor
    tensor: float  # operations a second of the card, bfloat16
    memory: float  # bytes a second
    cache: float  # bytes a second of the L2 cache
    cache_size: int  # bytes
    shared: int  # bytes of a processor
    registers: int  # of a lane, in all its warps
    warp: int  # lanes
    schedulers: int
    latency: float  # clocks from an instruction to the one that needs it, in warps of one scheduler
    most_warps: int = 64

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs that a processor holds at a time."""
        taken = -(-max(registers, 1) // 8) * 8
        by_registers = self.registers * self.schedulers // (taken * warps)
        by_shared = self.shared // max(shared + 1024, 1)
        return max(1, min(by_registers, by_shared, self.most_warps // warps))


def _nvidia(arithmetic: int) -> tuple[Unit, ...]:
    """[CUDA]; results a clock, so lanes. 32-bit float, integer (with logic, comparisons and
    conversions), special functions, shuffles; bytes of shared memory, bytes through the L1 cache.
    """
    return (
        Unit("instructions issued", {"issue": 32}, 4 * 32),
        Unit("float arithmetic", {"arithmetic": 32}, arithmetic),
        Unit("integer arithmetic", {"integer": 32}, 64),
        Unit("special functions", {"special": 32}, 16),
        Unit("shuffles", {"shuffle": 32}, 32),
        Unit("shared memory", {"shared": 1}, 128),
    )


H100 = Card(
    target="sm_90",
    processors=132,
    clock=989.4e12 / (132 * 4096),  # 4096 operations of a multiprocessor's tensor cores in a clock
    units=_nvidia(128),
    tensor=989.4e12,
    memory=3.35e12,
    cache=5.5e12,  # assumed: NVIDIA gives none
    cache_size=50 << 20,
    shared=228 << 10,
    registers=512,
    warp=32,
    schedulers=4,
    latency=4,
)
CARDS = {
    "H200": replace(H100, memory=4.8e12),
    "H100": H100,
    "A100": Card(
        target="sm_80",
        processors=108,
        clock=1.41e9,
        units=_nvidia(64),
        tensor=312e12,
        memory=2.039e12,
        cache=5120 * 1.41e9,
        cache_size=40 << 20,
        shared=164 << 10,
        registers=512,
        warp=32,
        schedulers=4,
        latency=4,
    ),
    "MI300X": Card(
        target="gfx942",
        processors=304,
        clock=2.1e9,
        units=(
            Unit("vector instructions", {"arithmetic": 64, "integer": 64, "special": 256}, 64),
            Unit("shared memory", {"shared": 1, "shuffle": 256}, 128),
        ),
        tensor=1307.4e12,
        memory=5.3e12,
        cache=8 * 16 * 128 * 2.1e9,
        cache_size=256 << 20,
        shared=64 << 10,
        registers=512,
        warp=64,
        schedulers=4,
        latency=1,  # an instruction of a wave of 64 takes its SIMD 4 clocks
        most_warps=32,
    ),
}
