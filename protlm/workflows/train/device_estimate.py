"""The memory and time of a run on another device, from what its maker publishes: an estimate, not a measurement."""

from dataclasses import dataclass

from protlm.choices import Precision
from protlm.config import Config
from protlm.errors import ConfigError, UsageError
from protlm.runtime.devices import Devices
from protlm.workflows.train.run_size import RunSize

ASSUMED_UTILISATION = 0.3
"""Share of the published peak that training is taken to reach. Large models reach more, small ones much less."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of GPU, by its data sheet.

    Attributes:
        gigabytes: Memory.
        float32: Peak of float32, without TF32, in 10¹² operations a second.
        bfloat16: Peak of dense bfloat16 matrix products, in the same unit; None if it has none.
    """

    gigabytes: int
    float32: float
    bfloat16: float | None


DEVICES = {
    "t4": Device(gigabytes=16, float32=8.1, bfloat16=None),
    "l4": Device(gigabytes=24, float32=30.3, bfloat16=121),
    "a10": Device(gigabytes=24, float32=31.2, bfloat16=125),
    "rtx3090": Device(gigabytes=24, float32=35.6, bfloat16=71),
    "rtx4090": Device(gigabytes=24, float32=82.6, bfloat16=165),
    "a40": Device(gigabytes=48, float32=37.4, bfloat16=150),
    "a6000": Device(gigabytes=48, float32=38.7, bfloat16=155),
    "l40s": Device(gigabytes=48, float32=91.6, bfloat16=362),
    "a100-40": Device(gigabytes=40, float32=19.5, bfloat16=312),
    "a100-80": Device(gigabytes=80, float32=19.5, bfloat16=312),
    "h100": Device(gigabytes=80, float32=67, bfloat16=989),
    "h100-pcie": Device(gigabytes=80, float32=51, bfloat16=756),
    "h200": Device(gigabytes=141, float32=67, bfloat16=989),
    "b200": Device(gigabytes=180, float32=75, bfloat16=2250),
}
"""Kinds of GPU by their names in `--for`."""

_MOST_DEVICES = 65536


@dataclass(frozen=True, kw_only=True)
class DeviceEstimate:
    """The memory and time of a run on other devices.

    Attributes:
        device: Name of the kind of device.
        num_devices: Number of devices.
        memory_bytes: Memory that a step needs on each.
        available_bytes: Memory of each.
        peak_flops: Published peak of each, in operations a second, at the precision of the run.
        assumed_utilisation: Share of it that is assumed.
        seconds_per_step: Time of an update.
        seconds: Time of all steps, without measurements and checkpoints.
    """

    device: str
    num_devices: int
    memory_bytes: int
    available_bytes: int
    peak_flops: float
    assumed_utilisation: float
    seconds_per_step: float
    seconds: float


def parse_devices(text: str) -> tuple[str, int]:
    """Returns the name of a kind of device and how many of it, from a text such as `h100x8`.

    Raises:
        UsageError: An unknown device, or a number that is none.
    """
    name, _, number = (text, "", "1") if text in DEVICES else text.rpartition("x")
    is_number = number.isascii() and number.isdecimal() and len(number) < 9
    if name not in DEVICES or not (is_number and 0 < int(number) <= _MOST_DEVICES):
        raise UsageError(
            f"--for {text[:40]}: expected {', '.join(DEVICES)}, alone or with a number of devices as in h100x8"
        )
    return name, int(number)


def estimate_on(name: str, devices: Devices, settings: Config, size: RunSize) -> DeviceEstimate:
    """Returns the memory and time of a run on devices of a kind.

    Args:
        name: The kind, of `DEVICES`.
        devices: How many, and how they share the work.
        settings: Settings of the run.
        size: Its size.

    Raises:
        ConfigError: The device has no numbers of the precision that the settings ask for.
    """
    device = DEVICES[name]
    peak = _peak(name, device, settings.train.precision)
    shares = devices.total if devices.strategy == "fsdp" else 1
    row_seconds = size.row_flops / (peak * ASSUMED_UTILISATION)
    seconds = row_seconds * (settings.train.accumulate // devices.total)
    return DeviceEstimate(
        device=name,
        num_devices=devices.total,
        memory_bytes=-(-size.memory.state_bytes // shares) + size.memory.activations_bytes + size.memory.teacher_bytes,
        available_bytes=device.gigabytes * 2**30,
        peak_flops=peak,
        assumed_utilisation=ASSUMED_UTILISATION,
        seconds_per_step=seconds,
        seconds=seconds * size.steps,
    )


def _peak(name: str, device: Device, precision: Precision) -> float:
    peak = device.float32 if precision == "32" else device.bfloat16
    if peak is None:
        raise ConfigError(f"--for {name}: this device has no bfloat16; ask for --precision 32, or another device")
    return peak * 1e12
