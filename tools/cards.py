"""What cards can do, from their vendors: the one table of rates that predictions are made with.

Each figure names its source in brackets; where a vendor gives none there is an assumption, named
so. Nothing here was measured by us.

* [H200] "NVIDIA H200 Tensor Core GPU", data sheet, column H200 SXM of its specifications.
* [H100] "NVIDIA H100 Tensor Core GPU Architecture", white paper: the tables that compare A100 with
  H100 (SXM5) and their compute capabilities.
* [A100] "NVIDIA A100 Tensor Core GPU Architecture", white paper: the tables that compare V100 with
  A100 and their compute capabilities, and the section on its L2 cache; the memory of 80 GB is from
  "NVIDIA A100 Tensor Core GPU", data sheet, column A100 80GB SXM.
* [CUDA] "CUDA C++ Programming Guide", tables "Throughput of Native Arithmetic Instructions" and
  "Technical Specifications per Compute Capability", columns 8.0 and 9.0; the section on multilevel
  hints for hiding latency: four schedulers with one instruction a clock each, four clocks from an
  arithmetic instruction to the next that depends on it; the sections on shared memory: 32 banks
  of 4 bytes a clock.
* [MI300X] "AMD Instinct MI300X Accelerator", data sheet.
* [CDNA 3] "AMD CDNA 3 Architecture", white paper: the sections on the compute unit and on the
  caches.
* [CDNA 3 ISA] "AMD Instinct MI300 Instruction Set Architecture", reference guide.
* [ROCm] "AMD GPU specifications", ROCm documentation, table of AMD Instinct GPUs, row MI300X.
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
    """[CUDA], results of a multiprocessor in a clock, so lanes: 32-bit floating-point add and
    multiply; 32-bit integer add, of which logic, comparisons and conversions are as many or more;
    reciprocal and base-2 exponential; warp shuffle. Bytes of shared memory. That all integer
    instructions share one rate is assumed.
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
    processors=132,  # [H100]
    # 4096 dense bfloat16 operations of a multiprocessor in a clock: 1024 for each of its four
    # tensor cores [H100], at the clock for which the peak rate is given.
    clock=989.4e12 / (132 * 4096),
    units=_nvidia(128),  # [CUDA], 9.0
    tensor=989.4e12,  # [H100], dense
    memory=3.35e12,  # [H100]
    cache=5.5e12,  # assumed: NVIDIA gives none
    cache_size=50 << 20,  # [H100]
    shared=228 << 10,  # [CUDA]
    registers=512,  # [CUDA]: 64 K of 32 bits for 32 lanes of four schedulers
    warp=32,  # [CUDA]
    schedulers=4,  # [CUDA]
    latency=4,  # [CUDA]
)
CARDS = {
    "H200": replace(H100, memory=4.8e12),  # [H200]: the rates of the H100, its bandwidth apart
    "H100": H100,
    "A100": Card(
        target="sm_80",
        processors=108,  # [A100]
        clock=1.41e9,  # [A100], boost
        units=_nvidia(64),  # [CUDA], 8.0
        tensor=312e12,  # [A100], dense
        memory=2.039e12,  # [A100], data sheet
        cache=5120 * 1.41e9,  # [A100]: bytes read in a clock
        cache_size=40 << 20,  # [A100]
        shared=164 << 10,  # [CUDA]
        registers=512,  # [CUDA], as above
        warp=32,  # [CUDA]
        schedulers=4,  # [CUDA]
        latency=4,  # [CUDA]
    ),
    "MI300X": Card(
        target="gfx942",
        processors=304,  # [ROCm]
        clock=2.1e9,  # [MI300X], peak engine clock
        units=(
            # [CDNA 3]: four SIMDs of 16 lanes. A transcendental instruction takes four times as
            # long [CDNA 3 ISA].
            Unit("vector instructions", {"arithmetic": 64, "integer": 64, "special": 256}, 64),
            Unit("shared memory", {"shared": 1, "shuffle": 256}, 128),  # [CDNA 3]: LDS
        ),
        tensor=1307.4e12,  # [MI300X], bfloat16, dense
        memory=5.3e12,  # [MI300X]
        cache=8 * 16 * 128 * 2.1e9,  # [CDNA 3]: 16 channels of 128 bytes a clock in each of 8 dies
        cache_size=256 << 20,  # [ROCm]: Infinity Cache, taken to be as fast as the L2 (assumed)
        shared=64 << 10,  # [ROCm]: LDS
        registers=512,  # [ROCm]: 512 KiB of vector registers, for 64 lanes of four SIMDs
        warp=64,  # [ROCm]
        schedulers=4,  # [CDNA 3]
        latency=1,  # an instruction of a wave of 64 takes its SIMD 4 clocks [CDNA 3]
        most_warps=32,  # assumed: 8 waves of each SIMD
    ),
}
