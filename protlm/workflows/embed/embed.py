"""`protlm embed`: proteins become one output of embeddings, in the layout asked for.

The proteins are read once into a store, their embeddings are computed and written in portions, and the portions are
assembled in the order of the input. All of this stays in `OUT.partial` until the output is complete.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protlm.choices import UsedPrecision
from protlm.data.embeddings.kinds import Dtype
from protlm.data.residue_counts import count_residues
from protlm.data.storage.protein_store import ProteinStore
from protlm.inference.long_proteins import Cut
from protlm.inference.precision import set_precision, used_precision
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_names import read_named_model
from protlm.runtime import work_folder
from protlm.runtime.devices import best_device
from protlm.runtime.launch import check_processes, process_rank
from protlm.runtime.portion_work import compute_here
from protlm.runtime.progress import StartProgress, no_progress, tell_nobody
from protlm.runtime.workers import connected
from protlm.vocabulary import RESIDUES, ModelVocabulary
from protlm.workflows.embed.assembly import assemble, can_go_on, is_kept
from protlm.workflows.embed.folder import EmbedFolder, check_replaceable
from protlm.workflows.embed.inputs import ProteinInputs, check_lengths, read_proteins
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.portions import EmbedWork
from protlm.workflows.embed.settings import EmbedRequest, EmbedSettings, settings_of

if TYPE_CHECKING:
    from protlm.runtime.dask_workers import DaskCluster


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A protein that did not fit into memory."""

    id: str
    num_residues: int


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """The outcome of a run.

    Attributes:
        out: The output.
        layout: Name of its layout.
        files: Companion files beside the output.
        num_records: Proteins in the output.
        num_residues: Residues of these proteins.
        num_equal: Proteins whose sequence came before, and was computed only once.
        num_renamed: Proteins whose id came before, and got a `#n`.
        num_windowed: Proteins computed in windows.
        num_truncated: Proteins of which only the first residues are embedded.
        include: Kinds of embedding.
        layers: Absolute layer numbers.
        dim: Width of an embedding.
        dtype: Type of the stored numbers.
        precision: Number type in which the model computed.
        num_beyond_training: Proteins that a model without a limit saw longer than any that it was trained on.
        trained_residues: Length of the longest protein that it was trained on; None if that is unknown.
        num_lacked: Residues that the model lacks and read as another token.
        lacked: Their letters.
        stand_in: That token.
        skipped: Proteins that did not fit into memory, and are not in the output.
        num_nucleotides: Nucleic acids that were kept as if they were proteins.
        rejects: Number of records that could not be read, by reason.
        repairs: Number of repaired letters, by rule.
        left_out: Entries of an input folder that are not protein files.
    """

    out: Path
    layout: str
    files: tuple[Path, ...]
    num_records: int
    num_residues: int
    num_equal: int
    num_renamed: int
    num_windowed: int
    num_truncated: int
    include: tuple[str, ...]
    layers: tuple[int, ...]
    dim: int
    dtype: Dtype
    precision: UsedPrecision
    num_beyond_training: int
    trained_residues: int | None
    num_lacked: int
    lacked: str
    stand_in: str
    skipped: tuple[Skipped, ...]
    num_nucleotides: int
    rejects: Mapping[str, int]
    repairs: Mapping[str, int]
    left_out: tuple[str, ...]


def embed(
    request: EmbedRequest,
    *,
    start_progress: StartProgress = no_progress,
    tell: Callable[[str], object] = tell_nobody,
) -> EmbedReport | None:
    """Embeds every protein of the inputs, in their order; a result does not depend on the other proteins.

    Args:
        request: The options of the run.
        start_progress: Starts the stages `read` (bytes), `embed` (residues) and `write` (proteins).
        tell: Called with a line on the cluster of a scheduler, such as where its dashboard is.

    Returns:
        The report; None in all processes but the first of a run on several devices.

    Raises:
        UsageError: Options that contradict each other.
        ProtlmError: A model or an input that cannot be read, an output that is in the way, a protein that is too long
            for the model, an unfinished run with other inputs, options or model, or a scheduler or workers that cannot
            be used.
    """
    check_processes(request.devices)
    used_precision(request.precision, may_be_half=True)
    with connected(request.scheduler) as cluster:
        if cluster is not None:
            tell(cluster.description)
        return _embed(request, cluster, start_progress)


def _embed(request: EmbedRequest, cluster: "DaskCluster | None", start_progress: StartProgress) -> EmbedReport | None:
    model, description = read_named_model(request.model)
    settings = settings_of(request, description)
    set_precision(model, settings.precision)
    if process_rank(request.devices):
        _join(request, model, settings)
        return None
    # If OUT is a link, its target is made or replaced, not the link.
    out = Path(os.path.realpath(request.out))
    EmbedFolder(out).complete_killed_run(resume=request.resume)
    check_replaceable(EmbedFolder(out), settings.layout, out, force=request.force)
    inputs = ProteinInputs(request.inputs, request.split, request.on_bad_record, request.nucleotides, start_progress)
    folder = EmbedFolder.opened(
        out, settings.weights_hash, settings.options, resume=request.resume, force=request.force
    )
    with folder.locked(), folder.kept_or_removed():
        proteins = folder.keep_proteins(read_proteins(folder.new_proteins_path, inputs))
        check_lengths(proteins, settings.cut, description)
        settings.layout.check_ids(proteins.ids)
        plan = Plan.of(proteins, settings)
        if not folder.is_finished:
            folder.adopt_left_overs()
            folder.drop_unusable(settings.columns)
            if not can_go_on(folder, proteins, plan, settings):
                folder.forget_output()
            _compute(folder, plan, model, settings, request, cluster, start_progress)
            assemble(folder, proteins, plan, settings, start_progress)
            check_replaceable(folder, settings.layout, out, force=request.force)
            folder.publish(settings.layout)
        report = _report(request, settings, description, proteins, inputs, is_kept(folder, proteins))
        work_folder.remove_finished(folder.path)
    return report


def _join(request: EmbedRequest, model: Performer, settings: EmbedSettings) -> None:
    """Computes this process's share of a run that the first process prepares and finishes."""
    from protlm.workflows.portion_devices import join

    join(model, EmbedWork(EmbedFolder(request.out), model, settings), request.devices)


def _compute(
    folder: EmbedFolder,
    plan: Plan,
    model: Performer,
    settings: EmbedSettings,
    request: EmbedRequest,
    cluster: "DaskCluster | None",
    start_progress: StartProgress,
) -> None:
    """Computes the unfinished portions."""
    if cluster is not None:
        from protlm.workflows.embed.cluster import compute_on_cluster

        waiting = folder.unfinished_portions(plan.num_portions)
        compute_on_cluster(folder, plan, waiting, request, settings, cluster, start_progress)
    elif request.devices.total > 1:
        # Imported here because importing Lightning takes seconds, and a single device does not need it.
        from protlm.workflows.portion_devices import compute_on_devices

        compute_on_devices(model, EmbedWork(folder, model, settings), request.devices, start_progress)
    else:
        compute_here(EmbedWork(folder, model.to(best_device()), settings), start_progress)


def _report(
    request: EmbedRequest,
    settings: EmbedSettings,
    description: ModelDescription,
    proteins: ProteinStore,
    inputs: ProteinInputs,
    kept: np.ndarray,
) -> EmbedReport:
    lengths, cut = proteins.lengths[kept], settings.cut
    vocabulary, trained = description.model.tokens(), description.trained_residues
    # What the model sees at once of each protein.
    seen = cut.kept(lengths) if cut.window is None else np.minimum(lengths, cut.window)
    skipped = np.flatnonzero(~kept).tolist()
    return EmbedReport(
        out=request.out,
        layout=settings.layout.name,
        files=settings.layout.paths(Path(os.path.realpath(request.out)))[1:],
        num_records=len(lengths),
        num_residues=int(cut.kept(lengths).sum()),
        num_equal=int((proteins.first != np.arange(proteins.num_records))[kept].sum()),
        num_renamed=proteins.num_renamed,
        num_windowed=0 if cut.window is None else int((lengths > cut.window).sum()),
        num_truncated=0 if cut.truncate is None else int((lengths > cut.truncate).sum()),
        include=settings.kinds,
        layers=settings.layers,
        dim=settings.model_dim,
        dtype=settings.dtype,
        precision=settings.precision,
        num_beyond_training=0 if trained is None else int((seen > trained).sum()),
        trained_residues=trained,
        num_lacked=_num_lacked(vocabulary, proteins, cut, kept),
        lacked=vocabulary.lacked,
        stand_in=vocabulary.stand_in,
        skipped=tuple(
            Skipped(id=proteins.id(record), num_residues=int(proteins.lengths[record])) for record in skipped
        ),
        num_nucleotides=inputs.num_nucleotides,
        rejects=dict(inputs.rejects),
        repairs=dict(inputs.repairs),
        left_out=inputs.left_out,
    )


def _num_lacked(vocabulary: ModelVocabulary, proteins: ProteinStore, cut: Cut, kept: np.ndarray) -> int:
    """Returns the number of embedded residues that a model reads as another token, having none for them."""
    if not vocabulary.lacked:
        return 0
    is_lacked = np.array([letter in vocabulary.lacked for letter in RESIDUES])
    counts = sum(
        (count_residues(proteins.tokens(record)[: cut.truncate]) for record in np.flatnonzero(kept).tolist()),
        start=np.zeros(len(RESIDUES), dtype=np.int64),
    )
    return int(counts[is_lacked].sum())
