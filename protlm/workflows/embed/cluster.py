"""Portions on the workers of a Dask cluster: each process loads the model once, and computes one portion at a time."""

import dataclasses
import os
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from protlm.errors import ProtlmError
from protlm.inference.precision import set_precision
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.dask_workers import DaskCluster
from protlm.runtime.devices import best_device
from protlm.runtime.progress import StartProgress, no_progress
from protlm.runtime.workers import check_wanted, open_workers, threads_of_task
from protlm.workflows.embed.folder import EmbedFolder
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.portions import EmbedWork
from protlm.workflows.embed.settings import EmbedRequest, EmbedSettings, settings_of

_one_at_a_time = threading.Lock()
_loaded: "tuple[str, EmbedWork] | None" = None
"""The work of the run that this process computed for last, and the id of that run."""


@dataclass(frozen=True)
class _Run:
    """What all portions of a run share.

    Attributes:
        id: An id of its own.
        request: Its options, with paths as the workers see them and nothing left to a default.
        weights_hash: Hash of the weights that the first process read.
    """

    id: str
    request: EmbedRequest
    weights_hash: str


@dataclass(frozen=True)
class _Portion:
    """A portion, and the numbers of its first and last record."""

    number: int
    first: int
    last: int

    @property
    def title(self) -> str:
        """The places of its proteins among those of the input."""
        return f"proteins {self.first:,} to {self.last:,} of the input"


def compute_on_cluster(
    folder: EmbedFolder,
    plan: Plan,
    portions: Sequence[int],
    request: EmbedRequest,
    settings: EmbedSettings,
    cluster: DaskCluster,
    start_progress: StartProgress,
) -> None:
    """Computes portions on the workers of a cluster.

    Args:
        folder: The folder of the run, with its proteins.
        plan: The plan of the run.
        portions: The portions to compute.
        request: The options.
        settings: The settings that follow from them here; the workers use the same.
        cluster: The connection to the cluster.
        start_progress: Starts the stage `embed` (residues).

    Raises:
        ProtlmError: A worker that does not see the model or the folder, or sees another; or a portion that failed.
    """
    model = Path(os.path.abspath(request.model)) if request.model.exists() else request.model
    of_workers = dataclasses.replace(
        request, model=model, inputs=(), out=Path(os.path.realpath(request.out)), scheduler=None,
        precision=settings.precision, tokens_per_batch=settings.tokens_per_batch,
    )  # fmt: skip
    run = _Run(uuid.uuid4().hex, of_workers, settings.weights_hash)
    advance = start_progress("embed", sum(map(plan.num_residues, portions)))
    of_run = folder.of_workers(run.id)
    tasks = (_Portion(portion, plan.records(portion).start + 1, plan.records(portion).stop) for portion in portions)
    seen = [str(model)] if model.exists() else []
    with open_workers(1, cluster, run, folder.path, seen, one_per_process=True) as workers:
        for number in workers.in_order(_compute, tasks, ahead=len(portions), meanwhile=lambda: advance(0)):
            folder.adopt(of_run, number)
            advance(plan.num_residues(number))


def _compute(run: _Run, portion: _Portion) -> int:
    """Computes and writes a portion, and returns its number."""
    # A process has one network; its threads are those of one task.
    with _one_at_a_time:
        check_wanted()
        if (threads := threads_of_task.get()) is not None:
            torch.set_num_threads(threads)
        work = _work_of(run)
        try:
            for row in work.start([portion.number], no_progress):
                work.add(row, work.compute(row))
        finally:
            work.close()
    return portion.number


def _work_of(run: _Run) -> EmbedWork:
    """Returns the work of a run, with its model and its proteins, which are loaded once."""
    global _loaded
    if _loaded is None or _loaded[0] != run.id:
        # The memory of an earlier one is free before this one is loaded.
        _loaded = None
        model, description = read_named_model(run.request.model)
        settings = settings_of(run.request, description)
        if settings.weights_hash != run.weights_hash:
            raise ProtlmError(f"{run.request.model}: a worker sees another model under this name; use one all can see")
        set_precision(model, settings.precision)
        folder = EmbedFolder(run.request.out).of_workers(run.id)
        work = EmbedWork(folder, model.to(best_device()), settings)
        work.waiting()
        _loaded = run.id, work
    return _loaded[1]
