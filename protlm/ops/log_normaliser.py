"""The logarithm of a normaliser, from query sums without the factors that cancel in the output."""

import math

import torch
from torch import Tensor

from protlm.ops.inputs import AttentionInputs


def absolute_logarithm(inputs: AttentionInputs, query_sums: Tensor) -> Tensor:
    """Returns log Σ φ(q)·φ(k) over the keys of each query (batch, heads, length), zero where a token is not real.

    Args:
        inputs: The inputs of a call of an exponential map, with the A that was used.
        query_sums: Natural logarithms of the same sums without the factors that the features of a query share:
            exp(−‖q‖²/(2√d)) and, for both features of a product, 1/√(number of features) and (1−4A)^(d/4).
    """
    q, head_dim = inputs.q.to(query_sums.dtype), inputs.q.shape[-1]
    logarithm: Tensor = query_sums - q.square().sum(-1) * (0.5 * head_dim**-0.5) - math.log(inputs.num_features)
    if inputs.oprf_a is not None:
        factor = 0.5 * head_dim * torch.log1p(-4 * _a_of_tokens(inputs, inputs.oprf_a))
        logarithm = logarithm + factor.to(logarithm.dtype)
    if inputs.token_mask is not None:
        logarithm = logarithm.masked_fill(~inputs.token_mask.unsqueeze(1), 0.0)
    return logarithm


def _a_of_tokens(inputs: AttentionInputs, oprf_a: Tensor) -> Tensor:
    """Returns A in float64 (batch, heads, length), or (batch, heads, 1) if all tokens of a row have the same."""
    a = oprf_a.detach().double().expand(inputs.num_segments, -1)
    if inputs.cu_seqlens is None:
        return a.unsqueeze(-1)
    positions = torch.arange(inputs.q.shape[2], device=a.device, dtype=inputs.cu_seqlens.dtype)
    segments = torch.searchsorted(inputs.cu_seqlens, positions, right=True) - 1
    of_tokens: Tensor = a[segments].T
    return of_tokens.unsqueeze(0)
