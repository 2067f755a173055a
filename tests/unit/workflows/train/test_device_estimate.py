import pytest

from protlm.config import Config, TrainConfig
from protlm.errors import ConfigError, UsageError
from protlm.runtime.devices import Devices
from protlm.workflows.train.device_estimate import ASSUMED_UTILISATION, DEVICES, estimate_on, parse_devices
from protlm.workflows.train.memory import MemoryEstimate
from protlm.workflows.train.run_size import RunSize

MEMORY = MemoryEstimate(
    parameters=10, projections=0, weights_bytes=40, gradients_bytes=40, optimizer_bytes=80, activations_bytes=1000
)
SIZE = RunSize(
    memory=MEMORY, num_records=1, residues_per_epoch=1, tokens_per_epoch=1, rows_per_epoch=1, steps=50, epochs=1.0,
    row_flops=67e12,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h100", ("h100", 1)),
        ("h100x8", ("h100", 8)),
        ("a100-80x4", ("a100-80", 4)),
        # A name with an x of its own.
        ("rtx4090", ("rtx4090", 1)),
        ("rtx4090x2", ("rtx4090", 2)),
    ],
)
def test_devices_are_a_name_and_a_number(text, expected):
    assert parse_devices(text) == expected


@pytest.mark.parametrize(
    "text",
    ["h999", "a100", "", "x8", "h100x", "h100x0", "h100x-1", "h100x2x2", "h100x" + "9" * 9, "h100x" + "0" * 9 + "1"],
)
def test_an_unknown_device_names_the_known_ones(text):
    with pytest.raises(UsageError, match=r"h100, .*as in h100x8") as caught:
        parse_devices(text)
    assert all(name in str(caught.value) for name in DEVICES)


def test_the_time_is_the_operations_by_an_assumed_share_of_the_peak():
    settings = Config(train=TrainConfig(accumulate=8))
    alone = estimate_on("h100", Devices(), settings, SIZE)
    assert alone.peak_flops == 67e12
    assert alone.seconds_per_step == pytest.approx(8 / ASSUMED_UTILISATION)
    assert alone.seconds == pytest.approx(50 * alone.seconds_per_step)
    assert estimate_on("h100", Devices(8), settings, SIZE).seconds_per_step == pytest.approx(1 / ASSUMED_UTILISATION)
    short = Config(train=TrainConfig(accumulate=8, precision="bf16-mixed"))
    assert estimate_on("h100", Devices(), short, SIZE).peak_flops == 989e12
    with pytest.raises(ConfigError, match="no bfloat16"):
        estimate_on("t4", Devices(), short, SIZE)


def test_fsdp_shares_the_state_and_not_the_row():
    settings = Config(train=TrainConfig(accumulate=4))
    whole = estimate_on("h100", Devices(4), settings, SIZE)
    shared = estimate_on("h100", Devices(4, strategy="fsdp"), settings, SIZE)
    assert (whole.memory_bytes, shared.memory_bytes) == (1160, 1040)
    assert whole.available_bytes == 80 * 2**30
