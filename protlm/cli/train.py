"""`protlm train`: options in, a training run, its results out."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protlm.choices import Precision, Stage, StrategyName
from protlm.cli import output
from protlm.cli.options import DevicesOption, ForceOption, JsonOption, NumNodesOption, one_of, seed_option
from protlm.cli.progress import Progress

if TYPE_CHECKING:
    from protlm.workflows.train.train import TrainReport

DatasetsArgument = Annotated[list[Path], typer.Argument(metavar="DATASET...", help="Datasets made by protlm prep.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run.")]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="NAME|FILE",
        help="A shipped configuration or a TOML file: see protlm config; default: tiny.",
    ),
]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as train.lr=1e-3; repeatable."),
]
InitOption = Annotated[
    Path | None,
    typer.Option("--init", metavar="MODEL", help="Start from the weights of this model; projections may differ."),
]
StageOption = Annotated[
    Stage | None,
    typer.Option(
        "--stage",
        metavar=one_of(Stage),
        help="Let a converted model, given with --init, recover. transfer: each layer learns the attention of its "
        "teacher; distill: then the whole model its predictions. Sets train.stage, and the defaults of the rates and "
        "steps.",
    ),
]
TeacherOption = Annotated[
    Path | None,
    typer.Option("--teacher", metavar="MODEL", help="With --stage: the model that the one of --init was made of."),
]
StrategyOption = Annotated[
    StrategyName,
    typer.Option(
        "--strategy",
        metavar=one_of(StrategyName),
        help="ddp: the whole model on each device; fsdp: a share of it on each.",
    ),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option("--precision", metavar=one_of(Precision), help="Sets train.precision."),
]
MaxStepsOption = Annotated[
    int | None,
    typer.Option("--max-steps", metavar="N", min=1, help="Optimizer updates from step 0 on; sets train.max_steps."),
]
MaxTimeOption = Annotated[
    str | None,
    typer.Option("--max-time", metavar="HH:MM:SS", help="Stop after this time, with a checkpoint and a model."),
]
SeedOption = Annotated[int | None, seed_option("Seed of weights, order and masks; sets train.seed.")]
WandbOption = Annotated[
    str | None,
    typer.Option("--wandb", metavar="PROJECT", help="Send the metrics to Weights & Biases too (needs protlm[wandb])."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in RUN with its own settings.")]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print parameters, memory, steps and the time of a step; train nothing."),
]
_TIMING_SECONDS = 60.0
TimingSecondsOption = Annotated[
    float | None,
    typer.Option(
        "--timing-seconds",
        metavar="N",
        min=0.0,
        help="With --dry-run: time a step only if that takes no longer, as far as can be foreseen, else estimate it; "
        f"default: {_TIMING_SECONDS:g}.",
    ),
]
ForOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="DEVICE",
        help="With --dry-run: estimate memory and time on other devices, such as h100 or a100-80x4, and run nothing.",
    ),
]
FindBatchOption = Annotated[
    bool,
    typer.Option("--find-batch", help="With --dry-run, on a GPU: find the largest data.tokens_per_batch that fits."),
]


def train_command(
    datasets: DatasetsArgument,
    out: OutOption,
    config: ConfigOption = None,
    overrides: OverridesOption = None,
    init: InitOption = None,
    stage: StageOption = None,
    teacher: TeacherOption = None,
    devices: DevicesOption = 1,
    num_nodes: NumNodesOption = 1,
    strategy: StrategyOption = "auto",
    precision: PrecisionOption = None,
    max_steps: MaxStepsOption = None,
    max_time: MaxTimeOption = None,
    seed: SeedOption = None,
    wandb: WandbOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    timing_seconds: TimingSecondsOption = None,
    device: ForOption = None,
    find_batch: FindBatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a masked or next-token language model.

    RUN gets config.toml, run.json, metrics.csv, curves.png, checkpoints/, tensorboard/ and model/, the model with the
    lowest perplexity on the valid split. Ctrl-C or SIGTERM stops after the current update and leaves a checkpoint and a
    model, which is marked as unmeasured if there was no time to measure it; --resume continues from the checkpoint.
    Everything else is a setting: protlm config prints them all, --set changes one.

    \b
    Examples:
      protlm train dataset --out run --config tiny
      protlm train dataset --out run --config tiny --set train.lr=1e-3 --max-steps 2000
      protlm train dataset --out run --resume
      protlm train dataset --out recovered --init converted --teacher model --stage transfer
      protlm train dataset --out run --config base --devices 8 --max-time 47:30:00
      protlm train dataset --out run --config base --dry-run
      protlm train dataset --out run --config base --set train.accumulate=8 --dry-run --for h100x8
    """  # noqa: D301  \b must reach Typer as a backspace
    if resume and force:
        raise typer.BadParameter("--resume continues a run and --force replaces it: give one of them")
    if not resume and (stage is None) != (teacher is None):
        raise typer.BadParameter("--stage and --teacher belong together: give both, or none of them")
    if stage is not None and init is None and not resume:
        raise typer.BadParameter("--stage trains a converted model: give it with --init")
    only_dry = {"--find-batch": find_batch, "--for": device is not None, "--timing-seconds": timing_seconds is not None}
    for name, is_given in only_dry.items():
        if is_given and not dry_run:
            raise typer.BadParameter(f"{name} trains nothing: give it together with --dry-run")
    if device is not None and (find_batch or timing_seconds is not None or (devices, num_nodes) != (1, 1)):
        raise typer.BadParameter(
            "--for names the devices, as in h100x8: leave out --devices, --num-nodes, --find-batch, --timing-seconds"
        )
    max_seconds = _seconds(max_time)
    named = {"max_steps": max_steps, "seed": seed, "precision": precision, "stage": stage}
    settings = [*(overrides or ()), *(f"train.{key}={value}" for key, value in named.items() if value is not None)]

    from protlm.runtime.devices import Devices
    from protlm.workflows.train.device_estimate import parse_devices
    from protlm.workflows.train.request import TrainRequest, check_request

    kind, num_devices = (None, devices) if device is None else parse_devices(device)
    request = TrainRequest(
        dataset_paths=datasets, run_dir=Path(os.path.realpath(out)), config=config, overrides=settings, init=init,
        teacher=teacher, devices=Devices(num_devices, num_nodes, strategy), wandb_project=wandb, resume=resume,
        force=force,
    )  # fmt: skip
    # Before torch and Lightning are loaded, which takes seconds.
    checked = check_request(request, runs_here=kind is None)
    if dry_run:
        from protlm.cli.dry_run import print_on_devices, print_pace_here

        if kind is None:
            seconds = _TIMING_SECONDS if timing_seconds is None else timing_seconds
            print_pace_here(checked, find_batch=find_batch, timing_seconds=seconds, as_json=as_json)
        else:
            print_on_devices(checked, kind, as_json=as_json)
        return

    from protlm.workflows.train.train import train

    with Progress({"train": "step"}) as progress:
        report = train(request, max_seconds=max_seconds, command=sys.argv[1:], start_progress=progress.start)
    if report is None:
        # Only the first process of a run prints.
        return
    output.print_json(report) if as_json else _print(report)
    for note in report.notes:
        output.warn(note)
    if report.ended_early is not None:
        again = _resume_command(datasets, out, devices, num_nodes, strategy, wandb)
        output.warn(f"stopped at step {report.step}: {report.ended_early}; go on with: {again}")
    if report.interrupted:
        raise typer.Exit(130)


def _resume_command(
    datasets: list[Path], out: Path, devices: int, num_nodes: int, strategy: StrategyName, wandb: str | None
) -> str:
    """Returns the command that continues a run, without the options that have their default."""
    words = ["protlm", "train", *map(str, datasets), "--out", str(out), "--resume"]
    for name, value, default in (
        ("--devices", devices, 1),
        ("--num-nodes", num_nodes, 1),
        ("--strategy", strategy, "auto"),
        ("--wandb", wandb, None),
    ):
        if value != default:
            words += [name, str(value)]
    return shlex.join(words)


def _seconds(text: str | None) -> float | None:
    """Returns the seconds of HH:MM:SS."""
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,6}:[0-5][0-9]:[0-5][0-9]", text):
        raise typer.BadParameter(f"expected HH:MM:SS, such as 47:30:00, got {text!r}", param_hint="--max-time")
    hours, minutes, seconds = map(int, text.split(":"))
    return 3600.0 * hours + 60.0 * minutes + seconds


def _print(report: "TrainReport") -> None:
    if report.valid is not None:
        output.print_scores(
            "valid",
            model=(report.valid.accuracy, report.valid.perplexity),
            baseline=(report.valid.empirical_accuracy, report.valid.empirical_perplexity),
        )
    unmeasured = ", unmeasured: the run was stopped before" if report.unmeasured else ""
    output.print_pairs(
        [
            ("steps", f"{report.step} in {report.seconds:.0f} s, {report.num_parameters:,} parameters"),
            ("model", f"{report.model or 'none'}{unmeasured}"),
            ("loss curve", report.run_dir / "curves.png"),
        ]
    )
