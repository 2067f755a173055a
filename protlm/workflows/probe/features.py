"""The features that a probe reads: embeddings of every layer in a file of a temporary folder, and sequences' own."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protlm import files
from protlm.data.embeddings.kinds import Kind
from protlm.data.records import shown
from protlm.data.storage.protein_store import ProteinStore
from protlm.data.strings import bounds_of
from protlm.errors import ProtlmError
from protlm.inference.linear_probe import Features, StoredFeatures
from protlm.inference.long_proteins import Cut
from protlm.inference.row_embeddings import RowEmbedder, embedded_in_order
from protlm.inference.sequence_features import (
    WindowFeatures,
    composition,
    dipeptides,
    variant_columns,
    variant_one_hot,
)
from protlm.model.performer import Performer
from protlm.runtime.progress import Advance


def embed_layers(
    model: Performer,
    proteins: ProteinStore,
    layers: Sequence[int],
    path: Path,
    *,
    of_residues: bool,
    cut: Cut,
    tokens_per_batch: int,
    advance: Advance,
) -> dict[int, Features]:
    """Returns the features of each layer: means over a protein, or the embeddings of its residues.

    Args:
        model: The network.
        proteins: The proteins; equal ones are computed once.
        layers: Absolute numbers.
        path: The name of a new file, which holds them as long as they are used.
        of_residues: Whether rows are residues.
        cut: The treatment of long proteins.
        tokens_per_batch: Budget of one forward pass.
        advance: Called with the residues of each protein that was computed.

    Raises:
        ProtlmError: Too little disk, a protein that does not fit into memory, or an embedding that is not finite.
    """
    kind: Kind = "per-residue" if of_residues else "mean"
    lengths, first = np.asarray(proteins.lengths), np.asarray(proteins.first)
    offsets = bounds_of(lengths) if of_residues else np.arange(len(lengths) + 1)
    shape = (len(layers), int(offsets[-1]), model.config.model_dim)
    _make_room(path, int(np.prod(shape, dtype=object)) * np.dtype(np.float32).itemsize)
    stored = np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
    # The map keeps the file, which so goes with this process in any case.
    path.unlink()
    repeats: dict[int, list[int]] = {}
    for record in np.flatnonzero(first != np.arange(len(first))).tolist():
        repeats.setdefault(int(first[record]), []).append(record)
    computed = np.flatnonzero(first == np.arange(len(first)))
    # The longest first, so that a row has those of similar length.
    order = computed[np.argsort(-lengths[computed], kind="stable")].tolist()
    embedder = RowEmbedder(model, (kind,), layers)
    tokens = ((record, proteins.tokens(record)) for record in order)
    for record, by_column in embedded_in_order(embedder, tokens, cut, tokens_per_batch):
        if by_column is None:
            raise ProtlmError(
                f"{shown(proteins.id(record))}: its {int(lengths[record]):,} residues do not fit into memory; compute "
                "long proteins in windows with --window"
            )
        for number, layer in enumerate(layers):
            rows = by_column[kind, layer]
            if not np.isfinite(rows).all():
                raise ProtlmError(f"{shown(proteins.id(record))}: its embedding is not finite; the model is of no use")
            for same in (record, *repeats.get(record, ())):
                stored[number, offsets[same] : offsets[same + 1]] = rows
        advance(int(lengths[record]))
    return {layer: StoredFeatures(stored[number]) for number, layer in enumerate(layers)}


def _make_room(path: Path, wanted: int) -> None:
    """Makes a file of a size, its blocks set aside where the system can: writing to a map without could end Python.

    Raises:
        ProtlmError: The disk has too little space.
    """
    free = files.free_bytes(path.parent)
    is_enough = wanted <= free
    with path.open("xb") as file:
        try:
            if is_enough and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, wanted)
        except OSError as error:
            # A quota, or what others wrote meanwhile; other errors are of systems that cannot set blocks aside.
            is_enough = error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        file.truncate(wanted if is_enough else 0)
    if not is_enough:
        path.unlink()
        raise ProtlmError(
            f"{path.parent}: expected {wanted:,} free bytes for the embeddings, got {free:,} or a quota below that; "
            "name fewer --layers, give fewer proteins, or choose another folder for temporary files with TMPDIR"
        )


def sequence_baselines(proteins: ProteinStore, *, of_residues: bool) -> dict[str, Features]:
    """Returns the features of sequences alone, by the name of the baseline."""
    each = (proteins.tokens(record) for record in range(len(proteins)))
    if of_residues:
        tokens, offsets = np.concatenate(list(each)), bounds_of(np.asarray(proteins.lengths))
        return {"residue": WindowFeatures(tokens, offsets, 0), "window": WindowFeatures(tokens, offsets)}
    counts, pairs = [], []
    for tokens in each:
        counts.append(composition(tokens))
        pairs.append(dipeptides(tokens))
    alone = np.stack(counts)
    baselines: dict[str, Features] = {
        "composition": StoredFeatures(alone),
        "dipeptides": StoredFeatures(np.concatenate([alone, np.stack(pairs)], axis=1)),
    }
    lengths = np.unique(np.asarray(proteins.lengths))
    if len(lengths) == 1:
        columns = variant_columns((proteins.tokens(record) for record in range(len(proteins))), int(lengths[0]))
        if columns is not None and len(columns):
            rows = [variant_one_hot(proteins.tokens(record), columns) for record in range(len(proteins))]
            baselines["one_hot"] = StoredFeatures(np.stack(rows))
    return baselines
