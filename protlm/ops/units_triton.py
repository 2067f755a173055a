"""Causal and near-far attention on a GPU by Triton kernels: how calls are shared out, and what their results are.

The kernels and their launches are in `protlm.ops.cuda`, which needs Triton.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from protlm.ops.cuda.launch import run_on
from protlm.ops.cuda.tiles import padded_dim, padded_features
from protlm.ops.cuda.units import state_dtype
from protlm.ops.inputs import AttentionInputs, check_bounds, result_like

if TYPE_CHECKING:
    from protlm.ops.cuda.unit_call import UnitCall

_STATE_BYTES = 1 << 30
"""States of the units that are held at once: of calls with more the heads are computed in groups, at least one."""


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the output, like v, and the query sums (batch, heads, length).

    With a near field these are natural logarithms of the absolute normalisers, zero for padding; else those of
    `favor_triton`.
    """
    check_bounds(inputs.cu_seqlens, inputs.q.shape[2])
    out, query_sums = result_like(inputs.v), _empty_sums(inputs)
    for heads in _head_groups(inputs):
        call = _call(inputs.of_heads(heads))
        sums = _empty_sums(call.inputs)
        run_on(inputs.q.device, call.forward(out[:, heads], sums))
        query_sums[:, heads] = sums * math.log(2) if inputs.near_block else sums
    if inputs.near_block and inputs.token_mask is not None:
        query_sums.masked_fill_(~inputs.token_mask.unsqueeze(1), 0.0)
    return out, query_sums


def backward(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, query_sums: Tensor, sums_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; states and features are computed again."""
    grads = result_like(inputs.q), result_like(inputs.k), result_like(inputs.v)
    for heads in _head_groups(inputs):
        call = _call(inputs.of_heads(heads))
        sums = (query_sums[:, heads] / (math.log(2) if inputs.near_block else 1.0)).contiguous()
        of_sums = None if sums_grad is None else sums_grad[:, heads].contiguous()
        q_grad, k_grad, v_grad = (grad[:, heads] for grad in grads)
        pulled, inner = out_grad[:, heads], torch.empty_like(sums)
        # One after the other: what the first of them holds is free for the second.
        run_on(inputs.q.device, call.of_queries(pulled, out[:, heads], sums, of_sums, inner, q_grad))
        run_on(inputs.q.device, call.of_keys(pulled, sums, inner, (k_grad, v_grad)))
    return grads


def _empty_sums(inputs: AttentionInputs) -> Tensor:
    return inputs.q.new_empty(inputs.q.shape[:3], dtype=inputs.compute_dtype)


def _head_groups(inputs: AttentionInputs) -> Iterator[slice]:
    """Yields the heads that are computed together."""
    from protlm.ops.cuda.unit_call import unit_tokens

    batch, heads, length, head_dim = inputs.q.shape
    num_units = batch * -(-length // unit_tokens(inputs)) + inputs.num_segments
    # Of a unit in float32, and what it reads.
    state = padded_features(inputs.num_features) * padded_dim(head_dim) * (4 + state_dtype(inputs).itemsize)
    step = max(1, _STATE_BYTES // (num_units * state))
    for first in range(0, heads, step):
        yield slice(first, min(first + step, heads))


def _call(inputs: AttentionInputs) -> "UnitCall":
    from protlm.ops.cuda.unit_call import UnitCall

    return UnitCall(inputs)
