import pytest
import torch
from torch import nn

from protlm.config import ModelConfig
from protlm.config_files import load_config, shipped_configs
from protlm.model.performer import Performer
from protlm.model.shapes import tensor_shapes
from protlm.vocabulary import TOKENS

SETTINGS = [
    {},
    {"attention": "softmax", "qk_norm": False, "conv_width": 0},
    {"attention": "relu", "projection": "none"},
    {"attention": "hyperbolic", "num_features": 24, "ffn": "swiglu", "norm": "rms"},
    {"layer_norm": "post", "positions": "learned", "max_positions": 70, "embedding_norm": True},
    {"positions": "sinusoidal", "causal": True, "conv_width": 5},
    {"positions": "none", "head": "linear", "tied_head": False},
    {"stored_frequencies": True, "qk_layer_norm": True, "qk_norm": False, "token_dropout": True},
    {"num_layers": 4, "attention": ("local", "near-far", "softmax", "oprf"), "local_bias": 3.0},
    {"attention": ("softmax", "positive"), "exact_temperature": 0.0},
    {"vocabulary": ("<pad>", "<unk>", *TOKENS[:1], *TOKENS[2:3], *TOKENS[4:24], "<mask>"), "norm": "rms"},
]


def configurations():
    shape = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "ffn_dim": 24, "num_features": 8}
    yield from (pytest.param(ModelConfig(**{**shape, **changes}), id=str(changes)[:60]) for changes in SETTINGS)
    yield from (pytest.param(load_config(name).model, id=name) for name in shipped_configs())


@pytest.mark.parametrize("config", list(configurations()))
def test_the_shapes_are_those_of_the_network(config):
    with torch.device("meta"):
        model = Performer(config)
    shapes = tensor_shapes(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in shapes.items()
    }
    parameters = [name for name, tensor in shapes.items() if tensor.role != "fixed"]
    assert sorted(parameters) == sorted(name for name, _ in model.named_parameters())
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, tensor in shapes.items() if tensor.role == "matrix"} == matrices
