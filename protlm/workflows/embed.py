"""`protlm embed`: protein files in, one embeddings file out, in two passes over the input.

The first pass counts, so that the file can be laid out at its final size; the second computes and writes in place.
Memory holds ids and lengths of all proteins, and the hidden states of one row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from protlm import vocabulary
from protlm.data.duplicates import sequence_digest
from protlm.data.embeddings import EmbeddingsWriter, open_embeddings
from protlm.data.reader import RecordReader
from protlm.data.records import UniqueIds
from protlm.errors import ProtlmError
from protlm.workflows.pretrained import EmbeddingKind, load_model, pool


@dataclass(frozen=True)
class EmbedReport:
    """What was embedded.

    Attributes:
        out: The embeddings file.
        num_records: Proteins in it.
        num_residues: Their residues.
        num_renamed: Proteins whose id stood before and that got a `#n`.
        include: Kinds of embedding.
        layers: Absolute layer numbers.
        dim: Width of an embedding.
        rejects: Skipped records by reason.
        repairs: Repaired letters by rule.
    """

    out: Path
    num_records: int
    num_residues: int
    num_renamed: int
    include: tuple[str, ...]
    layers: tuple[int, ...]
    dim: int
    rejects: dict[str, int]
    repairs: dict[str, int]


@dataclass(frozen=True)
class _Census:
    """What the first pass found."""

    ids: list[str]
    lengths: list[int]
    digests: list[bytes]
    num_renamed: int
    rejects: dict[str, int]
    repairs: dict[str, int]


def embed(
    model_path: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    include: Sequence[EmbeddingKind] = ("mean",),
    layers: Sequence[int] = (-1,),
    dtype: Literal["float32", "float16"] = "float32",
    tokens_per_batch: int = 8192,
    on_bad_record: Literal["error", "skip"] = "error",
    force: bool = False,
    start_progress: Callable[[int], Callable[[int], object]] | None = None,
) -> EmbedReport:
    """Embeds every protein of the inputs, in order, each whole and alone whatever it is computed beside.

    Args:
        model_path: A model directory or a run.
        inputs: FASTA files, plain or gzip.
        out: The embeddings file, written under a temporary name until it is complete.
        include: `mean` over the residues, `per-residue`, `cls`.
        layers: 0 is the embedding, -1 the last layer.
        dtype: Of the stored numbers.
        tokens_per_batch: Budget of one forward pass; a longer protein has a pass of its own.
        on_bad_record: Stop at a bad record, or skip and count it.
        force: Replaces an existing file.
        start_progress: Called with the number of residues to do; returns what is called with residues done.

    Raises:
        ProtlmError: A model or an input that cannot be read, an existing output, or an unknown layer.
    """
    _check_output(out, force=force)
    for path in inputs:
        if path.exists() and not path.is_file():
            raise ProtlmError(f"{path}: expected a file, which can be read twice, got a folder or a pipe")
    model = load_model(model_path)
    try:
        numbers = tuple(dict.fromkeys(model.layer_number(layer) for layer in layers))
    except ValueError as error:
        raise ProtlmError(f"{model_path}: {error}") from None
    census = _count(inputs, on_bad_record)
    _check_lengths(census, model.description.max_residues)
    kinds = tuple(dict.fromkeys(include))
    progress = start_progress(sum(census.lengths)) if start_progress is not None else None
    with EmbeddingsWriter.create(
        out, census.ids, census.lengths, census.digests, kinds, numbers, [model.model_dim] * len(numbers), dtype,
        model.description.weights_hash, force=force,
    ) as writer:  # fmt: skip
        proteins = _proteins(inputs, on_bad_record, census)
        for index, states in enumerate(model.hidden_states(proteins, numbers, tokens_per_batch)):
            for number in numbers:
                pooled = pool(states[number])
                for kind in kinds:
                    writer.write(kind, number, index, pooled[kind].astype(dtype))
            if progress is not None:
                progress(census.lengths[index])
    return EmbedReport(
        out=out,
        num_records=len(census.ids),
        num_residues=sum(census.lengths),
        num_renamed=census.num_renamed,
        include=kinds,
        layers=numbers,
        dim=model.model_dim,
        rejects=census.rejects,
        repairs=census.repairs,
    )


def _check_output(out: Path, *, force: bool) -> None:
    """Raises ProtlmError unless the output is new, or an embeddings file that may be replaced."""
    if not out.exists():
        return
    if not force:
        raise ProtlmError(f"{out}: exists already; replace it with --force or choose another --out")
    try:
        open_embeddings(out)
    except (ProtlmError, OSError):
        raise ProtlmError(
            f"{out}: is no embeddings file of protlm, so --force does not replace it; choose another --out"
        ) from None


def _check_lengths(census: _Census, limit: int | None) -> None:
    """Raises ProtlmError at the first protein that the model's learned positions do not reach."""
    if limit is None:
        return
    for name, length in zip(census.ids, census.lengths, strict=True):
        if length > limit:
            raise ProtlmError(
                f"{name[:80]}: has {length:,} residues, and the positions of this model reach {limit:,}; leave it out, "
                "or use a model without learned positions"
            )


def _count(inputs: Sequence[Path], on_bad_record: Literal["error", "skip"]) -> _Census:
    reader = RecordReader(inputs, on_bad_record=on_bad_record)
    unique = UniqueIds()
    ids: list[str] = []
    lengths: list[int] = []
    digests: list[bytes] = []
    num_renamed = 0
    for record in reader:
        name = unique(record.id)
        num_renamed += name != record.id
        ids.append(name)
        lengths.append(len(record.sequence))
        digests.append(sequence_digest(record.sequence.encode()))
    if not ids:
        raise ProtlmError(f"{', '.join(map(str, inputs))}: no usable record; nothing to embed")
    return _Census(ids, lengths, digests, num_renamed, dict(reader.rejects), dict(reader.repairs))


def _proteins(inputs: Sequence[Path], on_bad_record: Literal["error", "skip"], census: _Census) -> Iterator[np.ndarray]:
    """Yields the tokens of the second pass, and makes sure that it meets the same proteins as the first."""
    records = iter(RecordReader(inputs, on_bad_record=on_bad_record))
    for index, digest in enumerate(census.digests):
        record = next(records, None)
        if record is None or sequence_digest(record.sequence.encode()) != digest:
            raise ProtlmError(f"the input changed while it was read (record {index + 1}); embed it again")
        yield vocabulary.encode(record.sequence.encode())
