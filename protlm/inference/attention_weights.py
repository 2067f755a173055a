"""The attention weights of a model on one protein, read a tile of queries at a time.

FAVOR never forms its weights, but defines them: w_ij = φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j) (equations 3 and 4 of arXiv
2009.14794). Read from the features in float64, they are those with which the model computes, not those of exact
attention. A tile has all keys of some queries, so that memory grows with the length and not with its square.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.batches import pack_row
from protlm.model.attention_calls import AttentionCall, visit_attention
from protlm.model.performer import Performer
from protlm.ops import kernel_features
from protlm.ops.feature_maps import MapDefinition, definition_of, with_oprf_a
from protlm.vocabulary import are_residues

TILE_QUERIES = 128

_Weigh = Callable[[int, int, int], Tensor]
"""Takes the first query of a tile, its end, and the number of keys that it may see to weights, up to a factor of each
row."""


def visit_protein(model: Performer, protein: np.ndarray, visit: Callable[[AttentionCall], None]) -> None:
    """Runs the model on one protein, `<cls>` and `<eos>` around it, and visits the attention of every layer.

    Args:
        model: On any device; its mode is restored.
        protein: Residue tokens, uint8 (num_residues,).
        visit: Called with every layer's q, k and v, in order.

    Raises:
        ValueError: No residue, a token that stands for no residue, or more than the learned positions reach.
    """
    if not len(protein) or not are_residues(protein):
        raise ValueError("protein: expected at least one residue token and no other token")
    limit = model.config.max_positions - SPECIAL_TOKENS_PER_SEGMENT
    if model.config.positions == "learned" and len(protein) > limit:
        raise ValueError(
            f"protein: expected at most {limit} residues, which the learned positions of this model reach, "
            f"got {len(protein)}; give a part of it"
        )
    tokens, cu_seqlens = pack_row([protein])
    device = model.embedding.weight.device
    visit_attention(model, tokens.to(device), cu_seqlens.to(device), visit)


def weight_tiles(call: AttentionCall, head: int) -> Iterator[tuple[int, Float[Tensor, "queries length"]]]:
    """Yields the first query of each tile and the weights of its queries, in float64; each row sums to 1.

    The weights of `trig` can be negative. Cost: time O(length² · features), memory O(tile · length).

    Args:
        call: The attention of one protein.
        head: Number of the head, from 0.

    Raises:
        ValueError: The weights of a token are not finite, or beyond the range of float64.
    """
    assert len(call.segments.cu_seqlens) == 2, "the tiles are those of one protein"
    length, causal = len(call.q), call.attention.causal
    weigh = _exact_weights(call, head) if call.attention.is_exact else _estimated_weights(call, head)
    for start in range(0, length, TILE_QUERIES):
        stop = min(start + TILE_QUERIES, length)
        num_keys = stop if causal else length
        weights = weigh(start, stop, num_keys)
        if causal:
            weights.tril_(start)
        totals = weights.sum(-1, keepdim=True)
        if not bool((totals.isfinite() & (totals != 0)).all()):
            raise ValueError(
                f"call: expected attention weights in the range of float64, got others in layer {call.layer}, "
                f"head {head + 1}; the weights of the model are not finite, or its q and k far too large"
            )
        weights.div_(totals)
        yield start, torch.nn.functional.pad(weights, (0, length - num_keys)) if num_keys < length else weights


def share_tiles(call: AttentionCall, head: int) -> Iterator[tuple[int, Float[Tensor, "queries length"]]]:
    """Yields the tiles of `weight_tiles` as shares of attention, none of them negative: |w| / Σ|w|."""
    feature_map = call.attention.feature_map
    is_signed = not call.attention.is_exact and feature_map is not None and definition_of(feature_map).is_signed
    for start, weights in weight_tiles(call, head):
        if is_signed:
            weights = weights.abs_()
            weights.div_(weights.sum(-1, keepdim=True))
        yield start, weights


def attention_matrix(model: Performer, protein: np.ndarray, layer: int, head: int) -> np.ndarray:
    """Returns the whole map of one head, float64 (num_residues + 2, num_residues + 2), a row for each query.

    Args:
        model: On any device.
        protein: Residue tokens.
        layer: From 1.
        head: From 1.

    Raises:
        ValueError: There is no such layer or head, or the protein does not fit (see `visit_protein`).
    """
    for name, number, count in (("layer", layer, model.config.num_layers), ("head", head, model.config.num_heads)):
        if not 1 <= number <= count:
            raise ValueError(f"{name}: expected a number from 1 to {count}, got {number}")
    tiles: list[Tensor] = []

    def read(call: AttentionCall) -> None:
        if call.layer == layer:
            tiles.extend(weights.cpu() for _, weights in weight_tiles(call, head - 1))

    visit_protein(model, protein, read)
    return torch.cat(tiles).numpy()


def _exact_weights(call: AttentionCall, head: int) -> _Weigh:
    """Returns the exponentials exp(q·k/√d − max) of exact attention."""
    q, k = in_float64(call.q[:, head]), in_float64(call.k[:, head])
    attention = call.attention
    scale = attention.head_dim**-0.5
    bias = 0.0 if attention.local_bias is None else attention.local_bias[head].item()

    def weigh(start: int, stop: int, num_keys: int) -> Tensor:
        scores = q[start:stop] @ k[:num_keys].T * scale
        distances = torch.arange(num_keys, device=q.device) - torch.arange(start, stop, device=q.device).unsqueeze(1)
        is_near = distances.abs() <= attention.window
        if bias:
            scores += bias * is_near
        if attention.kind == "local":
            scores.masked_fill_(~is_near, -math.inf)
        if attention.causal:
            scores.masked_fill_(distances > 0, -math.inf)
        weights: Tensor = torch.exp(scores - scores.amax(-1, keepdim=True))
        return weights

    return weigh


def _estimated_weights(call: AttentionCall, head: int) -> _Weigh:
    """Returns the products φ(q)·φ(k), without factors that all keys of a query share."""
    attention = call.attention
    assert attention.feature_map is not None
    definition = definition_of(attention.feature_map)
    rows = None if attention.projection is None else in_float64(attention.projection[head])
    oprf_a = attention.oprf_a(call.q, call.k, call.segments)
    a = None if oprf_a is None else in_float64(oprf_a[0, head])
    bias = None
    if attention.feature_bias is not None:
        # Twice for maps with two features a row.
        bias = in_float64(attention.feature_bias[head]).repeat(definition.features_per_row)
    if attention.near_block:
        assert rows is not None
        return _near_far_weights(call, head, rows, a, bias)
    (q_values, _), (k_values, k_norms) = (
        _values_and_norms(in_float64(x[:, head]), rows, definition, a) for x in (call.q, call.k)
    )
    if not definition.is_exponential:

        def multiply(start: int, stop: int, num_keys: int) -> Tensor:
            norms = k_norms[:num_keys]
            return q_values[start:stop] @ (k_values[:num_keys] * torch.exp(norms - norms.max())).T

        return multiply
    k_logs = k_values + k_norms if bias is None else k_values + k_norms + bias

    def weigh(start: int, stop: int, num_keys: int) -> Tensor:
        # Relative to the largest logarithm of each feature among the keys, which cancels: each row then has a weight of
        # 1 or more, for norms of any size. Where causal attention hides just that key, norms up to 1e4 stay in range.
        references = k_logs[:num_keys].amax(0)
        q_logs = q_values[start:stop] + references
        return torch.exp(q_logs - q_logs.amax(-1, keepdim=True)) @ torch.exp(k_logs[:num_keys] - references).T

    return weigh


def _near_far_weights(
    call: AttentionCall, head: int, rows: Tensor, oprf_a: Tensor | None, bias: Tensor | None
) -> _Weigh:
    """Returns exp(q·k/√d) of near keys and φ(q)·φ(k) of the others."""
    attention = call.attention
    assert attention.feature_map is not None
    q, k = in_float64(call.q[:, head]), in_float64(call.k[:, head])
    q_features, k_features = (
        kernel_features(x, rows, feature_map=attention.feature_map, oprf_a=oprf_a) for x in (q, k)
    )
    if bias is not None:
        k_features = k_features * bias.exp()
    blocks = torch.arange(len(q), device=q.device) // attention.near_block
    scale = attention.head_dim**-0.5

    def weigh(start: int, stop: int, num_keys: int) -> Tensor:
        is_near = (blocks[start:stop].unsqueeze(1) - blocks[:num_keys]).abs() <= 1
        exact = torch.exp(q[start:stop] @ k[:num_keys].T * scale)
        return torch.where(is_near, exact, q_features[start:stop] @ k_features[:num_keys].T)

    return weigh


def _values_and_norms(
    x: Tensor, rows: Tensor | None, definition: MapDefinition, oprf_a: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the part of the features that depends on the projection, and the logarithm of h (length, 1).

    The part is log f for exponential maps and f for others.
    """
    y = x * x.shape[-1] ** -0.25
    norms = definition.norm_exponent / 2 * y.square().sum(-1, keepdim=True)
    if rows is None:
        return definition.apply(x), norms
    rows = definition.rescaled(rows)
    scores = y @ rows.T
    if oprf_a is not None:
        scores = with_oprf_a(scores, rows, oprf_a)
    return definition.apply(scores), norms


def in_float64(x: Tensor) -> Tensor:
    """Returns the tensor in float64, on the CPU if its device is an Apple GPU, which knows no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()
