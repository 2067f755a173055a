import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from protlm.config_files import load_config
from protlm.errors import CheckpointError
from protlm.workflows.train import checkpoint_content
from protlm.workflows.train.checkpoint_content import DamagedCheckpointError, most_bytes, read_step
from tests.unit.workflows.train import checkpoint_attacks as attacks

HASH = "ab" * 16
STEP = 3
SETTINGS = [
    "model.num_layers=1", "model.model_dim=8", "model.ffn_dim=8", "model.num_heads=2", "model.num_features=4",
    "model.conv_width=0", "train.accumulate=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    return load_config(None, SETTINGS)


@pytest.fixture(scope="module")
def content(settings):
    """What a run saves, at its smallest."""
    from protlm.model.performer import Performer
    from protlm.workflows.train.optimizer import build_optimizer

    model = Performer(settings.model)
    model.reset(0)
    optimizer = build_optimizer(model, settings.train)
    for _ in range(STEP):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    best = {
        "targets": "hidden", "num_targets": 9, "accuracy": 0.1, "perplexity": 9.0, "empirical_accuracy": 0.1,
        "empirical_perplexity": 18.0,
    }  # fmt: skip
    return {
        "epoch": 0,
        "global_step": STEP,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "loops": {"fit_loop": {}},
        "callbacks": {"Watch": {"best": best, "num_without_improvement": 0}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "TrainingData": {"next_row": 2 * STEP},
        "protlm": {
            "dataset_hash": HASH,
            "config": settings.model_dump(mode="json"),
            "redraw_generator": torch.Generator().manual_seed(1).get_state(),
            "num_tokens": 700,
        },
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


def checked(content, settings):
    with torch.device("meta"):
        model = checkpoint_content.Performer(settings.model)
    return checkpoint_content._checked_step(content, HASH, settings, model)


def test_a_checkpoint_is_found_whole(content, settings, path):
    path.write_bytes(attacks.saved(content))
    assert read_step(path, HASH, settings) == STEP


def test_every_file_that_is_none_is_one_line(content, settings, path):
    kinds = dict(attacks.files(content))
    assert len(kinds) > 40
    for kind, data in kinds.items():
        path.write_bytes(data)
        message = None
        try:
            read_step(path, HASH, settings)
        except DamagedCheckpointError as error:
            message = str(error)
        assert message is not None, kind
        assert message.startswith(f"{path}: damaged, or not a checkpoint"), kind
        assert len(message) < 300 + len(str(path)), kind
    assert not Path("protlm-was-here").exists()


@pytest.mark.parametrize("number", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_bytes_changed_at_random_are_seen_or_change_nothing(number, content, settings, path):
    data = attacks.saved(content)
    random = np.random.default_rng(1)
    for attempt in range(number):
        changed = np.frombuffer(data, np.uint8).copy()
        # Mostly in what describes the members, which no checksum covers.
        start = data.index(b"PK\x01\x02") if attempt % 3 else 0
        places = random.integers(start, len(data), size=random.integers(1, 6))
        changed[places] = random.integers(0, 256, size=len(places))
        path.write_bytes(changed.tobytes())
        try:
            assert read_step(path, HASH, settings) == STEP, attempt
        except CheckpointError as error:
            message = str(error)
            assert message.isprintable(), attempt


FREE = {
    ("epoch",),
    ("loops",),
    ("callbacks", "Watch", "num_without_improvement"),
    ("protlm", "num_tokens"),
    ("protlm", "config", "train", "max_steps"),
}
"""Places of numbers that nothing else in the checkpoint determines."""


def is_free(place):
    """Whether a place may hold other values of its kind."""
    is_rate = "param_groups" in place and place[-1] in ("lr", "peak_lr")
    is_higher_rate = place[-1:] in (("lr",), ("muon_lr",)) and place[0] == "protlm"
    is_measured = place[:3] == ("callbacks", "Watch", "best")
    is_loop = place[:1] == ("loops",)
    return place in FREE or is_rate or is_higher_rate or is_measured or is_loop


def message_of(content, settings):
    """Returns the message of the error that a check ends with; None if it ends well."""
    try:
        checked(content, settings)
    except CheckpointError as error:
        return str(error)
    return None


SAMPLED = pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
"""Some of the attacks of a kind, evenly chosen, and all of them."""


@SAMPLED
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_a_strange_value_in_any_place_is_one_line(every, content, settings):
    tried = list(itertools.product(attacks.places(content), attacks.ODD_VALUES.items()))
    assert len(tried) > 5000
    for place, (kind, value) in tried[::every]:
        message = message_of(attacks.replaced(content, place, value), settings)
        if message is None:
            same = attacks.value_at(content, place)
            # An earlier protlm had fewer settings.
            is_section = place[:2] == ("protlm", "config") and value == {}
            assert is_free(place) or is_section or (type(same) is type(value) and same == value), (place, kind)
        else:
            assert len(message) < 400, (place, kind)
            assert message.isprintable(), (place, kind)


@SAMPLED
def test_a_place_that_is_missing_or_too_many_is_one_line(every, content, settings):
    for place in list(attacks.places(content))[:: (every + 1) // 2]:
        # A measurement need not say of what, and an earlier protlm had fewer settings.
        may = is_free(place) or place[:2] == ("protlm", "config") or place[-1:] == ("targets",)
        if place and isinstance(attacks.value_at(content, place[:-1]), dict):
            assert message_of(attacks.without(content, place), settings) is not None or may, place
        container = attacks.value_at(content, place)
        if isinstance(container, dict) and not is_free((*place, "rubbish")):
            assert message_of(attacks.replaced(content, place, {**container, "rubbish": 1}), settings) is not None


@SAMPLED
def test_a_tensor_that_is_not_quite_the_right_one_is_one_line(every, content, settings):
    tensors = [place for place in attacks.places(content) if isinstance(attacks.value_at(content, place), torch.Tensor)]
    tried = [(place, *other) for place in tensors for other in attacks.like(attacks.value_at(content, place))]
    for place, kind, other in tried[:: (every + 1) // 2]:
        message = message_of(attacks.replaced(content, place, other), settings)
        assert message is not None, (place, kind)
        assert str(place[-1]) in message, (place, kind)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("optimizer_states", 0, "state", 0, "step"), torch.tensor(-1.0)),
        (("optimizer_states", 0, "state", 0, "step"), torch.tensor(2.5)),
        (("optimizer_states", 0, "state", 0, "step"), torch.tensor(4.0)),
        (("optimizer_states", 0, "state", 0, "exp_avg_sq"), torch.full((33, 8), -1.0)),
        (("protlm", "redraw_generator"), torch.zeros(5056, dtype=torch.uint8)),
        (("protlm", "redraw_generator"), torch.full((5056,), 255, dtype=torch.uint8)),
        (("protlm", "redraw_generator"), torch.zeros(16, dtype=torch.uint8)),
        (("pytorch-lightning_version",), "1.9.5"),
        (("pytorch-lightning_version",), "two"),
        (("pytorch-lightning_version",), "9" * 5000),
        (("optimizer_states", 0, "param_groups", 7, "params"), [torch.tensor(7.0)]),
        (("optimizer_states", 0, "param_groups", 7, "params"), [7.0]),
        (("global_step",), 2**60),
        (("TrainingData", "next_row"), 5),
    ],
)
def test_values_out_of_range_are_one_line(place, value, content, settings):
    with pytest.raises(DamagedCheckpointError, match=str(place[-1])):
        checked(attacks.replaced(content, place, value), settings)


def test_other_settings_and_data_are_told_apart_from_damage(content, settings):
    for place, value, words in (
        (("protlm", "dataset_hash"), "cd" * 16, "another dataset"),
        (("protlm", "config", "train", "lr"), 1e-9, "made with train.lr = 1e-09"),
        (("protlm", "config", "model", "num_layers"), 2, "made with model.num_layers = 2"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            checked(attacks.replaced(content, place, value), settings)
        assert not isinstance(caught.value, DamagedCheckpointError)
    # The rates of a resumed run may be lower than before.
    assert checked(attacks.replaced(content, ("protlm", "config", "train", "lr"), 0.5), settings) == STEP


def test_the_versions_of_modules_are_looked_at_too(content, settings):
    state = attacks.OrderedDict(content["state_dict"])
    state._metadata = attacks.OrderedDict({"": {"version": 1}})
    assert checked({**content, "state_dict": state}, settings) == STEP
    for metadata in (5, {"": 5}, {"": {"version": 1, "rubbish": 2}}, {3: {"version": 1}}):
        state._metadata = metadata
        with pytest.raises(DamagedCheckpointError):
            checked({**content, "state_dict": state}, settings)


def test_what_is_no_regular_file_is_refused_without_waiting(content, settings, path, tmp_path):
    began = time.monotonic()
    os.mkfifo(path)
    with pytest.raises(DamagedCheckpointError, match="regular"):
        read_step(path, HASH, settings)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DamagedCheckpointError, match="regular"):
        read_step(path, HASH, settings)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(DamagedCheckpointError):
        read_step(path, HASH, settings)
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedCheckpointError, match="directory"):
        read_step(path, HASH, settings)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(attacks.saved(content))
    path.rmdir()
    path.symlink_to(elsewhere)
    assert read_step(path, HASH, settings) == STEP
    assert time.monotonic() - began < 30


def test_a_file_that_is_larger_than_any_of_its_model_is_not_read(content, settings, path):
    path.write_bytes(attacks.saved(content))
    with path.open("r+b") as file:
        file.truncate(10 * 2**40)
    with pytest.raises(DamagedCheckpointError, match="bytes"):
        read_step(path, HASH, settings)


def test_a_real_checkpoint_is_far_below_the_bound(content, settings):
    model = checkpoint_content.Performer(settings.model)
    assert len(attacks.saved(content)) < most_bytes(model)
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert most_bytes(model) > 12 * numbers + 2**25
