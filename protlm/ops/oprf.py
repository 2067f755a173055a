"""The A of `oprf` from the data: the mean ‖x + y‖² of every segment from sums over single tokens, not over pairs."""

import torch
from torch import Tensor

from protlm.ops.blocks import cut_into_blocks
from protlm.ops.context_parallel import sum_over_ranks
from protlm.ops.inputs import AttentionInputs
from protlm.ops.random_features import oprf_parameter

_STRETCH_TOKENS = 512


def oprf_a_from_data(inputs: AttentionInputs) -> Tensor:
    """Returns A (segments, heads) in float64, from the mean over all pairs of real tokens of a segment."""
    head_dim = inputs.q.shape[-1]
    sums = _sums_over_tokens(inputs)
    if inputs.group_name:
        sums = sum_over_ranks(sums, inputs)
    q_sums, k_sums, squares, counts = torch.split(sums, [head_dim, head_dim, 1, 1], -1)
    # Σ over pairs of ‖q + k‖² is counts · Σ(‖q‖² + ‖k‖²) + 2 Σq·Σk; a segment without a token keeps 0.
    counts = counts.clamp(min=1)
    means = squares / counts + 2 * (q_sums * k_sums).sum(-1, keepdim=True) / counts.square()
    return oprf_parameter(means.squeeze(-1) * head_dim**-0.5, head_dim)


def _sums_over_tokens(inputs: AttentionInputs) -> Tensor:
    """Returns (segments, heads, 2 · head_dim + 2) in float64: Σq, Σk, Σ(‖q‖² + ‖k‖²) and the number of real tokens."""
    q, k = inputs.q, inputs.k
    heads, head_dim = q.shape[1], q.shape[-1]
    sums = torch.zeros((inputs.num_segments, heads, 2 * head_dim + 2), dtype=torch.float64, device=q.device)
    for block in cut_into_blocks(q, inputs.token_mask, inputs.cu_seqlens, _STRETCH_TOKENS, _STRETCH_TOKENS):
        block_sums = sums.new_zeros((heads, len(block.segments), sums.shape[-1]))
        q_sums, k_sums, squares, counts = torch.split(block_sums, [head_dim, head_dim, 1, 1], -1)
        for stretch in block.stretches:
            q_stretch, k_stretch = (stretch.take(x, inputs.compute_dtype, only_valid=True) for x in (q, k))
            squares += (q_stretch.square().sum((2, 3)) + k_stretch.square().sum((2, 3))).double().unsqueeze(-1)
            q_sums += q_stretch.sum(2).double()
            k_sums += k_stretch.sum(2).double()
            counts += stretch.length if stretch.valid is None else stretch.valid.sum(-1, keepdim=True)
        sums[block.segments] = block_sums.transpose(0, 1)
    return sums
