"""Weights of a saved model as the first ones of another: which tensors must fit, and which may be the network's own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protlm.config import ModelConfig
from protlm.errors import ModelError
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_files import description_of
from protlm.pretrained.model_names import read_named_model

_SAME = ("vocabulary", "residues_as_x", "token_dropout", "norm_eps")
"""Settings that no tensor shows."""


_DRAWN = (".projection", ".feature_bias")
_OF_ATTENTION = (
    ".feature_shift", ".query_balance", ".key_balance", ".temperature_logit", ".log_temperature", ".local_bias",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InitialModel:
    """A model whose weights another one begins with.

    Attributes:
        name: MODEL, as the user wrote it.
        description: Its description.
        network: The network of a model of another program, whose description comes with its weights, so that it is
            read once; None for one of ours, which is read when it is needed.
    """

    name: str | Path
    description: ModelDescription
    network: Performer | None = None


def find_initial_model(name: str | Path) -> InitialModel:
    """Returns the model of a name.

    Raises:
        ModelError: There is no such model, or it cannot be read.
    """
    description = description_of(name)
    if description is not None:
        return InitialModel(name=name, description=description)
    network, description = read_named_model(name)
    return InitialModel(name=name, description=description, network=network)


def load_initial_weights(model: Performer, init: InitialModel) -> list[str]:
    """Copies the weights of a saved model into a network, whose kind of attention may be another.

    Projections, with what an estimator has beside them, temperatures and local biases depend on the kind of attention:
    the network keeps its own where the saved model has none that fit. Rows of its own are shifted by a saved shift. So
    a Performer can start from the weights of a softmax Transformer, and the other way round. A temperature with a bound
    and one without are translated into each other, as far as the bound allows.

    Args:
        model: A network that is initialised already.
        init: The saved model.

    Returns:
        The names of the tensors that the network kept.

    Raises:
        ModelError: A model that cannot be read, or that differs in anything else.
    """
    saved, description = init.network, init.description
    if saved is None:
        saved, description = read_named_model(init.name)
    where = f"{init.name}: cannot start this model"
    target = model.state_dict()
    source = _translated(saved.state_dict(), description.model, model.config, target)
    if description.model.num_heads != model.config.num_heads:
        raise ModelError(
            f"{where}: model.num_heads: expected {description.model.num_heads} as in the saved one, "
            f"got {model.config.num_heads}"
        )
    for key in _SAME:
        wanted, given = getattr(description.model, key), getattr(model.config, key)
        if wanted != given:
            raise ModelError(f"{where}: model.{key}: expected {wanted!r} as in the saved one, got {given!r}"[:400])
    for name in sorted(source.keys() ^ target.keys()):
        if not _is_of_attention(name):
            state = "is missing in the saved one" if name in target else "of the saved one has no place in it"
            raise ModelError(f"{where}: tensor {name!r} {state}; the model sections must agree")
    kept = []
    for name, tensor in target.items():
        fits = name in source and source[name].shape == tensor.shape
        if _is_of_attention(name) and not (fits and _is_drawn_alike(name, description.model, model.config)):
            kept.append(name)
        elif not fits:
            raise ModelError(
                f"{where}: tensor {name!r}: expected {tuple(source[name].shape)} as in the saved one, "
                f"got {tuple(tensor.shape)}; the model sections must agree"
            )
    drawn = {name: tensor.clone() for name, tensor in target.items() if name.endswith(".projection")}
    model.load_state_dict({**target, **{name: source[name] for name in target if name not in kept}})
    for number, layer in enumerate(model.encoder_layers()):
        name = f"layers.{number}.attention.projection"
        # The network was initialised without a shift.
        if name in kept and layer.attention.feature_shift is not None:
            layer.attention.set_rows(drawn[name])
    return kept


def _translated(
    source: dict[str, Tensor], saved: ModelConfig, wanted: ModelConfig, target: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the saved tensors, with the temperatures in the form that the network has them in."""
    translated = dict(source)
    for name in target:
        layer, _, form = name.rpartition(".")
        bounded, free = f"{layer}.temperature_logit", f"{layer}.log_temperature"
        if form == "log_temperature" and bounded in source:
            translated[name] = (saved.max_temperature * torch.sigmoid(translated.pop(bounded))).log()
        elif form == "temperature_logit" and free in source:
            share = translated.pop(free).exp() / wanted.max_temperature
            if bool((share < 1).all()):
                translated[name] = torch.logit(share)
    return translated


def _is_of_attention(name: str) -> bool:
    return name.endswith((*_DRAWN, *_OF_ATTENTION))


def _is_drawn_alike(name: str, saved: ModelConfig, wanted: ModelConfig) -> bool:
    return not name.endswith(_DRAWN) or (saved.projection, saved.num_features) == (
        wanted.projection,
        wanted.num_features,
    )
