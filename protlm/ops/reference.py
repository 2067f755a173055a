"""The slow, obvious float64 twins of the fast ops.

They form every feature and every weight and leave the gradient to autograd. Tests hold the fast ops against them.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protlm.ops import random_features
from protlm.ops.favor import check_arguments
from protlm.ops.random_features import FeatureMap


def kernel_features(
    x: Float[Tensor, "*batch length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
) -> Float[Tensor, "*batch length features"]:
    """Returns φ(x) in float64; `protlm.ops.kernel_features` has the formulas."""
    projection = None if projection is None else projection.double()
    return random_features.kernel_features(x.double(), projection, feature_map=feature_map)


def favor_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns FAVOR attention in float64 by forming the (length, length) matrix of estimated weights.

    Works inside the range of float64 exponents: norms of q and k up to about 30. Cost: O(length²).
    """
    check_arguments(q, k, v, projection, feature_map=feature_map, token_mask=token_mask, cu_seqlens=cu_seqlens)
    q, k, v = (tensor.double() for tensor in (q, k, v))
    allowed = _allowed_pairs(q, token_mask, cu_seqlens)
    q_features = kernel_features(q, projection, feature_map=feature_map)
    k_features = kernel_features(k, projection, feature_map=feature_map)
    weights = torch.where(allowed, q_features @ k_features.transpose(-1, -2), 0.0)
    totals = weights.sum(-1, keepdim=True)
    return (weights @ v.masked_fill(~allowed.any(-2).unsqueeze(-1), 0.0)) / torch.where(totals > 0, totals, 1.0)


def softmax_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    *,
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns exact attention softmax(q·k/√d)·v in float64: what FAVOR with `positive` features estimates."""
    check_arguments(q, k, v, None, feature_map="relu", token_mask=token_mask, cu_seqlens=cu_seqlens)
    q, k, v = (tensor.double() for tensor in (q, k, v))
    allowed = _allowed_pairs(q, token_mask, cu_seqlens)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    weights = torch.where(allowed, torch.softmax(scores, -1), 0.0)
    return weights @ v


def _allowed_pairs(q: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Returns (batch, 1, length, length): True where a query may see a key; a padded query sees none."""
    batch, _, length, _ = q.shape
    real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if token_mask is None else token_mask
    allowed = real[:, :, None] & real[:, None, :]
    if cu_seqlens is not None:
        positions = torch.arange(length, device=q.device, dtype=cu_seqlens.dtype)
        segment = torch.searchsorted(cu_seqlens, positions, right=True)
        allowed = allowed & (segment[:, None] == segment[None, :])
    return allowed[:, None]
