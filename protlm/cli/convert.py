"""`protlm convert`: a model in, a directory in another format, a summary out."""

from pathlib import Path
from typing import Annotated

import typer

from protlm.choices import ModelFormat
from protlm.cli import output
from protlm.cli.options import ForceOption, JsonOption, ModelArgument, one_of, seed_option
from protlm.cli.progress import Progress

OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make.")]
ToOption = Annotated[
    ModelFormat,
    typer.Option("--to", metavar=one_of(ModelFormat), help="A model directory of protlm, or one of transformers."),
]
SeedOption = Annotated[int, seed_option("Accepted as by every command; converting draws nothing.")]


def convert_command(
    model: ModelArgument,
    out: OutOption,
    to: ToOption = "protlm",
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a pretrained model as a model directory, or for transformers.

    Every command takes a pretrained model by its name as well; a converted one needs no network, no pickle and no
    checks of names, and records where it came from. --to hf writes what AutoModelForMaskedLM and AutoTokenizer load,
    for architectures that transformers has; otherwise it says what stands in the way.

    \b
    Examples:
      protlm convert facebook/esm2_t6_8M_UR50D --out esm2
      protlm convert esm1b_t33_650M_UR50S.pt --out esm1b
      protlm convert esm2 --out esm2-hf --to hf
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.workflows.convert.request import ConvertRequest, check_request

    request = ConvertRequest(model=model, out=out, to=to, force=force)
    # Before torch is loaded, which takes seconds.
    check_request(request)

    from protlm.workflows.convert.convert import convert

    with Progress({"convert": "step"}) as progress:
        report = convert(request, start_progress=progress.start)
    if as_json:
        output.print_json(report)
        return
    limit = "any" if report.max_residues is None else f"{report.max_residues:,} residues"
    if report.max_residues is None and report.trained_residues is not None:
        limit += f"; it was trained on proteins of up to {report.trained_residues:,} residues"
    pairs: list[tuple[str, object]] = [
        ("parameters", f"{report.num_parameters:,} in {report.num_layers} layers, {report.model_dim} wide"),
        ("longest protein", limit),
    ]
    if report.lacked:
        pairs.append(("read as", f"{report.stand_in}: {', '.join(report.lacked)}"))
    for name, origin in (("source", report.origin), ("fine-tuned from", report.fine_tuned_from)):
        if origin is not None:
            revision = "" if origin.revision is None else f" at {origin.revision}"
            pairs.append((name, f"{origin.source}{revision}, family {origin.family}"))
            pairs.append(("licence", origin.licence or "not given by the source"))
    pairs.append(("model", out if report.architecture is None else f"{out} ({report.architecture})"))
    output.print_pairs(pairs)
