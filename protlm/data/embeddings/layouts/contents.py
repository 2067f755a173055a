"""The contents of an output of embeddings, as they are known before the first protein is written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from protlm import vocabulary
from protlm.choices import UsedPrecision
from protlm.data.digests import DIGEST_BYTES
from protlm.data.embeddings.kinds import KINDS, RESIDUE_KINDS, Dtype, Kind
from protlm.data.strings import Strings

Column = tuple[Kind, int]
"""A kind of embedding and the absolute number of its layer."""

Embeddings = Mapping[Column, np.ndarray]
"""The embeddings of one protein: (num_residues, width) of the residue kinds, (width,) of the others."""


def columns_of(kinds: Sequence[Kind], layers: Sequence[int], last_layer: int) -> tuple[Column, ...]:
    """Returns the columns of kinds and layers, in order: each kind of each layer, but logits of the last layer only."""
    return tuple((kind, layer) for kind in kinds for layer in ((last_layer,) if kind == "logits" else layers))


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """The contents of an output.

    Attributes:
        ids: Final ids in order, all different.
        lengths: Number of rows of each record in the residue kinds, int64 (records).
        digests: `digests.sequence_digest` of each whole cleaned sequence, uint8 (records, 16).
        residues: Function that returns the letters of the whole cleaned sequence of a record.
        kinds: Kinds to store, each once.
        layers: Absolute numbers of the layers to store, each once; logits do not depend on them.
        last_layer: Number of the model's last layer, under which logits are stored.
        model_dim: Width of an embedding.
        dtype: Type of the stored numbers.
        model_hash: Hash of the model that makes them.
        precision: Number type in which the model computes.
    """

    ids: Strings
    lengths: np.ndarray
    digests: np.ndarray
    residues: Callable[[int], bytes]
    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]
    last_layer: int
    model_dim: int
    dtype: Dtype
    model_hash: str
    precision: UsedPrecision = "32"

    def __post_init__(self) -> None:
        """Raises ValueError if the attributes contradict each other."""
        sizes = (len(self.ids), len(self.lengths), len(self.digests))
        if len(set(sizes)) != 1 or self.digests.shape[1:] != (DIGEST_BYTES,):
            raise ValueError(f"ids, lengths, digests: expected equal numbers, got {sizes}")
        if not self.kinds or len(set(self.kinds)) != len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds: expected some of {KINDS}, each once, got {self.kinds}")
        if len(set(self.layers)) != len(self.layers) or min((*self.layers, self.last_layer)) < 0:
            raise ValueError(f"layers: expected different ones from 0, got {self.layers} and {self.last_layer}")
        if not self.columns:
            raise ValueError(f"layers: expected at least one for {', '.join(self.kinds)}, got none")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype: expected one of {get_args(Dtype)}, got {self.dtype!r}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns stored of every protein."""
        return columns_of(self.kinds, self.layers, self.last_layer)

    def record_id(self, index: int) -> str:
        """Returns the id of a record."""
        start, end = self.ids.offsets[index : index + 2]
        return bytes(self.ids.text[start:end]).decode()

    def width(self, kind: Kind) -> int:
        """Returns the number of values in a row of a kind."""
        return vocabulary.VOCABULARY_SIZE if kind == "logits" else self.model_dim

    def shape(self, kind: Kind, index: int) -> tuple[int, ...]:
        """Returns the shape of a record's embedding of a kind."""
        width = self.width(kind)
        return (int(self.lengths[index]), width) if kind in RESIDUE_KINDS else (width,)
