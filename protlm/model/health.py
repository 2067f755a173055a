"""Health of the attention: how well the random features of each layer still estimate attention weights, on one row.

The estimate for one (query, key) pair is a sum of terms t_f = φ_f(q)·φ_f(k), one for each feature f. As norms grow,
ever fewer features make up the whole sum, the variance explodes, and training stalls without an error.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from protlm.choices import FeatureMap
from protlm.model.attention import SelfAttention
from protlm.model.segments import Segments
from protlm.ops.feature_maps import definition_of, with_oprf_a
from protlm.ops.inputs import AttentionInputs
from protlm.ops.oprf import oprf_a_from_data

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


@torch.no_grad()
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

    def measure(attention: nn.Module, arguments: tuple[Tensor, Segments, tuple[Tensor, Tensor] | None]) -> None:
        assert isinstance(attention, SelfAttention)
        # While a layer runs, its weights are complete even if devices share them.
        q, k, _ = attention.queries_keys_values(*arguments)
        healths.append(_layer_health(len(healths) + 1, attention, q, k, arguments[1]))

    attentions = [module for module in model.modules() if isinstance(module, SelfAttention)]
    handles = [attention.register_forward_pre_hook(measure) for attention in attentions]
    try:
        # A compiled layer would not call the hooks.
        with _evaluating(model), torch.compiler.set_stance("force_eager"):
            model(tokens, cu_seqlens)
    finally:
        for handle in handles:
            handle.remove()
    return healths


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _layer_health(layer: int, attention: SelfAttention, q: Tensor, k: Tensor, segments: Segments) -> LayerHealth:
    q_norms, k_norms = (x.float().square().sum(-1).mean(0) / math.sqrt(attention.head_dim) for x in (q, k))
    effective, dead = None, None
    if attention.kind != "softmax":
        effective, dead = _feature_use(attention, attention.kind, q, k, segments)
    return LayerHealth(
        layer=layer,
        q_norm=q_norms.mean().item(),
        k_norm=k_norms.mean().item(),
        max_q_norm=q_norms.max().item(),
        max_k_norm=k_norms.max().item(),
        effective_features=effective,
        dead_features=dead,
    )


def _feature_use(
    attention: SelfAttention, feature_map: FeatureMap, q: Tensor, k: Tensor, segments: Segments
) -> tuple[float, float]:
    """Returns the number of effective features, and the share of dead ones."""
    queries, keys = _sampled_pairs(segments, attention.causal)
    oprf_a = _oprf_a(attention, q, k, segments)
    effective, dead = [], []
    # One head at a time: the terms of all pairs of all heads would take more memory than the layer itself.
    for head in range(attention.num_heads):
        rows = None if attention.projection is None else attention.projection[head].float()
        a = None if oprf_a is None else oprf_a[segments.numbers[queries], head].view(-1, 1, 1)
        q_logs, k_logs = (
            log_features(x[tokens, head].float(), rows, feature_map, a)
            for x, tokens in ((q, queries.unsqueeze(1)), (k, keys))
        )
        # Softmax subtracts the largest logarithm of each pair, so the shares are finite for norms of any size.
        shares = torch.softmax(q_logs + k_logs, -1)
        effective.append(shares.square().sum(-1).reciprocal().mean())
        dead.append((shares.amax((0, 1)) < _DEAD_SHARE / shares.shape[-1]).float().mean())
    return torch.stack(effective).mean().item(), torch.stack(dead).mean().item()


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


def _oprf_a(attention: SelfAttention, q: Tensor, k: Tensor, segments: Segments) -> Tensor | None:
    """Returns the A of every segment and head (segments, heads) in the attention; None for maps without an A."""
    if not attention.takes_oprf_a:
        return None
    fixed = attention.fixed_oprf_a()
    if fixed is not None:
        return fixed.expand(len(segments.cu_seqlens) - 1, -1)
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    return oprf_a_from_data(AttentionInputs(q, k, q, None, None, segments.cu_seqlens)).float()


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
