"""`protlm convert`: a model becomes a directory of protlm, with another attention if asked for, or of transformers."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from protlm import files
from protlm.choices import ModelFormat
from protlm.pretrained.export import export
from protlm.pretrained.model_description import Origin
from protlm.pretrained.model_directory import save_model
from protlm.pretrained.model_files import read_description
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.convert.request import ConvertRequest, check_request
from protlm.workflows.convert.swap import SwapReport, check_swap, costs_of, settings_of, swap


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """The outcome.

    Attributes:
        out: The directory.
        to: Its format.
        architecture: Name of the architecture in transformers; None for a directory of protlm.
        num_parameters: Trained numbers of the model.
        num_layers: Layers.
        model_dim: Width of an embedding.
        max_residues: Longest protein that its positions reach; None: any.
        trained_residues: Longest protein that it was trained on; None if that is unknown.
        lacked: Residue letters that it reads as another token.
        stand_in: That token.
        origin: The source of the model; None if protlm trained it.
        fine_tuned_from: The source of the weights with which that training began, if another program had trained them.
        weights_hash: xxh3-128 of the weights in a directory of protlm; None for transformers.
        swap: The outcome of a swap of the attention; None without one.
    """

    out: Path
    to: ModelFormat
    architecture: str | None
    num_parameters: int
    num_layers: int
    model_dim: int
    max_residues: int | None
    trained_residues: int | None
    lacked: str
    stand_in: str
    origin: Origin | None
    fine_tuned_from: Origin | None
    weights_hash: str | None
    swap: SwapReport | None


def convert(request: ConvertRequest, *, start_progress: StartProgress = no_progress) -> ConvertReport:
    """Writes a model in another format or with another attention, whole or not at all.

    Args:
        request: What is asked for.
        start_progress: Starts the stage `convert` (two steps, to read and to write), and for a swap those of `swap`.

    Raises:
        UsageError: Options that contradict each other.
        ProtlmError: A model that cannot be read, has no equivalent in the format or no attention to swap, proteins that
            cannot be read, or an output that is in the way.
    """
    check_request(request)
    out = Path(os.path.realpath(request.out))
    advance = start_progress("convert", 2)
    model, description = read_named_model(request.model)
    advance(1)
    architecture, report = None, None
    settings, exact_description = settings_of(request), description
    if settings is not None:
        check_swap(request, description)
        model, description, report = swap(model, description, request, settings, start_progress)
    if request.to == "protlm":
        save_model(out, model, description)
    else:
        partial = files.partial_path(out)
        partial.mkdir(parents=True)
        try:
            architecture = export(model, description, partial)
            files.publish(partial, out)
        finally:
            files.remove(partial)
    advance(1)
    if report is not None and request.report is not None:
        exact_costs, costs = costs_of(request.model, out, exact_description)
        report = replace(report, exact_costs=exact_costs, costs=costs)
    vocabulary = model.config.tokens()
    return ConvertReport(
        out=request.out,
        to=request.to,
        architecture=architecture,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=model.config.num_layers,
        model_dim=model.config.model_dim,
        max_residues=description.max_residues,
        trained_residues=description.trained_residues,
        lacked=vocabulary.lacked,
        stand_in=vocabulary.stand_in,
        origin=description.origin,
        fine_tuned_from=description.fine_tuned_from,
        weights_hash=read_description(out).weights_hash if request.to == "protlm" else None,
        swap=report,
    )
