"""Parameters that keep their values in training, chosen by patterns of their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from protlm.errors import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes parameters whose name matches a pattern out of training: they get no gradient and do not decay.

    Raises:
        ConfigError: A pattern that matches no parameter, or patterns that leave none to be trained.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ConfigError(
                f"train.freeze: expected patterns of parameters, such as {next(iter(parameters))} or layers.0.*, got "
                f"{pattern!r}, which matches none"
            )
    for name, parameter in parameters.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("train.freeze: expected patterns that leave something to be trained, got all parameters")
