"""`protlm eval`: options in, a measurement, its table out."""

from enum import StrEnum
from pathlib import Path

import typer

from protlm.cli import output
from protlm.cli.progress import Bars


class SplitOption(StrEnum):
    """The splits that can be scored."""

    valid = "valid"
    test = "test"
    ood = "ood"
    train = "train"


def eval_command(
    model: Path = typer.Argument(..., metavar="MODEL", help="A model directory, or the run that made it."),
    dataset: Path = typer.Argument(..., metavar="DATASET", help="A dataset made by protlm prep."),
    split: SplitOption = typer.Option(SplitOption.test, "--split", help="Which proteins to score."),
    out: Path = typer.Option(..., "--out", metavar="DIR", help="Folder for report.json."),
    seed: int = typer.Option(0, "--seed", min=0, max=2**63 - 1, help="Seed of the masks."),
    force: bool = typer.Option(False, "--force", help="Replace an existing report."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Measure how well a model fills in masked residues.

    Accuracy is the fraction of masked residues that the model ranks first; perplexity is the number of residues it
    effectively hesitates between (20 is a blind guess among the standard ones). Both stand beside the empirical
    baseline: the residue frequencies of the model's training set.

    \b
    Examples:
      protlm eval run dataset --split test --out report
      protlm eval run/model dataset --split valid --out report-valid --json
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.workflows.evaluate.evaluate import evaluate

    with Bars({"eval": "residue"}) as bars:
        report = evaluate(model, dataset, split.value, out, seed=seed, force=force, start_progress=bars.start)
    if as_json:
        output.print_json(report)
        return
    output.print_table(
        (f"{report.split} split", "accuracy", "perplexity"),
        [
            ("model", f"{report.model.accuracy:.4f}", f"{report.model.perplexity:.3f}"),
            ("residue frequencies", f"{report.empirical.accuracy:.4f}", f"{report.empirical.perplexity:.3f}"),
        ],
    )
    print(f"scored      {report.num_targets:,} masked residues of {report.num_records:,} proteins")
    print(f"report      {out / 'report.json'}")
