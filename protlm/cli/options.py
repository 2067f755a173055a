"""Options that mean the same in several commands, each defined once; and two forms of option that Typer lacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from protlm.choices import MOST_TOKENS, InferencePrecision
from protlm.data.records import Nucleotides, OnBadRecord
from protlm.runtime.workers import Scheduler


def one_of(choices: Any) -> str:
    """Returns the metavar of a choice: the values of a Literal, with bars between them."""
    return "|".join(get_args(choices))


def some_of(name: str, choices: Any, help: str) -> Any:
    """Returns a repeatable option for values of a Literal, by comma; Typer itself takes a Literal as one value only."""

    def check(values: Sequence[str] | None) -> Sequence[str] | None:
        if values is None:
            return None
        values = [value.strip() for text in values for value in text.split(",")]
        for value in values:
            if value not in get_args(choices):
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, get_args(choices)))}.")
        return values

    return typer.Option(name, metavar=one_of(choices), help=help, callback=check)


def seed_option(help: str, max: int | None = None) -> Any:
    """Returns the option `--seed`; the help says which draws depend on it."""
    return typer.Option("--seed", metavar="N", min=0, max=max, help=help)


def scheduler_of(address: str | None, file: Path | None) -> Scheduler | None:
    """Returns the scheduler that two options name; None if neither is given."""
    if address is not None and file is not None:
        raise typer.BadParameter("--scheduler and --scheduler-file: give one of them")
    return None if address is None and file is None else Scheduler(address, file)


ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A model directory or the run that made it, a directory of transformers, a .pt of fairseq; OWNER/NAME "
        "on the hub; or starter.",
    ),
]
OnBadRecordOption = Annotated[
    OnBadRecord,
    typer.Option("--on-bad-record", metavar=one_of(OnBadRecord), help="Stop at a bad record, or skip and count it."),
]
NucleotidesOption = Annotated[
    Nucleotides,
    typer.Option(
        "--nucleotides",
        metavar=one_of(Nucleotides),
        help="Stop at a nucleic acid, skip and count it, or keep it with a warning.",
    ),
]
DevicesOption = Annotated[
    int, typer.Option("--devices", metavar="N", min=1, max=1024, help="GPUs, or processes on the CPU, on each machine.")
]
NumNodesOption = Annotated[
    int, typer.Option("--num-nodes", metavar="N", min=1, max=65536, help="Machines; all must see the folder of --out.")
]
TokensPerBatchOption = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-batch",
        metavar="N",
        min=3,
        max=MOST_TOKENS,
        help="Budget of one forward pass; default: a number that suits the device.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        metavar="N",
        min=2,
        max=MOST_TOKENS,
        help="Compute longer proteins in overlapping windows of N residues.",
    ),
]
PrecisionOption = Annotated[
    InferencePrecision,
    typer.Option(
        "--precision",
        metavar=one_of(InferencePrecision),
        help="Number type of weights and products; auto: bf16 to embed on a GPU that has it, else 32.",
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler", metavar="ADDRESS", help="Let the workers of a Dask cluster do it (needs protlm[cluster])."
    ),
]
SchedulerFileOption = Annotated[
    Path | None,
    typer.Option("--scheduler-file", metavar="FILE", help="The file in which Dask's scheduler wrote its address."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
