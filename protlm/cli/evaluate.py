"""`protlm eval`: options in, a measurement, its table out."""

from pathlib import Path
from typing import Annotated

import typer

from protlm.choices import SplitName
from protlm.cli import output
from protlm.cli.options import DatasetArgument, ForceOption, JsonOption, ModelArgument, one_of, seed_option
from protlm.cli.progress import Bars


def eval_command(
    model: ModelArgument,
    dataset: DatasetArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for report.json.")],
    split: Annotated[
        SplitName, typer.Option("--split", metavar=one_of(SplitName), help="The proteins to score.")
    ] = "test",
    seed: Annotated[int, seed_option("Seed of the masks.", max=2**63 - 1)] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model predicts masked residues.

    Accuracy is the fraction of masked residues that the model ranks first. Perplexity is the effective number of
    residues that it is choosing between; a blind guess among the standard residues gives 20. Both are printed beside
    the empirical baseline: the residue frequencies of the model's training set.

    \b
    Examples:
      protlm eval run dataset --split test --out report
      protlm eval run/model dataset --split valid --out report-valid --json
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.workflows.evaluate.evaluate import evaluate

    with Bars({"eval": "residue"}) as bars:
        report = evaluate(model, dataset, split, out, seed=seed, force=force, start_progress=bars.start)
    if as_json:
        output.print_json(report)
        return
    output.print_scores(
        report.split,
        model=(report.model.accuracy, report.model.perplexity),
        baseline=(report.empirical.accuracy, report.empirical.perplexity),
    )
    output.print_pairs(
        [
            ("scored", f"{report.num_targets:,} masked residues of {report.num_records:,} proteins"),
            ("report", out / "report.json"),
        ]
    )
