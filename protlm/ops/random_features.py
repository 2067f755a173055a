"""Random projections: hides how the rows that FAVOR's features are made of are drawn."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

ProjectionKind = Literal["orthogonal", "iid"]
FeatureMap = Literal["positive", "relu"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)

RELU_OFFSET = 1e-3
"""Added to every ReLU feature, as in the authors' code: no key has weight zero."""


def draw_projection(
    num_features: int,
    head_dim: int,
    *,
    kind: ProjectionKind = "orthogonal",
    num_heads: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*heads features head_dim"]:
    """Draws the rows ω of a random projection, each distributed as N(0, I) on its own.

    `iid` rows are independent. `orthogonal` rows are exactly orthogonal within blocks of head_dim rows, with
    independent norms distributed as χ with head_dim degrees of freedom: estimates stay unbiased and their variance
    falls (Theorem 2 of arXiv 2009.14794). A block is the Q of a Householder QR of a Gaussian matrix with its columns
    multiplied by sign(diag R): only then is Q distributed uniformly (Haar) over the orthogonal group. The draw is made
    in float64 on the CPU, so that a seed gives the same projection everywhere. Cost: O(num_heads · num_features ·
    head_dim²).

    Args:
        num_features: Rows, at least 1; more than head_dim makes further blocks.
        head_dim: Columns, at least 1.
        kind: `orthogonal` or `iid`.
        num_heads: Draws one independent projection a head; None draws a single one.
        generator: CPU generator to draw from; None uses torch's default generator.
        dtype: Of the result.

    Returns:
        Shape (num_features, head_dim), or (num_heads, num_features, head_dim).

    Raises:
        ValueError: A size below 1 or an unknown kind.
    """
    for name, size in (("num_features", num_features), ("head_dim", head_dim), ("num_heads", num_heads)):
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    heads = 1 if num_heads is None else num_heads
    if kind == "iid":
        rows = torch.randn(heads, num_features, head_dim, generator=generator, dtype=torch.float64)
    elif kind == "orthogonal":
        num_blocks = math.ceil(num_features / head_dim)
        directions = _haar_orthogonal(heads * num_blocks, head_dim, generator)
        directions = directions.reshape(heads, num_blocks * head_dim, head_dim)[:, :num_features]
        gaussian = torch.randn(heads, num_features, head_dim, generator=generator, dtype=torch.float64)
        rows = directions * gaussian.norm(dim=-1, keepdim=True)
    else:
        raise ValueError(f"kind: expected 'orthogonal' or 'iid', got {kind!r}")
    rows = rows.to(dtype)
    return rows[0] if num_heads is None else rows


def kernel_features(
    x: Float[Tensor, "*batch length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
) -> Float[Tensor, "*batch length features"]:
    """Returns the features φ(x) of queries or keys, un-normalised and with nothing subtracted inside the exponent.

    With y = x/d^¼ and rows ω_j of the projection (Lemma 1 of arXiv 2009.14794):
    `positive` φ_j(x) = exp(ω_j·y − ‖y‖²/2)/√M, so that the mean of φ(q)·φ(k) over draws is exp(q·k/√d);
    `relu` φ_j(x) = (max(ω_j·y, 0) + 1e-3)/√M, and without a projection max(x, 0) + 1e-3 on x itself.
    In float32 `positive` stays finite while ω·y − ‖y‖²/2 < 88; `favor_attention` has no such bound. Cost: O(length).

    Raises:
        ValueError: An unknown map, no projection for a map that needs one, or a projection of another head_dim.
    """
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map: expected one of {FEATURE_MAPS}, got {feature_map!r}")
    if projection is None:
        if feature_map != "relu":
            raise ValueError(f"projection: expected a tensor for feature_map {feature_map!r}, got None")
        return torch.relu(x) + RELU_OFFSET
    if projection.shape[-1] != x.shape[-1]:
        raise ValueError(f"projection: expected head_dim {x.shape[-1]} as in x, got {projection.shape[-1]}")
    y = x * x.shape[-1] ** -0.25
    scores = y @ projection.transpose(-1, -2)
    if feature_map == "relu":
        features = torch.relu(scores) + RELU_OFFSET
    else:
        features = torch.exp(scores - y.square().sum(-1, keepdim=True) / 2)
    scale: float = projection.shape[-2] ** -0.5
    return features * scale


def _haar_orthogonal(count: int, size: int, generator: torch.Generator | None) -> Tensor:
    gaussian = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    signs = torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))
    haar: Tensor = q * signs.unsqueeze(-2)
    return haar
