"""What `protlm embed` is asked for: the request as it was given, and as it is once the model is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protlm.choices import SplitName
from protlm.data.embeddings.kinds import Dtype, Kind, LayoutName
from protlm.data.embeddings.layouts import LAYOUTS, Column, Layout, columns_of
from protlm.data.records import OnBadRecord
from protlm.errors import ProtlmError
from protlm.inference.long_proteins import Cut
from protlm.inference.row_embeddings import absolute_layer
from protlm.pretrained.model_description import ModelDescription
from protlm.runtime.devices import Devices, default_tokens_per_batch
from protlm.vocabulary import VOCABULARY_SIZE

ONE_DEVICE = Devices()


class EmbedUsageError(ValueError):
    """Options that contradict each other."""


@dataclass(frozen=True)
class EmbedRequest:
    """What embed is asked for.

    Attributes:
        model: A model directory or a run.
        inputs: Protein files, `-` for the standard input; or one dataset of `protlm prep`.
        out: What to make: a file, or with the layout `esm` a folder.
        split: Of the dataset.
        include: Kinds of embedding.
        layers: 0 is the embedding, -1 the last layer.
        layout: How embeddings lie in the output.
        dtype: Of the stored numbers; None for what the layout is known for.
        tokens_per_batch: Budget of one forward pass; a longer protein or window has a pass of its own. None for what
            suits the device.
        window: Compute longer proteins in overlapping windows of so many residues.
        truncate: Embed only the first residues of longer proteins.
        on_bad_record: Stop at a bad record, or skip and count it.
        devices: Where to compute.
        resume: Go on with what an unfinished run left; without any, begin.
        force: Replace an existing output of the same layout; without `resume` also what an unfinished run left.
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
    devices: Devices = ONE_DEVICE
    resume: bool = False
    force: bool = False


@dataclass(frozen=True)
class EmbedSettings:
    """What is computed and stored, with the model known.

    Attributes:
        layout: The layout.
        kinds: Kinds of embedding, each once.
        layers: Absolute numbers, each once.
        dtype: Of the stored numbers.
        tokens_per_batch: Budget of one forward pass.
        cut: What becomes of long proteins.
        model_dim: Width of an embedding.
        last_layer: Number of the last layer.
        weights_hash: Of the model.
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

    @property
    def columns(self) -> tuple[Column, ...]:
        """What is stored of a protein."""
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
        """The options that decide about the output, as `--resume` compares them."""
        return {
            "layout": self.layout.name,
            "include": list(self.kinds),
            "layers": list(self.layers),
            "dtype": self.dtype,
            "tokens-per-batch": self.tokens_per_batch,
            "window": self.cut.window,
            "truncate": self.cut.truncate,
        }


def settings_of(request: EmbedRequest, description: ModelDescription) -> EmbedSettings:
    """Returns what a request means for a model.

    Raises:
        EmbedUsageError: Options that contradict each other.
        ProtlmError: A layer that the model does not have; windows that its positions do not reach.
    """
    layout = LAYOUTS[request.layout]
    if request.window is not None and request.truncate is not None:
        raise EmbedUsageError("--window embeds long proteins whole and --truncate cuts them: give one of them")
    last = description.model.num_layers
    kinds = tuple(dict.fromkeys(request.include))
    try:
        layers = tuple(dict.fromkeys(absolute_layer(layer, last) for layer in request.layers))
    except ValueError as error:
        raise ProtlmError(f"{request.model}: {error}") from None
    dtype = request.dtype or layout.default_dtype
    try:
        layout.check(kinds, layers, dtype)
    except ValueError as error:
        raise EmbedUsageError(str(error)) from None
    cut, limit = Cut(request.window, request.truncate), description.max_residues
    for name, size in (("--window", cut.window), ("--truncate", cut.truncate)):
        if size is not None and limit is not None and size > limit:
            raise ProtlmError(f"{request.model}: the positions of this model reach {limit:,} residues; lower {name}")
    tokens_per_batch = request.tokens_per_batch or default_tokens_per_batch()
    return EmbedSettings(
        layout, kinds, layers, dtype, tokens_per_batch, cut, description.model.model_dim, last, description.weights_hash
    )  # fmt: skip
