"""The error of FAVOR as an estimate of exact attention, for each head, on a model's q, k and v of real proteins.

The estimate of a head is random through its projection alone. So with q, k and v of a protein fixed, fresh draws give
its bias and variance, and the proteins, each with draws of its own, give the uncertainty of both.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from protlm.inference.attention_weights import in_float64, visit_protein
from protlm.inference.metrics import Estimate, estimate, replicate_weights
from protlm.inference.replaced_attention import (
    check_has_features,
    estimates_softmax,
    exact_attention,
    has_draws,
    kept_projections,
)
from protlm.model.attention_calls import AttentionCall
from protlm.model.health import feature_use, num_features_of
from protlm.model.performer import Performer
from protlm.ops.feature_maps import definition_of
from protlm.runtime.progress import Advance, no_advance


@dataclass(frozen=True, kw_only=True)
class HeadApproximation:
    """The attention of one head as an estimate of exact attention with the same q, k and v.

    With out_r the output for draw r, e_r = out_r − exact and ē the mean of e_r over R draws, each sum being over the
    tokens of a protein and divided by Σ‖exact‖²:
    - variance = Σ_r ‖e_r − ē‖²/(R − 1);
    - squared_bias = ‖ē‖² − variance/R, the square of the bias without what R draws leave of the noise.
    Both are unbiased, so squared_bias scatters about 0 where there is no bias, and their sum is the mean squared error
    of a draw. Even weights that are unbiased before normalisation (Lemma 1 of arXiv 2009.14794) give outputs with a
    bias, which falls as 1/features: a ratio of unbiased estimates is not unbiased.

    Values are means over proteins, with a bootstrap over proteins. What does not apply is None: the errors of `relu`,
    which is no estimate of softmax attention, and the numbers of redraws without a projection. For `relu`, variance is
    in units of the squared mean output.

    Attributes:
        layer: From 1.
        head: From 1.
        relative_error: ‖out − exact‖/‖exact‖ with the saved projection, mean over tokens.
        redrawn_relative_error: The same for a fresh draw.
        squared_bias: See above.
        variance: See above.
        q_norm: Mean over tokens of ‖x‖², x = q/d^¼: the relative variance of one weight is (e^{‖x+y‖²} − 1)/features.
        k_norm: The same of y = k/d^¼.
        max_q_norm: Largest ‖x‖² of a token.
        max_k_norm: Largest ‖y‖² of a token.
        effective_features: Features that share an estimate, as in `LayerHealth`.
    """

    layer: int
    head: int
    relative_error: Estimate | None
    redrawn_relative_error: Estimate | None
    squared_bias: Estimate | None
    variance: Estimate | None
    q_norm: float
    k_norm: float
    max_q_norm: float
    max_k_norm: float
    effective_features: float


@dataclass(frozen=True, kw_only=True)
class ApproximationReport:
    """The approximation of every head of a model.

    Attributes:
        feature_map: The model's map, or its maps by comma.
        is_softmax_estimate: Whether its weights, before normalisation, are unbiased estimates of those of softmax.
        num_features: Features of one vector; the most of a layer if layers have different maps.
        num_proteins: Proteins that were measured.
        num_draws: Fresh draws for each protein and layer; 0 without a projection.
        seed: Seed of the draws and of the bootstrap.
        heads: Every head of the layers that have features, layer after layer.
    """

    feature_map: str
    is_softmax_estimate: bool
    num_features: int
    num_proteins: int
    num_draws: int
    seed: int
    heads: list[HeadApproximation]


_NUMBERS = tuple(field.name for field in fields(HeadApproximation) if field.name not in ("layer", "head"))


def measure_approximation(
    model: Performer,
    proteins: Iterable[np.ndarray],
    *,
    max_proteins: int = 100,
    num_draws: int = 10,
    seed: int = 0,
    advance: Advance = no_advance,
) -> ApproximationReport:
    """Returns the error of the model's attention against exact attention on the first proteins, one at a time.

    A protein's draws are a function of the seed, its number and the layer. The projections of the model stay as they
    are. Cost: exact attention takes O(length²) time, and memory O(length) where torch has a fused kernel for it.

    Args:
        model: On any device.
        proteins: Residue tokens of each protein, uint8.
        max_proteins: Number of proteins that are taken.
        num_draws: Fresh draws for each protein and layer, at least 2.
        seed: Seed of the draws and of the bootstrap.
        advance: Called with the residues of each protein.

    Raises:
        ValueError: The model's attention is exact, there is no protein, one does not fit (see `visit_protein`), or too
            few draws.
    """
    check_has_features(model)
    if num_draws < 2:
        raise ValueError(f"num_draws: expected at least 2, got {num_draws}")
    keys: list[bytes] = []
    by_protein: list[np.ndarray] = []
    for number, protein in enumerate(islice(proteins, max_proteins)):
        by_layer: dict[int, np.ndarray] = {}

        def measure(call: AttentionCall, number: int = number, by_layer: dict[int, np.ndarray] = by_layer) -> None:
            if not call.attention.is_exact:
                by_layer[call.layer] = _measure(call, num_draws, _generator(seed, number, call.layer))

        visit_protein(model, protein, measure)
        keys.append(protein.tobytes())
        by_protein.append(np.stack(list(by_layer.values())))
        advance(len(protein))
    if not by_protein:
        raise ValueError("proteins: expected at least one, got none")
    maps = {feature_map: definition_of(feature_map) for feature_map in sorted(model.config.feature_maps)}
    return ApproximationReport(
        feature_map=",".join(maps),
        is_softmax_estimate=all(definition.is_softmax_estimate for definition in maps.values()),
        num_features=max(num_features_of(model.config, feature_map) for feature_map in maps),
        num_proteins=len(by_protein),
        num_draws=num_draws if has_draws(model) else 0,
        seed=seed,
        heads=_over_proteins(np.stack(by_protein), list(by_layer), replicate_weights(keys, seed)),
    )


def _generator(seed: int, protein: int, layer: int) -> torch.Generator:
    (word,) = np.random.SeedSequence((seed, protein, layer)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(word) >> 1)


def _measure(call: AttentionCall, num_draws: int, generator: torch.Generator) -> np.ndarray:
    """Returns the numbers of one layer on one protein, float64 (heads, numbers); NaN for those that do not apply."""
    by_name = {"effective_features": feature_use(call)[0]}
    for name, x in (("q_norm", call.q), ("k_norm", call.k)):
        norms = x.float().square().sum(-1) * call.attention.head_dim**-0.5
        by_name |= {name: norms.mean(0), f"max_{name}": norms.amax(0)}
    out = _attend(call)
    exact = None
    if estimates_softmax(call.attention):
        with exact_attention(call.attention):
            exact = _attend(call)
        by_name["relative_error"] = _relative_error(out, exact)
    if call.attention.projection is not None:
        by_name |= _numbers_of_draws(call, out, exact, num_draws, generator)
    absent = torch.full((call.attention.num_heads,), torch.nan)
    return torch.stack([by_name.get(name, absent).double().cpu() for name in _NUMBERS], -1).numpy()


def _numbers_of_draws(
    call: AttentionCall, out: Tensor, exact: Tensor | None, num_draws: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Returns the numbers of fresh draws, each (heads,), from the output for the saved draw and the exact one."""
    centre = out if exact is None else exact
    sums = torch.zeros_like(centre)
    squares, relative_errors = torch.zeros(2, centre.shape[1], dtype=centre.dtype, device=centre.device)
    with kept_projections(call.attention):
        for _ in range(num_draws):
            call.attention.redraw(generator)
            drawn = _attend(call)
            relative_errors += _relative_error(drawn, centre)
            sums += drawn - centre
            squares += (drawn - centre).square().sum((0, 2))
    # Σ_r ‖e_r − ē‖² = Σ_r ‖e_r‖² − ‖Σ_r e_r‖²/R, with e_r relative to any centre.
    squared_sums = sums.square().sum((0, 2))
    variance = (squares - squared_sums / num_draws) / (num_draws - 1)
    if exact is None:
        return {"variance": variance / (centre + sums / num_draws).square().sum((0, 2))}
    scale = exact.square().sum((0, 2))
    return {
        "redrawn_relative_error": relative_errors / num_draws,
        "squared_bias": (squared_sums / num_draws**2 - variance / num_draws) / scale,
        "variance": variance / scale,
    }


def _attend(call: AttentionCall) -> Tensor:
    return in_float64(call.attention.attend(call.q, call.k, call.v, call.segments))


def _relative_error(out: Tensor, target: Tensor) -> Tensor:
    """Returns ‖out − target‖/‖target‖ of every head, mean over tokens; 0 for a token where both are 0."""
    errors, norms = (out - target).norm(dim=-1), target.norm(dim=-1)
    ratios: Tensor = errors / torch.where((norms == 0) & (errors == 0), 1.0, norms)
    return ratios.mean(0)


def _over_proteins(numbers: np.ndarray, layers: list[int], weights: np.ndarray) -> list[HeadApproximation]:
    """Returns every head from (proteins, layers, heads, numbers) and the weights (proteins, replicates)."""
    heads = []
    for place, head in np.ndindex(numbers.shape[1:3]):
        columns = dict(zip(_NUMBERS, numbers[:, place, head].T, strict=True))
        approximation = HeadApproximation(
            layer=layers[place],
            head=head + 1,
            relative_error=_mean_with_interval(columns["relative_error"], weights),
            redrawn_relative_error=_mean_with_interval(columns["redrawn_relative_error"], weights),
            squared_bias=_mean_with_interval(columns["squared_bias"], weights),
            variance=_mean_with_interval(columns["variance"], weights),
            q_norm=float(columns["q_norm"].mean()),
            k_norm=float(columns["k_norm"].mean()),
            max_q_norm=float(columns["max_q_norm"].max()),
            max_k_norm=float(columns["max_k_norm"].max()),
            effective_features=float(columns["effective_features"].mean()),
        )
        heads.append(approximation)
    return heads


def _mean_with_interval(values: np.ndarray, weights: np.ndarray) -> Estimate | None:
    if np.isnan(values).all():
        return None
    # A replicate that draws no protein has no mean.
    with np.errstate(invalid="ignore"):
        return estimate(float(values.mean()), values @ weights / weights.sum(0))
