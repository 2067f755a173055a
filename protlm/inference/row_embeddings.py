"""A row of proteins becomes embeddings: pooling, and the copy to the CPU."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.batches import pack_row
from protlm.data.batching.rows import packed_in_order
from protlm.data.embeddings.kinds import RESIDUE_KINDS, Kind
from protlm.data.embeddings.layouts import Column, columns_of
from protlm.inference.long_proteins import Cut, Window
from protlm.inference.memory import computed_by_halves
from protlm.model.performer import Performer
from protlm.runtime.devices import best_device

Sums = dict[Column, np.ndarray]
"""The results of one window: float32 (num_residues, dim) or (dim,); for a mean the sum over its residues, float64."""


def default_tokens_per_batch() -> int:
    """Returns the default budget of a forward pass without gradients, in tokens, for the device.

    A CPU is fastest while a row and its activations fit into the cache; a GPU needs more work at a time.
    """
    return 8192 if best_device().type == "cuda" else 2048


class RowEmbedder:
    """Computes rows of proteins with a model, on the model's device.

    Attributes:
        columns: The columns that are computed.
    """

    def __init__(self, model: Performer, kinds: Sequence[Kind], layers: Sequence[int]) -> None:
        """Prepares.

        Args:
            model: The network, in evaluation mode.
            kinds: Kinds of embedding, each once.
            layers: Absolute layer numbers, each once; logits ignore them.
        """
        self._model = model
        self._last = model.config.num_layers
        self.columns = columns_of(kinds, layers, self._last)
        self._layers = {layer for _, layer in self.columns}

    def __call__(self, proteins: Sequence[np.ndarray], cores: Sequence[slice] | None = None) -> list[Sums]:
        """Returns the sums of each protein of a row.

        Args:
            proteins: Residue tokens of each protein, or of a window of it, uint8.
            cores: The residues of each whose results are returned; default: all.
        """
        tokens, bounds = pack_row(proteins)
        device = self._model.embedding.weight.device
        with torch.inference_mode():
            states = self._model.hidden_states(tokens.to(device), bounds.to(device), self._layers)
            # Residues begin after <cls>.
            starts = (bounds[:-1] + 1).tolist()
            cores = cores or [slice(0, len(protein)) for protein in proteins]
            kept = [slice(at + core.start, at + core.stop) for at, core in zip(starts, cores, strict=True)]
            by_column = {column: self._compute(column, states, kept, bounds) for column in self.columns}
        return [{column: by_column[column][number] for column in self.columns} for number in range(len(proteins))]

    def compute_by_halves(self, proteins: Sequence[np.ndarray], cores: Sequence[slice]) -> Iterator[Sums | None]:
        """Yields the sums of each protein of a row; where memory runs out, the row is halved.

        A protein that does not fit into memory even alone gives None.
        """
        windows = list(zip(proteins, cores, strict=True))
        yield from computed_by_halves(lambda some: self(*map(list, zip(*some, strict=True))), windows)

    def _compute(
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
            rows = self._model.token_table.columns(self._model.head(rows, self._model.embedding.weight))
        numbers = rows.float().cpu().numpy()
        return [numbers[residues] for residues in kept]


class _Seen(NamedTuple):
    """A window, its tokens, and whether it is the last one of its protein."""

    window: Window
    tokens: np.ndarray
    is_last: bool

    @property
    def core(self) -> slice:
        """The residues whose results are taken from this window."""
        return slice(self.window.core_start - self.window.start, self.window.core_stop - self.window.start)


def embedded_in_order(
    embedder: RowEmbedder, proteins: Iterable[tuple[int, np.ndarray]], cut: Cut, tokens_per_batch: int
) -> Iterator[tuple[int, dict[Column, np.ndarray] | None]]:
    """Yields the number and the embeddings of each protein, in order, reading no further than a row.

    A row has consecutive proteins; they are computed fastest where neighbours are of similar length.

    Args:
        embedder: The model and the columns.
        proteins: Number and residue tokens of each protein.
        cut: The treatment of long proteins.
        tokens_per_batch: Budget of a row.

    Yields:
        float32 by column, parts of the whole row's arrays; None for a protein that does not fit into memory even alone.
    """

    def seen() -> Iterator[_Seen]:
        for number, tokens in proteins:
            windows = cut.windows(number, len(tokens))
            for window in windows:
                yield _Seen(window, tokens[window.start : window.stop], window is windows[-1])

    gathered: list[Sums | None] = []
    for row in packed_in_order(seen(), lambda each: len(each.tokens) + SPECIAL_TOKENS_PER_SEGMENT, tokens_per_batch):
        results = embedder.compute_by_halves([each.tokens for each in row], [each.core for each in row])
        for each, result in zip(row, results, strict=True):
            gathered.append(result)
            if each.is_last:
                sums = [of_window for of_window in gathered if of_window is not None]
                is_whole = len(sums) == len(gathered)
                gathered = []
                yield each.window.record, merge_windows(sums, each.window.core_stop) if is_whole else None


def merge_windows(windows: Sequence[Sums], num_residues: int) -> dict[Column, np.ndarray]:
    """Returns the embeddings of one protein from the sums of its windows, as float32.

    The `cls` of a protein is the mean over its windows.

    Args:
        windows: The sums of each window, in order.
        num_residues: Residues of the protein that are embedded.
    """
    embeddings = {}
    for column in windows[0]:
        kind, _ = column
        arrays = [sums[column] for sums in windows]
        if kind in RESIDUE_KINDS:
            embeddings[column] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        else:
            total = np.stack(arrays).sum(0, dtype=np.float64)
            embeddings[column] = (total / (num_residues if kind == "mean" else len(arrays))).astype(np.float32)
    return embeddings
