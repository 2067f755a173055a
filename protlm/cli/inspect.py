"""`protlm inspect`: a dataset in, what it says about itself out."""

from pathlib import Path
from typing import Annotated

import typer

from protlm.cli import output
from protlm.cli.progress import Bars


def inspect_command(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset made by protlm prep.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all shards and compare them with their checksums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tell what a dataset holds, from its manifest; its report.html shows more.

    \b
    Examples:
      protlm inspect dataset
      protlm inspect dataset --verify --json
    """  # noqa: D301 (\b is Typer's mark to keep the lines)
    from protlm.cli.dataset_summary import print_summary
    from protlm.workflows.inspect import inspect_dataset

    with Bars({"verify": "residue"}) as bars:
        report = inspect_dataset(dataset, verify=verify, start_progress=bars.start)
    if as_json:
        output.print_json(report.summary)
        return
    print_summary(report.manifest)
    print(f"\ndataset: {report.path}\nhash: {report.hash}")
    if verify:
        print("verified: the shards hold what was written")
