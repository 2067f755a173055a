"""`protlm embed`: options in, an embeddings file, its summary out."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from protlm.cli import output


class Include(StrEnum):
    """The kinds of embedding."""

    mean = "mean"
    per_residue = "per-residue"
    cls = "cls"


class Precision(StrEnum):
    """The types of the stored numbers."""

    float32 = "float32"
    float16 = "float16"


class OnBadRecord(StrEnum):
    """What to do with a record that cannot be used."""

    error = "error"
    skip = "skip"


def embed_command(
    model: Path = typer.Argument(..., metavar="MODEL", help="A model directory, or the run that made it."),
    inputs: list[Path] = typer.Argument(..., metavar="INPUT...", help="FASTA files, plain or gzip."),
    out: Path = typer.Option(..., "--out", metavar="FILE", help="The embeddings file (HDF5)."),
    include: list[Include] = typer.Option([Include.mean], "--include", help="What to store; repeatable."),
    layers: str = typer.Option("-1", "--layers", help="Layers, by comma: 0 is the embedding, -1 the last."),
    dtype: Precision = typer.Option(Precision.float32, "--dtype", help="Type of the stored numbers."),
    tokens_per_batch: int = typer.Option(8192, "--tokens-per-batch", min=3, help="Budget of one forward pass."),
    on_bad_record: OnBadRecord = typer.Option(OnBadRecord.error, "--on-bad-record", help="Stop, or skip and count."),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Embed every protein: one vector each, or one a residue.

    Proteins keep their order and their ids; a repeated id gets #2, #3, … A protein of any length is embedded whole, and
    its result does not depend on the others.

    \b
    Examples:
      protlm embed run proteins.fasta --out embeddings.h5
      protlm embed run a.fasta b.fasta.gz --out embeddings.h5 --include mean --include per-residue --dtype float16
    """  # noqa: D301  \b must reach Typer as a backspace
    try:
        layer_numbers = [int(text) for text in layers.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--layers: expected whole numbers by comma, got {layers!r}") from None

    from tqdm import tqdm

    from protlm.workflows.embed import embed

    with tqdm(unit="residue", unit_scale=True, desc="embed", disable=None) as bar:
        report = embed(
            model,
            inputs,
            out,
            include=[kind.value for kind in include],
            layers=layer_numbers,
            dtype=dtype.value,
            tokens_per_batch=tokens_per_batch,
            on_bad_record=on_bad_record.value,
            force=force,
            start_progress=lambda total: _start(bar, total),
        )
    if report.rejects:
        output.warn("skipped " + ", ".join(f"{count} records ({reason})" for reason, count in report.rejects.items()))
    if as_json:
        output.print_json(report)
        return
    print(f"embedded    {report.num_records:,} proteins, {report.num_residues:,} residues")
    if report.num_renamed:
        print(f"renamed     {report.num_renamed:,} repeated ids, as #2, #3, …")
    for rule, count in report.repairs.items():
        print(f"repaired    {count:,} letters ({rule})")
    print(f"stored      {', '.join(report.include)} of layer {', '.join(map(str, report.layers))}, {report.dim} wide")
    print(f"embeddings  {report.out}")


def _start(bar: Any, total: int) -> Callable[[int], object]:
    bar.reset(total)
    update: Callable[[int], object] = bar.update
    return update
