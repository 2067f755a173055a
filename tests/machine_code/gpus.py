"""The capacities and rates of the GPUs: the only place that knows their data sheets."""

from dataclasses import dataclass

REGISTERS_PER_SM = 65_536
WARPS_PER_SM = 64
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the driver takes of every block."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: limits of a streaming multiprocessor (SM), and rates per SM and clock.

    Attributes:
        name: As its maker sells it.
        num_sms: Multiprocessors.
        clock_hz: Boost clock.
        memory_bytes_per_second: Of the device memory.
        shared_bytes_per_block: What one block may ask for (opt-in).
        least_shared_bytes: The same of the smallest GPU that runs with the same tiles.
        multiply_adds: Of bfloat16 in the tensor cores.
        fp32_lanes: Additions or fused multiply-adds of float32.
    """

    name: str
    num_sms: int
    clock_hz: float
    memory_bytes_per_second: float
    shared_bytes_per_block: int
    least_shared_bytes: int
    multiply_adds: int
    fp32_lanes: int

    def blocks_per_sm(self, *, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Returns how many blocks of a kernel are resident at once; 0 if not even one fits."""
        if registers > 255 or shared_bytes > self.shared_bytes_per_block:
            return 0
        allocated = -(-registers // 8) * 8 * 32 * num_warps
        shared_bytes_per_sm = self.shared_bytes_per_block + RESERVED_SHARED_BYTES
        return min(
            REGISTERS_PER_SM // allocated,
            shared_bytes_per_sm // (shared_bytes + RESERVED_SHARED_BYTES),
            WARPS_PER_SM // num_warps,
        )


_SMALL = 99 * 1024
"""Of a block on the GPUs for workstations and games: 8.6, 8.9 and 12.x."""

GPUS = {
    80: Gpu("A100 80GB SXM", 108, 1.41e9, 2.039e12, 163 * 1024, _SMALL, 1024, 64),
    90: Gpu("H100 SXM", 132, 1.83e9, 3.35e12, 227 * 1024, 227 * 1024, 2048, 128),
    100: Gpu("B200", 148, 1.85e9, 8.0e12, 227 * 1024, 227 * 1024, 4096, 128),
    120: Gpu("RTX 5090", 170, 2.41e9, 1.792e12, _SMALL, _SMALL, 256, 128),
}
"""By compute capability, those that the kernels are compiled for."""
