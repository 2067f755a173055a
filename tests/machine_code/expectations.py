"""The expectations on a kernel's machine code, and the words for each that it fails."""

from dataclasses import dataclass

from protlm.ops.cuda.launch import Launch
from tests.machine_code.compiler import MachineCode
from tests.machine_code.gpus import GPUS

ROOM = 1.05
"""How much longer a hot loop may get before a test fails: another version of the compiler moves a few instructions."""
TENSOR_OPCODE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""By capability, the instruction that reaches the full rate of the tensor cores."""


@dataclass(frozen=True)
class Case:
    """One launch and what its machine code is expected to do.

    Attributes:
        launch: As a GPU would be given it.
        multiply_adds: Of the tensor cores, in one iteration of a block's loop; 0 for a kernel that multiplies nothing.
        has_pipelined_loads: Whether the loop has loads, which should be under way while it multiplies.
        has_narrow_products: Whether some products have less than 64 rows, fewer than a group of warps multiplies.
        has_wide_products: Whether some have more.
    """

    launch: Launch
    multiply_adds: int
    has_pipelined_loads: bool
    has_narrow_products: bool = False
    has_wide_products: bool = True


def counts(code: MachineCode) -> dict[str, int]:
    """Returns what is counted once and then expected: tensor-core instructions, and the length of the hot loop."""
    return {
        "tensor_instructions": sum(code.tensor_instructions.values()),
        "hot_loop": code.hot_loop.instructions if code.hot_loop else 0,
        "instructions": code.instructions,
    }


def problems(code: MachineCode, case: Case, counted: dict[str, int] | None) -> list[str]:
    """Returns what is wrong with a kernel, one line each; nothing where all is well.

    Args:
        code: What the compiler made of the launch.
        case: What is expected.
        counted: The `counts` of before; None to let them be.
    """
    faults = _resources(code)
    if code.atomics:
        faults.append(f"{code.atomics} atomic instructions: expected none, results would depend on the order of blocks")
    faults += _tensor_work(code, case)
    if case.has_pipelined_loads and not code.asynchronous_copies:
        faults.append("nothing is copied asynchronously: expected loads that are under way while it multiplies")
    return faults + (_changed(counts(code), counted) if counted else [])


def _resources(code: MachineCode) -> list[str]:
    gpu, faults = GPUS[code.capability], []
    spilled = (code.spill_store_bytes, code.spill_load_bytes, code.stack_bytes, code.local_memory_instructions)
    if any(spilled):
        stores, loads, stack, instructions = spilled
        faults.append(
            f"spills {stores} bytes out and {loads} in, {stack} bytes of stack, {instructions} instructions on local "
            "memory: expected none"
        )
    if code.shared_bytes > gpu.least_shared_bytes:
        faults.append(f"{code.shared_bytes} bytes of shared memory: expected at most {gpu.least_shared_bytes}")
    if code.blocks_per_sm < 1:
        faults.append(f"no block fits on an SM: {code.registers} registers in {code.num_warps} warps")
    return faults


def _tensor_work(code: MachineCode, case: Case) -> list[str]:
    used = set(code.tensor_instructions)
    if not case.multiply_adds:
        return [f"{sorted(used)}: expected no tensor-core instruction"] if used else []
    expected = {TENSOR_OPCODE[code.capability]} if case.has_wide_products else set()
    expected |= {TENSOR_OPCODE[80]} if case.has_narrow_products else set()
    if wrong := used ^ expected:
        return [f"tensor-core instructions {sorted(used)}: {sorted(wrong)} should be otherwise"]
    if code.multiply_adds < case.multiply_adds:
        return [f"{code.multiply_adds} multiply-adds: expected {case.multiply_adds} in each iteration alone"]
    return []


def _changed(measured: dict[str, int], counted: dict[str, int]) -> list[str]:
    wrong = [
        f"{measured[name]} in {name}: expected at most {counted[name]} and 5 %"
        for name in ("hot_loop", "instructions")
        if measured[name] > ROOM * counted[name]
    ]
    if measured["tensor_instructions"] != counted["tensor_instructions"]:
        wrong.append(
            f"{measured['tensor_instructions']} tensor-core instructions: expected {counted['tensor_instructions']}"
        )
    return wrong
