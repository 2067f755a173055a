"""Health of the attention: how well the random features of each layer still estimate attention weights, on one row.

The estimate for one (query, key) pair is a sum of terms t_f = φ_f(q)·φ_f(k), one for each feature f. As norms grow,
ever fewer features make up the whole sum, the variance explodes, and training stalls without an error.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from protlm.choices import FeatureMap
from protlm.config import ModelConfig
from protlm.model.attention_calls import AttentionCall, visit_attention
from protlm.model.segments import Segments
from protlm.ops.feature_maps import definition_of, with_oprf_a

_NUM_QUERIES = 64
_NUM_KEYS = 64
_DEAD_SHARE = 0.01
"""Fraction of its fair share that a feature must reach in at least one pair."""


@dataclass(frozen=True)
class LayerHealth:
    """The health of the attention of one layer, measured on one row.

    Attributes:
        layer: Number of the layer, from 1.
        q_norm: Mean ‖x‖², x = q/d^¼, over tokens and heads: with k_norm it bounds the variance of the estimates.
        k_norm: The same for keys.
        max_q_norm: Largest mean of a head: a single head that diverges does not show in the mean of all.
        max_k_norm: The same for keys.
        effective_features: Mean over sampled pairs and heads of (Σt)²/Σt², for `trig` of |t|: the number of features
            that share an estimate, from 1 to all. None for exact attention.
        dead_features: Share of the features with less than a hundredth of their fair share of every sampled pair. None
            for exact attention.
    """

    layer: int
    q_norm: float
    k_norm: float
    max_q_norm: float
    max_k_norm: float
    effective_features: float | None
    dead_features: float | None


def attention_health(
    model: nn.Module, tokens: Int[Tensor, " length"], cu_seqlens: Int[Tensor, " bounds"]
) -> list[LayerHealth]:
    """Returns the health of every layer on one row.

    `model(tokens, cu_seqlens)` runs once in evaluation mode, uncompiled, so a model that is wrapped for several devices
    works too; every device then has to make this call. At most 64 queries of the row, and 64 keys for each of them, are
    sampled, evenly spaced and the same in every call.

    Args:
        model: A `Performer`, or a module that wraps one.
        tokens: A packed row, not empty.
        cu_seqlens: int32 bounds of its segments.
    """
    healths: list[LayerHealth] = []
    visit_attention(model, tokens, cu_seqlens, lambda call: healths.append(_layer_health(call)))
    return healths


def _layer_health(call: AttentionCall) -> LayerHealth:
    head_dim = call.attention.head_dim
    q_norms, k_norms = (x.float().square().sum(-1).mean(0) / math.sqrt(head_dim) for x in (call.q, call.k))
    effective, dead = None, None
    if not call.attention.is_exact:
        effective, dead = (numbers.mean().item() for numbers in feature_use(call))
    return LayerHealth(
        layer=call.layer,
        q_norm=q_norms.mean().item(),
        k_norm=k_norms.mean().item(),
        max_q_norm=q_norms.max().item(),
        max_k_norm=k_norms.max().item(),
        effective_features=effective,
        dead_features=dead,
    )


def feature_use(call: AttentionCall) -> tuple[Float[Tensor, " heads"], Float[Tensor, " heads"]]:
    """Returns the effective features and the share of dead features of every head, as `LayerHealth` defines them.

    Raises:
        ValueError: The attention is exact.
    """
    attention, segments = call.attention, call.segments
    if attention.is_exact or attention.feature_map is None:
        raise ValueError(f"call: expected attention with features, got {attention.kind!r}")
    queries, keys = _sampled_pairs(segments, attention.causal)
    oprf_a = attention.oprf_a(call.q, call.k, segments)
    effective, dead = [], []
    # One head at a time: the terms of all pairs of all heads would take more memory than the layer itself.
    for head in range(attention.num_heads):
        rows = None if attention.projection is None else attention.projection[head].float()
        a = None if oprf_a is None else oprf_a[segments.numbers[queries], head].float().view(-1, 1, 1)
        q_logs, k_logs = (
            log_features(x[tokens, head].float(), rows, attention.feature_map, a)
            for x, tokens in ((call.q, queries.unsqueeze(1)), (call.k, keys))
        )
        if attention.feature_bias is not None:
            # Twice for maps with two features a row.
            q_logs = q_logs + attention.feature_bias[head].repeat(definition_of(attention.feature_map).features_per_row)
        # Softmax subtracts the largest logarithm of each pair, so the shares are finite for norms of any size.
        shares = torch.softmax(q_logs + k_logs, -1)
        effective.append(shares.square().sum(-1).reciprocal().mean())
        dead.append((shares.amax((0, 1)) < _DEAD_SHARE / shares.shape[-1]).float().mean())
    return torch.stack(effective), torch.stack(dead)


def num_features_of(config: ModelConfig, feature_map: FeatureMap) -> int:
    """Returns the number of features of one vector in the layers of a model that have this feature map."""
    rows = config.num_features if config.has_projection else config.head_dim
    return rows * definition_of(feature_map).features_per_row


def _sampled_pairs(segments: Segments, causal: bool) -> tuple[Tensor, Tensor]:
    """Returns queries (queries,), and for each of them keys (queries, keys) that it sees, as positions in the row."""
    length = len(segments.positions)
    queries = _spaced(torch.tensor(length, device=segments.positions.device), min(length, _NUM_QUERIES))
    positions = segments.positions[queries]
    num_seen = positions + 1 if causal else segments.lengths[queries]
    # The keys of a shorter segment are sampled repeatedly, all about equally often.
    return queries, (queries - positions).unsqueeze(1) + _spaced(num_seen.unsqueeze(1), _NUM_KEYS)


def _spaced(sizes: Tensor, count: int) -> Tensor:
    """Returns `count` evenly spaced numbers from 0 to size − 1 along the last axis."""
    steps = torch.arange(count, device=sizes.device)
    return (2 * steps + 1) * sizes // (2 * count)


def log_features(
    x: Float[Tensor, "*axes head_dim"],
    projection: Float[Tensor, "rows head_dim"] | None,
    feature_map: FeatureMap,
    oprf_a: Float[Tensor, "*broadcast 1"] | None = None,
) -> Float[Tensor, "*axes features"]:
    """Returns log|φ(x)| of `kernel_features`, without the terms that all features of x share: they cancel in a share.

    Raises:
        ValueError: An unknown map, or one without a formula.
    """
    definition = definition_of(feature_map)
    if projection is None:
        return definition.log_features(x)
    projection = definition.rescaled(projection)
    scores: Tensor = x @ projection.T * x.shape[-1] ** -0.25
    if oprf_a is not None:
        scores = with_oprf_a(scores, projection, oprf_a)
    return definition.log_features(scores)
