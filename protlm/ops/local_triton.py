"""Exact attention to near tokens on a GPU by Triton kernels, without a matrix of (length, window) in memory.

The kernels and their launches are in `protlm.ops.cuda`, which needs Triton.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from protlm.ops import favor_triton
from protlm.ops.cuda.launch import run_on
from protlm.ops.cuda.units import cut_into_units, with_reach
from protlm.ops.inputs import AttentionInputs, LocalInputs, result_like

if TYPE_CHECKING:
    from protlm.ops.cuda.near_call import NearCall

_UNIT_TOKENS = 128
"""Tokens of a unit: one to four tiles."""


def covers(inputs: LocalInputs) -> bool:
    """Returns whether the kernels can compute a call."""
    return favor_triton.covers_tensor(inputs.q) and favor_triton.why_not() is None


def forward(inputs: LocalInputs) -> tuple[Tensor, Tensor]:
    """Returns the output, and for the backward the logarithms to base 2 of the normalisers (batch, heads, length)."""
    out = result_like(inputs.v)
    query_sums = inputs.q.new_empty(inputs.q.shape[:3], dtype=inputs.compute_dtype)
    run_on(inputs.q.device, [near_call(inputs).forward(out, query_sums)])
    return out, query_sums


def backward(inputs: LocalInputs, out_grad: Tensor, out: Tensor, query_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; the weights are computed again."""
    from protlm.ops.cuda.call import with_neighbours

    q_grad, k_grad, v_grad = (result_like(x) for x in (inputs.q, inputs.k, inputs.v))
    call, inner = near_call(inputs), torch.empty_like(query_sums)
    out_grad = with_neighbours(out_grad)
    launches = [
        call.query_gradients(out_grad, out, query_sums, inner, q_grad),
        call.key_gradients(out_grad, query_sums, inner, (k_grad, v_grad)),
    ]
    run_on(inputs.q.device, launches)
    return q_grad, k_grad, v_grad


def near_call(inputs: LocalInputs, capability: int | None = None) -> "NearCall":
    """Returns the launches of a call; `capability` stands in for that of the device."""
    from protlm.ops.cuda.call import with_neighbours
    from protlm.ops.cuda.near_call import NearCall

    q, k, v = (with_neighbours(x) for x in (inputs.q, inputs.k, inputs.v))
    # Like the inputs of a map that needs no projection.
    like_favor = AttentionInputs(q, k, v, None, inputs.token_mask, inputs.cu_seqlens, None, "relu")
    units = with_reach(cut_into_units(like_favor, _UNIT_TOKENS), like_favor, q.shape[2])
    return NearCall(like_favor, units, inputs.before, inputs.after, capability)
