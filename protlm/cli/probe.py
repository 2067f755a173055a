"""`protlm probe`: options in, a table of scores beside baselines out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protlm.choices import ProbeTask
from protlm.cli import output
from protlm.cli.options import (
    ForceOption,
    JsonOption,
    ModelArgument,
    TokensPerBatchOption,
    WindowOption,
    one_of,
    seed_option,
)
from protlm.cli.progress import Progress

if TYPE_CHECKING:
    from protlm.workflows.probe.report import ProbeReport

_UNITS = {"read": "B", "embed": "residue", "fit": "fit"}

LabelsArgument = Annotated[
    Path,
    typer.Argument(metavar="LABELS", help="CSV or TSV with sequence and label; or FASTA with label=… in its headers."),
]
SequencesOption = Annotated[
    Path | None,
    typer.Option("--sequences", metavar="FILE", help="The proteins, where LABELS has none: label strings, as in FLIP."),
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label", metavar="NAME", help="Column or key of the labels; default: label, or target if there is none."
    ),
]
TaskOption = Annotated[
    ProbeTask, typer.Option("--task", metavar=one_of(ProbeTask), help="What the labels are; auto: as they look.")
]
MaskOption = Annotated[
    Path | None,
    typer.Option("--mask", metavar="FILE", help="FASTA of 0 and 1 for each residue: those with 0 are left out."),
]
IgnoreOption = Annotated[
    str, typer.Option("--ignore", metavar="LETTERS", help="Letters of label strings that stand for no label.")
]
ClustersOption = Annotated[
    Path | None,
    typer.Option("--clusters", metavar="TSV", help="Clusters as for prep: none is divided between folds."),
]
MinClassSizeOption = Annotated[
    int, typer.Option("--min-class-size", metavar="N", min=1, help="Leave out classes of fewer proteins.")
]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", metavar="LAYERS", help="Numbers by comma, as for embed; default: all, or 12 of many."),
]
FoldsOption = Annotated[
    int, typer.Option("--folds", metavar="N", min=3, max=100, help="Folds, where the labels name no split.")
]
SeedsOption = Annotated[
    int, typer.Option("--seeds", metavar="N", min=1, max=100, help="Draws of folds and of random weights.")
]
MostRowsOption = Annotated[
    int,
    typer.Option("--most-rows", metavar="N", min=10, help="Most proteins or residues to fit on; of more, a sample."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for probe.json and probe.html; default: none.")
]
SeedOption = Annotated[int, seed_option("First seed of the folds, and that of the bootstrap.", max=2**31 - 1)]


def probe_command(
    model: ModelArgument,
    labels: LabelsArgument,
    sequences: SequencesOption = None,
    label: LabelOption = None,
    task: TaskOption = "auto",
    mask: MaskOption = None,
    ignore: IgnoreOption = "",
    clusters: ClustersOption = None,
    min_class_size: MinClassSizeOption = 1,
    layers: LayersOption = None,
    folds: FoldsOption = 5,
    seeds: SeedsOption = 3,
    most_rows: MostRowsOption = 50_000,
    window: WindowOption = None,
    tokens_per_batch: TokensPerBatchOption = None,
    out: OutOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Does a model know anything about my proteins? A linear model reads labels from its embeddings.

    Proteins are embedded once; a regularised linear model then predicts the label of proteins that it was not fitted
    on, from each layer. Beside it stand baselines on the same proteins: their composition and dipeptides, the residues
    around each residue, the same architecture with random weights, and a constant answer. Only what is beyond all of
    them is knowledge of the model. The row `model` takes the layer that is best on proteins kept aside for this.

    Labels: a table with columns sequence and label (id and split if you like); FASTA with label=… or TARGET=… in its
    headers; or a letter for each residue, as secondary structure, with --sequences. Numbers are values, all else
    classes. Without a split, folds are drawn: give --clusters, so that no relative of a tested protein is fitted.

    \b
    Examples:
      protlm probe run labels.csv
      protlm probe run labels.csv --label solubility --clusters clusters.tsv --out probe
      protlm probe run proteins.fasta --label family --layers 0,-1 --json
      protlm probe run sampled.fasta --sequences sequences.fasta --mask mask.fasta
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.workflows.probe.request import ProbeRequest, check_request

    request = ProbeRequest(
        model=model, labels=labels, sequences=sequences, label=label, task=task, mask=mask, ignore=ignore,
        clusters=clusters, min_class_size=min_class_size, layers=_numbers(layers), num_folds=folds, num_seeds=seeds,
        seed=seed, most_rows=most_rows, window=window, tokens_per_batch=tokens_per_batch, out=out, force=force,
    )  # fmt: skip
    # Before torch is loaded, which takes seconds.
    check_request(request)

    from protlm.workflows.probe.probe import probe

    with Progress(_UNITS) as progress:
        report = probe(request, start_progress=progress.start)
    for line in report.warnings:
        output.warn(line)
    if as_json:
        output.print_json(report.to_json())
    else:
        _print(report, out)


def _numbers(layers: str | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        message = f"expected numbers by comma, such as 0,-1, got {layers!r}"
        raise typer.BadParameter(message, param_hint="--layers") from None  # Typer's own form of an error


def _print(report: "ProbeReport", out: Path | None) -> None:
    from protlm.workflows.probe.page import score_rows

    what = {
        "classification": f"{report.num_classes:,} classes",
        "regression": "values",
        "per-residue": f"{report.num_classes:,} classes of residues",
    }[report.task]
    (_, *names), *rows = score_rows(report)
    output.print_table((report.label, *names), rows)
    print()
    print(report.verdict)
    split = "the split of the labels" if report.split == "given" else f"{report.num_folds} folds"
    tested = f"{report.num_tested:,} {'residues' if report.task == 'per-residue' else 'proteins'}"
    seeds = "1 seed" if len(report.seeds) == 1 else f"{len(report.seeds)} seeds"
    pairs: list[tuple[str, object]] = [
        ("labels", f"{what}; {report.num_proteins:,} proteins ({report.task})"),
        ("tested", f"{tested}, {split}, mean of {seeds} ± standard error over {report.num_units:,} {report.resampled}"),
        ("layer", "chosen in folds: " + ", ".join(f"{layer} ({count})" for layer, count in report.chosen.items())),
    ]
    if out is not None:
        pairs.append(("report", out))
    output.print_pairs(pairs)
