import pytest

from protlm.config import Config, ModelConfig, TrainConfig
from protlm.config_files import load_config
from protlm.errors import ConfigError, RunError
from protlm.vocabulary import TOKENS
from protlm.workflows.train.frozen import choose_parameters
from protlm.workflows.train.memory import estimate_memory
from protlm.workflows.train.optimizer import learning_rate_factor
from protlm.workflows.train.stage import (
    STAGE_DEFAULTS,
    TEACHER_NAME,
    check_teacher,
    teacher_of_run,
    write_teacher,
)
from tests.unit.model.small_models import build

SHAPE = {"attention": ("positive", "local", "near-far"), "num_layers": 3, "estimator": True, "qk_balance": True}


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_transfer_trains_what_decides_on_the_weights_of_attention(qk_norm, learns):
    model = build(qk_norm=qk_norm, **SHAPE)
    names = set(model.state_dict())
    settings = Config(model=model.config, train=TrainConfig(stage="transfer", transfer_features=learns))
    choose_parameters(model, settings)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = ["query.weight", "query.bias", "key.weight", "key.bias"]
    expected += ["log_temperature"] * qk_norm + ["projection", "feature_bias"] * learns
    assert sorted(trained) == sorted(f"layers.{layer}.attention.{name}" for layer in (0, 2) for name in expected)
    assert set(model.state_dict()) == names
    # What is told of a run before torch is loaded says the same.
    counted = estimate_memory(settings)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert counted.weights_bytes == estimate_memory(Config(model=model.config)).weights_bytes


def test_patterns_take_more_out_of_transfer_but_not_all():
    model = build(**SHAPE)
    train = TrainConfig(stage="transfer", freeze=("layers.0.*", "*.projection"))
    choose_parameters(model, Config(model=model.config, train=train))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("attention.")[0] for name in trained} == {"layers.2."}
    assert not any("projection" in name for name in trained)
    train = TrainConfig(stage="transfer", freeze=("layers.*",))
    with pytest.raises(ConfigError, match="of what transfer trains"):
        choose_parameters(build(**SHAPE), Config(model=model.config, train=train))


@pytest.mark.parametrize("stage", STAGE_DEFAULTS)
def test_the_settings_of_a_stage_stand_before_the_defaults_alone(stage):
    own = {"train": STAGE_DEFAULTS[stage]}
    settings = load_config(None, [f"train.stage={stage}", "train.lr=0.5"], missing=own).train
    assert (settings.lr, settings.optimizer) == (0.5, "adamw")
    assert learning_rate_factor(5, settings) == 0.5
    assert learning_rate_factor(settings.max_steps, settings) == pytest.approx(0.1)
    assert settings.valid_every_steps <= settings.max_steps / 4
    # A file that says something is obeyed.
    assert load_config("tiny", [f"train.stage={stage}"], missing=own).train.optimizer == "muon"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_layers": 2}, "model.num_layers: expected 3 as in the model that is trained, got 2"),
        ({"model_dim": 64}, "model.model_dim"),
        ({"num_heads": 2}, "model.num_heads"),
        ({"causal": True}, "model.causal"),
        ({"positions": "none"}, "expected 'rotary' as in the model that is trained, got 'none'"),
        ({"residues_as_x": "U"}, "model.residues_as_x"),
        ({"vocabulary": (*TOKENS, "|")}, "model.vocabulary: expected None as in the model that is trained, got '|'"),
    ],
)
def test_a_teacher_of_another_shape_is_refused_with_both_values(changes, word):
    student = ModelConfig(attention="positive")
    check_teacher(student, ModelConfig(attention="softmax", conv_width=0, vocabulary=TOKENS), "teacher")
    with pytest.raises(ConfigError) as caught:
        check_teacher(student, ModelConfig(attention="softmax", **changes), "teacher")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_learned_positions_of_a_teacher_reach_as_far():
    student, teacher = (ModelConfig(positions="learned", max_positions=size) for size in (100, 90))
    with pytest.raises(ConfigError, match=r"model\.max_positions: expected 100 .* got 90"):
        check_teacher(student, teacher, "teacher")


def test_a_run_knows_where_its_teacher_is(tmp_path, monkeypatch):
    assert teacher_of_run(tmp_path) is None
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path, "model")
    assert teacher_of_run(tmp_path) == str(tmp_path / "model")
    write_teacher(tmp_path, "lab/model@main")
    assert teacher_of_run(tmp_path) == "lab/model@main"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model": 3}', b'{"model": "a", "other": 1}', b"\xff"])
def test_a_file_that_names_no_teacher_is_told_in_one_line(content, tmp_path):
    (tmp_path / TEACHER_NAME).write_bytes(content)
    with pytest.raises(RunError, match=r"teacher\.json: .*--teacher") as caught:
        teacher_of_run(tmp_path)
    assert "\n" not in str(caught.value)
