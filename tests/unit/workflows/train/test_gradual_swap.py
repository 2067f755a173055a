import pytest

from protlm.config import Config, ModelConfig, TrainConfig
from protlm.errors import ConfigError
from protlm.workflows.train.gradual_swap import check_gradual_swap, is_converted, kinds_at, set_kinds
from tests.unit.model.small_models import build

SHAPE = ModelConfig(attention=("positive", "local", "near-far"), num_layers=5, estimator=True)


def settings(every, model=SHAPE, **train):
    return Config(model=model, train=TrainConfig(convert_layers=every, **train))


def test_layers_are_converted_first_layer_first_after_so_many_updates_each():
    kinds = [kinds_at(settings(2), step) for step in range(1, 8)]
    first = ("positive", "local", "softmax", "softmax", "local")
    second = ("positive", "local", "near-far", "softmax", "local")
    assert kinds == [first] * 2 + [second] * 2 + [SHAPE.kinds] * 3
    assert [is_converted(settings(2), step) for step in range(1, 8)] == [False] * 4 + [True] * 3


def test_all_are_converted_at_once_by_default():
    assert is_converted(settings(0), 1)
    assert is_converted(settings(2, ModelConfig(attention="softmax")), 1)


def test_a_layer_whose_turn_has_not_come_is_exact():
    model = build(attention="positive", estimator=True)
    set_kinds(model, ("positive", "softmax"))
    assert [layer.attention.is_exact for layer in model.encoder_layers()] == [False, True]
    set_kinds(model, model.config.kinds)
    assert not any(layer.attention.is_exact for layer in model.encoder_layers())


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (settings(5, max_steps=10), "after 10 updates, expected fewer than train.max_steps = 10, got 5"),
        (settings(5, ModelConfig(attention="positive")), "without model.estimator"),
        (settings(5, stage="transfer"), "expected 0 in transfer"),
        (settings(5, compile=True), "train.compile"),
    ],
)
def test_what_cannot_be_done_is_refused(asked, word):
    with pytest.raises(ConfigError) as caught:
        check_gradual_swap(asked)
    assert word in str(caught.value)
    check_gradual_swap(settings(5, max_steps=11))
