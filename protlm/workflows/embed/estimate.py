"""The dry run of embed: sizes are counted from the inputs, and the time is extrapolated from a sample of proteins."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protlm.data.embeddings.layouts import LAYOUTS
from protlm.data.storage.protein_store import ProteinStore
from protlm.errors import ProtlmError
from protlm.files import free_bytes
from protlm.inference.long_proteins import Cut
from protlm.inference.pace import pace_of
from protlm.runtime.devices import best_device
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.embed.folder import EmbedFolder, check_replaceable
from protlm.workflows.embed.inputs import ProteinInputs, check_lengths, read_proteins
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.settings import EmbedRequest, EmbedSettings, settings_of

if TYPE_CHECKING:
    from protlm.inference.row_embeddings import RowEmbedder

_STORE_BYTES = 64
"""Bytes of a protein in the store besides its id and its residues, about."""


@dataclass(frozen=True, kw_only=True)
class EmbedCounts:
    """The proteins of a run, counted before torch is loaded.

    Attributes:
        num_records: Proteins.
        num_residues: Their residues, without those that `truncate` cuts off.
        num_sequences: Different sequences; each is computed once.
        num_computed_residues: Residues to compute; those in the overlap of two windows count twice.
        longest: Residues of the longest protein.
    """

    num_records: int
    num_residues: int
    num_sequences: int
    num_computed_residues: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class EmbedEstimate(EmbedCounts):
    """The size, time and disk that a run is expected to take, beside its counts.

    Attributes:
        out_bytes: Size of the output.
        peak_bytes: Disk space needed during the run, the output included.
        free_bytes: Free disk space at the place of the output.
        seconds: Time on this machine, from a sample; assumes that devices share the work evenly.
        residues_per_second: Residues to compute divided by that time.
        num_nucleotides: Nucleic acids that were kept as if they were proteins.
        rejects: Number of records that cannot be read, by reason.
        left_out: Entries of an input folder that are not protein files.
    """

    out_bytes: int
    peak_bytes: int
    free_bytes: int
    seconds: float
    residues_per_second: float
    num_nucleotides: int
    rejects: Mapping[str, int]
    left_out: tuple[str, ...]


def estimate(
    request: EmbedRequest,
    *,
    start_progress: StartProgress = no_progress,
    tell: Callable[[EmbedCounts], None] = lambda counts: None,
) -> EmbedEstimate:
    """Reads the inputs, times a sample of their proteins and returns what embedding them all would take.

    Args:
        request: The options of the run.
        start_progress: Starts the stage `read` (bytes).
        tell: Called with the counts as soon as they are known, before torch is loaded.

    Raises:
        ProtlmError: As `embed` raises before it computes anything.
    """
    out = Path(os.path.realpath(request.out))
    folder = EmbedFolder(out)
    check_replaceable(folder, LAYOUTS[request.layout], out, force=request.force)
    inputs = ProteinInputs(request.inputs, request.split, request.on_bad_record, request.nucleotides, start_progress)
    with tempfile.TemporaryDirectory() as temporary:
        proteins = read_proteins(Path(temporary) / "proteins", inputs)
        counts = _counts(proteins, Cut(window=request.window, truncate=request.truncate))
        tell(counts)

        from protlm.inference.precision import set_precision
        from protlm.inference.row_embeddings import RowEmbedder
        from protlm.pretrained.model_names import read_named_model

        model, description = read_named_model(request.model)
        settings = settings_of(request, description)
        folder.check_start(settings.weights_hash, settings.options, resume=request.resume, force=request.force)
        check_lengths(proteins, settings.cut, description)
        settings.layout.check_ids(proteins.ids)
        set_precision(model, settings.precision)
        embedder = RowEmbedder(model.to(best_device()), settings.kinds, settings.layers)
        return _estimate(request, out, settings, proteins, inputs, counts, embedder)


def _counts(proteins: ProteinStore, cut: Cut) -> EmbedCounts:
    is_first = proteins.first == np.arange(proteins.num_records)
    return EmbedCounts(
        num_records=proteins.num_records,
        num_residues=int(cut.kept(proteins.lengths).sum()),
        num_sequences=int(is_first.sum()),
        num_computed_residues=int(cut.sizes(proteins.lengths[is_first]).sum()),
        longest=int(proteins.lengths.max()),
    )


def _estimate(
    request: EmbedRequest,
    out: Path,
    settings: EmbedSettings,
    proteins: ProteinStore,
    inputs: ProteinInputs,
    counts: EmbedCounts,
    embedder: "RowEmbedder",
) -> EmbedEstimate:
    kept = settings.cut.kept(proteins.lengths)
    is_first = proteins.first == np.arange(proteins.num_records)
    sizes = settings.cut.sizes(proteins.lengths[is_first])

    def compute(row: Sequence[np.ndarray]) -> bool:
        return None not in embedder.compute_by_halves(row, [slice(0, len(protein)) for protein in row])

    letters = np.concatenate([proteins.tokens(record) for record in range(min(64, proteins.num_records))])
    try:
        pace = pace_of(compute, letters, sizes, settings.tokens_per_batch)
    except MemoryError as error:
        raise ProtlmError(f"{error}; take --window, --truncate or fewer --layers") from None  # one line says it all
    seconds = pace.seconds(sizes) / request.devices.total
    id_bytes = len(proteins.ids.text)
    store_bytes = id_bytes + _STORE_BYTES * proteins.num_records + int(proteins.lengths.sum())
    out_bytes = settings.num_bytes(proteins.num_records, counts.num_residues) + id_bytes
    out_bytes += settings.layout.bytes_per_record * proteins.num_records
    return EmbedEstimate(
        **asdict(counts),
        out_bytes=out_bytes,
        peak_bytes=_peak_bytes(settings, proteins, kept, is_first, out_bytes) + store_bytes,
        free_bytes=free_bytes(out),
        seconds=seconds,
        residues_per_second=counts.num_computed_residues / seconds,
        num_nucleotides=inputs.num_nucleotides,
        rejects=dict(inputs.rejects),
        left_out=inputs.left_out,
    )


def _peak_bytes(
    settings: EmbedSettings, proteins: ProteinStore, kept: np.ndarray, is_first: np.ndarray, out_bytes: int
) -> int:
    """Returns the largest total size of output and portions during a run."""
    portion_bytes = settings.num_bytes(int(is_first.sum()), int(kept[is_first].sum()))
    if not settings.layout.can_resume:
        return out_bytes + portion_bytes
    # A portion is removed once it is in the output, unless a later protein has one of its sequences.
    plan = Plan.of(proteins, settings)
    is_kept_on = plan.last_use() > np.arange(plan.num_portions)
    held = [plan.num_residues(portion) for portion in np.flatnonzero(is_kept_on).tolist()]
    largest = max(plan.num_residues(portion) for portion in range(plan.num_portions))
    share = (sum(held) + largest) / max(1, int(kept[is_first].sum()))
    return out_bytes + int(portion_bytes * min(1.0, share))
