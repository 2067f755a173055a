"""Means, variances and covariances of estimates of the softmax kernel, in closed form.

One row ω of a projection estimates the kernel by f(ω), and M rows by the mean of f. All maps depend on a row by ω·z or
ω·(x − y) alone, so that a mean over turned rows is a series in the squared length of a sum of rows. The variances are
those of Lemma 2 of arXiv 2009.14794, derived again; the covariances of orthogonal and simplex rows were derived here.
"""

import math
from dataclasses import dataclass

from protlm.ops.feature_maps import RELU_OFFSET, definition_of

MAX_TERMS = 200


@dataclass(frozen=True)
class Pair:
    """A query and a key, x = q/d^¼ and y = k/d^¼, up to a rotation.

    Attributes:
        x_square: ‖x‖².
        y_square: ‖y‖².
        cosine: Of the angle between x and y.
    """

    x_square: float
    y_square: float
    cosine: float

    @property
    def dot(self) -> float:
        """x·y, the exponent of the kernel."""
        return self.cosine * math.sqrt(self.x_square * self.y_square)

    @property
    def kernel(self) -> float:
        """SM = exp(x·y) = exp(q·k/√d)."""
        return math.exp(self.dot)

    @property
    def sum_square(self) -> float:
        """‖x + y‖²."""
        return self.x_square + self.y_square + 2 * self.dot

    @property
    def difference_square(self) -> float:
        """‖x − y‖²."""
        return self.x_square + self.y_square - 2 * self.dot


def pair_of_sum(sum_square: float, cosine: float) -> Pair:
    """Returns x and y of equal length with this ‖x + y‖² and this angle."""
    square = sum_square / (2 + 2 * cosine)
    return Pair(square, square, cosine)


def lemma_2(feature_map: str, pair: Pair, rows: int) -> float:
    """Returns the mean squared error with `rows` iid rows, as Lemma 2 of arXiv 2009.14794 writes it."""
    growth = math.exp(pair.sum_square)
    if feature_map == "trig":
        return growth * pair.kernel**-2 * (1 - math.exp(-pair.difference_square)) ** 2 / (2 * rows)
    positive = growth * pair.kernel**2 * (1 - 1 / growth) / rows
    if feature_map == "positive":
        return positive
    if feature_map == "hyperbolic":
        return 0.5 * (1 - 1 / growth) * positive
    raise ValueError(f"feature_map: expected one of Lemma 2, got {feature_map!r}")


def mean_estimate(feature_map: str, pair: Pair, head_dim: int) -> float:
    """Returns the mean of φ(q)·φ(k) over draws: the kernel itself but for `regularised` and `relu`."""
    if feature_map == "regularised":
        return _envelope(pair) * _sphere_mean(head_dim * pair.sum_square, head_dim)
    if feature_map == "relu":
        x, y = math.sqrt(pair.x_square), math.sqrt(pair.y_square)
        angle = math.acos(max(-1.0, min(1.0, pair.cosine)))
        arc_cosine = x * y * (math.sin(angle) + (math.pi - angle) * pair.cosine) / (2 * math.pi)
        return arc_cosine + RELU_OFFSET * (x + y) / math.sqrt(2 * math.pi) + RELU_OFFSET**2
    if definition_of(feature_map).is_softmax_estimate:
        return pair.kernel
    raise ValueError(f"feature_map: expected one whose mean is known, got {feature_map!r}")


def row_variance(feature_map: str, pair: Pair, head_dim: int, oprf_a: float = 0.0) -> float:
    """Returns the variance of the estimate by one row of N(0, I)."""
    if feature_map == "regularised":
        second = _envelope(pair) ** 2 * _sphere_mean(4 * head_dim * pair.sum_square, head_dim)
        return second - mean_estimate("regularised", pair, head_dim) ** 2
    if feature_map == "oprf":
        spread = 1 - 8 * oprf_a
        second = (1 - 4 * oprf_a) ** head_dim * spread ** (-head_dim / 2) * math.exp(pair.sum_square / spread)
        return pair.kernel**2 * (second - 1)
    return lemma_2(feature_map, pair, 1)


def row_covariance(feature_map: str, kind: str, pair: Pair, head_dim: int) -> float:
    """Returns the covariance of the estimates by two rows of one block.

    For `oprf` it is that of `positive`: its weight exp(2A‖ω‖²) turns the scaled rows √(1−4A)·ω back into N(0, I).
    """
    if kind == "iid":
        return 0.0
    cosine = 0.0 if kind == "orthogonal" else -1 / (head_dim - 1)
    if feature_map == "regularised":
        squares = head_dim * pair.sum_square * (2 + 2 * cosine)
        return (
            _envelope(pair) ** 2 * _sphere_mean(squares, head_dim) - mean_estimate("regularised", pair, head_dim) ** 2
        )
    if feature_map == "trig":
        both = (_rows_mean(-pair.difference_square, sign * cosine, head_dim) for sign in (1, -1))
        return math.exp(pair.x_square + pair.y_square) * sum(both) / 2 - pair.kernel**2
    if feature_map not in ("positive", "hyperbolic", "oprf"):
        raise ValueError(f"feature_map: expected one whose covariance is known, got {feature_map!r}")
    signs = (1, -1) if feature_map == "hyperbolic" else (1,)
    both = (_rows_mean(pair.sum_square, sign * cosine, head_dim) for sign in signs)
    return _envelope(pair) ** 2 * sum(both) / len(signs) - pair.kernel**2


def mean_square_error(feature_map: str, kind: str, pair: Pair, head_dim: int, rows: int, oprf_a: float = 0.0) -> float:
    """Returns the variance of the estimate by `rows` rows in blocks of head_dim, the last of which may be cut."""
    whole, rest = divmod(rows, head_dim)
    pairs_of_rows = whole * head_dim * (head_dim - 1) + rest * (rest - 1)
    variance = rows * row_variance(feature_map, pair, head_dim, oprf_a)
    covariance = pairs_of_rows * row_covariance(feature_map, kind, pair, head_dim) if pairs_of_rows else 0.0
    return (variance + covariance) / rows**2


def theorem_2_gap(pair: Pair, head_dim: int, rows: int) -> float:
    """Returns by how much, at least, orthogonal rows lower the error of `positive` (rows ≤ head_dim)."""
    return 2 * (rows - 1) / (rows * (head_dim + 2)) * (pair.kernel - _envelope(pair)) ** 2


def _envelope(pair: Pair) -> float:
    return math.exp(-(pair.x_square + pair.y_square) / 2)


def _sphere_mean(square: float, head_dim: int) -> float:
    """Returns the mean of exp(w·u) for a w with ‖w‖² = square over unit vectors u: ₀F₁(; d/2; ‖w‖²/4)."""
    return _series([1.0] * MAX_TERMS, square / 4, head_dim)


def _rows_mean(square: float, cosine: float, head_dim: int) -> float:
    """Returns the mean of exp((ω₁ + ω₂)·z) for rows with χ norms at a fixed angle; a negative ‖z‖² gives that of cos.

    ‖ω₁ + ω₂‖² = ρ²(1 + c·sin 2θ), with ρ² of χ² with 2d degrees of freedom and cos²θ of Beta(d/2, d/2).
    """
    half = head_dim / 2
    lengths = [2.0**n * math.exp(math.lgamma(head_dim + n) - math.lgamma(head_dim)) for n in range(40)]
    sines = [
        math.exp(k * math.log(2) + 2 * math.lgamma(half + k / 2) - math.lgamma(head_dim + k)
                 - 2 * math.lgamma(half) + math.lgamma(head_dim))
        for k in range(40)
    ]  # fmt: skip
    angles = [sum(math.comb(n, k) * cosine**k * sines[k] for k in range(n + 1)) for n in range(40)]
    return _series([length * angle for length, angle in zip(lengths, angles, strict=True)], square / 4, head_dim)


def _series(moments: list[float], argument: float, head_dim: int) -> float:
    """Returns Σ argumentⁿ·momentₙ / (n!·(d/2)ₙ)."""
    total, factor = 0.0, 1.0
    for n, moment in enumerate(moments):
        term = factor * moment
        total += term
        factor *= argument / ((n + 1) * (head_dim / 2 + n))
    # The terms fall factorially: a last one of any size means a pair far outside those of the report.
    assert abs(term) < 1e-9 * abs(total)
    return total
