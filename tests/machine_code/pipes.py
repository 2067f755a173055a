"""How much of each execution unit instructions keep busy: hides what a mnemonic means.

The rates are those of NVIDIA's tables of instruction throughput. This is arithmetic on counts, no simulation:
latencies, bank conflicts and the memory of the tensor cores are left out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.machine_code.gpus import Gpu
from tests.machine_code.sass import Instruction

TENSOR, SPECIAL, FMA, ALU, SHARED, ISSUE = "tensor", "special functions", "float32", "integer", "shared memory", "issue"
PIPE_OF = dict.fromkeys(("MUFU", "F2F", "F2I", "I2F", "FLO", "POPC", "BREV"), SPECIAL)
PIPE_OF |= dict.fromkeys(
    ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2", "FHFMA"), FMA
)
PIPE_OF |= dict.fromkeys(
    (
        "FMNMX", "FMNMX3", "FSEL", "FSETP", "FCHK", "F2FP", "I2FP", "IADD3", "IABS", "IMNMX", "ISETP", "LEA", "LOP3",
        "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX",
    ),
    ALU,
)  # fmt: skip
PIPE_OF |= dict.fromkeys(("LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS", "ATOMS"), SHARED)
TENSOR_OPCODES = ("HMMA", "HGMMA", "UTCHMMA")
ASYNCHRONOUS_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
"""Not `ATOMS`: the allocation of tensor memory has some; the PTX says whether the kernel itself asked for one."""

SPECIAL_LANES, ALU_LANES, SCHEDULERS, SHARED_BYTES_PER_CLOCK = 16, 64, 4, 128
HALF_RATE = {"IMAD"}
TWO_RESULTS = {"FFMA2", "FADD2", "FMUL2"}
"""Packed pairs of float32: one instruction to issue, two to compute."""
WIDTH = re.compile(r"\.(64|128|M88(?:\.[24])?|MT88(?:\.[24])?)\b")
WORDS_OF_WIDTH = {"64": 2, "128": 4, "2": 2, "4": 4}
HMMA_SHAPE = re.compile(r"HMMA\.(16816|1688)\b")
HGMMA_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\b")
DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")
DEPTH_OF_16_BITS = 16


@dataclass(frozen=True)
class Product:
    """The product of one tensor-core instruction of a block: rows × columns × depth.

    Attributes:
        executions: How many warps, or groups of warps, of the block issue it.
        shared_operands: How many of its two operands come from shared memory.
    """

    rows: int
    columns: int
    depth: int
    executions: int
    shared_operands: int

    @property
    def multiply_adds(self) -> int:
        """Of all executions."""
        return self.rows * self.columns * self.depth * self.executions

    @property
    def shared_bytes(self) -> int:
        """Read from shared memory by all executions, at two bytes a value."""
        sides = (0, self.columns, self.columns + self.rows)[self.shared_operands]
        return 2 * self.depth * sides * self.executions


def products(instructions: Sequence[Instruction], num_warps: int) -> dict[int, Product]:
    """Returns what the tensor-core instructions of a whole kernel multiply, by position."""
    by_position = {}
    # Blackwell's shape is a constant in a uniform register, set shortly before its use.
    constants: dict[str, int] = {}
    for position, instruction in enumerate(instructions):
        if instruction.opcode == "UMOV":
            register, value = (word.strip() for word in instruction.operands.split(",")[:2])
            constants[register] = int(value, 16) if value.startswith("0x") else constants.get(value, 0)
        elif instruction.base in TENSOR_OPCODES:
            by_position[position] = _product(instruction, num_warps, constants)
    return by_position


def _product(instruction: Instruction, num_warps: int, constants: dict[str, int]) -> Product:
    opcode, operands = instruction.opcode, instruction.operands
    if shape := HMMA_SHAPE.match(opcode):
        return Product(16, 8, int(shape[1][3:]), num_warps, 0)
    if shape := HGMMA_SHAPE.match(opcode):
        rows, columns, depth = map(int, shape.groups())
        # One descriptor in the place of both operands describes both.
        first = operands.split(",")[1].strip()
        return Product(rows, columns, depth, num_warps // 4, 2 if first.startswith("gdesc") else 1)
    if shape := DESCRIPTOR.search(operands):
        descriptor = constants.get(shape[1], 0)
        rows, columns = (descriptor >> 24 & 0x1F) << 4, (descriptor >> 17 & 0x3F) << 3
        if rows and columns:
            return Product(rows, columns, DEPTH_OF_16_BITS, 1, 1 if operands.startswith("tmem") else 2)
    raise ValueError(f"{opcode} {operands}: expected a tensor-core instruction of a known shape")


def busy_clocks(
    instructions: Sequence[Instruction], multiplied: Sequence[Product], num_warps: int, gpu: Gpu
) -> dict[str, float]:
    """Returns the clocks that each unit of an SM needs for one block to run these instructions and products once."""
    counts = Counter(instruction.base for instruction in instructions)
    lanes = 32 * num_warps

    def clocks(pipe: str, per_clock: int) -> float:
        return lanes * sum(count for base, count in counts.items() if PIPE_OF.get(base) == pipe) / per_clock

    extra = sum(counts[base] for base in TWO_RESULTS)
    half_rate = sum(counts[base] for base in HALF_RATE)
    float32 = clocks(FMA, gpu.fp32_lanes) + lanes * extra / gpu.fp32_lanes
    words = sum(_words(instruction) for instruction in instructions if PIPE_OF.get(instruction.base) == SHARED)
    operand_bytes = sum(product.shared_bytes for product in multiplied)
    return {
        TENSOR: sum(product.multiply_adds for product in multiplied) / gpu.multiply_adds,
        SPECIAL: clocks(SPECIAL, SPECIAL_LANES),
        FMA: max(float32, lanes * half_rate / ALU_LANES),
        ALU: clocks(ALU, ALU_LANES),
        SHARED: (4 * lanes * words + operand_bytes) / SHARED_BYTES_PER_CLOCK,
        ISSUE: num_warps * len(instructions) / SCHEDULERS,
    }


def _words(instruction: Instruction) -> int:
    """Returns how many words of 32 bits each lane moves."""
    width = WIDTH.search(instruction.opcode)
    return WORDS_OF_WIDTH.get(width[1].rpartition(".")[2], 1) if width else 1


def count(instructions: Iterable[Instruction], bases: Sequence[str]) -> int:
    """Returns how many instructions are one of these."""
    return sum(instruction.base in bases for instruction in instructions)
