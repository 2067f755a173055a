"""The request of `protlm probe`, and the checks of it that need no torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from protlm.choices import ProbeTask
from protlm.data.embeddings.kinds import absolute_layer
from protlm.data.parsing.sources import STDIN
from protlm.errors import ProtlmError, UsageError
from protlm.inference.long_proteins import Cut
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_files import description_of

REPORT_NAME, PAGE_NAME = "probe.json", "probe.html"
_OF_OTHERS = ("manifest.json", "config.toml", "config.json")
_MOST_LAYERS = 12
"""Layers above the embedding that are probed unless the user names some."""


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """A measurement that `protlm probe` is asked for.

    Attributes:
        model: A model directory, a run, or a model of another program.
        labels: The file of the labels: a table, FASTA with labels in its headers, or FASTA of label strings.
        sequences: The file of the proteins, where `labels` has none.
        label: Name of the column or key of the labels; None: `label` or `target`.
        task: What the labels are; `auto`: decided by the labels.
        mask: FASTA of 0 and 1 for each residue: those with 0 are left out.
        ignore: Letters of label strings that stand for no label.
        clusters: The cluster of each protein, as for prep: a cluster is never divided between folds.
        min_class_size: Classes of fewer proteins are left out.
        layers: Numbers of the layers to probe, possibly negative; None: all, or 12 of many, and the embedding.
        num_folds: Folds, where the labels name no split.
        num_seeds: How often folds, the sample to fit and the random weights are drawn.
        seed: The first of these seeds, and that of the bootstrap.
        most_rows: Most proteins or residues that a fit takes.
        window: Compute longer proteins in overlapping windows of so many residues.
        tokens_per_batch: Budget of one forward pass; None: a default for the device.
        out: Folder of the report; None: none is written.
        force: Replace an existing report.
    """

    model: Path
    labels: Path
    sequences: Path | None = None
    label: str | None = None
    task: ProbeTask = "auto"
    mask: Path | None = None
    ignore: str = ""
    clusters: Path | None = None
    min_class_size: int = 1
    layers: tuple[int, ...] | None = None
    num_folds: int = 5
    num_seeds: int = 3
    seed: int = 0
    most_rows: int = 50_000
    window: int | None = None
    tokens_per_batch: int | None = None
    out: Path | None = None
    force: bool = False

    @property
    def cut(self) -> Cut:
        """The treatment of long proteins."""
        return Cut(window=self.window)


def check_request(request: ProbeRequest) -> None:
    """Checks options, inputs, output and model, and reads no label yet.

    Raises:
        UsageError: Options that contradict each other.
        ProtlmError: An input that is not there, a report that is in the way, or no such model.
    """
    for name, path in (
        ("LABELS", request.labels),
        ("--sequences", request.sequences),
        ("--mask", request.mask),
        ("--clusters", request.clusters),
    ):
        if path is None:
            continue
        if str(path) == STDIN:
            raise UsageError(f"{name}: expected a file, which is read more than once, and not the standard input")
        if not path.exists():
            raise ProtlmError(f"{path}: no such file")
        if not path.is_file():
            raise ProtlmError(f"{path}: expected a file, which is read more than once, and no folder, pipe or device")
    if request.label is not None and not request.label.strip():
        raise UsageError("--label: expected the name of a column or key, got none")
    if request.task in ("classification", "regression") and (request.mask is not None or request.ignore):
        raise UsageError(f"--mask and --ignore are for labels of residues, and --task {request.task} is of proteins")
    if request.out is not None:
        check_out(request.out, force=request.force)
    description = description_of(request.model)
    if description is not None:
        check_model(request, description)


def check_out(folder: Path, *, force: bool) -> None:
    """Raises ProtlmError if the report cannot be written into a folder, or must not."""
    above = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not above.is_dir():
        raise ProtlmError(f"{above}: no folder; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ProtlmError(f"{above}: may not be written to; choose another --out")
    for name in _OF_OTHERS:
        if (folder / name).exists():
            raise ProtlmError(f"{folder}: holds {name}, so it is no folder for a report; choose another --out")
    for path in (folder / REPORT_NAME, folder / PAGE_NAME):
        if path.is_dir() or (os.path.lexists(path) and not force):
            raise ProtlmError(f"{path}: exists already; replace it with --force or choose another --out")


def check_model(request: ProbeRequest, description: ModelDescription) -> None:
    """Raises ProtlmError if the model lacks a layer, or does not reach as far as --window."""
    probed_layers(request, description)
    limit = description.max_residues
    if request.window is not None and limit is not None and request.window > limit:
        raise ProtlmError(f"{request.model}: the positions of this model reach {limit:,} residues; lower --window")


def probed_layers(request: ProbeRequest, description: ModelDescription) -> tuple[int, ...]:
    """Returns the absolute numbers of the layers to probe, rising; raises ProtlmError for one that is not there."""
    last = description.model.num_layers
    if request.layers is None:
        count = min(last, _MOST_LAYERS)
        return tuple(round(place * last / count) for place in range(count + 1)) if count else (0,)
    try:
        return tuple(sorted({absolute_layer(layer, last) for layer in request.layers}))
    except ValueError as error:
        raise ProtlmError(f"{request.model}: --layers: {error}") from None  # with the model that lacks it
