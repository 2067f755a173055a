"""The facade of a trained model: hides tokens, packing and devices from whoever wants embeddings or logits."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from protlm import vocabulary
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batches import pack_row
from protlm.model.performer import Performer
from protlm.workflows.checkpoint import ModelDescription, read_model
from protlm.workflows.devices import best_device

EmbeddingKind = Literal["mean", "per-residue", "cls"]


class ProteinModel:
    """A trained model that takes sequences as text and gives NumPy arrays.

    Attributes:
        description: What the model directory says of the model.
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
        include: Sequence[EmbeddingKind] = ("mean",),
        *,
        layer: int = -1,
        tokens_per_batch: int = 8192,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns an iterator over the embeddings of each sequence, in order, as float32.

        A result does not depend on the sequences beside it. Sequences are read as they are needed.

        Args:
            sequences: Residues as text; repaired like records of a FASTA file.
            include: `mean` over the residues (dim,), `per-residue` (num_residues, dim), `cls` (dim,).
            layer: 0 is the embedding, -1 the last layer.
            tokens_per_batch: Budget of one forward pass; a longer protein has a pass of its own.

        Raises:
            ValueError: An unknown kind or layer, an empty sequence or a letter that stands for no residue.
        """
        if isinstance(include, str) or not set(include) <= {"mean", "per-residue", "cls"}:
            raise ValueError(f"include: expected some of 'mean', 'per-residue', 'cls', got {include!r}")
        number = self.layer_number(layer)
        proteins = _tokens(sequences, tokens_per_batch)

        def embeddings() -> Iterator[dict[str, np.ndarray]]:
            for states in self.hidden_states(proteins, (number,), tokens_per_batch):
                pooled = pool(states[number])
                # Copies, so that a kept vector does not keep the whole row in memory.
                yield {kind: pooled[kind].copy() for kind in include}

        return embeddings()

    def logits(self, sequences: Iterable[str], *, tokens_per_batch: int = 8192) -> Iterator[np.ndarray]:
        """Returns an iterator over the logits of each sequence, in order: float32 (num_residues, 33), nothing masked.

        Raises:
            ValueError: An empty sequence or a letter that stands for no residue.
        """
        proteins = _tokens(sequences, tokens_per_batch)

        def logits_of_each() -> Iterator[np.ndarray]:
            for row in _rows(proteins, tokens_per_batch):
                tokens, bounds = pack_row(row)
                with torch.inference_mode():
                    logits = self._model(tokens.to(self._device), bounds.to(self._device)).float().cpu().numpy()
                for start, stop in pairwise(bounds.tolist()):
                    yield logits[start + 1 : stop - 1].copy()

        return logits_of_each()

    def layer_number(self, layer: int) -> int:
        """Returns the absolute number of a layer given from either end.

        Raises:
            ValueError: There is no such layer.
        """
        if not -self.num_layers - 1 <= layer <= self.num_layers:
            raise ValueError(f"layer: expected {-self.num_layers - 1} to {self.num_layers}, got {layer}")
        return layer if layer >= 0 else self.num_layers + 1 + layer

    def hidden_states(
        self, proteins: Iterable[np.ndarray], layers: Collection[int], tokens_per_batch: int
    ) -> Iterator[dict[int, np.ndarray]]:
        """Yields for each protein, in order, its hidden states by layer number, float32 (num_residues + 2, dim).

        Args:
            proteins: Residue tokens, uint8.
            layers: Absolute numbers.
            tokens_per_batch: Budget of one forward pass.
        """
        for row in _rows(proteins, tokens_per_batch):
            tokens, bounds = pack_row(row)
            with torch.inference_mode():
                states = self._model.hidden_states(tokens.to(self._device), bounds.to(self._device), layers)
            arrays = {number: state.float().cpu().numpy() for number, state in states.items()}
            for start, stop in pairwise(bounds.tolist()):
                yield {number: array[start:stop] for number, array in arrays.items()}

    @property
    def _device(self) -> torch.device:
        return self._model.embedding.weight.device


def load_model(path: str | Path) -> ProteinModel:
    """Returns a trained model, on the GPU if there is one.

    Args:
        path: A model directory, or a run of `protlm train`.

    Raises:
        CheckpointError: Files that are missing, altered or of another version.
    """
    model, description = read_model(Path(path))
    return ProteinModel(model.to(best_device()), description)


def pool(states: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the kinds of embedding from the hidden states of one protein with its `<cls>` and `<eos>`."""
    residues = states[1:-1]
    return {"mean": residues.mean(0, dtype=np.float64).astype(states.dtype), "per-residue": residues, "cls": states[0]}


def _tokens(sequences: Iterable[str], tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Returns an iterator over the tokens of each sequence; checks at once what does not need the sequences."""
    if isinstance(sequences, str):
        raise ValueError("sequences: expected several, such as a list, got a single str; put it into a list")
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: expected at least 1, got {tokens_per_batch}")
    return map(_encode, sequences)


def _encode(sequence: str) -> np.ndarray:
    residues, _ = vocabulary.clean(sequence.encode())
    if not residues:
        raise ValueError("sequences: expected at least one residue in each, got an empty one")
    return vocabulary.encode(residues)


def _rows(proteins: Iterable[np.ndarray], tokens_per_batch: int) -> Iterator[list[np.ndarray]]:
    """Yields proteins in order, as many at a time as fit into a row; a longer one alone."""
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
