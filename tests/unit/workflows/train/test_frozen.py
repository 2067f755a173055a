import pytest
import torch

from protlm.config import Config, ModelConfig, TrainConfig
from protlm.errors import ConfigError
from protlm.model.performer import Performer
from protlm.workflows.train.frozen import choose_parameters
from protlm.workflows.train.memory import estimate_memory
from protlm.workflows.train.optimizer import build_optimizer

SHAPE = ModelConfig(attention="positive", num_layers=3, model_dim=16, num_heads=2, ffn_dim=24, num_features=8)


def model():
    network = Performer(SHAPE)
    network.reset(0)
    return network


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_keep_their_bits_and_all_others_move(optimizer):
    network = model()
    patterns = ("embedding.*", "layers.[01].*")
    choose_parameters(network, Config(model=SHAPE, train=TrainConfig(freeze=patterns)))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    steps = build_optimizer(network, TrainConfig(optimizer=optimizer, weight_decay=0.5))
    for _ in range(2):
        network(torch.tensor([0, 5, 6, 32, 2]), torch.tensor([0, 5], dtype=torch.int32)).square().sum().backward()
        steps.step()
        steps.zero_grad()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert not any(name.startswith(("embedding.", "layers.0.", "layers.1.")) for name in moved)
    assert moved >= {"head.dense.weight", "layers.2.ffn_in.weight", "layers.2.attention.value.weight", "head.bias"}


def test_frozen_parameters_need_no_memory_for_training():
    whole, part = (
        estimate_memory(Config(model=SHAPE, train=TrainConfig(freeze=freeze))) for freeze in ((), ("layers.0.*",))
    )
    layer = sum(parameter.numel() for parameter in model().layers[0].parameters())
    assert whole.parameters - part.parameters == layer
    assert whole.weights_bytes == part.weights_bytes
    assert whole.gradients_bytes - part.gradients_bytes == 4 * layer
    assert part.optimizer_bytes < whole.optimizer_bytes


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(("layers.7.*",), "'layers.7.*', which matches none"), (("*",), "leave something to be trained")],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=r"train\.freeze") as caught:
        choose_parameters(model(), Config(model=SHAPE, train=TrainConfig(freeze=patterns)))
    assert message in str(caught.value)
