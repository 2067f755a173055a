"""`protlm train`: options in, a training run, its results out."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from protlm.cli import output

if TYPE_CHECKING:
    from protlm.workflows.train import TrainReport


def train_command(
    dataset: Path = typer.Argument(..., metavar="DATASET", help="A dataset made by protlm prep."),
    out: Path = typer.Option(..., "--out", metavar="RUN", help="Folder of the run."),
    config: str | None = typer.Option(
        None, "--config", metavar="NAME|FILE", help="A shipped configuration or a TOML file; default: tiny."
    ),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override a setting, such as train.lr=1e-3; repeatable."
    ),
    max_steps: int | None = typer.Option(None, "--max-steps", min=1, help="Optimizer updates since step 0."),
    seed: int | None = typer.Option(
        None, "--seed", min=0, help="Seed of weights, order and masks; the same as train.seed."
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue the run in RUN with its own settings."),
    force: bool = typer.Option(False, "--force", help="Replace an existing run."),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Train a masked language model.

    RUN gets config.toml, metrics.csv, curves.png, checkpoints/ and model/, the model with the lowest perplexity on the
    valid split. Ctrl-C stops after the current update and leaves a checkpoint; --resume goes on from it.

    \b
    Examples:
      protlm train dataset --out run --config tiny
      protlm train dataset --out run --config tiny --set train.lr=1e-3 --max-steps 2000
      protlm train dataset --out run --resume
    """  # noqa: D301  \b must reach Typer as a backspace
    if resume and force:
        raise typer.BadParameter("--resume continues a run and --force replaces it: give one of them")

    from protlm.workflows.train import train

    report = train(
        dataset, out, config=config, overrides=overrides, max_steps=max_steps, seed=seed, resume=resume, force=force
    )
    if as_json:
        output.print_json(report)
    else:
        _print(report)
    if report.interrupted:
        output.warn(f"stopped at step {report.step}; go on with: protlm train {dataset} --out {out} --resume")
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
