"""The Python interface of a trained model: sequences in, NumPy arrays out; tokens, packing and devices stay inside."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from protlm import vocabulary
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.embeddings.kinds import KINDS, Kind
from protlm.inference.row_embeddings import RowEmbedder, absolute_layer, default_tokens_per_batch, merge_windows
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.devices import best_device


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
            ValueError: An unknown kind or layer, an empty sequence, a letter that stands for no residue, or a sequence
                longer than the model's learned positions.
        """
        if isinstance(include, str) or not include or not set(include) <= set(KINDS):
            raise ValueError(f"include: expected some of {', '.join(map(repr, KINDS))}, got {include!r}")
        number = absolute_layer(layer, self.num_layers)
        proteins = _tokens(sequences, tokens_per_batch, self.description.max_residues)
        return self._compute(proteins, tuple(dict.fromkeys(include)), number, tokens_per_batch)

    def logits(self, sequences: Iterable[str], *, tokens_per_batch: int | None = None) -> Iterator[np.ndarray]:
        """Returns an iterator over the logits of each sequence, in order: float32 (num_residues, 33), without masking.

        Raises:
            ValueError: An empty sequence or a letter that stands for no residue.
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


def _tokens(sequences: Iterable[str], tokens_per_batch: int | None, max_residues: int | None) -> Iterator[np.ndarray]:
    """Returns an iterator over the tokens of each sequence; checks the other arguments at once."""
    if isinstance(sequences, str):
        raise ValueError("sequences: expected several, such as a list, got a single str; put it into a list")
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: expected at least 1, got {tokens_per_batch}")
    return (_encode(sequence, max_residues) for sequence in sequences)


def _encode(sequence: str, max_residues: int | None) -> np.ndarray:
    residues, _ = vocabulary.clean(sequence.encode())
    if not residues:
        raise ValueError("sequences: expected at least one residue in each, got an empty one")
    if max_residues is not None and len(residues) > max_residues:
        raise ValueError(
            f"sequences: expected at most {max_residues} residues, which the positions of this model reach, "
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
