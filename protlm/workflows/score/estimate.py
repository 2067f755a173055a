"""The dry run of score: passes are counted from the inputs, and the time is extrapolated from a sample of them."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from protlm.data.storage.protein_store import ProteinStore
from protlm.errors import ProtlmError
from protlm.files import free_bytes
from protlm.inference.marginals import passes_of
from protlm.inference.memory import computed_by_halves
from protlm.inference.pace import pace_of
from protlm.inference.precision import set_precision, used_precision
from protlm.inference.row_embeddings import default_tokens_per_batch
from protlm.model.performer import Performer
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.devices import best_device
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.score.folder import VARIANTS_NAME, ScoreFolder
from protlm.workflows.score.inputs import ScoreInputs
from protlm.workflows.score.plan import Plan
from protlm.workflows.score.portions import pass_log_probabilities
from protlm.workflows.score.request import ScoreRequest, check_model, check_picture, check_replaceable
from protlm.workflows.score.score import check_lengths
from protlm.workflows.score.sites import read_sites

_SCORE_BYTES = 30
"""Bytes that a row of the output has beyond that of the input, about."""


@dataclass(frozen=True, kw_only=True)
class ScoreCounts:
    """The size of a run.

    Attributes:
        num_proteins: Proteins whose mutants are scored.
        num_variants: Rows to score.
        num_sites: Positions whose probabilities are computed.
        num_passes: Forward passes of a protein or window.
        num_computed_residues: Residues that all passes see.
        longest: Residues of the longest pass.
    """

    num_proteins: int
    num_variants: int
    num_sites: int
    num_passes: int
    num_computed_residues: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class ScoreEstimate(ScoreCounts):
    """The time and disk that a run is expected to take, beside its size.

    Attributes:
        out_bytes: Size of the output, about.
        peak_bytes: Disk space needed during the run, the output included.
        free_bytes: Free disk space at the place of the output.
        seconds: Time on this machine, from a sample; assumes that devices share the work evenly.
        passes_per_second: Passes divided by that time.
        rejects: Number of records and rows that cannot be scored, by reason.
        left_out: Files of an input folder that are no assays.
        num_not_standard: Positions that a scan leaves out: their residue is none of the 20 standard ones.
    """

    out_bytes: int
    peak_bytes: int
    free_bytes: int
    seconds: float
    passes_per_second: float
    rejects: Mapping[str, int]
    left_out: Sequence[str]
    num_not_standard: int


def estimate(
    request: ScoreRequest,
    *,
    start_progress: StartProgress = no_progress,
    tell: Callable[[ScoreCounts], None] = lambda counts: None,
) -> ScoreEstimate:
    """Reads the inputs, times a sample of the passes and returns what scoring all mutants would take.

    Args:
        request: The options of the run.
        start_progress: Starts the stage `read` (bytes).
        tell: Called with the counts as soon as they are known.

    Raises:
        ProtlmError: As `score` raises before it computes anything.
    """
    folder = ScoreFolder(request.out)
    # A killed run with a finished output is brought to its end first.
    if not (request.resume and folder.is_finished):
        check_replaceable(request)
        check_picture(request, folder)
    precision = used_precision(request.precision, may_be_half=False)
    model, description = read_named_model(request.model)
    set_precision(model, precision)
    check_model(request, description)
    tokens_per_batch = request.tokens_per_batch or default_tokens_per_batch()
    folder.check_start(
        description.weights_hash,
        request.options(tokens_per_batch, precision),
        resume=request.resume,
        force=request.force,
    )
    inputs = ScoreInputs(request, description, start_progress)
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary) / "new"
        proteins = inputs.read(new)
        read_bytes = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        sites = read_sites(new)
        plan = Plan(proteins, sites, request.strategy, request.cut, tokens_per_batch)
        check_lengths(proteins, plan, request, description)
        sizes, counts = plan.pass_sizes()
        size = ScoreCounts(
            num_proteins=inputs.num_proteins,
            num_variants=inputs.num_variants,
            num_sites=len(sites),
            num_passes=int(counts.sum()),
            num_computed_residues=int((sizes * counts).sum()),
            longest=int(sizes.max(initial=0)),
        )
        tell(size)
        seconds = _seconds(model.to(best_device()), proteins, plan, request, tokens_per_batch)
        out_bytes = (new / VARIANTS_NAME).stat().st_size + _SCORE_BYTES * inputs.num_variants
    # The probabilities lie there twice: in portions, and joined.
    sites_bytes = 2 * len(sites) * plan.num_columns * np.dtype(np.float32).itemsize
    return ScoreEstimate(
        **asdict(size),
        out_bytes=out_bytes,
        peak_bytes=out_bytes + read_bytes + sites_bytes,
        free_bytes=free_bytes(Path(os.path.realpath(request.out))),
        seconds=seconds,
        passes_per_second=size.num_passes / seconds if seconds else 0.0,
        rejects=dict(inputs.rejects),
        left_out=inputs.left_out,
        num_not_standard=inputs.num_not_standard,
    )


def _seconds(
    model: Performer, proteins: ProteinStore, plan: Plan, request: ScoreRequest, tokens_per_batch: int
) -> float:
    sizes, counts = plan.pass_sizes()
    if not len(sizes):
        return 0.0
    letters = np.concatenate([proteins.tokens(record) for record in range(min(64, proteins.num_records))])

    def compute(row: Sequence[np.ndarray]) -> bool:
        passes = [
            next(passes_of(number, tokens, np.array([0]), "masked", request.cut)) for number, tokens in enumerate(row)
        ]
        results = computed_by_halves(lambda some: pass_log_probabilities(model, some, is_of_all_tokens=True), passes)
        return all(result is not None for result in results)

    try:
        pace = pace_of(compute, letters, sizes, tokens_per_batch, counts)
    except MemoryError as error:
        raise ProtlmError(f"{error}; take --window") from None  # one line says it all
    return pace.seconds(sizes, counts) / request.devices.total
