"""From finished parts to the output: hides which part holds what, and what is removed on the way.

The output is written in the order of the input. Where its layout allows, a part is removed once nothing more of it is
needed, so that the disk does not hold everything twice; a killed assembly goes on where it was.
"""

from collections import OrderedDict

import numpy as np

from protlm.data.embeddings.layouts import Column, Contents
from protlm.data.embeddings.reader import EmbeddingsFile, open_embeddings
from protlm.data.storage.protein_store import ProteinStore
from protlm.errors import ProtlmError, ShardError
from protlm.runtime.progress import StartProgress
from protlm.workflows.embed.folder import EmbedFolder
from protlm.workflows.embed.portions import contents_of
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.settings import EmbedSettings

_OPEN_PARTS = 8


def is_kept(folder: EmbedFolder, proteins: ProteinStore) -> np.ndarray:
    """Returns whether each record is in the output, bool (records,): all but those that did not fit into memory."""
    kept: np.ndarray = ~np.isin(proteins.first, folder.skipped())
    return kept


def can_go_on(folder: EmbedFolder, proteins: ProteinStore, plan: Plan, settings: EmbedSettings) -> bool:
    """Says whether an output that was begun is as it was left; without one there is nothing to go on with."""
    if not 0 < folder.num_assembled <= plan.num_parts or not settings.layout.can_resume:
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
        folder: With all parts finished.
        proteins: All proteins.
        plan: What is in which part.
        settings: What is stored, and how.
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
    parts, last_use = _Parts(folder, plan, settings), plan.last_use()
    index = int(np.count_nonzero(kept[: plan.bounds[done]]))
    writer = settings.layout.open(folder.output_path, contents, resume=done > 0)
    try:
        for part in range(done, plan.num_parts):
            for record in plan.records(part):
                if kept[record]:
                    first = int(proteins.first[record])
                    writer.write(index, parts.embeddings(first, proteins.id(first)))
                    index += 1
            if settings.layout.can_resume:
                writer.flush()
                folder.note_assembled(part + 1)
                for unused in np.flatnonzero(last_use == part).tolist():
                    parts.close(unused)
                    folder.remove_part(unused)
            advance(len(plan.records(part)))
        writer.close()
    except BaseException:
        writer.discard()
        raise


def _contents(folder: EmbedFolder, proteins: ProteinStore, settings: EmbedSettings) -> Contents:
    kept = is_kept(folder, proteins)
    return contents_of(proteins, settings, None if kept.all() else np.flatnonzero(kept))


class _Parts:
    """The embeddings in finished parts; a few of them are open at a time."""

    def __init__(self, folder: EmbedFolder, plan: Plan, settings: EmbedSettings) -> None:
        self._folder, self._plan, self._columns = folder, plan, settings.columns
        self._open: OrderedDict[int, dict[Column, EmbeddingsFile]] = OrderedDict()

    def embeddings(self, record: int, record_id: str) -> dict[Column, np.ndarray]:
        """Returns what is stored of a record that was computed."""
        part = self._plan.part_of(record)
        if part not in self._open:
            path = self._folder.part_path(part)
            self._open[part] = {(kind, layer): open_embeddings(path, kind, layer) for kind, layer in self._columns}
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(part)
        return {column: file[record_id] for column, file in self._open[part].items()}

    def close(self, part: int) -> None:
        """Lets go of a part."""
        self._open.pop(part, None)
