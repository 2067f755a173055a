"""`protlm embed`: options in, embeddings out, and what there is to know of them."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from protlm.cli import output
from protlm.cli.progress import Bars
from protlm.data.records import shown
from protlm.errors import ProtlmError

if TYPE_CHECKING:
    from protlm.workflows.embed.embed import EmbedReport
    from protlm.workflows.embed.estimate import EmbedEstimate

_UNITS = {"read": "B", "embed": "residue", "write": "protein"}
_SHOWN_SKIPPED = 20


class Include(StrEnum):
    """The kinds of embedding."""

    mean = "mean"
    per_residue = "per-residue"
    cls = "cls"
    logits = "logits"


class LayoutName(StrEnum):
    """The layouts of the output."""

    protlm = "protlm"
    uniprot = "uniprot"
    bio_embeddings = "bio-embeddings"
    esm = "esm"
    npz = "npz"
    parquet = "parquet"
    npy = "npy"


class Precision(StrEnum):
    """The types of the stored numbers."""

    float32 = "float32"
    float16 = "float16"


class OnBadRecord(StrEnum):
    """What to do with a record that cannot be used."""

    error = "error"
    skip = "skip"


class SplitName(StrEnum):
    """The splits of a dataset."""

    train = "train"
    valid = "valid"
    test = "test"
    ood = "ood"


def embed_command(
    model: Path = typer.Argument(..., metavar="MODEL", help="A model directory, or the run that made it."),
    inputs: list[str] = typer.Argument(
        ..., metavar="INPUT...", help="Protein files as for prep, `-` for the standard input; or one DATASET."
    ),
    out: Path = typer.Option(..., "--out", metavar="FILE", help="The output: a file; with the layout esm a folder."),
    split: SplitName | None = typer.Option(None, "--split", help="Which proteins of a DATASET."),
    include: list[Include] = typer.Option([Include.mean], "--include", help="What to store; repeatable."),
    layers: str = typer.Option("-1", "--layers", help="Layers, by comma: 0 is the embedding, -1 the last."),
    layout: LayoutName = typer.Option(LayoutName.protlm, "--layout", help="How embeddings lie in the output."),
    dtype: Precision | None = typer.Option(
        None, "--dtype", help="Type of the stored numbers; default: float32, and float16 for the layout uniprot."
    ),
    tokens_per_batch: int | None = typer.Option(
        None, "--tokens-per-batch", min=3, help="Budget of one forward pass; default: what suits the device."
    ),
    window: int | None = typer.Option(
        None, "--window", min=2, help="Compute longer proteins in overlapping windows of so many residues."
    ),
    truncate: int | None = typer.Option(
        None, "--truncate", min=1, help="Embed only the first so many residues of longer proteins."
    ),
    on_bad_record: OnBadRecord = typer.Option(OnBadRecord.error, "--on-bad-record", help="Stop, or skip and count."),
    devices: int = typer.Option(1, "--devices", min=1, help="GPUs, or processes on the CPU, on each machine."),
    num_nodes: int = typer.Option(1, "--num-nodes", min=1, help="Machines; they must share the folder of the output."),
    seed: int = typer.Option(0, "--seed", min=0, help="Taken as by every command; embedding draws nothing."),
    resume: bool = typer.Option(False, "--resume", help="Go on with what an unfinished run left."),
    force: bool = typer.Option(False, "--force", help="Replace an existing output of the same layout."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Tell proteins, size, time and free disk; embed nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Embed every protein: one vector each, or one a residue.

    Proteins keep their order and their ids; a repeated id gets #2, #3, … A protein of any length is embedded whole
    unless --truncate says otherwise, and its result does not depend on the others. Equal sequences are computed once. A
    protein that does not fit into memory is left out and listed, and the status is then 1.

    \b
    Examples:
      protlm embed run proteins.fasta --out embeddings.h5
      protlm embed run a.fasta b.fasta.gz --out embeddings.h5 --include mean --include per-residue --dtype float16
      protlm embed run proteins.fasta --out per-residue.h5 --layout uniprot --include per-residue
      zcat proteins.fasta.gz | protlm embed run - --out vectors --layout esm --layers 0,-1
      protlm embed run dataset --split test --out test.h5 --devices 4
    """  # noqa: D301  \b must reach Typer as a backspace
    try:
        layer_numbers = [int(text) for text in layers.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--layers: expected whole numbers by comma, got {layers!r}") from None

    from protlm.runtime.devices import Devices
    from protlm.runtime.work_folder import partial_folder
    from protlm.workflows.embed.embed import embed
    from protlm.workflows.embed.estimate import EmbedEstimate, estimate
    from protlm.workflows.embed.settings import EmbedRequest, EmbedUsageError

    request = EmbedRequest(
        model, inputs, out, None if split is None else split.value, [kind.value for kind in include], layer_numbers,
        layout.value, None if dtype is None else dtype.value, tokens_per_batch, window, truncate, on_bad_record.value,
        Devices(devices, num_nodes), resume, force,
    )  # fmt: skip
    try:
        with Bars(_UNITS) as bars:
            report = estimate(request, bars.start) if dry_run else embed(request, bars.start)
    except EmbedUsageError as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        if not dry_run and (kept := partial_folder(out)).is_dir():
            output.warn(f"what is finished is kept in {kept}; go on with the same command and --resume")
        raise
    if report is None:
        # One of the other processes of the run: the first one tells.
        return
    for path in report.left_out:
        output.warn(f"{path}: no protein file; left out")
    if report.rejects:
        output.warn("skipped " + ", ".join(f"{count} records ({reason})" for reason, count in report.rejects.items()))
    if isinstance(report, EmbedEstimate):
        _tell_estimate(report, as_json)
    else:
        _tell(report, as_json)


def _tell(report: "EmbedReport", as_json: bool) -> None:
    if as_json:
        output.print_json(report)
    else:
        print(f"embedded    {report.num_records:,} proteins, {report.num_residues:,} residues")
        for count, what in (
            (report.num_equal, "proteins with a sequence that stood before, computed once"),
            (report.num_windowed, "proteins in overlapping windows"),
            (report.num_truncated, "proteins cut to their beginning"),
            (report.num_renamed, "repeated ids, renamed to #2, #3, …"),
        ):
            if count:
                print(f"of them     {count:,} {what}")
        for rule, count in report.repairs.items():
            print(f"repaired    {count:,} letters ({rule})")
        print(
            f"stored      {', '.join(report.include)} of layer {', '.join(map(str, report.layers))}, "
            f"{report.dim} wide, {report.dtype}"
        )
        print(f"embeddings  {', '.join(map(str, (report.out, *report.files)))}")
        for found in report.skipped:
            print(f"left out    {shown(found.id)}, {found.num_residues:,} residues: did not fit into memory")
    if report.skipped:
        listed = ", ".join(f"{shown(found.id)} ({found.num_residues:,})" for found in report.skipped[:_SHOWN_SKIPPED])
        listed += ", …" if len(report.skipped) > _SHOWN_SKIPPED else ""
        raise ProtlmError(
            f"{len(report.skipped):,} proteins did not fit into memory and are not in {report.out}: {listed}; "
            "embed them with --window or --truncate, fewer --layers, or on a machine with more memory"
        )


def _tell_estimate(found: "EmbedEstimate", as_json: bool) -> None:
    if as_json:
        output.print_json(found)
    else:
        rows = [
            ("proteins", f"{found.num_records:,}"),
            ("different sequences", f"{found.num_sequences:,}"),
            ("residues", f"{found.num_residues:,}"),
            ("residues to compute", f"{found.num_computed_residues:,}"),
            ("residues of the longest", f"{found.longest:,}"),
            ("output bytes, about", f"{found.out_bytes:,}"),
            ("disk bytes while at work, about", f"{found.peak_bytes:,}"),
            ("free disk bytes", f"{found.free_bytes:,}"),
            ("residues a second, in a sample", f"{found.residues_per_second:,.0f}"),
            ("seconds, about", f"{found.seconds:,.0f}"),
        ]
        output.print_table(("dry run", ""), rows)
    if found.peak_bytes > found.free_bytes:
        raise ProtlmError(f"not enough disk: about {found.peak_bytes:,} bytes wanted, {found.free_bytes:,} free")
