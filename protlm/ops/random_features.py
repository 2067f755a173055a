"""Random features: how the rows of a projection are drawn, and the features that each map makes of a vector."""

import math
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from protlm.choices import FeatureMap, ProjectionKind
from protlm.ops.feature_maps import check_feature_map, definition_of, with_oprf_a
from protlm.ops.inputs import check_tensor

PROJECTION_KINDS: tuple[str, ...] = get_args(ProjectionKind)


def draw_projection(
    num_features: int,
    head_dim: int,
    *,
    kind: ProjectionKind = "orthogonal",
    num_heads: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*heads features head_dim"]:
    """Draws the rows ω of a random projection, each of which is distributed as N(0, I).

    `iid` rows are independent. `orthogonal` rows are exactly orthogonal within blocks of head_dim rows, with
    independent norms distributed as χ with head_dim degrees of freedom: estimates stay unbiased and their variance
    falls (Theorem 2 of arXiv 2009.14794). A block is the Q of a Householder QR of a Gaussian matrix with its columns
    multiplied by sign(diag R): only then is Q distributed uniformly (Haar) over the orthogonal group. `simplex` rows
    have the same norms and point, within a block, to the corners of a regular simplex turned by such a Q: any two have
    the cosine −1/(head_dim − 1) (arXiv 2301.13856). Rows are drawn in float64 on the CPU, so that a seed gives the same
    projection everywhere. Cost: O(num_heads · num_features · head_dim²).

    Args:
        num_features: Number of rows, at least 1; each head_dim rows make a block.
        head_dim: Number of columns, at least 1; at least 2 for `simplex`.
        kind: `orthogonal`, `iid` or `simplex`.
        num_heads: Draws one independent projection per head; None draws a single one.
        generator: CPU generator to draw from; None uses torch's default generator.
        dtype: Dtype of the result.
        device: Device of the result; None is torch's default device.

    Returns:
        Shape (num_features, head_dim), or (num_heads, num_features, head_dim).

    Raises:
        ValueError: A size below 1, an unknown kind, or a generator of another device than the CPU.
    """
    for name, size in (("num_features", num_features), ("head_dim", head_dim), ("num_heads", num_heads)):
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if kind not in PROJECTION_KINDS:
        raise ValueError(f"kind: expected one of {PROJECTION_KINDS}, got {kind!r}")
    if kind == "simplex" and head_dim < 2:
        raise ValueError(f"head_dim: expected at least 2 for kind 'simplex', got {head_dim}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator: expected one of the CPU, where rows are drawn, got one of {generator.device}")
    heads = 1 if num_heads is None else num_heads
    if kind == "iid":
        rows = _gaussian(heads, num_features, head_dim, generator)
    else:
        num_blocks = math.ceil(num_features / head_dim)
        directions = _haar_orthogonal(heads * num_blocks, head_dim, generator)
        if kind == "simplex":
            directions = _simplex_corners(head_dim) @ directions
        directions = directions.reshape(heads, num_blocks * head_dim, head_dim)[:, :num_features]
        gaussian = _gaussian(heads, num_features, head_dim, generator)
        rows = directions * gaussian.norm(dim=-1, keepdim=True)
    rows = rows.to(torch.get_default_device() if device is None else device, dtype)
    return rows[0] if num_heads is None else rows


def kernel_features(
    x: Float[Tensor, "*batch length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
    oprf_a: Float[Tensor, "*axes"] | float | None = None,
) -> Float[Tensor, "*broadcast length map_features"]:
    """Returns the features φ(x) of queries or keys, without normalisation or stabiliser.

    With y = x/d^¼, d = head_dim, M rows ω_j and u_j = ω_j·y, the features of a row are:

    | map | φ(x) | features | the mean of φ(q)·φ(k) over draws |
    |---|---|---|---|
    | `positive` | exp(u − ‖y‖²/2)/√M | M | exp(q·k/√d) (Lemma 1 of arXiv 2009.14794) |
    | `hyperbolic` | exp(±u − ‖y‖²/2)/√(2M) | 2M | the same, with less variance (its Lemma 2) |
    | `trig` | exp(‖y‖²/2)·(sin u, cos u)/√M | 2M | the same, signed (arXiv 2006.03555) |
    | `regularised` | as `positive`, with ω rescaled to length √d | M | a lower bound of it (its Theorem 1) |
    | `oprf` | (1−4A)^(d/4)·exp(A‖ω‖² + √(1−4A)·u − ‖y‖²/2)/√M | M | exp(q·k/√d) (arXiv 2205.15317) |
    | `relu` | (max(u, 0) + 1e-3)/√M; without a projection max(x, 0) + 1e-3 | M or d | no estimate of softmax |

    In float32 the exponentials stay finite while their exponents are below 88; `favor_attention` has no such bound.
    Cost: O(length).

    Args:
        x: Queries or keys.
        projection: Rows ω; None for `relu` only.
        feature_map: The map φ.
        oprf_a: The A of `oprf`, below 1/8, the same for queries and keys; broadcast against the features. See
            `oprf_parameter`.

    Raises:
        TypeError: x or the projection is no tensor.
        ValueError: An unknown map, no projection or A for a map that needs one, or a projection of another head_dim.
    """
    check_tensor("x", x, "")
    check_tensor("projection", projection, "", is_optional=True)
    check_feature_map(feature_map, has_projection=projection is not None, has_oprf_a=oprf_a is not None)
    definition = definition_of(feature_map)
    if projection is None:
        return definition.apply(x)
    if definition.takes_oprf_a and oprf_a is None:
        raise ValueError(f"oprf_a: expected a number or a tensor for feature_map {feature_map!r}, got None")
    head_dim = x.shape[-1]
    if projection.shape[-1] != head_dim:
        raise ValueError(f"projection: expected head_dim {head_dim} as in x, got {projection.shape[-1]}")
    projection = definition.rescaled(projection)
    y = x * head_dim**-0.25
    scores = y @ projection.transpose(-1, -2)
    a = None if oprf_a is None else torch.as_tensor(oprf_a, dtype=x.dtype, device=x.device)
    if a is not None:
        scores = with_oprf_a(scores, projection, a)
    features = definition.apply(scores)
    norm_exponents = definition.norm_exponent * (y.square().sum(-1, keepdim=True) / 2)
    scale: float = projection.shape[-2] ** -0.5
    if not definition.is_exponential:
        # Not exp(0 · ‖y‖²): of a vector whose square overflows that is NaN.
        return (torch.exp(norm_exponents) * features if definition.norm_exponent else features) * scale
    features = torch.exp(features + norm_exponents)
    if a is not None:
        features = torch.pow(1 - 4 * a, head_dim / 4) * features
    return features * (scale / math.sqrt(definition.features_per_row))


def oprf_parameter(mean_square: Float[Tensor, "*axes"], head_dim: int) -> Float[Tensor, "*axes"]:
    """Returns the A of `oprf` that minimises the variance, from the mean of ‖x + y‖² with x = q/d^¼, y = k/d^¼.

    A = (1 − 2f − √((2f + 1)² + 8f))/16, where f is the mean divided by head_dim (arXiv 2205.15317). It is at most 0,
    and 0, which is `positive`, for f = 0. `oprf` is unbiased for any A that does not depend on the projection.
    """
    f = mean_square / head_dim
    return (1 - 2 * f - ((2 * f + 1).square() + 8 * f).sqrt()) / 16


def _simplex_corners(size: int) -> Tensor:
    """Returns `size` unit vectors (size, size), any two of which have the cosine −1/(size − 1)."""
    centred = torch.eye(size, dtype=torch.float64, device="cpu") - 1 / size
    return centred * math.sqrt(size / (size - 1))


def _gaussian(count: int, num_rows: int, size: int, generator: torch.Generator | None) -> Tensor:
    # The CPU, whatever torch.set_default_device says.
    return torch.randn(count, num_rows, size, generator=generator, dtype=torch.float64, device="cpu")


def _haar_orthogonal(count: int, size: int, generator: torch.Generator | None) -> Tensor:
    gaussian = _gaussian(count, size, size, generator)
    q, r = torch.linalg.qr(gaussian)
    signs = torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))
    haar: Tensor = q * signs.unsqueeze(-2)
    return haar
