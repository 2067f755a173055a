"""`protlm inspect`: a dataset in, its counts out."""

from typing import Annotated

import typer

from protlm.cli import output
from protlm.cli.options import DatasetArgument, JsonOption
from protlm.cli.progress import Bars


def inspect_command(
    dataset: DatasetArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all shards and compare them with their checksums.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the counts of a dataset, from its manifest.

    The report.html in the dataset shows more.

    \b
    Examples:
      protlm inspect dataset
      protlm inspect dataset --verify --json
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.cli.dataset_summary import print_summary
    from protlm.workflows.inspect import inspect_dataset

    with Bars({"verify": "residue"}) as bars:
        report = inspect_dataset(dataset, verify=verify, start_progress=bars.start)
    if as_json:
        output.print_json(report.summary)
        return
    print_summary(report.manifest)
    print()
    output.print_pairs([("dataset", report.path), ("hash", report.hash)])
    if verify:
        output.print_pairs([("verified", "the shards hold what was written")])
