"""`protlm prep`: what its options are called and how its outcome is told."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from protlm.cli import output
from protlm.cli.progress import Bars
from protlm.errors import ProtlmError

if TYPE_CHECKING:
    from protlm.workflows.prep.estimate import Estimate
    from protlm.workflows.prep.prepare import PartReport, PrepReport

# The defaults below are those of `workflows.prep.options.PrepRequest`, too heavy to import here; a test compares them.
SplitMethod = Literal["random", "cluster", "family", "file"]
OnBadRecord = Literal["error", "skip"]
_READY_MADE = "{} set ready-made; INPUT is then the training set. Repeatable."
_UNITS = {"read": "B", "write": "residues"}


def prep_command(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="FASTA, A3M, UniProtKB flat file or XML, UniRef XML; .gz .bz2 .xz .zst; told by content. "
            "Files, folders, patterns; - is the standard input.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DATASET", help="The dataset folder to make.")],
    valid_input: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help=_READY_MADE.format("Validation"))
    ] = None,
    test_input: Annotated[list[str] | None, typer.Option(metavar="FILE", help=_READY_MADE.format("Test"))] = None,
    ood_input: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help=_READY_MADE.format("Out-of-distribution"))
    ] = None,
    split: Annotated[
        SplitMethod,
        typer.Option(help="Draw sequences, draw whole clusters, hold out families, or do as a file says."),
    ] = "random",
    valid_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Part drawn for validation.  [default: 0.01]")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Part drawn for the test.  [default: 0.01]")
    ] = None,
    clusters: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Clusters: MMseqs2 TSV (cluster, member), CD-HIT .clstr or UniRef XML."),
    ] = None,
    cluster_with: Annotated[
        Literal["mmseqs"] | None, typer.Option(help="Find the clusters of INPUT with a program that is installed.")
    ] = None,
    cluster_identity: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sequence identity in a cluster, with --cluster-with.  [default: 0.3]"),
    ] = None,
    families: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Families: TSV of id and family; flat files tell their own.")
    ] = None,
    ood_family: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Family held out as ood, or the preset paper-pfam-20. Repeatable."),
    ] = None,
    split_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Splits: TSV of id and train, valid, test or ood.")
    ] = None,
    min_length: Annotated[int, typer.Option(min=1, help="Reject shorter sequences.")] = 1,
    max_length: Annotated[int | None, typer.Option(min=1, help="Reject longer sequences.")] = None,
    dedupe: Annotated[bool, typer.Option(help="Keep only the first of equal sequences within a split.")] = True,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="Stop at a bad record, or count it and go on.")] = "error",
    shard_residues: Annotated[int, typer.Option(min=1, help="Residues in a shard, at most.")] = 67_108_864,
    check_leaks: Annotated[
        bool, typer.Option(help="Look for sequences of one split that are part of those of another.")
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the dataset does not depend on it.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an unfinished run left.")] = False,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only read the I-th of N parts of the files, for --merge.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make the dataset from parts that were read.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make nothing; tell counts, time and disk from a sample.")
    ] = False,
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
      protlm prep uniref90.fasta.gz --split cluster --clusters uniref50.tsv --out dataset --workers 8
      protlm prep uniprot_sprot.dat.gz --split family --ood-family PF00306 --out dataset
    """  # noqa: D301 (\b is Typer's mark to keep the lines)
    from protlm.runtime.work_folder import partial_folder
    from protlm.workflows.prep.estimate import Estimate
    from protlm.workflows.prep.mmseqs import clusters_of
    from protlm.workflows.prep.options import PrepRequest, PrepUsageError, parse_part
    from protlm.workflows.prep.prepare import PartReport, prepare

    try:
        with Bars(_UNITS) as bars, clusters_of(inputs, cluster_with, cluster_identity, clusters) as cluster_file:
            request = PrepRequest(
                inputs=inputs, out=out, valid_inputs=valid_input or (), test_inputs=test_input or (),
                ood_inputs=ood_input or (), split=split, valid_fraction=valid_fraction, test_fraction=test_fraction,
                clusters=cluster_file, families=families, ood_families=ood_family or (), split_file=split_file,
                seed=seed, min_length=min_length, max_length=max_length, dedupe=dedupe, on_bad_record=on_bad_record,
                shard_residues=shard_residues, check_leaks=check_leaks, workers=workers, resume=resume,
                part=None if part is None else parse_part(part), merge=merge, dry_run=dry_run, force=force,
            )  # fmt: skip
            report = prepare(request, start_progress=bars.start)
    except PrepUsageError as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        if (kept := partial_folder(out)).is_dir():
            output.warn(f"what is finished is kept in {kept}; go on with the same command and --resume")
        raise
    if isinstance(report, Estimate):
        _tell_estimate(report, as_json)
    elif isinstance(report, PartReport):
        _tell_part(report, as_json)
    else:
        _tell(report, as_json)


def _tell(report: "PrepReport", as_json: bool) -> None:
    from protlm.cli.dataset_summary import print_summary, warn_about

    for path in report.left_out:
        output.warn(f"{path}: no protein file; left out")
    if report.num_unclustered:
        output.warn(f"{report.num_unclustered:,} records are in no cluster; each was drawn for itself")
    warn_about(report.manifest)
    if as_json:
        output.print_json(report.summary)
        return
    print_summary(report.manifest)
    print(f"\ndataset: {report.out}")


def _tell_part(report: "PartReport", as_json: bool) -> None:
    if as_json:
        output.print_json(report)
        return
    if not report.files:
        output.warn("this part has no file: there are more parts than files")
    output.print_table(("file of this part",), [(path,) for path in report.files])
    print(f"\nrecords: {report.num_records:,}\nparts: {report.folder}")


def _tell_estimate(found: "Estimate", as_json: bool) -> None:
    for path in found.left_out:
        output.warn(f"{path}: no protein file; would be left out")
    if as_json:
        output.print_json(found)
    else:
        rows = [
            ("files", f"{found.files:,}"),
            ("input bytes", f"{found.input_bytes:,}"),
            ("sampled bytes", f"{found.sampled_bytes:,}"),
            ("records, about", f"{found.num_records:,}"),
            ("residues, about", f"{found.num_residues:,}"),
            ("dataset bytes, about", f"{found.dataset_bytes:,}"),
            ("disk bytes while at work, about", f"{found.peak_bytes:,}"),
            ("free disk bytes", f"{found.free_bytes:,}"),
            ("seconds, about", f"{found.seconds:,.0f}"),
            *((f"rejected in the sample, {reason}", f"{count:,}") for reason, count in found.rejects.items()),
        ]
        output.print_table(("dry run", ""), rows)
    if found.peak_bytes > found.free_bytes:
        raise ProtlmError(f"not enough disk: about {found.peak_bytes:,} bytes wanted, {found.free_bytes:,} free")
