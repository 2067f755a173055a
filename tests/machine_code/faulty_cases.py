"""Small kernels with one fault each, and one without: what the expectations must be able to tell apart."""

import torch
import triton
import triton.language as tl

from protlm.ops.cuda.launch import Launch
from tests.machine_code.expectations import Case


@triton.jit
def multiply(
    left, right, out, rows, depth, stride,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ADDS_ATOMICALLY: tl.constexpr,
):  # fmt: skip
    """Multiplies a block of rows with a matrix, step by step along the depth."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    step = tl.arange(0, STEP)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, depth, STEP):
        some = tl.load(left + row[:, None] * stride + (start + step)[None, :], mask=row[:, None] < rows, other=0.0)
        others = tl.load(right + (start + step)[:, None] * COLUMNS + column[None, :])
        total = tl.dot(some, others, total, input_precision="ieee")
    where = out + row[:, None] * COLUMNS + column[None, :]
    if ADDS_ATOMICALLY:
        tl.atomic_add(where, total, mask=row[:, None] < rows)
    else:
        tl.store(where, total, mask=row[:, None] < rows)


@triton.jit
def copy(source, target, BLOCK: tl.constexpr):
    """Copies a block."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + position, tl.load(source + position))


def _multiply(
    dtype=torch.bfloat16, block=128, columns=128, step=64, num_warps=8, num_stages=3, adds_atomically=False
) -> Case:
    depth = 4096
    arguments = {
        "left": torch.empty(4096, depth, dtype=dtype, device="meta"),
        "right": torch.empty(depth, columns, dtype=dtype, device="meta"),
        "out": torch.empty(4096, columns, dtype=torch.float32, device="meta"),
        "rows": 4096,
        "depth": depth,
        "stride": depth,
    }
    constants = {"BLOCK": block, "COLUMNS": columns, "STEP": step, "ADDS_ATOMICALLY": adds_atomically}
    launch = Launch(multiply, (4096 // block,), arguments, constants, num_warps, num_stages)
    return Case(launch, block * columns * step, has_pipelined_loads=True)


def _copy(first: int) -> Case:
    elements = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    arguments = {"source": elements[first:], "target": torch.empty_like(elements)}
    return Case(Launch(copy, (1,), arguments, {"BLOCK": 1024}, 4, 1), 0, has_pipelined_loads=False)


def cases(capability: int) -> dict[str, Case]:
    """Returns the kernel without fault, and its faulty brothers by fault."""
    assert capability
    return {
        "sound": _multiply(),
        "spills": _multiply(num_warps=1),
        "too much shared memory": _multiply(num_stages=8),
        "atomics": _multiply(adds_atomically=True),
        "no tensor cores": _multiply(dtype=torch.float32, block=32, columns=32, step=32, num_warps=4, num_stages=2),
        "not pipelined": _multiply(num_stages=1),
        "aligned": _copy(0),
        "not aligned": _copy(1),
    }
