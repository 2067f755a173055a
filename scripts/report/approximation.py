"""Errors of whole attention against its exact value: which inputs are drawn, and how errors are measured."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from protlm.ops import draw_projection, favor_attention, kernel_features
from protlm.ops.feature_maps import definition_of
from scripts.report.estimates import generator_of


def rows_for(feature_map: str, num_features: int) -> int:
    """Returns the rows that give this many features."""
    return num_features // definition_of(feature_map).features_per_row


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Returns ‖values − expected‖/‖expected‖, over all elements."""
    return ((values.double() - expected).norm() / expected.norm()).item()


def on_sphere(shape: Sequence[int], square: float, generator: torch.Generator) -> Tensor:
    """Returns float64 vectors q in uniform directions with ‖q/d^¼‖² = square."""
    vectors = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return functional.normalize(vectors, dim=-1) * (math.sqrt(square) * shape[-1] ** 0.25)


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the slope of the least-squares line through (log x, log y)."""
    logs_x, logs_y = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    centred = logs_x - logs_x.mean()
    return ((centred * logs_y).sum() / centred.square().sum()).item()


def uniform_errors(
    feature_map: str, kind: str, *, length: int, head_dim: int, square: float, num_features: int, draws: int, seed: int
) -> Tensor:
    """Returns max|A − Â| over all pairs of `length` queries and keys, for each draw of points and projection."""
    generator, errors = generator_of(seed), []
    for _ in range(draws):
        q, k = (on_sphere((length, head_dim), square, generator) for _ in range(2))
        projection = draw_projection(
            rows_for(feature_map, num_features), head_dim, kind=kind, generator=generator, dtype=torch.float64
        )
        q_features, k_features = (kernel_features(x, projection, feature_map=feature_map) for x in (q, k))
        weights = torch.exp(q @ k.T / math.sqrt(head_dim))
        errors.append((q_features @ k_features.T - weights).abs().max())
    return torch.stack(errors)


def output_errors(
    q: Tensor, k: Tensor, v: Tensor, combinations: Sequence[tuple[str, str, int]], seed: int
) -> dict[tuple[str, str, int], Tensor]:
    """Returns the mean squared error of the normalised output of each head, for (map, kind, features); float64.

    Each head has inputs and a projection of its own: heads are the draws.
    """
    expected = functional.scaled_dot_product_attention(q, k, v)
    heads, head_dim = q.shape[1], q.shape[-1]
    errors = {}
    for feature_map, kind, num_features in combinations:
        projection = draw_projection(
            rows_for(feature_map, num_features), head_dim, kind=kind, num_heads=heads, generator=generator_of(seed),
            dtype=torch.float64,
        )  # fmt: skip
        out = favor_attention(q, k, v, projection, feature_map=feature_map)
        errors[feature_map, kind, num_features] = (out - expected).square().mean((0, 2, 3))
    return errors


class Stack:
    """Attention layers of one set of random weights, pre-LN with residuals and normalised queries and keys."""

    def __init__(self, *, layers: int, heads: int, head_dim: int, square: float, generator: torch.Generator) -> None:
        self.heads, self.square = heads, square
        width = heads * head_dim
        self.weights = torch.randn(layers, 4, width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)

    def run(self, x: Tensor, attend: "Attention") -> list[Tensor]:
        """Returns the residual stream (length, width) after each layer."""
        streams = []
        for layer, (to_q, to_k, to_v, to_out) in enumerate(self.weights):
            normed = functional.layer_norm(x, x.shape[-1:])
            q, k, v = (self._split(normed @ weight) for weight in (to_q, to_k, to_v))
            q, k = (functional.normalize(z, dim=-1) * (self.square**0.5 * z.shape[-1] ** 0.25) for z in (q, k))
            out = attend(layer, q, k, v)
            x = x + out[0].transpose(0, 1).flatten(1) @ to_out
            streams.append(x)
        return streams

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(0, 1).unsqueeze(0)


class Attention:
    """Exact attention of a stack, or FAVOR with an independent projection for each layer and head."""

    def __init__(self, feature_map: str | None = None, projections: Tensor | None = None) -> None:
        self.feature_map, self.projections = feature_map, projections

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns the attention of one layer."""
        if self.feature_map is None or self.projections is None:
            return functional.scaled_dot_product_attention(q, k, v)
        return favor_attention(q, k, v, self.projections[layer], feature_map=self.feature_map)


def layer_errors(
    variants: Sequence[tuple[str, str, int]], *, layers: int, length: int, heads: int, head_dim: int, square: float,
    draws: int, seed: int,
) -> dict[tuple[str, str, int], list[list[float]]]:  # fmt: skip
    """Returns for (map, kind, features) and each draw the relative error of the residual stream after each layer."""
    generator = generator_of(seed)
    errors: dict[tuple[str, str, int], list[list[float]]] = {variant: [] for variant in variants}
    for _ in range(draws):
        stack = Stack(layers=layers, heads=heads, head_dim=head_dim, square=square, generator=generator)
        x = torch.randn(length, heads * head_dim, generator=generator, dtype=torch.float64)
        expected = stack.run(x, Attention())
        for feature_map, kind, num_features in variants:
            rows = rows_for(feature_map, num_features)
            drawn = draw_projection(
                rows, head_dim, kind=kind, num_heads=layers * heads, generator=generator, dtype=torch.float64
            )
            streams = stack.run(x, Attention(feature_map, drawn.unflatten(0, (layers, heads))))
            pairs = zip(streams, expected, strict=True)
            errors[feature_map, kind, num_features].append([relative_error(*pair) for pair in pairs])
    return errors


def attention_with_epsilon(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, epsilon: float, *, whole_exponent: bool = True
) -> Tensor:
    """Returns attention with the usual features exp(· − max) + ε: the maximum per query, and over all keys of a head.

    The maximum is that of the whole exponent ω·x − ‖x‖²/2, or of ω·x alone. Without ε it cancels, and float64 keeps
    the output exact.
    """
    half_squares = (x.square().sum(-1, keepdim=True) / (2 * math.sqrt(x.shape[-1])) for x in (q, k))
    features = []
    for x, half_square, axes in zip((q, k), half_squares, ((-1,), (-2, -1)), strict=True):
        exponents = x @ projection.transpose(-1, -2) * x.shape[-1] ** -0.25 - half_square
        bounded = exponents if whole_exponent else exponents + half_square
        features.append(torch.exp(exponents - bounded.amax(axes, keepdim=True)) + epsilon)
    q_features, k_features = features
    totals = q_features @ k_features.sum(-2).unsqueeze(-1)
    return (q_features @ (k_features.transpose(-1, -2) @ v)) / totals


def epsilon_biases(
    epsilons: Sequence[float], *, variance: float, length: int, draws: int, head_dim: int, num_features: int, seed: int
) -> dict[str, list[float]]:
    """Returns by how much each ε changes the output, for each draw, and the error of favor_attention in float32.

    Keys are `ε, maximum over …` and `favor_attention`; an error is relative to the same draw without ε in float64.
    """
    generator = generator_of(seed)
    errors: dict[str, list[float]] = {}
    for _ in range(draws):
        q, k, v = torch.randn(3, 1, 1, length, head_dim, generator=generator, dtype=torch.float64).float().double()
        q, k = (x * math.sqrt(variance) for x in (q, k))
        projection = draw_projection(num_features, head_dim, generator=generator).double()
        expected = attention_with_epsilon(q, k, v, projection, 0.0)
        for epsilon in epsilons:
            for whole, name in ((True, "whole exponent"), (False, "projection")):
                out = attention_with_epsilon(q, k, v, projection, epsilon, whole_exponent=whole)
                errors.setdefault(f"{epsilon:.0e}, {name}", []).append(relative_error(out, expected))
        ours = favor_attention(q.float(), k.float(), v.float(), projection.float())
        errors.setdefault("favor_attention", []).append(relative_error(ours, expected))
    return errors
