"""`protlm prep`: options in, a dataset, its counts out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from protlm.choices import SplitMethod, Unclustered
from protlm.cli import output
from protlm.cli.options import (
    ForceOption,
    JsonOption,
    NucleotidesOption,
    OnBadRecordOption,
    ResumeOption,
    SchedulerFileOption,
    SchedulerOption,
    one_of,
    scheduler_of,
    seed_option,
)
from protlm.cli.progress import Progress

if TYPE_CHECKING:
    from protlm.workflows.prep.estimate import PrepEstimate
    from protlm.workflows.prep.prepare import PartReport, PrepReport

# The defaults below are those of `workflows.prep.options.PrepRequest`, too heavy to import here; a test compares them.
_READY_MADE = "Ready-made {} set; INPUT is then the training set. Repeatable."
_UNITS = {"read for clusters": "sequence", "cluster": "sequence", "read": "B", "write": "residue"}

InputsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Protein files, folders or patterns, or - for the standard input: FASTA, A3M, UniProtKB flat file or "
        "XML, UniRef XML; plain, .gz, .bz2, .xz or .zst. The format is recognised from the content.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DATASET", help="The dataset folder to make.")]
ValidInputOption = Annotated[
    list[str] | None, typer.Option("--valid-input", metavar="FILE", help=_READY_MADE.format("validation"))
]
TestInputOption = Annotated[
    list[str] | None, typer.Option("--test-input", metavar="FILE", help=_READY_MADE.format("test"))
]
OodInputOption = Annotated[
    list[str] | None, typer.Option("--ood-input", metavar="FILE", help=_READY_MADE.format("out-of-distribution"))
]
SplitOption = Annotated[
    SplitMethod,
    typer.Option(
        "--split",
        metavar=one_of(SplitMethod),
        help="Draw sequences, draw whole clusters, hold out families, or follow --split-file.",
    ),
]
ValidFractionOption = Annotated[
    float | None,
    typer.Option(
        "--valid-fraction",
        metavar="FRACTION",
        min=0.0,
        max=1.0,
        help="Fraction of INPUT drawn for valid; default: 0.01, beside ready-made splits 0.",
    ),
]
TestFractionOption = Annotated[
    float | None,
    typer.Option(
        "--test-fraction",
        metavar="FRACTION",
        min=0.0,
        max=1.0,
        help="Fraction of INPUT drawn for test; default: 0.01, beside ready-made splits 0.",
    ),
]
ClustersOption = Annotated[
    Path | None,
    typer.Option(
        "--clusters",
        metavar="FILE",
        help="Clusters: CD-HIT .clstr, MMseqs2 TSV (cluster, member) or UniRef XML.",
    ),
]
ClusterWithOption = Annotated[
    Literal["mmseqs"] | None,
    typer.Option(
        "--cluster-with", metavar="mmseqs", help="Cluster the proteins with a program installed on this machine."
    ),
]
ClusterIdentityOption = Annotated[
    float | None,
    typer.Option(
        "--cluster-identity",
        metavar="FRACTION",
        min=0.0,
        max=1.0,
        help="Sequence identity within a cluster, with --cluster-with; default: 0.3.",
    ),
]
UnclusteredOption = Annotated[
    Unclustered | None,
    typer.Option(
        "--unclustered",
        metavar=one_of(Unclustered),
        help="In a split by cluster, draw each record without cluster, or train on it; default: an error.",
    ),
]
FamiliesOption = Annotated[
    Path | None,
    typer.Option("--families", metavar="FILE", help="Families: TSV of id and family; flat files contain theirs."),
]
OodFamilyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ood-family", metavar="NAME", help="Family, or the preset paper-pfam-20, to hold out as ood. Repeatable."
    ),
]
SplitFileOption = Annotated[
    Path | None,
    typer.Option("--split-file", metavar="FILE", help="Splits: TSV of id and train, valid, test or ood."),
]
MinLengthOption = Annotated[int, typer.Option("--min-length", metavar="N", min=1, help="Reject shorter sequences.")]
MaxLengthOption = Annotated[
    int | None, typer.Option("--max-length", metavar="N", min=1, help="Reject longer sequences.")
]
DedupeOption = Annotated[
    bool, typer.Option("--dedupe/--no-dedupe", help="Keep only the first of equal sequences within a split.")
]
ShardResiduesOption = Annotated[
    int, typer.Option("--shard-residues", metavar="N", min=1, help="Residues in a shard, at most.")
]
CheckLeaksOption = Annotated[
    bool,
    typer.Option(
        "--check-leaks/--no-check-leaks",
        help="Look for sequences of one split that are contained in sequences of another.",
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", metavar="N", min=1, help="Processes; their number does not change the dataset."),
]
PartOption = Annotated[
    str | None,
    typer.Option("--part", metavar="I/N", help="Read only the I-th of N parts of the files, for --merge."),
]
MergeOption = Annotated[bool, typer.Option("--merge", help="Make the dataset from the parts that were read.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Estimate counts, time and disk from a sample; make nothing.")
]
SeedOption = Annotated[int, seed_option("Seed of the random split.")]


def prep_command(
    inputs: InputsArgument,
    out: OutOption,
    valid_input: ValidInputOption = None,
    test_input: TestInputOption = None,
    ood_input: OodInputOption = None,
    split: SplitOption = "random",
    valid_fraction: ValidFractionOption = None,
    test_fraction: TestFractionOption = None,
    clusters: ClustersOption = None,
    cluster_with: ClusterWithOption = None,
    cluster_identity: ClusterIdentityOption = None,
    unclustered: UnclusteredOption = None,
    families: FamiliesOption = None,
    ood_family: OodFamilyOption = None,
    split_file: SplitFileOption = None,
    min_length: MinLengthOption = 1,
    max_length: MaxLengthOption = None,
    dedupe: DedupeOption = True,
    on_bad_record: OnBadRecordOption = "error",
    nucleotides: NucleotidesOption = "keep",
    shard_residues: ShardResiduesOption = 67_108_864,
    check_leaks: CheckLeaksOption = True,
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    resume: ResumeOption = False,
    part: PartOption = None,
    merge: MergeOption = False,
    dry_run: DryRunOption = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn protein files into a dataset: clean, deduplicate, split.

    A sequence is never in two splits: the first of train, valid, test and ood that has it keeps it.

    \b
    Examples:
      protlm prep proteins.fasta.gz --out dataset
      protlm prep proteins.fasta --out dataset --valid-fraction 0.1 --test-fraction 0.1
      protlm prep train.fasta --valid-input valid.fasta --test-input test.fasta --out dataset
      protlm prep uniref90.fasta.gz --split cluster --clusters uniref50.tsv --out dataset --workers 8
      protlm prep uniprot_sprot.dat.gz --split family --ood-family PF00306 --out dataset
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.runtime.work_folder import partial_folder
    from protlm.workflows.prep.options import PrepRequest, parse_part
    from protlm.workflows.prep.prepare import prepare

    try:
        with Progress(_UNITS) as progress:
            request = PrepRequest(
                inputs=inputs, out=out, valid_inputs=valid_input or (), test_inputs=test_input or (),
                ood_inputs=ood_input or (), split=split, valid_fraction=valid_fraction, test_fraction=test_fraction,
                clusters=clusters, cluster_with=cluster_with, cluster_identity=cluster_identity, families=families,
                ood_families=ood_family or (), split_file=split_file, unclustered=unclustered, seed=seed,
                min_length=min_length, max_length=max_length, dedupe=dedupe, on_bad_record=on_bad_record,
                nucleotides=nucleotides, shard_residues=shard_residues, check_leaks=check_leaks, workers=workers,
                scheduler=scheduler_of(scheduler, scheduler_file),
                resume=resume, part=None if part is None else parse_part(part), merge=merge, dry_run=dry_run,
                force=force,
            )  # fmt: skip
            report = prepare(request, start_progress=progress.start, tell=output.tell)
    except KeyboardInterrupt:
        output.warn_if_kept(partial_folder(out))
        raise
    _print(report, as_json)


def _print(report: "PrepReport | PartReport | PrepEstimate", as_json: bool) -> None:
    from protlm.workflows.prep.estimate import PrepEstimate
    from protlm.workflows.prep.prepare import PartReport

    if isinstance(report, PrepEstimate):
        _print_estimate(report, as_json)
    elif isinstance(report, PartReport):
        _print_part(report, as_json)
    else:
        _print_dataset(report, as_json)


def _print_dataset(report: "PrepReport", as_json: bool) -> None:
    from protlm.cli.dataset_summary import print_summary, warn_about

    for file in report.left_out:
        output.warn(f"{file}; no protein file, left out")
    unclustered = report.manifest.options.unclustered
    if report.num_unclustered:
        treatment = "they are in train" if unclustered == "train" else "each was drawn for itself"
        output.warn(f"{report.num_unclustered:,} records are in no cluster; {treatment}")
    for note in report.label_notes:
        output.warn(note)
    warn_about(report.manifest)
    if as_json:
        output.print_json(report.summary)
        return
    print_summary(report.manifest)
    print()
    output.print_pairs([("dataset", report.out)])


def _print_part(report: "PartReport", as_json: bool) -> None:
    if as_json:
        output.print_json(report)
        return
    if not report.files:
        output.warn("this part has no file: there are more parts than files")
    output.print_table(("file of this part",), [(path,) for path in report.files])
    print()
    output.print_pairs([("records", f"{report.num_records:,}"), ("parts", report.folder)])


def _print_estimate(estimate: "PrepEstimate", as_json: bool) -> None:
    for file in estimate.left_out:
        output.warn(f"{file}; no protein file, would be left out")
    pairs = [
        ("files", f"{estimate.files:,}"),
        ("input bytes", f"{estimate.input_bytes:,}"),
        ("sampled bytes", f"{estimate.sampled_bytes:,}"),
        ("records, about", f"{estimate.num_records:,}"),
        ("residues, about", f"{estimate.num_residues:,}"),
        ("dataset bytes, about", f"{estimate.dataset_bytes:,}"),
        ("disk bytes while at work, about", f"{estimate.peak_bytes:,}"),
        ("free disk bytes", f"{estimate.free_bytes:,}"),
        ("seconds, about", f"{estimate.seconds:,.0f}"),
        *((f"rejected in the sample, {reason}", f"{count:,}") for reason, count in estimate.rejects.items()),
    ]
    output.print_estimate(estimate, pairs, as_json=as_json)
