"""A model's scores with exact attention or other random projections in place of its own, and a sentence on them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from protlm.inference.metrics import Score
from protlm.model.attention import SelfAttention
from protlm.ops.feature_maps import definition_of

NEAR_SHARE = 0.05
"""Exact attention or another projection changes little if the model loses less than this share of its gain over the
empirical baseline, both in nats per residue; a choice of ours."""

LITTLE_GAIN_NATS = 0.05
"""With a smaller gain over the empirical baseline there is too little to lose for the share to mean anything."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation over draws."""

    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class ReplacementScores:
    """A model's scores with its own attention and with others in its place, on the same targets.

    Attributes:
        saved: With the saved projections.
        empirical: The empirical baseline.
        exact: With exact attention; None for `relu`, which is no estimate of it.
        near_only: With the exact weights of near tokens alone; None without a near field.
        far_only: With estimates of all weights; None without a near field.
        redrawn: With each of some other draws; empty without projections.
        redrawn_accuracy: Over these draws; None without projections.
        redrawn_perplexity: Likewise.
    """

    saved: Score
    empirical: Score
    exact: Score | None
    near_only: Score | None = None
    far_only: Score | None = None
    redrawn: list[Score]
    redrawn_accuracy: Spread | None
    redrawn_perplexity: Spread | None


def score_replacements(
    model: nn.Module, score: Callable[[], Score], empirical: Score, *, num_draws: int = 10, seed: int = 0
) -> ReplacementScores:
    """Returns the scores of a FAVOR model with its own attention, with exact attention, and with other draws.

    Args:
        model: A `Performer`, or a module that wraps one.
        score: Scores the model as it is at the time of the call, always on the same targets.
        empirical: The empirical baseline on these targets.
        num_draws: Number of other draws, at least 2.
        seed: Seed of the draws.

    Raises:
        ValueError: The model's attention is exact, or too few draws.
    """
    check_has_features(model)
    if num_draws < 2:
        raise ValueError(f"num_draws: expected at least 2, got {num_draws}")
    saved, exact, redrawn = score(), None, []
    near, far = None, None
    if estimates_softmax(model):
        with exact_attention(model):
            exact = score()
    if has_near_field(model):
        with near_only(model):
            near = score()
        with far_only(model):
            far = score()
    if has_draws(model):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_draws):
            with other_draw(model, generator):
                redrawn.append(score())
    return ReplacementScores(
        saved=saved,
        empirical=empirical,
        exact=exact,
        near_only=near,
        far_only=far,
        redrawn=redrawn,
        redrawn_accuracy=_spread([score.accuracy for score in redrawn]),
        redrawn_perplexity=_spread([score.perplexity for score in redrawn]),
    )


@contextmanager
def exact_attention(model: nn.Module) -> Iterator[None]:
    """Computes exact softmax attention in the place of FAVOR, in every layer that has it, until the end of the block.

    Raises:
        ValueError: The model's attention is exact already, or no estimate of softmax attention.
    """
    check_has_features(model)
    if not estimates_softmax(model):
        raise ValueError("model: expected an estimate of softmax attention, got features with a kernel of their own")
    attentions = _with_features(model)
    with _set_to(attentions, "kind", ["softmax"] * len(attentions)):
        yield


@contextmanager
def other_draw(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Replaces the projections of every layer and head by fresh draws until the end of the block.

    Raises:
        ValueError: The model's attention is exact, or has no projections.
    """
    check_has_features(model)
    if not has_draws(model):
        raise ValueError("model: expected random projections, got none; nothing to draw")
    with kept_projections(model):
        for attention in _with_features(model):
            attention.redraw(generator)
        yield


@contextmanager
def kept_projections(model: nn.Module) -> Iterator[None]:
    """Restores the projections of the model and their biases, to the bit, at the end of the block."""
    each = (tensor for attention in _attentions(model) for tensor in (attention.projection, attention.feature_bias))
    drawn = [tensor for tensor in each if tensor is not None]
    copies = [tensor.clone() for tensor in drawn]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(drawn, copies, strict=True):
                tensor.copy_(copy)


@contextmanager
def near_only(model: nn.Module) -> Iterator[None]:
    """Leaves the weights of far tokens out, in every layer with a near field, until the end of the block.

    Raises:
        ValueError: No layer has a near field.
    """
    attentions = _with_near_field(model)
    projections = [attention.projection for attention in attentions]
    # e to these powers are factors of the features.
    biases = [torch.full(rows.shape[:2], -torch.inf).to(rows) for rows in projections if rows is not None]
    with _set_to(attentions, "feature_bias", biases):
        yield


@contextmanager
def far_only(model: nn.Module) -> Iterator[None]:
    """Estimates the weights of near tokens too, in every layer with a near field, until the end of the block.

    Raises:
        ValueError: No layer has a near field.
    """
    attentions = _with_near_field(model)
    with _set_to(attentions, "near_block", [0] * len(attentions)):
        yield


@contextmanager
def _set_to(attentions: Sequence[SelfAttention], name: str, values: Sequence[object]) -> Iterator[None]:
    """Gives an attribute of each attention another value until the end of the block."""
    before = [getattr(attention, name) for attention in attentions]
    try:
        for attention, value in zip(attentions, values, strict=True):
            setattr(attention, name, value)
        yield
    finally:
        for attention, value in zip(attentions, before, strict=True):
            setattr(attention, name, value)


def has_near_field(model: nn.Module) -> bool:
    """Returns whether a layer has exact weights of near tokens beside estimates of the others."""
    return any(attention.near_block for attention in _with_features(model))


def check_has_features(model: nn.Module) -> None:
    """Raises ValueError for a model all of whose layers are exact."""
    if not _with_features(model):
        raise ValueError("model: expected FAVOR attention, got exact attention in every layer; nothing to approximate")


def estimates_softmax(model: nn.Module) -> bool:
    """Returns whether the features estimate softmax attention, or a bound of it, in every layer that has features."""
    maps = (attention.feature_map for attention in _with_features(model))
    return all(feature_map is not None and definition_of(feature_map).estimates is not None for feature_map in maps)


def has_draws(model: nn.Module) -> bool:
    """Returns whether the model has random projections."""
    return any(attention.projection is not None for attention in _attentions(model))


def sentence_of(scores: ReplacementScores, *, redraw_every_steps: int) -> str:
    """Returns the sentence of the report on how far the model depends on its projection and on its feature map.

    Args:
        scores: The scores with replacements.
        redraw_every_steps: Updates between two draws in training; 0: none.
    """
    if not scores.redrawn_accuracy or not scores.redrawn_perplexity:
        return "The attention of this model has a kernel of its own, without random features: it approximates nothing."
    training = "Trained on one draw"
    if redraw_every_steps:
        training = f"Trained with a new draw every {redraw_every_steps} updates"
    saved, accuracy, perplexity = scores.saved, scores.redrawn_accuracy.mean, scores.redrawn_perplexity.mean
    changes = (
        f"with another draw accuracy goes from {saved.accuracy:.3f} to {accuracy:.3f} and perplexity from "
        f"{saved.perplexity:.2f} to {perplexity:.2f} (mean of {len(scores.redrawn)} draws)"
    )
    if scores.exact is not None:
        changes += f", with exact attention to {scores.exact.accuracy:.3f} and {scores.exact.perplexity:.2f}"
    return f"{training}, this model {_verdict(scores)}: {changes}."


def _verdict(scores: ReplacementScores) -> str:
    gain = scores.empirical.loss - scores.saved.loss
    if gain < LITTLE_GAIN_NATS:
        return "has learned hardly more than the frequencies of the residues, so its attention matters little"
    lost_to_draw = float(np.mean([score.loss for score in scores.redrawn]) - scores.saved.loss) / gain
    needs_draw = lost_to_draw >= NEAR_SHARE
    loss = f"and loses {min(lost_to_draw, 1):.0%} of its gain over the empirical baseline with another one"
    if scores.exact is None:
        dependence = f"is tied to its draw, {loss}" if needs_draw else "does not depend on its draw"
        return f"has a kernel of its own, which estimates no softmax attention and {dependence}"
    needs_features = (scores.exact.loss - scores.saved.loss) / gain >= NEAR_SHARE
    if needs_draw and needs_features:
        return f"has a kernel that is no estimate of softmax attention but tied to its draw, {loss}"
    if needs_draw:
        return f"works with exact attention, but as an estimate of it is tied to its draw, {loss}"
    if needs_features:
        return "does not depend on its draw, but on the kernel or the noise of its features, unlike softmax attention"
    return "computes an estimate of softmax attention that is near enough to it"


def _attentions(model: nn.Module) -> list[SelfAttention]:
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


def _with_features(model: nn.Module) -> list[SelfAttention]:
    return [attention for attention in _attentions(model) if not attention.is_exact]


def _with_near_field(model: nn.Module) -> list[SelfAttention]:
    attentions = [attention for attention in _with_features(model) if attention.near_block]
    if not attentions:
        raise ValueError("model: expected a layer with a near field, got none")
    return attentions


def _spread(values: list[float]) -> Spread | None:
    return Spread(mean=float(np.mean(values)), std=float(np.std(values, ddof=1))) if values else None
