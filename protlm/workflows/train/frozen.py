"""Which tensors of a network a run trains: by patterns of their names, and by the stage of its recovery."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from protlm.config import Config
from protlm.errors import ConfigError
from protlm.workflows.train.stage import layers_with_features, learned_features, untrained_in_stage

if TYPE_CHECKING:
    from protlm.model.performer import Performer


def frozen_names(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Returns the names of the parameters that patterns take out of training.

    Args:
        names: The names of all parameters, in order.
        patterns: The patterns.

    Raises:
        ConfigError: A pattern that matches no parameter, or patterns that leave none to be trained.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ConfigError(
                f"train.freeze: expected patterns of parameters, such as {next(iter(names))} or layers.0.*, got "
                f"{pattern!r}, which matches none"
            )
        frozen |= matching
    if len(frozen) == len(names):
        raise ConfigError("train.freeze: expected patterns that leave something to be trained, got all parameters")
    return frozen


def untrained_names(names: Collection[str], settings: Config) -> set[str]:
    """Returns the names of the parameters that keep their values in a run, by its patterns or by its stage.

    Args:
        names: The names of all parameters, in order, with those of `learned_features`.
        settings: Those of the run.

    Raises:
        ConfigError: As `frozen_names` raises.
    """
    untrained = frozen_names(names, settings.train.freeze) | untrained_in_stage(names, settings)
    if len(untrained) == len(names):
        raise ConfigError(
            "train.freeze: expected patterns that leave something to be trained of what transfer trains, got all of it"
        )
    return untrained


def choose_parameters(model: "Performer", settings: Config) -> None:
    """Makes parameters of all that a run trains, and takes all other parameters out of training.

    Raises:
        ConfigError: As `frozen_names` raises.
    """
    if learned_features(settings):
        layers = model.encoder_layers()
        for number in layers_with_features(settings.model):
            layers[number].attention.learn_features()
    parameters = dict(model.named_parameters())
    for name in untrained_names(parameters, settings):
        parameters[name].requires_grad_(False)
