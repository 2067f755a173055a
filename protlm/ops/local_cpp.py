"""Exact attention to near tokens by the compiled kernels: how a call is divided into units and passed to C++.

They compute in float32, also for shorter inputs, but for calls of bfloat16 on a processor that has units for it.
"""

import ctypes
import functools
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protlm.ops import compiled
from protlm.ops.inputs import LocalInputs, result_like

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST_TRAINED = 2048
"""Tokens of a segment up to which the backward of float32 is the faster one: the units of a longer one compute most of
it twice, and each holds all of its keys and values."""
_UNIT_TOKENS = 512
"""Tokens of a unit, a multiple of the block of 32 queries: their keys are packed once, and those within reach of a seam
twice."""


def covers(inputs: LocalInputs) -> bool:
    """Returns whether the kernel can compute a call; the others go to `local_torch`."""
    return inputs.q.device.type == "cpu" and inputs.q.dtype in _DTYPES and inputs.token_mask is None


def longest_exact(dtype: torch.dtype, *, has_gradients: bool) -> int:
    """Returns up to how many tokens attention to a whole segment is faster by the kernel than by PyTorch's, here.

    Args:
        dtype: Of q, k and v.
        has_gradients: Whether their gradients are wanted too.
    """
    if dtype not in _DTYPES or compiled.why_not() is not None or compiled.best_kernel() != "avx512":
        return 0
    is_of_float32 = dtype != torch.bfloat16 or not compiled.best_half_kernel()
    return _LONGEST_TRAINED if has_gradients and is_of_float32 else sys.maxsize


def forward(inputs: LocalInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, and for the backward each query's reference score, to base 2, and its inverse sum of weights.

    The weights of a query are 2 to the power of its scores less the reference, which is the largest or not far below.
    """
    dtype = _dtype_of(inputs)
    out = result_like(inputs.v, dtype=dtype)
    maxima, factors = (inputs.q.new_empty(inputs.q.shape[:3], dtype=torch.float32) for _ in range(2))
    _run("forward", inputs, maxima, factors, {"out": out}, dtype)
    return out.to(inputs.q.dtype), maxima, factors


def backward(
    inputs: LocalInputs, out_grad: Tensor, out: Tensor, maxima: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; the weights are computed again."""
    dtype = _dtype_of(inputs)
    q_grad, k_grad, v_grad = (result_like(x, dtype=dtype) for x in (inputs.q, inputs.k, inputs.v))
    tensors = {"out": out, "out_grad": out_grad, "q_grad": q_grad, "k_grad": k_grad, "v_grad": v_grad}
    _run("backward", inputs, maxima, factors, tensors, dtype)
    return q_grad.to(inputs.q.dtype), k_grad.to(inputs.q.dtype), v_grad.to(inputs.q.dtype)


def _dtype_of(inputs: LocalInputs) -> torch.dtype:
    """Returns the type in which a call is computed: bfloat16 only where the processor has units for it."""
    is_bfloat16 = inputs.q.dtype == torch.bfloat16 and bool(compiled.best_half_kernel())
    return torch.bfloat16 if is_bfloat16 else torch.float32


def _run(
    task: str,
    inputs: LocalInputs,
    maxima: Tensor,
    factors: Tensor,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Runs a task by the kernel of a type; tensors along the length that have another are copied."""
    batch, heads, length, head_dim = inputs.q.shape
    units = _units_of_rows(batch, length) if inputs.cu_seqlens is None else _units(inputs.cu_seqlens.tolist())
    # The call holds only pointers: what they point to must live until it is over.
    alive: list[Any] = [units]

    def strided(x: Tensor) -> compiled.StridedTensor:
        x = x.to(dtype)
        alive.append(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous())
        return compiled.StridedTensor(alive[-1].data_ptr(), *alive[-1].stride()[:3])

    call = compiled.LocalCall(
        heads=heads,
        head_dim=head_dim,
        num_tokens=length,
        before=inputs.before,
        after=inputs.after,
        units=units.ctypes.data,
        num_units=len(units),
        longest_unit=int(units[:, 4].max(initial=0)),
        maxima=maxima.data_ptr(),
        factors=factors.data_ptr(),
        result_bytes=inputs.q.numel() * dtype.itemsize,
        num_threads=torch.get_num_threads(),
        is_backward=task == "backward",
        **{name: strided(x) for name, x in ({"q": inputs.q, "k": inputs.k, "v": inputs.v} | tensors).items()},
    )
    functions = compiled.functions("local", compiled.kernel_of(dtype))
    workspace = torch.empty(functions["workspace"](ctypes.byref(call)), dtype=torch.float32, device="cpu")
    call.workspace = workspace.data_ptr()
    functions[task](ctypes.byref(call))


@functools.lru_cache(maxsize=64)
def _units_of_rows(batch: int, length: int) -> np.ndarray:
    units = np.tile(_units([0, length]), (batch, 1))
    units[:, 0] = np.repeat(np.arange(batch), len(units) // max(batch, 1))
    return units


def _units(bounds: list[int]) -> np.ndarray:
    """Returns the units of the segments of one row, int64, rows of `LocalUnit`."""
    starts, counts = np.array(bounds[:-1], dtype=np.int64), np.diff(bounds)
    num_units = -(-counts // _UNIT_TOKENS)
    segment = np.repeat(np.arange(len(counts)), num_units)
    index = np.arange(len(segment)) - np.repeat(np.cumsum(num_units) - num_units, num_units)
    first = index * _UNIT_TOKENS
    count = np.minimum(counts[segment] - first, _UNIT_TOKENS)
    columns = (np.zeros_like(segment), starts[segment], counts[segment], first, count)
    return np.ascontiguousarray(np.stack(columns, 1), dtype=np.int64)
