"""Estimates of the softmax kernel over many draws: how draws are made, some at a time, and averaged."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from protlm.ops import draw_projection, kernel_features, oprf_parameter
from protlm.ops.feature_maps import DEFINITIONS, definition_of
from scripts.report.closed_forms import Pair, mean_estimate

SOFTMAX_MAPS = tuple(name for name, definition in DEFINITIONS.items() if definition.is_softmax_estimate)
KINDS = ("iid", "orthogonal", "simplex")
DRAWS_AT_ONCE = 1_000

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Mean:
    """A mean of independent samples and its standard error."""

    value: float
    standard_error: float

    def z_value(self, expected: float) -> float:
        """Returns the distance of the mean from an expected value, in standard errors."""
        return (self.value - expected) / self.standard_error


def mean_of(samples: Tensor) -> Mean:
    """Returns the mean of independent samples."""
    return Mean(samples.mean().item(), (samples.std() / math.sqrt(len(samples))).item())


def ratio_of(numerator: Mean, denominator: Mean) -> Mean:
    """Returns a ratio of independent means; its error is that of the first order."""
    value = numerator.value / denominator.value
    relative = math.hypot(numerator.standard_error / numerator.value, denominator.standard_error / denominator.value)
    return Mean(value, abs(value) * relative)


def generator_of(seed: int) -> torch.Generator:
    """Returns a generator of its own for one measurement."""
    return torch.Generator().manual_seed(seed)


def best_a(pair: Pair, head_dim: int) -> float:
    """Returns the A of `oprf` for one pair."""
    return oprf_parameter(torch.tensor(pair.sum_square, dtype=torch.float64), head_dim).item()


def draw_without_signs(
    num_features: int, head_dim: int, *, num_heads: int, generator: torch.Generator, **_: object
) -> Tensor:
    """Returns one block of orthogonal rows with the fault that PAPER.md warns of: Q of a QR without sign(diag R)."""
    q = torch.linalg.qr(torch.randn(num_heads, head_dim, head_dim, generator=generator, dtype=torch.float64))[0]
    norms = torch.randn(num_heads, num_features, head_dim, generator=generator, dtype=torch.float64).norm(dim=-1)
    return q[:, :num_features] * norms.unsqueeze(-1)


def row_estimates(feature_map: str, x: Tensor, y: Tensor, projection: Tensor, oprf_a: float | None) -> Tensor:
    """Returns (draws, directions, rows): the estimate of the kernel by each row, from x and y (…, directions, d)."""
    scale = x.shape[-1] ** 0.25
    options = {"feature_map": feature_map, "oprf_a": oprf_a if definition_of(feature_map).takes_oprf_a else None}
    products = kernel_features(x * scale, projection, **options) * kernel_features(y * scale, projection, **options)
    rows = projection.shape[-2]
    # `hyperbolic` and `trig` make two features of a row.
    return products.unflatten(-1, (-1, rows)).sum(-2) * rows


def directions_to_test(head_dim: int) -> Tensor:
    """Returns unit vectors (2·head_dim + 2, head_dim): coordinates, all-ones, and the opposites of both."""
    ones = torch.full((1, head_dim), head_dim**-0.5, dtype=torch.float64)
    directions = torch.cat((torch.eye(head_dim, dtype=torch.float64), ones))
    return torch.cat((directions, -directions))


def direction_means(
    feature_map: str, kind: str, pair: Pair, head_dim: int, draws: int, seed: int, draw: Draw = draw_projection
) -> list[Mean]:
    """Returns the mean of φ(q)·φ(k) over draws of one block, for each direction; x and y are parallel to it."""
    directions = directions_to_test(head_dim)
    x, y = directions * math.sqrt(pair.x_square), directions * math.sqrt(pair.y_square)
    generator, means = generator_of(seed), []
    for first in range(0, draws, DRAWS_AT_ONCE):
        projection = draw(
            head_dim, head_dim, kind=kind, num_heads=min(DRAWS_AT_ONCE, draws - first), generator=generator,
            dtype=torch.float64,
        )  # fmt: skip
        means.append(row_estimates(feature_map, x, y, projection, best_a(pair, head_dim)).mean(-1))
    return [mean_of(samples) for samples in torch.cat(means).T]


@dataclass(frozen=True)
class ErrorSamples:
    """Mean squared errors and covariances of rows, one sample per draw.

    Attributes:
        square_errors: (φ(q)·φ(k) − its mean)², averaged over the directions that the draw is looked at along.
        covariances: The products of the errors of two different rows, averaged over all pairs of rows.
    """

    square_errors: Tensor
    covariances: Tensor


def error_samples(
    feature_map: str, kind: str, pair: Pair, head_dim: int, rows: int, *, draws: int, directions: int = 1, seed: int
) -> ErrorSamples:
    """Measures errors around the closed form of the mean; each draw meets `directions` pairs turned at random."""
    generator, mean = generator_of(seed), mean_estimate(feature_map, pair, head_dim)
    squares, covariances = [], []
    for first in range(0, draws, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, draws - first)
        projection = draw_projection(
            rows, head_dim, kind=kind, num_heads=count, generator=generator, dtype=torch.float64
        )
        x, y = _turned(pair, (count, directions, head_dim), generator)
        errors = row_estimates(feature_map, x, y, projection, best_a(pair, head_dim)) - mean
        sums = errors.sum(-1).square()
        squares.append(sums.mean(-1) / rows**2)
        covariances.append((sums - errors.square().sum(-1)).mean(-1) / max(1, rows * (rows - 1)))
    return ErrorSamples(torch.cat(squares), torch.cat(covariances))


def _turned(pair: Pair, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns x and y in directions drawn uniformly."""
    first, other = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    first = torch.nn.functional.normalize(first, dim=-1)
    other = torch.nn.functional.normalize(other - (other * first).sum(-1, keepdim=True) * first, dim=-1)
    sine = math.sqrt(max(0.0, 1 - pair.cosine**2))
    return math.sqrt(pair.x_square) * first, math.sqrt(pair.y_square) * (pair.cosine * first + sine * other)
