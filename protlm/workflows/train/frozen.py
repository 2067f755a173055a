"""Parameters that keep their values in training, chosen by patterns of their names."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from protlm.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


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


def freeze(model: "nn.Module", patterns: Sequence[str]) -> None:
    """Takes parameters whose name matches a pattern out of training: they get no gradient and do not decay.

    Raises:
        ConfigError: As `frozen_names` raises.
    """
    parameters = dict(model.named_parameters())
    for name in frozen_names(parameters, patterns):
        parameters[name].requires_grad_(False)
