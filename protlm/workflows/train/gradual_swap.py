"""The gradual conversion of a model: which layers compute exact attention until their turn, a function of the step."""

from typing import TYPE_CHECKING

from protlm.choices import AttentionKind
from protlm.config import Config
from protlm.errors import ConfigError
from protlm.workflows.train.stage import layers_with_features

if TYPE_CHECKING:
    from protlm.model.performer import Performer


def check_gradual_swap(settings: Config) -> None:
    """Raises ConfigError if layers are to be converted one after another and cannot be, or not before the run ends."""
    train, model = settings.train, settings.model
    every = train.convert_layers
    if not every:
        return
    if train.stage == "transfer":
        raise ConfigError(
            f"train.convert_layers: expected 0 in transfer, which trains every layer by itself, got {every}"
        )
    if not model.estimator:
        raise ConfigError(
            f"train.convert_layers: expected 0 for a model without model.estimator, whose layers stand for no exact "
            f"ones, got {every}"
        )
    if train.compile:
        raise ConfigError(
            "train.compile: expected false with train.convert_layers, which changes the layers on the way"
        )
    last = _last_turn(settings)
    if last >= train.max_steps:
        raise ConfigError(
            f"train.convert_layers: the last of {len(layers_with_features(model))} layers has its turn after {last:,} "
            f"updates, expected fewer than train.max_steps = {train.max_steps:,}, got {every} between two"
        )


def kinds_at(settings: Config, step: int) -> tuple[AttentionKind, ...]:
    """Returns the kind of attention of each layer in update number `step`, from 1."""
    kinds = list(settings.model.kinds)
    every = settings.train.convert_layers
    for place, number in enumerate(layers_with_features(settings.model)):
        if step <= place * every:
            kinds[number] = "softmax"
    return tuple(kinds)


def is_converted(settings: Config, step: int) -> bool:
    """Returns whether all layers were those of the model in update number `step`."""
    return kinds_at(settings, step) == settings.model.kinds


def set_kinds(model: "Performer", kinds: tuple[AttentionKind, ...]) -> None:
    """Gives each layer its kind of attention; the weights stay."""
    for layer, kind in zip(model.encoder_layers(), kinds, strict=True):
        layer.attention.kind = kind


def _last_turn(settings: Config) -> int:
    return (len(layers_with_features(settings.model)) - 1) * settings.train.convert_layers
