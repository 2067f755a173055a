"""Launch -> machine code, with no GPU: hides Triton's compiler and the tools that read its binaries.

What is compiled is what a real launch would compile: types, divisibility and constants come from Triton's own
specialisation of the arguments. Needs a process without `TRITON_INTERPRET`.
"""

import contextlib
import io
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from protlm.ops.cuda.launch import Launch
from tests.machine_code import pipes, sass
from tests.machine_code.gpus import GPUS

PTX_ATOMIC = re.compile(r"\b(?:atom|red|multimem\.red)\.")
PTX_NAN_HIDING = re.compile(r"\b(?:max|min)\.f32")
STACK_AND_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
PERFORMANCE_WARNING = re.compile(r"\((C7\d+)\) Potential Performance Loss: ([^\n]*)")


@dataclass(frozen=True)
class Loop:
    """One loop, per iteration and block; what it counts are instructions of one warp.

    Attributes:
        instructions: All of them.
        tensor_instructions: Those of the tensor cores.
        multiply_adds: What these multiply, in all warps together.
        asynchronous_copies: From global to shared memory.
        opcodes: Counts by opcode without modifiers, the most frequent first.
        busy_clocks: By execution unit; see `pipes`.
    """

    instructions: int
    tensor_instructions: int
    multiply_adds: int
    asynchronous_copies: int
    opcodes: dict[str, int]
    busy_clocks: dict[str, float]


@dataclass(frozen=True)
class MachineCode:
    """The machine code of a kernel and the resources that it takes.

    Attributes:
        kernel: Its name.
        capability: What it was compiled for: one of `GPUS`.
        num_warps: Warps of a block.
        num_blocks: Blocks of the launch.
        registers: Of a thread.
        stack_bytes: Of a thread.
        spill_store_bytes: Registers written to memory for lack of room, of a thread.
        spill_load_bytes: Read again.
        local_memory_instructions: Whatever else goes to the memory of a thread.
        shared_bytes: Of a block.
        instructions: All of them.
        tensor_instructions: By opcode.
        multiply_adds: What these multiply in a block, each counted once.
        atomics: Instructions whose order of execution could change a result.
        asynchronous_copies: From global to shared memory.
        nan_hiding: Largest and smallest of two numbers taken such that NaN loses.
        opcodes: Counts by opcode without modifiers, the most frequent first.
        loops: Inner loops before those around them.
        warnings: What the assembler says of lost performance.
        compile_seconds: From source to binary.
    """

    kernel: str
    capability: int
    num_warps: int
    num_blocks: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    local_memory_instructions: int
    shared_bytes: int
    instructions: int
    tensor_instructions: dict[str, int]
    multiply_adds: int
    atomics: int
    asynchronous_copies: int
    nan_hiding: int
    opcodes: dict[str, int]
    loops: tuple[Loop, ...]
    warnings: tuple[str, ...]
    compile_seconds: float

    @property
    def hot_loop(self) -> Loop | None:
        """The loop with most tensor-core work, the innermost of equals; without such work the longest innermost one."""
        return max(self.loops, key=lambda loop: (loop.multiply_adds, -loop.instructions), default=None)

    @property
    def blocks_per_sm(self) -> int:
        """How many blocks are resident on a multiprocessor."""
        gpu = GPUS[self.capability]
        return gpu.blocks_per_sm(
            registers=self.registers, shared_bytes=self.shared_bytes, num_warps=self.num_warps
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "MachineCode":
        """Returns what `to_json` wrote."""
        loops = tuple(Loop(**loop) for loop in content["loops"])
        return MachineCode(**{**content, "loops": loops, "warnings": tuple(content["warnings"])})


@dataclass(frozen=True)
class _Address:
    """A tensor for Triton's specialisation, which asks for the address; a meta tensor says 0 even in the middle."""

    dtype: torch.dtype
    offset_bytes: int

    def data_ptr(self) -> int:
        """Returns the address as if the storage began at 0: allocations are aligned to far more than 16 bytes."""
        return self.offset_bytes


def compile_launch(launch: Launch, capability: int) -> MachineCode:
    """Compiles a launch for a GPU that need not be there.

    Args:
        launch: Its tensors may be on device "meta".
        capability: One of `GPUS`.

    Returns:
        What the machine code needs and does.
    """
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: expected a process without it, which compiles")
    started = time.perf_counter()
    compiled, log = _compile(launch, capability)
    seconds = time.perf_counter() - started
    instructions = sass.parse(_disassembly(compiled.asm["cubin"]))
    multiplied = pipes.products(instructions, launch.num_warps)
    resources = [tuple(map(int, sizes)) for sizes in STACK_AND_SPILLS.findall(log)]
    stack, stores, loads = (sum(column) for column in zip(*resources, strict=True))
    counts = Counter(instruction.base for instruction in instructions)
    return MachineCode(
        kernel=compiled.metadata.name,
        capability=capability,
        num_warps=compiled.metadata.num_warps,
        num_blocks=_num_blocks(launch.grid),
        registers=max(map(int, REGISTERS.findall(log))),
        stack_bytes=stack,
        spill_store_bytes=stores,
        spill_load_bytes=loads,
        local_memory_instructions=pipes.count(instructions, ("LDL", "STL")),
        shared_bytes=compiled.metadata.shared,
        instructions=len(instructions),
        tensor_instructions={base: counts[base] for base in pipes.TENSOR_OPCODES if counts[base]},
        multiply_adds=sum(product.multiply_adds for product in multiplied.values()),
        atomics=pipes.count(instructions, pipes.ATOMICS) + len(PTX_ATOMIC.findall(compiled.asm["ptx"])),
        asynchronous_copies=pipes.count(instructions, pipes.ASYNCHRONOUS_COPIES),
        nan_hiding=len(PTX_NAN_HIDING.findall(compiled.asm["ptx"])),
        opcodes=dict(counts.most_common()),
        loops=tuple(
            _loop([instructions[position] for position in body],
                  [multiplied[position] for position in body if position in multiplied],
                  launch.num_warps, capability)
            for body in sass.loops(instructions)
        ),
        warnings=tuple(f"{code}: {text}" for code, text in PERFORMANCE_WARNING.findall(log)),
        compile_seconds=seconds,
    )  # fmt: skip


def _compile(launch: Launch, capability: int) -> tuple[CompiledKernel, str]:
    """Returns the binary and what the assembler said."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel, wanted = launch.kernel, dict(launch.constants)
    wanted |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    # These two are what JITFunction.run calls, between asking the driver for the device and compiling.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**{name: _bare(value) for name, value in launch.arguments.items()}, **wanted)
    options, signature, constants, attributes = kernel._pack_args(backend, wanted, bound, specialisation, options)
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        # A binary from the cache would come without the assembler's words.
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options.__dict__)
    return compiled, log.getvalue()


def _bare(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Address(value.dtype, value.storage_offset() * value.element_size())
    return value


def _disassembly(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _num_blocks(grid: Sequence[int]) -> int:
    total = 1
    for size in grid:
        total *= size
    return total


def _loop(
    body: Sequence[sass.Instruction], multiplied: Sequence[pipes.Product], num_warps: int, capability: int
) -> Loop:
    return Loop(
        instructions=len(body),
        tensor_instructions=pipes.count(body, pipes.TENSOR_OPCODES),
        multiply_adds=sum(product.multiply_adds for product in multiplied),
        asynchronous_copies=pipes.count(body, pipes.ASYNCHRONOUS_COPIES),
        opcodes=dict(Counter(instruction.base for instruction in body).most_common()),
        busy_clocks=pipes.busy_clocks(body, multiplied, num_warps, GPUS[capability]),
    )
