"""`protlm inspect`: a path in, and the summary of the dataset, embeddings, model or run that lies there out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protlm.cli import output
from protlm.cli.options import JsonOption
from protlm.cli.progress import Progress

if TYPE_CHECKING:
    from protlm.pretrained.model_description import ModelDescription
    from protlm.workflows.identify import EmbeddingsReport, ModelReport, RunReport
    from protlm.workflows.inspect import InspectReport

PathArgument = Annotated[
    Path,
    typer.Argument(metavar="PATH", help="A dataset, an output of embed in any layout, a run, or a model on disk."),
]


def inspect_command(
    path: PathArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all shards, or the weights, and compare them with their checksums.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a summary of a dataset, of embeddings, a model or a run.

    The report.html in a dataset shows more.

    \b
    Examples:
      protlm inspect dataset
      protlm inspect dataset --verify --json
      protlm inspect embeddings.h5
      protlm inspect run
      protlm inspect esm2_t6_8M_UR50D.pt
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.workflows.identify import EmbeddingsReport, ModelReport, RunReport, content_of, identify

    with Progress({"verify": "residue"}) as progress:
        report = identify(path, verify=verify, start_progress=progress.start)
    if as_json:
        output.print_json(content_of(report))
    elif isinstance(report, EmbeddingsReport):
        output.print_pairs(_of_embeddings(report))
    elif isinstance(report, ModelReport):
        output.print_pairs(_of_model(report))
    elif isinstance(report, RunReport):
        output.print_pairs(_of_run(report))
    else:
        _print_dataset(report)


def _print_dataset(report: "InspectReport") -> None:
    from protlm.cli.dataset_summary import print_summary

    print_summary(report.manifest)
    print()
    output.print_pairs([("dataset", report.path), ("hash", report.hash)])
    if report.verified:
        output.print_pairs([("verified", "the shards hold what was written")])


def _of_embeddings(report: "EmbeddingsReport") -> list[tuple[str, object]]:
    summary = report.summary
    entries = "different sequences" if report.layout == "biotrainer" else "proteins"
    residues = "" if summary.num_residues is None else f", {summary.num_residues:,} residues"
    stored = [
        ", ".join(summary.kinds),
        f"layer {', '.join(map(str, summary.layers))}" if summary.layers else "",
        f"{summary.dim} wide" if summary.dim else "",
        summary.dtype or "",
    ]
    return [
        ("embeddings", ", ".join((report.path, *report.files))),
        ("layout", report.layout),
        ("holds", f"{summary.num_entries:,} {entries}{residues}"),
        ("stored", ", ".join(part for part in stored if part)),
        ("model hash", summary.model_hash or "not kept in this layout"),
        *([("precision", summary.precision)] if summary.precision else []),
    ]


def _of_model(report: "ModelReport") -> list[tuple[str, object]]:
    about, shape = report.description, report.description.model
    task = "next tokens" if shape.causal else "masked residues"
    pairs: list[tuple[str, object]] = [
        ("model", report.path),
        ("attention", shape.attention_name),
        ("shape", f"{shape.num_layers} layers, {shape.model_dim} wide, {shape.num_heads} heads, {task}"),
        ("parameters", f"{report.num_parameters:,}"),
        *_source_of(about),
        ("longest", "any protein" if about.max_residues is None else f"{about.max_residues:,} residues"),
    ]
    if about.origin is not None:
        pairs.append(("vocabulary", _vocabulary_of(about)))
    elif about.valid is None:
        pairs.append(("valid", "unmeasured: the run was stopped before" if about.unmeasured else "not measured"))
    else:
        valid = about.valid
        scores = f"accuracy {valid.accuracy:.4f}, perplexity {valid.perplexity:.3f}"
        baseline = f"the empirical baseline {valid.empirical_accuracy:.4f}, {valid.empirical_perplexity:.3f}"
        pairs.append(("valid", f"{scores}; {baseline}"))
    weights = about.weights_hash or "not read; --verify reads them"
    pairs.append(("weights", weights + (" (verified)" if report.verified else "")))
    return pairs


def _source_of(about: "ModelDescription") -> list[tuple[str, object]]:
    """Returns the lines on where the weights come from: a training, another program, or one after the other."""
    lines: list[tuple[str, object]] = []
    if about.origin is None:
        lines.append(("trained", f"{about.step:,} steps on the dataset {about.dataset_hash}"))
    for name, origin in (("origin", about.origin), ("fine-tuned", about.fine_tuned_from)):
        if origin is not None:
            revision = f", revision {origin.revision}" if origin.revision else ""
            licence = f"licence: {origin.licence or 'not named'}"
            lines.append((name, f"{origin.source}{revision}, {origin.family}, {licence}"))
    if (swap := about.swap) is not None:
        near = f", near block {swap.near_block}" if swap.near_block else ""
        estimates = f"{swap.num_features} features, {swap.attention}{near}, balance {swap.balance}"
        lines.append(("swapped", f"for the exact attention of {swap.weights_hash}: {estimates}"))
    return lines


def _vocabulary_of(about: "ModelDescription") -> str:
    vocabulary = about.model.tokens()
    lacked = f"; {', '.join(vocabulary.lacked)} read as {vocabulary.stand_in}" if vocabulary.lacked else ""
    return f"{len(vocabulary)} tokens{lacked}"


def _of_run(report: "RunReport") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = [("run", report.path)]
    if report.description is not None:
        pairs += [("dataset", f"{data.name}, {data.num_records:,} proteins") for data in report.description.datasets]
        last = report.description.sessions[-1]
        ended = last.end.outcome if last.end else "killed"
        outcome = "at work" if report.is_at_work else ended
        done = f"{last.end.last_step:,}" if last.end else f"from {last.first_step:,}"
        pairs += [
            ("sessions", f"{len(report.description.sessions):,}, the last of {last.started}: {outcome}"),
            ("steps", f"{done} of {report.max_steps:,}"),
        ]
    return [*pairs, *(_of_model(report.model) if report.model else [("model", "none yet")])]
