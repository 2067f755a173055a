"""The Python interface of a trained model: sequences in, NumPy arrays out; tokens, packing and devices stay inside."""

import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from protlm import vocabulary
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.embeddings.kinds import KINDS, Kind, absolute_layer
from protlm.data.records import shown
from protlm.inference.row_embeddings import RowEmbedder, default_tokens_per_batch, merge_windows
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.devices import best_device

_SPECIAL_TOKEN = re.compile("|".join(re.escape(token) for token in vocabulary.TOKENS if len(token) > 1))
_SHOWN_BYTES = 60


class ProteinModel:
    """A trained model that takes sequences as text and returns NumPy arrays.

    Attributes:
        description: The content of the model's config.json.
    """

    def __init__(self, model: Performer, description: ModelDescription) -> None:
        self._model = model.eval()
        self.description = description

    @property
    def num_layers(self) -> int:
        """Number of the last layer; 0 is the embedding."""
        return self.description.model.num_layers

    @property
    def model_dim(self) -> int:
        """Width of an embedding."""
        return self.description.model.model_dim

    def embed(
        self,
        sequences: Iterable[str],
        include: Sequence[Kind] = ("mean",),
        *,
        layer: int = -1,
        tokens_per_batch: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns an iterator over the embeddings of each sequence, in order, as float32.

        A result does not depend on the other sequences. Sequences are read only as they are needed.

        Args:
            sequences: Residues as text; repaired like records of a FASTA file.
            include: `mean` over the residues (dim,), `per-residue` (num_residues, dim), `cls` (dim,), `logits`
                (num_residues, 33); logits always are those of the last layer.
            layer: 0 is the embedding, -1 the last layer.
            tokens_per_batch: Budget of one forward pass; a longer protein has a pass of its own. None: a default for
                the device.

        Raises:
            ValueError: An unknown kind or layer; with its place in `sequences`, one that is no str, is empty, holds
                anything else than residues, or is longer than the model's learned positions.
        """
        if isinstance(include, str) or not include or not set(include) <= set(KINDS):
            raise ValueError(f"include: expected some of {', '.join(map(repr, KINDS))}, got {include!r}")
        number = absolute_layer(layer, self.num_layers)
        proteins = _tokens(sequences, tokens_per_batch, self.description.max_residues)
        return self._compute(proteins, tuple(dict.fromkeys(include)), number, tokens_per_batch)

    def logits(self, sequences: Iterable[str], *, tokens_per_batch: int | None = None) -> Iterator[np.ndarray]:
        """Returns an iterator over the logits of each sequence, in order: float32 (num_residues, 33), without masking.

        Raises:
            ValueError: A sequence that `embed` would not take either.
        """
        proteins = _tokens(sequences, tokens_per_batch, self.description.max_residues)
        by_kind = self._compute(proteins, ("logits",), self.num_layers, tokens_per_batch)
        return (arrays["logits"] for arrays in by_kind)

    def _compute(
        self, proteins: Iterable[np.ndarray], kinds: Sequence[Kind], layer: int, tokens_per_batch: int | None
    ) -> Iterator[dict[str, np.ndarray]]:
        embedder = RowEmbedder(self._model, kinds, (layer,))
        for row in _rows(proteins, tokens_per_batch or default_tokens_per_batch()):
            for protein, sums in zip(row, embedder(row), strict=True):
                # A vector that the caller keeps must not keep the whole row in memory.
                yield {kind: array.copy() for (kind, _), array in merge_windows([sums], len(protein)).items()}


def load_model(
    name: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> ProteinModel:
    """Returns a saved model, on the GPU if there is one.

    Args:
        name: An existing path: a model directory, a run of `protlm train`, a Hugging Face directory or a checkpoint
            `.pt` of fairseq; otherwise `OWNER/NAME[@REVISION]` on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        token: For models of the hub that ask for one.
        local_files_only: Take a model of the hub from its cache only.

    Raises:
        ModelError: Files that are missing, altered or of another version, or a model that protlm does not run.
    """
    model, description = read_named_model(name, revision=revision, token=token, local_files_only=local_files_only)
    return ProteinModel(model.to(best_device()), description)


def residues_of(sequence: object, name: str) -> bytes:
    """Returns the cleaned residues of a sequence that a caller passed.

    Args:
        sequence: What was passed.
        name: Its name for messages, such as `sequences[3]`.

    Raises:
        ValueError: No `str`, no residue in it, or something else than residues.
    """
    if not isinstance(sequence, str):
        raise ValueError(f"{name}: expected a sequence as str, got {_described(sequence)}")
    if special := _SPECIAL_TOKEN.search(sequence):
        raise ValueError(
            f"{name}: expected residues only, got the special token {special[0]!r} at position {special.start() + 1}; "
            "write X for an unknown residue, and leave the ends to protlm"
        )
    try:
        # Half a surrogate pair is no text, but an illegal character like any other.
        residues, _ = vocabulary.clean(sequence.encode(errors="surrogatepass"))
    except vocabulary.IllegalLetterError as error:
        raise ValueError(f"{name}: {error}; expected the letters of residues, {vocabulary.RESIDUES}") from None
    if not residues:
        raise ValueError(f"{name}: expected at least one residue, got {shown(sequence)}")
    return residues


def _described(value: object) -> str:
    """Returns what something is that is no sequence, with the next step where it is clear."""
    text = shown(str(value))[1:-1]
    if value is None or isinstance(value, numbers.Number):
        return text
    kind = type(value).__name__
    if isinstance(value, bytes | bytearray):
        return f"{kind} {bytes(value[:_SHOWN_BYTES])!r}; decode it"
    if isinstance(value, tuple | list):
        return f"{kind} {text}; pass the sequence alone"
    return kind


def _tokens(sequences: Iterable[str], tokens_per_batch: int | None, max_residues: int | None) -> Iterator[np.ndarray]:
    """Returns an iterator over the tokens of each sequence; checks the other arguments at once."""
    # The keys of a mapping would be taken for the sequences.
    if isinstance(sequences, str | bytes | bytearray | Mapping) or not isinstance(sequences, Iterable):
        got = "a single str; put it into a list" if isinstance(sequences, str) else _described(sequences)
        raise ValueError(f"sequences: expected several, such as a list of str, got {got}")
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: expected at least 1, got {tokens_per_batch}")
    return (_encode(sequence, f"sequences[{index}]", max_residues) for index, sequence in enumerate(sequences))


def _encode(sequence: str, name: str, max_residues: int | None) -> np.ndarray:
    residues = residues_of(sequence, name)
    if max_residues is not None and len(residues) > max_residues:
        raise ValueError(
            f"{name}: expected at most {max_residues} residues, which the positions of this model reach, "
            f"got {len(residues)}"
        )
    return vocabulary.encode(residues)


def _rows(proteins: Iterable[np.ndarray], tokens_per_batch: int) -> Iterator[list[np.ndarray]]:
    """Yields rows of proteins, in order: as many as the budget allows, or a single longer one."""
    row: list[np.ndarray] = []
    used = 0
    for protein in proteins:
        size = len(protein) + SPECIAL_TOKENS_PER_SEGMENT
        if row and used + size > tokens_per_batch:
            yield row
            row, used = [], 0
        row.append(protein)
        used += size
    if row:
        yield row
