"""The options of `protlm embed`: the request of the user, and the settings that follow from it for a given model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protlm.choices import InferencePrecision, SplitName, UsedPrecision
from protlm.data.embeddings.kinds import Dtype, Kind, LayoutName, absolute_layer
from protlm.data.embeddings.layouts import LAYOUTS, Column, Layout, columns_of
from protlm.data.records import Nucleotides, OnBadRecord
from protlm.errors import ProtlmError, UsageError
from protlm.inference.long_proteins import Cut
from protlm.pretrained.model_description import ModelDescription
from protlm.runtime.devices import Devices
from protlm.runtime.workers import Scheduler
from protlm.vocabulary import VOCABULARY_SIZE

ONE_DEVICE = Devices()


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """The options of a run.

    Attributes:
        model: A model directory or a run.
        inputs: Protein files, `-` for the standard input; or one dataset of `protlm prep`.
        out: The output to make: a file, or with the layout `esm` a folder.
        split: The split of the dataset.
        include: Kinds of embedding.
        layers: Layer numbers; 0 is the embedding, -1 the last layer.
        layout: Name of the output's layout.
        dtype: Type of the stored numbers; None: the default of the layout.
        tokens_per_batch: Budget of one forward pass; a longer protein or window has a pass of its own. None: a default
            for the device.
        window: Compute longer proteins in overlapping windows of so many residues.
        truncate: Embed only the first so many residues of longer proteins.
        on_bad_record: Stop at a bad record, or skip and count it.
        nucleotides: Stop at a nucleic acid, skip and count it, or keep it as if it were a protein.
        precision: Number type of weights and matrix products; `auto`: bfloat16 on a GPU that has it, else float32.
        devices: The devices to compute on.
        scheduler: The Dask cluster whose workers compute instead; None for none.
        resume: Resume an unfinished run; start one if there is none.
        force: Replace an existing output of the same layout and, without `resume`, the work of an unfinished run.
    """

    model: Path
    inputs: Sequence[str | Path]
    out: Path
    split: SplitName | None = None
    include: Sequence[Kind] = ("mean",)
    layers: Sequence[int] = (-1,)
    layout: LayoutName = "protlm"
    dtype: Dtype | None = None
    tokens_per_batch: int | None = None
    window: int | None = None
    truncate: int | None = None
    on_bad_record: OnBadRecord = "error"
    nucleotides: Nucleotides = "keep"
    precision: InferencePrecision = "auto"
    devices: Devices = ONE_DEVICE
    scheduler: Scheduler | None = None
    resume: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """The settings of a run on a given model.

    Attributes:
        layout: The layout of the output.
        kinds: Kinds of embedding, each once.
        layers: Absolute layer numbers, each once.
        dtype: Type of the stored numbers.
        tokens_per_batch: Budget of one forward pass.
        cut: The treatment of long proteins.
        model_dim: Width of an embedding.
        last_layer: Number of the last layer.
        weights_hash: Hash of the model's weights.
        precision: Number type of weights and matrix products.
    """

    layout: Layout
    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]
    dtype: Dtype
    tokens_per_batch: int
    cut: Cut
    model_dim: int
    last_layer: int
    weights_hash: str
    precision: UsedPrecision

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns stored for each protein: pairs of kind and layer."""
        return columns_of(self.kinds, self.layers, self.last_layer)

    def num_bytes(self, num_records: int, num_residues: int) -> int:
        """Returns the size of the embeddings of so many proteins and residues, without ids."""
        size = 2 if self.dtype == "float16" else 4
        rows = {"per-residue": num_residues, "logits": num_residues, "mean": num_records, "cls": num_records}
        return sum(
            rows[kind] * (VOCABULARY_SIZE if kind == "logits" else self.model_dim) * size for kind, _ in self.columns
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options that shape the output, as `--resume` compares them."""
        return {
            "layout": self.layout.name,
            "include": list(self.kinds),
            "layers": list(self.layers),
            "dtype": self.dtype,
            "tokens-per-batch": self.tokens_per_batch,
            "window": self.cut.window,
            "truncate": self.cut.truncate,
            # Earlier versions had none.
            **({} if self.precision == "32" else {"precision": self.precision}),
        }


def check_options(request: EmbedRequest, description: ModelDescription | None) -> None:
    """Checks that options fit together and to the model.

    Args:
        request: The options.
        description: The model; None if it is not known yet.

    Raises:
        UsageError: Options that contradict each other.
        ProtlmError: A layer that the model does not have, or windows longer than its learned positions.
    """
    if request.window is not None and request.truncate is not None:
        raise UsageError("--window embeds long proteins whole and --truncate cuts them: give one of them")
    if request.scheduler is not None and request.devices.total > 1:
        raise UsageError("--devices and --num-nodes: only without --scheduler, whose workers are the devices")
    if description is None:
        return
    layout = LAYOUTS[request.layout]
    kinds, layers = _kinds(request), _layers(request, description.model.num_layers)
    try:
        layout.check(kinds, layers, request.dtype or layout.default_dtype)
    except ValueError as error:
        raise UsageError(str(error)) from None
    limit = description.max_residues
    for name, size in (("--window", request.window), ("--truncate", request.truncate)):
        if size is not None and limit is not None and size > limit:
            raise ProtlmError(f"{request.model}: the positions of this model reach {limit:,} residues; lower {name}")


def settings_of(request: EmbedRequest, description: ModelDescription) -> EmbedSettings:
    """Returns the settings that a request leads to with a given model.

    Raises:
        ProtlmError: As `check_options` raises.
    """
    # Loads torch, which checks do not need.
    from protlm.inference.precision import used_precision
    from protlm.inference.row_embeddings import default_tokens_per_batch

    check_options(request, description)
    layout, last = LAYOUTS[request.layout], description.model.num_layers
    return EmbedSettings(
        layout=layout,
        kinds=_kinds(request),
        layers=_layers(request, last),
        dtype=request.dtype or layout.default_dtype,
        tokens_per_batch=request.tokens_per_batch or default_tokens_per_batch(),
        cut=Cut(window=request.window, truncate=request.truncate),
        model_dim=description.model.model_dim,
        last_layer=last,
        weights_hash=description.weights_hash,
        precision=used_precision(request.precision, may_be_half=True),
    )


def _kinds(request: EmbedRequest) -> tuple[Kind, ...]:
    return tuple(dict.fromkeys(request.include))


def _layers(request: EmbedRequest, last: int) -> tuple[int, ...]:
    """Returns the absolute numbers of the layers, each once."""
    try:
        return tuple(dict.fromkeys(absolute_layer(layer, last) for layer in request.layers))
    except ValueError as error:
        raise ProtlmError(f"{request.model}: {error}") from None
