"""Layers that treat every token by itself take a stretch of a row at a time, and nothing else of the model changes."""

import pytest
import torch

from protlm.config import ModelConfig
from protlm.model import stretches
from protlm.model.performer import Performer
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import bounds

SIZES = (40, 3, 90, 21)


@pytest.fixture
def calls(monkeypatch):
    """Makes stretches short; returns a function that notes the lengths it is given."""
    monkeypatch.setattr(stretches, "STRETCH_TOKENS", 16)
    lengths = []

    def noting(x, y):
        lengths.append(len(x))
        return x + y, x.unsqueeze(-1) * torch.ones(2)

    noting.lengths = lengths
    return noting


@pytest.mark.parametrize("length", [0, 1, 16, 17, 50])
def test_stretches_put_together_are_the_whole(calls, length):
    x, y = torch.arange(length * 3.0).view(length, 3), torch.ones(length, 3)
    with torch.no_grad():
        total, pair = stretches.in_stretches(calls, x, y)
    assert total.equal(x + y)
    assert pair.equal(torch.stack((x, x), -1))
    assert sum(calls.lengths) == length
    assert max(calls.lengths) <= 16


def test_with_gradients_one_call_is_given_the_whole_row(calls):
    x = torch.ones(50, 3, requires_grad=True)
    total, _ = stretches.in_stretches(calls, x, x)
    assert calls.lengths == [50]
    assert torch.autograd.grad(total.sum(), x)[0].equal(torch.full((50, 3), 2.0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"conv_width": 0, "qk_norm": False, "attention": "softmax"},
        {"conv_width": 0, "layer_norm": "post", "positions": "learned", "ffn": "swiglu"},
        {"conv_width": 5, "positions": "none", "rescale_qk": True},
        {"causal": True, "attention": "softmax"},
    ],
    ids=str,
)
def test_hidden_states_are_those_of_whole_rows(monkeypatch, settings):
    model = Performer(ModelConfig(num_layers=2, model_dim=16, num_heads=2, ffn_dim=24, num_features=8, **settings))
    model.reset(0)
    model.eval().double()
    tokens = torch.randint(4, 24, (sum(SIZES),), generator=torch.Generator().manual_seed(0))
    expected = model.hidden_states(tokens, bounds(*SIZES), (0, 1, 2))
    # No stretch ends where a protein does.
    monkeypatch.setattr(stretches, "STRETCH_TOKENS", 16)
    with torch.inference_mode():
        actual = model.hidden_states(tokens, bounds(*SIZES), (0, 1, 2))
    for layer, states in expected.items():
        assert relative_error(actual[layer], states) < TOLERANCE[torch.float64], layer


def test_without_gradients_the_widest_tensors_are_never_of_a_whole_row(monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH_TOKENS", 16)
    model = Performer(
        ModelConfig(
            attention="positive", num_layers=1, model_dim=16, num_heads=2, ffn_dim=64, num_features=8, conv_width=0
        )
    )
    model.reset(0)
    seen = []
    (layer,) = model.layers
    layer.ffn_in.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    with torch.inference_mode():
        model.eval().hidden_states(torch.full((sum(SIZES),), 5), bounds(*SIZES), (1,))
    assert seen == [16] * 9 + [10]
