"""Finished portions become the output, in the order of the input.

Where the layout allows it, a portion is removed as soon as no later record needs it, so that the disk does not hold
everything twice, and an assembly that was killed is resumed where it stopped.
"""

from collections import OrderedDict

import numpy as np

from protlm.data.embeddings.layouts import Column, Contents
from protlm.data.embeddings.reader import EmbeddingsFile, open_embeddings
from protlm.data.storage.protein_store import ProteinStore
from protlm.errors import ProtlmError, ShardError
from protlm.runtime.progress import StartProgress
from protlm.workflows.embed.folder import EmbedFolder
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.portions import contents_of
from protlm.workflows.embed.settings import EmbedSettings

_OPEN_PORTIONS = 8


def is_kept(folder: EmbedFolder, proteins: ProteinStore) -> np.ndarray:
    """Returns a bool for each record: it is in the output unless its sequence did not fit into memory."""
    kept: np.ndarray = ~np.isin(proteins.first, folder.skipped())
    return kept


def can_go_on(folder: EmbedFolder, proteins: ProteinStore, plan: Plan, settings: EmbedSettings) -> bool:
    """Returns whether there is an unfinished output, and it is as the run before left it."""
    if not 0 < folder.num_assembled <= plan.num_portions or not settings.layout.can_resume:
        return False
    try:
        settings.layout.open(folder.output_path, _contents(folder, proteins, settings), resume=True).discard()
    except ShardError:
        return False
    return True


def assemble(
    folder: EmbedFolder,
    proteins: ProteinStore,
    plan: Plan,
    settings: EmbedSettings,
    start_progress: StartProgress,
) -> None:
    """Writes the output into the folder.

    Args:
        folder: The folder; all portions in it are finished.
        proteins: All proteins.
        plan: The records of each portion.
        settings: The settings of the run.
        start_progress: Starts the stage `write` (proteins).

    Raises:
        ProtlmError: No protein fitted into memory.
    """
    kept = is_kept(folder, proteins)
    if not kept.any():
        raise ProtlmError(
            "no protein fits into memory; lower --tokens-per-batch, or take --window, --truncate, fewer --layers, or a "
            "machine with more memory, where --resume goes on"
        )
    advance = start_progress("write", proteins.num_records)
    contents = _contents(folder, proteins, settings)
    done = folder.num_assembled if settings.layout.can_resume else 0
    portions, last_use = _Portions(folder, plan, settings), plan.last_use()
    index = int(np.count_nonzero(kept[: plan.bounds[done]]))
    writer = settings.layout.open(folder.output_path, contents, resume=done > 0)
    try:
        for portion in range(done, plan.num_portions):
            for record in plan.records(portion):
                if kept[record]:
                    first = int(proteins.first[record])
                    writer.write(index, portions.embeddings(first, proteins.id(first)))
                    index += 1
            if settings.layout.can_resume:
                writer.flush()
                folder.note_assembled(portion + 1)
                for unused in np.flatnonzero(last_use == portion).tolist():
                    portions.close(unused)
                    folder.remove_portion(unused)
            advance(len(plan.records(portion)))
        writer.close()
    except BaseException:
        writer.discard()
        raise


def _contents(folder: EmbedFolder, proteins: ProteinStore, settings: EmbedSettings) -> Contents:
    kept = is_kept(folder, proteins)
    return contents_of(proteins, settings, None if kept.all() else np.flatnonzero(kept))


class _Portions:
    """The embeddings in the finished portions, of which a few are open at a time."""

    def __init__(self, folder: EmbedFolder, plan: Plan, settings: EmbedSettings) -> None:
        self._folder, self._plan, self._columns = folder, plan, settings.columns
        self._open: OrderedDict[int, dict[Column, EmbeddingsFile]] = OrderedDict()

    def embeddings(self, record: int, record_id: str) -> dict[Column, np.ndarray]:
        """Returns the embeddings of a record that was computed."""
        portion = self._plan.portion_of(record)
        if portion not in self._open:
            path = self._folder.portion_path(portion)
            self._open[portion] = {(kind, layer): open_embeddings(path, kind, layer) for kind, layer in self._columns}
            if len(self._open) > _OPEN_PORTIONS:
                self._open.popitem(last=False)
        self._open.move_to_end(portion)
        return {column: file[record_id] for column, file in self._open[portion].items()}

    def close(self, portion: int) -> None:
        """Closes the file of a portion."""
        self._open.pop(portion, None)
