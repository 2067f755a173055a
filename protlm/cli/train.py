"""`protlm train`: options in, a training run, its results out."""

import re
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from protlm.cli import output

if TYPE_CHECKING:
    from protlm.workflows.train.dry_run import DryRunReport
    from protlm.workflows.train.train import TrainReport


class Strategy(StrEnum):
    """How the devices of a run share the work."""

    AUTO = "auto"
    DDP = "ddp"
    FSDP = "fsdp"


class Precision(StrEnum):
    """Which numbers the matrix products are made with."""

    FULL = "32"
    MIXED = "bf16-mixed"


def _seconds(text: str | None) -> float | None:
    """Returns the seconds of HH:MM:SS."""
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,6}:[0-5][0-9]:[0-5][0-9]", text):
        raise typer.BadParameter(f"expected HH:MM:SS, such as 47:30:00, got {text!r}", param_hint="--max-time")
    hours, minutes, seconds = map(int, text.split(":"))
    return 3600.0 * hours + 60.0 * minutes + seconds


def train_command(
    datasets: list[Path] = typer.Argument(..., metavar="DATASET...", help="Datasets made by protlm prep."),
    out: Path = typer.Option(..., "--out", metavar="RUN", help="Folder of the run."),
    config: str | None = typer.Option(
        None, "--config", metavar="NAME|FILE", help="A shipped configuration or a TOML file; default: tiny."
    ),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override a setting, such as train.lr=1e-3; repeatable."
    ),
    init: Path | None = typer.Option(
        None, "--init", metavar="MODEL", help="Start from the weights of this model or run; projections may differ."
    ),
    devices: int = typer.Option(1, "--devices", min=1, help="GPUs, or processes on the CPU, on each machine."),
    num_nodes: int = typer.Option(1, "--num-nodes", min=1, help="Machines."),
    strategy: Strategy = typer.Option(
        Strategy.AUTO, "--strategy", help="ddp: the whole model on each device; fsdp: a part of it on each."
    ),
    precision: Precision | None = typer.Option(None, "--precision", help="The same as train.precision."),
    max_steps: int | None = typer.Option(None, "--max-steps", min=1, help="Optimizer updates since step 0."),
    max_time: str | None = typer.Option(
        None, "--max-time", metavar="HH:MM:SS", help="Stop after this time, with a checkpoint."
    ),
    seed: int | None = typer.Option(
        None, "--seed", min=0, help="Seed of weights, order and masks; the same as train.seed."
    ),
    wandb: str | None = typer.Option(
        None,
        "--wandb",
        metavar="PROJECT",
        help="Send the numbers to Weights & Biases too (protlm[wandb]).",
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue the run in RUN with its own settings."),
    force: bool = typer.Option(False, "--force", help="Replace an existing run."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Tell parameters, memory, steps and the time of one, and train nothing."
    ),
    find_batch: bool = typer.Option(
        False, "--find-batch", help="With --dry-run, on a GPU: find the largest data.tokens_per_batch that fits."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Train a masked or next-token language model.

    RUN gets config.toml, run.json, metrics.csv, curves.png, checkpoints/, tensorboard/ and model/, the model with the
    lowest perplexity on the valid split. Ctrl-C or SIGTERM stops after the current update and leaves a checkpoint;
    --resume goes on from it. Everything else is a setting: see configs/ and --set.

    \b
    Examples:
      protlm train dataset --out run --config tiny
      protlm train dataset --out run --config tiny --set train.lr=1e-3 --max-steps 2000
      protlm train dataset --out run --resume
      protlm train dataset --out run --config base --devices 8 --max-time 47:30:00
      protlm train dataset --out run --config base --dry-run
    """  # noqa: D301  \b must reach Typer as a backspace
    if resume and force:
        raise typer.BadParameter("--resume continues a run and --force replaces it: give one of them")
    if find_batch and not dry_run:
        raise typer.BadParameter("--find-batch trains nothing: give it together with --dry-run")
    max_seconds = _seconds(max_time)
    wanted = [*overrides]
    for key, value in (("max_steps", max_steps), ("seed", seed), ("precision", precision)):
        if value is not None:
            wanted.append(f"train.{key}={value}")

    from protlm.runtime.devices import Devices
    from protlm.workflows.train.start import TrainRequest

    request = TrainRequest(
        dataset_paths=datasets, run_dir=out.resolve(), config=config, overrides=wanted, init=init,
        devices=Devices(devices, num_nodes, strategy.value), wandb_project=wandb, resume=resume, force=force,
    )  # fmt: skip
    if dry_run:
        from protlm.workflows.train.dry_run import dry_run as estimate

        found = estimate(request, find_batch=find_batch)
        output.print_json(found) if as_json else _print_estimate(found)
        return

    from protlm.workflows.train.train import train

    report = train(request, max_seconds=max_seconds, command=sys.argv[1:])
    if report is None:
        # One of the other processes of the run: the first one tells.
        return
    output.print_json(report) if as_json else _print(report)
    for note in report.notes:
        output.warn(note)
    if report.ended_early is not None:
        given = [("--devices", devices, 1), ("--num-nodes", num_nodes, 1), ("--strategy", strategy.value, "auto"),
                 ("--wandb", wandb, None)]  # fmt: skip
        words = [str(word) for name, value, default in given if value != default for word in (name, value)]
        again = shlex.join(["protlm", "train", *map(str, datasets), "--out", str(out), "--resume", *words])
        output.warn(f"stopped at step {report.step}: {report.ended_early}; go on with: {again}")
    if report.interrupted:
        raise typer.Exit(130)


def _print(report: "TrainReport") -> None:
    if report.valid is not None:
        output.print_table(
            ("valid split", "accuracy", "perplexity"),
            [
                ("model", f"{report.valid.accuracy:.4f}", f"{report.valid.perplexity:.3f}"),
                (
                    "residue frequencies",
                    f"{report.valid.empirical_accuracy:.4f}",
                    f"{report.valid.empirical_perplexity:.3f}",
                ),
            ],
        )
    print(f"steps       {report.step} in {report.seconds:.0f} s, {report.num_parameters:,} parameters")
    print(f"model       {report.model or 'none yet: it is written at the first measurement'}")
    print(f"loss curve  {report.run_dir / 'curves.png'}")


def _print_estimate(report: "DryRunReport") -> None:
    memory = report.memory
    print(f"parameters  {report.num_parameters:,}, and {memory.projections:,} numbers of random projections")
    parts = {
        "weights": memory.weights_bytes, "gradients": memory.gradients_bytes, "optimizer": memory.optimizer_bytes,
        "one row": memory.activations_bytes,
    }  # fmt: skip
    told = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    print(f"memory      {_gib(report.memory_bytes)} of {_gib(report.available_bytes)} by estimate: {told}")
    print(
        f"an epoch    {report.num_records:,} proteins, {report.residues_per_epoch:,} residues, "
        f"{report.tokens_per_epoch:,} tokens in {report.rows_per_epoch:,} rows"
    )
    done = f", {report.first_step:,} of them made" if report.first_step else ""
    print(f"the run     {report.steps:,} steps{done}, {report.epochs:.2f} epochs")
    if report.seconds_per_step is None or report.seconds is None:
        print("a step      not timed: it needs more memory than is here")
    else:
        hours = report.seconds / 3600
        left = "for what is left, measurements not counted"
        print(f"a step      {report.seconds_per_step:.2f} s here, and so {hours:.1f} h {left}")
    if report.largest_tokens_per_batch is not None:
        print(f"a row       at most data.tokens_per_batch = {report.largest_tokens_per_batch:,} fits")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
