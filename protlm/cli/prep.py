"""`protlm prep`: what its options are called and how its outcome is told."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from protlm.cli import output

if TYPE_CHECKING:
    from protlm.workflows.prep import PrepReport

# The defaults below are those of `workflows.prep.prepare`, which is too heavy to import here; a test compares them.
SplitMethod = Literal["random"]
OnBadRecord = Literal["error", "skip"]
_READY_MADE = "{} set ready-made; INPUT is then the training set. Repeatable."


def prep_command(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="FASTA files, plain or .gz.")],
    out: Annotated[Path, typer.Option(metavar="DATASET", help="The dataset folder to make.")],
    valid_input: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help=_READY_MADE.format("Validation"))
    ] = None,
    test_input: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_READY_MADE.format("Test"))] = None,
    ood_input: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help=_READY_MADE.format("Out-of-distribution"))
    ] = None,
    split: Annotated[
        SplitMethod, typer.Option(help="How to split INPUT; a function of seed and sequence alone.")
    ] = "random",
    valid_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Part drawn for validation.  [default: 0.01]")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Part drawn for the test.  [default: 0.01]")
    ] = None,
    min_length: Annotated[int, typer.Option(min=1, help="Reject shorter sequences.")] = 1,
    max_length: Annotated[int | None, typer.Option(min=1, help="Reject longer sequences.")] = None,
    dedupe: Annotated[bool, typer.Option(help="Keep only the first of equal sequences within a split.")] = True,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="Stop at a bad record, or count it and go on.")] = "error",
    shard_residues: Annotated[int, typer.Option(min=1, help="Residues in a shard, at most.")] = 67_108_864,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random split.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a dataset that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn protein files into a dataset: clean, drop exact duplicates, split, write.

    A sequence never stands in two splits: of train, valid, test, ood the first that has it keeps it.

    \b
    Examples:
      protlm prep proteins.fasta.gz --out dataset
      protlm prep proteins.fasta --out dataset --valid-fraction 0.1 --test-fraction 0.1
      protlm prep train.fasta --valid-input valid.fasta --test-input test.fasta --out dataset
    """  # noqa: D301 (\b is Typer's mark to keep the lines)
    from tqdm import tqdm

    from protlm.workflows.prep import PrepUsageError, prepare

    # The one method so far; the option is there so that scripts may already name it.
    assert split == "random"
    files = [*inputs, *(valid_input or ()), *(test_input or ()), *(ood_input or ())]
    try:
        with tqdm(total=_num_bytes(files), unit="B", unit_scale=True, desc="prep", disable=None) as bar:
            report = prepare(
                inputs,
                out,
                valid_inputs=valid_input or (),
                test_inputs=test_input or (),
                ood_inputs=ood_input or (),
                valid_fraction=valid_fraction,
                test_fraction=test_fraction,
                seed=seed,
                min_length=min_length,
                max_length=max_length,
                dedupe=dedupe,
                on_bad_record=on_bad_record,
                shard_residues=shard_residues,
                force=force,
                progress=bar.update,
            )
    except PrepUsageError as error:
        raise typer.BadParameter(str(error)) from error
    _warn(report)
    if as_json:
        output.print_json(report)
    else:
        _print(report)


def _num_bytes(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())


def _warn(report: "PrepReport") -> None:
    for name, split in report.splits.items():
        if not split.num_records:
            output.warn(f"split {name!r} is empty")
    if report.rejects:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in report.rejects.items())
        output.warn(f"{sum(report.rejects.values()):,} records rejected: {counts}")


def _print(report: "PrepReport") -> None:
    rows = [
        (
            name,
            f"{split.num_records:,}",
            f"{split.num_residues:,}",
            "-" if split.median_length is None else f"{split.median_length:,}",
            "-" if split.p99_length is None else f"{split.p99_length:,}",
        )
        for name, split in report.splits.items()
    ]
    output.print_table(("split", "records", "residues", "median length", "p99 length"), rows)
    counts = {
        "duplicates removed, within a split": report.duplicates_within_split,
        "duplicates removed, across splits": report.duplicates_across_splits,
        **{f"repaired letters, {rule}": count for rule, count in report.repairs.items()},
        **{f"rejected records, {reason}": count for reason, count in report.rejects.items()},
    }
    if any(counts.values()):
        print()
        output.print_table(("also", "count"), [(name, f"{count:,}") for name, count in counts.items() if count])
    print(f"\ndataset: {report.out}")
