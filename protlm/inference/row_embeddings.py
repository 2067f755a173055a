"""From rows of proteins to embeddings: hides pooling, the way to the CPU, and what is done when memory runs out."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from protlm.data.batching.batches import pack_row
from protlm.data.embeddings.kinds import RESIDUE_KINDS, Kind
from protlm.data.embeddings.layouts import Column, columns_of
from protlm.model.performer import Performer

Sums = dict[Column, np.ndarray]
"""What one segment gives: float32 (num_residues, dim) or (dim,); for a mean the sum over its residues, float64."""

_NO_CPU_MEMORY = ("can't allocate memory", "not enough memory")


class RowEmbedder:
    """Computes rows of proteins with a model, on the model's device.

    Attributes:
        columns: What is computed.
    """

    def __init__(self, model: Performer, kinds: Sequence[Kind], layers: Sequence[int]) -> None:
        """Prepares.

        Args:
            model: In evaluation mode.
            kinds: Kinds of embedding, each once.
            layers: Absolute numbers, each once; logits ignore them.
        """
        self._model = model
        self._last = model.config.num_layers
        self.columns = columns_of(kinds, layers, self._last)
        self._layers = {layer for _, layer in self.columns}

    def __call__(self, proteins: Sequence[np.ndarray], cores: Sequence[slice] | None = None) -> list[Sums]:
        """Returns what each protein of a row gives.

        Args:
            proteins: Residue tokens of each, uint8.
            cores: The residues of each that are wanted; default: all.
        """
        tokens, bounds = pack_row(proteins)
        device = self._model.embedding.weight.device
        with torch.inference_mode():
            states = self._model.hidden_states(tokens.to(device), bounds.to(device), self._layers)
            # Without <cls> and <eos>.
            starts = (bounds[:-1] + 1).tolist()
            wanted = cores or [slice(0, len(protein)) for protein in proteins]
            kept = [slice(at + core.start, at + core.stop) for at, core in zip(starts, wanted, strict=True)]
            found = {column: self._computed(column, states, kept, bounds) for column in self.columns}
        return [{column: found[column][number] for column in self.columns} for number in range(len(proteins))]

    def or_none(self, proteins: Sequence[np.ndarray], cores: Sequence[slice]) -> Iterator[Sums | None]:
        """Yields what each protein of a row gives; if memory does not suffice, by halves, and None for one too long."""
        found = self._unless_memory_runs_out(proteins, cores)
        if found is not None:
            yield from found
        elif len(proteins) == 1:
            yield None
        else:
            half = len(proteins) // 2
            yield from self.or_none(proteins[:half], cores[:half])
            yield from self.or_none(proteins[half:], cores[half:])

    def _unless_memory_runs_out(self, proteins: Sequence[np.ndarray], cores: Sequence[slice]) -> list[Sums] | None:
        try:
            return self(proteins, cores)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of `except`, whose traceback would keep the tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _computed(
        self, column: Column, states: Mapping[int, Tensor], kept: Sequence[slice], bounds: Tensor
    ) -> Sequence[np.ndarray]:
        kind, layer = column
        if kind == "mean":
            sums = torch.stack([states[layer][residues].sum(0, dtype=torch.float64) for residues in kept])
            return list(sums.cpu().numpy())
        if kind == "cls":
            return list(states[layer][bounds[:-1].to(states[layer].device)].float().cpu().numpy())
        rows = states[layer]
        if kind == "logits":
            rows = self._model.head(rows, self._model.embedding.weight)
        numbers = rows.float().cpu().numpy()
        return [numbers[residues] for residues in kept]


def merged(parts: Sequence[Sums], num_residues: int) -> dict[Column, np.ndarray]:
    """Returns the embeddings of one protein from what its segments gave, in order, as float32.

    The `cls` of a protein in several windows is the mean of theirs.

    Args:
        parts: Of each segment.
        num_residues: Residues of all of them together.
    """
    found = {}
    for column in parts[0]:
        kind, _ = column
        pieces = [part[column] for part in parts]
        if kind in RESIDUE_KINDS:
            found[column] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        else:
            total = np.stack(pieces).sum(0, dtype=np.float64)
            found[column] = (total / (num_residues if kind == "mean" else len(pieces))).astype(np.float32)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error is of memory that did not suffice, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_CPU_MEMORY)


def absolute_layer(layer: int, last_layer: int) -> int:
    """Returns the absolute number of a layer given from either end.

    Raises:
        ValueError: There is no such layer.
    """
    if not -last_layer - 1 <= layer <= last_layer:
        raise ValueError(f"layer: expected {-last_layer - 1} to {last_layer}, got {layer}")
    return layer if layer >= 0 else last_layer + 1 + layer
