"""`protlm train --dry-run`: the size of a run at once, then its pace here, or on devices that are not here."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from protlm.cli import output
from protlm.errors import ProtlmError
from protlm.workflows.train.device_estimate import DeviceEstimate, estimate_on
from protlm.workflows.train.request import CheckedRequest
from protlm.workflows.train.run_size import RunSize, size_of

if TYPE_CHECKING:
    from protlm.workflows.train.dry_run import DryRunReport


def print_pace_here(checked: CheckedRequest, *, find_batch: bool, timing_seconds: float, as_json: bool) -> None:
    """Prints the size of a run, as far as it is known before torch is loaded, and then its pace on this machine."""
    settings = checked.settings
    if settings is not None and not as_json:
        _print_size(size_of(settings, checked.sets.train, checked.teacher))

    from protlm.workflows.train.dry_run import dry_run

    report = dry_run(checked.request, find_batch=find_batch, timing_seconds=timing_seconds)
    if as_json:
        output.print_json(report)
    else:
        if settings is None:
            _print_size(report)
        _print_pace(report)
    if report.note is not None:
        output.warn(report.note)


def print_on_devices(checked: CheckedRequest, kind: str, *, as_json: bool) -> None:
    """Prints the size of a run, and its memory and time on devices of a kind.

    Raises:
        ProtlmError: The settings are not known without weights, or do not suit the device.
    """
    if checked.settings is None:
        raise ProtlmError(
            f"--for {kind}: the settings follow from {checked.request.init}, which is not read for an estimate; write "
            "it in our format with protlm convert, and give that"
        )
    size = size_of(checked.settings, checked.sets.train, checked.teacher)
    estimate = estimate_on(kind, checked.request.devices, checked.settings, size)
    if as_json:
        output.print_json({"num_parameters": size.memory.parameters, **asdict(size), "on_devices": asdict(estimate)})
    else:
        _print_size(size)
        output.print_pairs(_on_devices(estimate))


def _print_size(size: "RunSize | DryRunReport") -> None:
    memory = size.memory
    sizes = {"weights": memory.weights_bytes, "gradients": memory.gradients_bytes, "optimizer": memory.optimizer_bytes}
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())
    output.print_pairs(
        [
            ("parameters", f"{memory.parameters:,}, and {memory.projections:,} numbers of random projections"),
            ("state", f"{_gib(memory.state_bytes)}: {listed}"),
            (
                "an epoch",
                f"{size.num_records:,} proteins, {size.residues_per_epoch:,} residues, "
                f"{size.tokens_per_epoch:,} tokens in {size.rows_per_epoch:,} rows",
            ),
            ("the run", f"{size.steps:,} steps, {size.epochs:.2f} epochs"),
        ]
    )
    sys.stdout.flush()


def _print_pace(report: "DryRunReport") -> None:
    row = _gib(report.memory.activations_bytes)
    total, available = _gib(report.memory_bytes), _gib(report.available_bytes)
    teacher = f", {_gib(report.memory.teacher_bytes)} for the teacher" if report.memory.teacher_bytes else ""
    pairs = [("memory", f"{total} of {available} here by estimate: the state{teacher}, and {row} for one row")]
    if report.first_step:
        pairs.append(("made", f"{report.first_step:,} of the steps"))
    if report.seconds_per_step is None or report.seconds is None:
        pairs.append(("a step", "not timed: it needs more memory than is here"))
    else:
        how = "s here" if report.seconds_from == "measured" else "s here by estimate, not timed (--timing-seconds)"
        left = "for what is left, measurements not counted"
        pairs.append(("a step", f"{report.seconds_per_step:.2f} {how}, and so {_hours(report.seconds)} {left}"))
    if report.largest_tokens_per_batch is not None:
        pairs.append(("a row", f"at most data.tokens_per_batch = {report.largest_tokens_per_batch:,} fits"))
    output.print_pairs(pairs)


def _on_devices(estimate: DeviceEstimate) -> list[tuple[str, object]]:
    fits = "" if estimate.memory_bytes <= estimate.available_bytes else "; it does not fit: lower data.tokens_per_batch"
    peak = f"{estimate.peak_flops / 1e12:g} TFLOP/s, the published peak of a device"
    return [
        ("estimate", f"not measured: {estimate.assumed_utilisation:.0%} of {peak}"),
        ("devices", f"{estimate.num_devices:,} × {estimate.device}"),
        ("memory", f"{_gib(estimate.memory_bytes)} of {_gib(estimate.available_bytes)} on each{fits}"),
        ("a step", f"{estimate.seconds_per_step:.3g} s, and so {_hours(estimate.seconds)}, measurements not counted"),
    ]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"
