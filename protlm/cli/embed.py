"""`protlm embed`: options in, embeddings, a summary out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from protlm.choices import MOST_TOKENS, SplitName
from protlm.cli import output
from protlm.cli.options import (
    DevicesOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    NucleotidesOption,
    NumNodesOption,
    OnBadRecordOption,
    PrecisionOption,
    ResumeOption,
    SchedulerFileOption,
    SchedulerOption,
    TokensPerBatchOption,
    WindowOption,
    one_of,
    scheduler_of,
    seed_option,
    some_of,
)
from protlm.cli.progress import Progress
from protlm.data.embeddings.kinds import Dtype, Kind, LayoutName
from protlm.data.records import shown
from protlm.errors import ProtlmError

if TYPE_CHECKING:
    from protlm.workflows.embed.embed import EmbedReport
    from protlm.workflows.embed.estimate import EmbedCounts

_UNITS = {"read": "B", "embed": "residue", "write": "protein"}
_SHOWN_SKIPPED = 20
_DEFAULT_INCLUDE = ["mean"]
_REPAIRED = (
    "{:,} letters were repaired: biotrainer finds a protein by its sequence, and these only if the file that it reads "
    "has the repaired letters too"
)

InputsArgument = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Protein files as for prep, or - for the standard input; or one DATASET."),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="The output: a file, or a folder with the layout esm.")
]
SplitOption = Annotated[
    SplitName | None, typer.Option("--split", metavar=one_of(SplitName), help="The proteins of a DATASET to embed.")
]
IncludeOption = Annotated[
    list[str], some_of("--include", Kind, help="Kinds of embedding to store, by comma; repeatable.")
]
LayersOption = Annotated[
    str, typer.Option("--layers", metavar="LAYERS", help="Numbers by comma: 0 is the embedding, -1 the last layer.")
]
LayoutOption = Annotated[
    LayoutName | None,
    typer.Option(
        "--layout",
        metavar=one_of(LayoutName),
        help="Layout of the output; default: that of the suffix of --out (.npz, .npy, .parquet), else protlm.",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar=one_of(Dtype),
        help="Type of the stored numbers; default: float32, and float16 for the layout uniprot.",
    ),
]
TruncateOption = Annotated[
    int | None,
    typer.Option(
        "--truncate", metavar="N", min=1, max=MOST_TOKENS, help="Embed only the first N residues of longer proteins."
    ),
]
SeedOption = Annotated[int, seed_option("Accepted as by every command; embedding draws nothing.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print counts, size, time and free disk; embed nothing.")]


def embed_command(
    model: ModelArgument,
    inputs: InputsArgument,
    out: OutOption,
    split: SplitOption = None,
    include: IncludeOption = _DEFAULT_INCLUDE,
    layers: LayersOption = "-1",
    layout: LayoutOption = None,
    dtype: DtypeOption = None,
    tokens_per_batch: TokensPerBatchOption = None,
    window: WindowOption = None,
    truncate: TruncateOption = None,
    on_bad_record: OnBadRecordOption = "error",
    nucleotides: NucleotidesOption = "keep",
    precision: PrecisionOption = "auto",
    devices: DevicesOption = 1,
    num_nodes: NumNodesOption = 1,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed every protein: one vector each, or one per residue.

    Proteins keep their order and their ids; a repeated id gets #2, #3, … A protein of any length is embedded whole
    unless --truncate is given, and its result does not depend on the others. Equal sequences are computed once. A
    protein that does not fit into memory is left out and listed, and the exit status is then 1. --force replaces an
    output of the same layout only.

    \b
    Examples:
      protlm embed run proteins.fasta --out embeddings.h5
      protlm embed run a.fasta b.fasta.gz --out embeddings.h5 --include mean --include per-residue --dtype float16
      protlm embed run proteins.fasta --out per-residue.h5 --layout uniprot --include per-residue
      zcat proteins.fasta.gz | protlm embed run - --out vectors --layout esm --layers 0,-1
      protlm embed run dataset --split test --out test.h5 --devices 4
    """  # noqa: D301  \b must reach Typer as a backspace
    layer_numbers = _numbers(layers)

    from protlm.data.embeddings.layouts import layout_name

    chosen_layout = layout_name(out, layout)

    from protlm.runtime.devices import Devices
    from protlm.runtime.work_folder import partial_folder
    from protlm.workflows.embed.checks import check_request
    from protlm.workflows.embed.settings import EmbedRequest

    request = EmbedRequest(
        model=model, inputs=inputs, out=out, split=split, include=cast("list[Kind]", include), layers=layer_numbers,
        layout=chosen_layout, dtype=dtype, tokens_per_batch=tokens_per_batch, window=window, truncate=truncate,
        on_bad_record=on_bad_record, nucleotides=nucleotides,
        precision=precision, devices=Devices(devices, num_nodes),
        scheduler=scheduler_of(scheduler, scheduler_file), resume=resume, force=force,
    )  # fmt: skip
    # Before torch is loaded, which takes seconds.
    check_request(request)

    from protlm.workflows.embed.estimate import EmbedEstimate, estimate

    try:
        with Progress(_UNITS) as progress:
            report: EmbedEstimate | EmbedReport | None
            if dry_run:
                report = estimate(request, start_progress=progress.start, tell=lambda counts: _tell(counts, as_json))
            else:
                from protlm.workflows.embed.embed import embed

                report = embed(request, start_progress=progress.start, tell=output.tell)
    except KeyboardInterrupt:
        if not dry_run:
            output.warn_if_kept(partial_folder(out))
        raise
    if report is None:
        # Only the first process of a run prints.
        return
    for file in report.left_out:
        output.warn(f"{file}; no protein file, left out")
    if report.rejects:
        output.warn("skipped " + ", ".join(f"{count} records ({reason})" for reason, count in report.rejects.items()))
    if report.num_nucleotides:
        output.warn(
            f"{report.num_nucleotides:,} records are nucleic acids, and their letters were read as residues; "
            "leave them out with --nucleotides skip"
        )
    if isinstance(report, EmbedEstimate):
        rate = ("residues a second, in a sample", f"{report.residues_per_second:,.0f}")
        output.print_time_and_disk(report, rate, as_json=as_json)
    else:
        if chosen_layout == "biotrainer" and report.repairs:
            output.warn(_REPAIRED.format(sum(report.repairs.values())))
        _print(report, as_json)


def _numbers(layers: str) -> list[int]:
    try:
        return [int(text) for text in layers.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--layers: expected whole numbers by comma, got {layers!r}") from None


def _print(report: "EmbedReport", as_json: bool) -> None:
    if as_json:
        output.print_json(report)
    else:
        output.print_pairs(_pairs(report))
    if report.skipped:
        listed = ", ".join(
            f"{shown(protein.id)} ({protein.num_residues:,})" for protein in report.skipped[:_SHOWN_SKIPPED]
        )
        listed += ", …" if len(report.skipped) > _SHOWN_SKIPPED else ""
        raise ProtlmError(
            f"{len(report.skipped):,} proteins did not fit into memory and are not in {report.out}: {listed}; "
            "embed them with --window or --truncate, fewer --layers, or on a machine with more memory"
        )


def _pairs(report: "EmbedReport") -> list[tuple[str, str]]:
    pairs = [("embedded", f"{report.num_records:,} proteins, {report.num_residues:,} residues")]
    for count, description in (
        (report.num_equal, "proteins with a sequence that stood before, computed once"),
        (report.num_windowed, "proteins in overlapping windows"),
        (report.num_truncated, "proteins cut to their beginning"),
        (report.num_renamed, "repeated ids, renamed to #2, #3, …"),
    ):
        if count:
            pairs.append(("of them", f"{count:,} {description}"))
    if report.num_beyond_training:
        longest = f"longer than any that the model was trained on ({report.trained_residues:,} residues)"
        pairs.append(("of them", f"{report.num_beyond_training:,} proteins {longest}"))
    if report.num_lacked:
        what = f"{report.num_lacked:,} residues that the model lacks ({', '.join(report.lacked)})"
        pairs.append(("read as", f"{report.stand_in}: {what}"))
    pairs += [("repaired", f"{count:,} letters ({rule})") for rule, count in report.repairs.items()]
    kinds, layers = ", ".join(report.include), ", ".join(map(str, report.layers))
    pairs += [
        ("stored", f"{kinds} of layer {layers}, {report.dim} wide, {report.dtype}"),
        ("embeddings", ", ".join(map(str, (report.out, *report.files)))),
    ]
    for protein in report.skipped:
        pairs.append(("left out", f"{shown(protein.id)}, {protein.num_residues:,} residues: did not fit into memory"))
    return pairs


def _tell(counts: "EmbedCounts", as_json: bool) -> None:
    pairs = [
        ("proteins", f"{counts.num_records:,}"),
        ("different sequences", f"{counts.num_sequences:,}"),
        ("residues", f"{counts.num_residues:,}"),
        ("residues to compute", f"{counts.num_computed_residues:,}"),
        ("residues of the longest", f"{counts.longest:,}"),
    ]
    output.print_counts(pairs, as_json=as_json)
