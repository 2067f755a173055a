"""The slow, obvious float64 twins of the fast ops, against which tests compare them.

They form every feature and every weight and leave the gradient to autograd.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protlm.choices import FeatureMap
from protlm.ops import random_features
from protlm.ops.inputs import AttentionInputs
from protlm.ops.random_features import oprf_parameter


def kernel_features(
    x: Float[Tensor, "*batch length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
    oprf_a: Float[Tensor, "*axes"] | float | None = None,
) -> Float[Tensor, "*broadcast length map_features"]:
    """Returns φ(x) in float64; `protlm.ops.kernel_features` has the formulas."""
    projection = None if projection is None else projection.double()
    return random_features.kernel_features(x.double(), projection, feature_map=feature_map, oprf_a=oprf_a)


def favor_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    causal: bool = False,
    oprf_a: Float[Tensor, "*segments heads"] | None = None,
    near_block: int = 0,
    feature_bias: Float[Tensor, "*bias_heads features"] | None = None,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns FAVOR attention in float64 by forming the (length, length) matrix of estimated, and near exact, weights.

    Works inside the range of float64 exponents: norms of q and k up to about 30. Cost: O(length²).
    """
    inputs = AttentionInputs(
        q, k, v, projection, token_mask, cu_seqlens, oprf_a, feature_map, causal, "", feature_bias, near_block
    )
    weights = _weights(inputs, feature_map)
    totals = weights.sum(-1, keepdim=True)
    is_seen = _allowed_pairs(_segment_of_token(q, cu_seqlens), token_mask, causal).any(-2).unsqueeze(-1)
    return (weights @ v.double().masked_fill(~is_seen, 0.0)) / torch.where(totals == 0, 1.0, totals)


def log_normaliser(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"],
    *,
    feature_map: FeatureMap = "positive",
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    causal: bool = False,
    oprf_a: Float[Tensor, "*segments heads"] | None = None,
    near_block: int = 0,
    feature_bias: Float[Tensor, "*bias_heads features"] | None = None,
) -> Float[Tensor, "batch heads length"]:
    """Returns the logarithm of the sum of each query's weights in `favor_attention`, zero for padding."""
    inputs = AttentionInputs(
        q, k, k, projection, token_mask, cu_seqlens, oprf_a, feature_map, causal, "", feature_bias, near_block
    )
    totals = _weights(inputs, feature_map).sum(-1)
    return torch.where(totals == 0, 1.0, totals).log()


def softmax_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    *,
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns exact attention softmax(q·k/√d)·v in float64, which FAVOR estimates.

    With `window`, each token sees the tokens at most so far away: `local_attention`.
    """
    # Checked like the inputs of a map that needs no projection.
    AttentionInputs(q, k, v, None, token_mask, cu_seqlens, None, "relu", causal).check()
    q, k, v = (tensor.double() for tensor in (q, k, v))
    allowed = _allowed_pairs(_segment_of_token(q, cu_seqlens), token_mask, causal)
    if window is not None:
        places = torch.arange(q.shape[2], device=q.device)
        allowed = allowed & ((places - places.unsqueeze(1)).abs() <= window)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    weights = torch.where(allowed, torch.softmax(scores, -1), 0.0)
    return weights @ v


def _weights(inputs: AttentionInputs, feature_map: FeatureMap) -> Tensor:
    """Returns the weight of every key for every query (batch, heads, length, length), zero where it sees none."""
    inputs.check()
    q, k = inputs.q.double(), inputs.k.double()
    segment = _segment_of_token(q, inputs.cu_seqlens)
    allowed = _allowed_pairs(segment, inputs.token_mask, inputs.causal)
    token_a = None
    if inputs.map_definition.takes_oprf_a:
        if inputs.oprf_a is None:
            token_a = _oprf_a_from_pairs(q, k, segment, allowed)
        else:
            token_a = inputs.oprf_a.detach().double().expand(inputs.num_segments, -1)[segment].transpose(1, 2)
        token_a = token_a.unsqueeze(-1)
    q_features, k_features = (
        kernel_features(x, inputs.projection, feature_map=feature_map, oprf_a=token_a) for x in (q, k)
    )
    if inputs.feature_bias is not None:
        factors = inputs.feature_bias.double().exp().unsqueeze(-2)
        q_features = q_features * torch.cat([factors] * inputs.map_definition.features_per_row, -1)
    weights = q_features @ k_features.transpose(-1, -2)
    if inputs.near_block:
        exact = torch.exp(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
        weights = torch.where(_near_pairs(inputs, segment), exact, weights)
    return torch.where(allowed, weights, 0.0)


def _near_pairs(inputs: AttentionInputs, segment: Tensor) -> Tensor:
    """Returns True where the blocks of two tokens are the same or neighbours, if their segments are the same."""
    positions = torch.arange(segment.shape[1], device=segment.device)
    if inputs.cu_seqlens is not None:
        positions = positions - inputs.cu_seqlens[segment[0]]
    blocks = positions // inputs.near_block
    return (blocks[:, None] - blocks[None, :]).abs() <= 1


def _segment_of_token(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the number of each token's segment (batch, length)."""
    batch, _, length, _ = q.shape
    if cu_seqlens is None:
        return torch.arange(batch, device=q.device).unsqueeze(1).expand(batch, length)
    positions = torch.arange(length, device=q.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True).unsqueeze(0) - 1


def _allowed_pairs(segment: Tensor, token_mask: Tensor | None, causal: bool) -> Tensor:
    """Returns True where a query may see a key (batch, 1, length, length); a padded query sees none."""
    allowed = segment[:, :, None] == segment[:, None, :]
    if token_mask is not None:
        allowed = allowed & token_mask[:, :, None] & token_mask[:, None, :]
    return (allowed.tril() if causal else allowed)[:, None]


@torch.no_grad()
def _oprf_a_from_pairs(q: Tensor, k: Tensor, segment: Tensor, allowed: Tensor) -> Tensor:
    """Returns the A of each token's segment (batch, heads, length), from the mean ‖x + y‖² of all its pairs."""
    same = (segment[:, :, None] == segment[:, None, :]).unsqueeze(1).double()
    head_dim = q.shape[-1]
    # ‖q + k‖² of every pair, written out: the sums themselves would be head_dim times larger.
    squares = q.square().sum(-1).unsqueeze(3) + k.square().sum(-1).unsqueeze(2) + 2 * q @ k.transpose(-1, -2)
    squares = squares * head_dim**-0.5
    sums = same @ torch.where(allowed, squares, 0.0).sum(-1, keepdim=True)
    counts = same @ allowed.double().sum(-1, keepdim=True)
    return oprf_parameter(sums / counts.clamp(min=1), head_dim).squeeze(-1)
