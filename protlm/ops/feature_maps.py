"""The definition of every feature map: all that differs between maps and that more than one file acts on.

A place that handles maps reads these definitions and never compares names, so a new map is refused, by its name,
wherever its definition does not list it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RELU_OFFSET = 1e-3
"""Added to every ReLU feature, as in the authors' code: no key has weight zero."""


@dataclass(frozen=True, kw_only=True)
class MapDefinition:
    """A feature map φ: with y = x/d^¼, row ω of the projection gives the features h(y)·f(ω·y)/√M.

    Attributes:
        name: The name in `favor_attention` and in the configuration.
        features_per_row: Number of features that one row of the projection gives.
        rescales_rows: Whether rows are first rescaled to the length √head_dim.
        mirrors_rows: Whether the features of a row ω are those of ω and of −ω.
        needs_projection: Whether the map is defined only with a projection; the others can also apply f to x itself.
        takes_oprf_a: Whether the map has the parameter A of `oprf_parameter`.
        is_exponential: Whether f is an exponential: features are then kept as logarithms, and a state has a reference
            for each feature.
        is_signed: Whether features can be negative: the renormaliser is then a sum of terms that nearly cancel.
        norm_exponent: h(y) = exp(norm_exponent · ‖y‖²/2).
        estimates: The expectation of φ(q)·φ(k): `softmax` is exp(q·k/√d), `bound` a smoother kernel below it that comes
            near it as head_dim grows; None for a kernel of its own.
        backends: The backends of `favor_attention` that compute the map.
        formula: Takes scores ω·y (…, rows) to (…, features): to log f for exponential maps, to f for others. Without
            it, `kernel_features`, the float64 twin and the health of a model refuse the map.
    """

    name: str
    features_per_row: int
    rescales_rows: bool = False
    mirrors_rows: bool = False
    needs_projection: bool = True
    takes_oprf_a: bool = False
    is_exponential: bool
    is_signed: bool = False
    norm_exponent: int
    estimates: Literal["softmax", "bound"] | None
    backends: frozenset[str]
    formula: Callable[[Tensor], Tensor] | None

    @property
    def is_softmax_estimate(self) -> bool:
        """Whether φ(q)·φ(k) is an unbiased estimate of exp(q·k/√d)."""
        return self.estimates == "softmax"

    @property
    def joins_exact_weights(self) -> bool:
        """Whether estimates can stand beside exact weights exp(q·k/√d) in one sum: unbiased, and never negative."""
        return self.is_exponential and self.is_softmax_estimate

    def rescaled(self, projection: Tensor) -> Tensor:
        """Returns the rows (…, rows, head_dim) with the length that the map gives them."""
        return to_common_length(projection) if self.rescales_rows else projection

    def mirrored(self, projection: Tensor) -> Tensor:
        """Returns the rows, followed by −ω of each row ω where the map mirrors rows."""
        return torch.cat((projection, -projection), -2) if self.mirrors_rows else projection

    def projection_gradient(self, projection: Tensor, rows_grad: Tensor) -> Tensor:
        """Returns the gradient of the projection from that of its rows, `mirrored` after `rescaled`."""
        if self.mirrors_rows:
            of_rows, of_opposites = rows_grad.chunk(2, -2)
            rows_grad = of_rows - of_opposites
        if not self.rescales_rows:
            return rows_grad
        norms: Tensor = torch.linalg.vector_norm(projection, dim=-1, keepdim=True)
        directions = projection / norms
        along: Tensor = (rows_grad * directions).sum(-1, keepdim=True) * directions
        return (rows_grad - along) * (math.sqrt(projection.shape[-1]) / norms)

    def apply(self, scores: Tensor) -> Tensor:
        """Returns log f of the scores for exponential maps, f for others.

        Raises:
            ValueError: The definition has no formula.
        """
        if self.formula is None:
            raise ValueError(f"feature_map: expected one with a formula, got {self.name!r}")
        return self.formula(scores)

    def log_features(self, scores: Tensor) -> Tensor:
        """Returns log|f| of the scores, without the factor h that all features of a vector share.

        Raises:
            ValueError: The definition has no formula.
        """
        values = self.apply(scores)
        return values if self.is_exponential else values.abs().log()


def to_common_length(projection: Tensor) -> Tensor:
    """Returns rows (…, rows, head_dim) rescaled to the length √head_dim."""
    norms: Tensor = torch.linalg.vector_norm(projection, dim=-1, keepdim=True)
    return projection * (math.sqrt(projection.shape[-1]) / norms)


def with_oprf_a(scores: Tensor, projection: Tensor, oprf_a: Tensor) -> Tensor:
    """Returns the scores of `oprf`: A‖ω‖² + √(1−4A)·ω·y."""
    return oprf_a * projection.square().sum(-1).unsqueeze(-2) + (1 - 4 * oprf_a).sqrt() * scores


def _unchanged(scores: Tensor) -> Tensor:
    return scores


def _both_signs(scores: Tensor) -> Tensor:
    return torch.cat((scores, -scores), -1)


def _sines_and_cosines(scores: Tensor) -> Tensor:
    return torch.cat((torch.sin(scores), torch.cos(scores)), -1)


def _offset_relu(scores: Tensor) -> Tensor:
    return torch.relu(scores) + RELU_OFFSET


_ALL_BACKENDS = frozenset(("torch", "cpp", "triton"))

DEFINITIONS = {
    definition.name: definition
    for definition in (
        MapDefinition(
            name="positive",
            features_per_row=1,
            is_exponential=True,
            norm_exponent=-1,
            estimates="softmax",
            backends=_ALL_BACKENDS,
            formula=_unchanged,
        ),
        MapDefinition(
            name="hyperbolic",
            features_per_row=2,
            mirrors_rows=True,
            is_exponential=True,
            norm_exponent=-1,
            estimates="softmax",
            backends=_ALL_BACKENDS,
            formula=_both_signs,
        ),
        MapDefinition(
            name="trig",
            features_per_row=2,
            is_exponential=False,
            is_signed=True,
            norm_exponent=1,
            estimates="softmax",
            backends=frozenset(("torch",)),
            formula=_sines_and_cosines,
        ),
        MapDefinition(
            name="regularised",
            features_per_row=1,
            rescales_rows=True,
            is_exponential=True,
            norm_exponent=-1,
            estimates="bound",
            backends=_ALL_BACKENDS,
            formula=_unchanged,
        ),
        MapDefinition(
            name="oprf",
            features_per_row=1,
            takes_oprf_a=True,
            is_exponential=True,
            norm_exponent=-1,
            estimates="softmax",
            backends=_ALL_BACKENDS,
            formula=_unchanged,
        ),
        MapDefinition(
            name="relu",
            features_per_row=1,
            needs_projection=False,
            is_exponential=False,
            norm_exponent=0,
            estimates=None,
            backends=_ALL_BACKENDS,
            formula=_offset_relu,
        ),
    )
}
"""Every feature map by its name."""


def definition_of(feature_map: str) -> MapDefinition:
    """Returns the definition of a feature map.

    Raises:
        ValueError: There is no such map.
    """
    if feature_map not in DEFINITIONS:
        raise ValueError(f"feature_map: expected one of {tuple(DEFINITIONS)}, got {feature_map!r}")
    return DEFINITIONS[feature_map]


def map_names(accepts: Callable[[MapDefinition], bool]) -> tuple[str, ...]:
    """Returns the names of the maps whose definitions are accepted."""
    return tuple(name for name, definition in DEFINITIONS.items() if accepts(definition))


def check_feature_map(feature_map: str, *, has_projection: bool, has_oprf_a: bool) -> None:
    """Raises ValueError for an unknown map, a missing projection, or an A for a map that has none."""
    definition = definition_of(feature_map)
    if definition.needs_projection and not has_projection:
        raise ValueError(f"projection: expected a tensor for feature_map {feature_map!r}, got None")
    if has_oprf_a and not definition.takes_oprf_a:
        raise ValueError(f"oprf_a: expected None for feature_map {feature_map!r}, got a value")


def check_backend(feature_map: str, backend: str) -> None:
    """Raises ValueError for a map that the backend does not compute."""
    if backend not in definition_of(feature_map).backends:
        raise ValueError(f"feature_map: expected one that the backend {backend!r} computes, got {feature_map!r}")
