"""The folder `OUT.partial` of embed: the files beside its portions, and the publishing of the embeddings."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from protlm.data.embeddings.layouts import Column, Layout
from protlm.data.embeddings.reader import open_embeddings
from protlm.data.storage.protein_store import ProteinStore, open_proteins
from protlm.errors import ProtlmError, ShardError
from protlm.runtime import work_folder
from protlm.runtime.portion_folder import PortionFolder
from protlm.runtime.work_folder import read_json, write_json

_ASSEMBLED = "assembled.json"
_SKIPPED_SUFFIX = ".skipped.json"
_NUM_PORTIONS = "num_parts"


class EmbedFolder(PortionFolder):
    """The folder `OUT.partial`, beside the place of the output; a portion is a file in the layout `protlm`."""

    command = "embed"
    format = "protlm-embed"
    format_version = 1
    # Portions were called parts when the format of this folder was made; on disk they keep that name, so that --resume
    # works across versions.
    portions_name = "parts"
    portion_suffix = ".h5"

    def of_workers(self, run_id: str) -> "EmbedFolder":
        """Returns this folder for the workers of a run: their portions lie apart until `adopt` takes them over.

        So a worker that goes on after the end of its run has no place in that of another one.
        """
        folder = EmbedFolder(self._out)
        folder.portions_name = f"{self.portions_name}-{run_id}"  # type: ignore[misc]
        folder._portions_path.mkdir(exist_ok=True)
        return folder

    def adopt(self, folder: "EmbedFolder", portion: int) -> None:
        """Takes over a portion that a worker has finished in its folder."""
        # Should this process be killed in between, the portion is not there yet, and will be computed again.
        note, made = self._skipped_path(portion), self.portion_path(portion)
        # Most portions skip nothing.
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder._portions_path / note.name, note)
        os.replace(folder._portions_path / made.name, made)

    def adopt_left_overs(self) -> None:
        """Takes over what workers of a lost run have finished; that run had the inputs and options of this one."""
        for left_over in sorted(self.path.glob(f"{self.portions_name}-*")):
            folder = self.of_workers(left_over.name.removeprefix(f"{self.portions_name}-"))
            for portion in [int(path.stem) for path in folder._portions()]:
                self.adopt(folder, portion)
            shutil.rmtree(left_over)

    def unfinished_portions(self, num_portions: int) -> list[int]:
        """Returns the portions that are neither computed nor in the output yet."""
        assembled = self.num_assembled
        return [portion for portion in super().unfinished_portions(num_portions) if portion >= assembled]

    @property
    def num_assembled(self) -> int:
        """Number of portions that are in the output already."""
        note = read_json(self.path / _ASSEMBLED)
        number = note.get(_NUM_PORTIONS) if isinstance(note, dict) else None
        return number if isinstance(number, int) and number > 0 else 0

    def note_assembled(self, num_portions: int) -> None:
        """Notes that so many portions, from the first on, are in the output."""
        write_json(self.path / _ASSEMBLED, {_NUM_PORTIONS: num_portions})

    def note_skipped(self, portion: int, records: list[int]) -> None:
        """Notes the records of a portion that did not fit into memory; call it before the portion is written."""
        if records:
            write_json(self._skipped_path(portion), {"records": records})
        else:
            # An earlier process, killed before it wrote the portion, may have had less memory.
            self._skipped_path(portion).unlink(missing_ok=True)

    def skipped(self) -> list[int]:
        """Returns the records of all portions that did not fit into memory, in ascending order."""
        finished = work_folder.finished_note(self.path)
        # Once the output is complete, the portions may be gone.
        notes = [finished] if finished else map(read_json, sorted(self._portions_path.glob(f"*{_SKIPPED_SUFFIX}")))
        return [record for note in notes if isinstance(note, dict) for record in note.get("records", ())]

    def keep_proteins(self, new: ProteinStore) -> ProteinStore:
        """Moves the proteins that were just read to their place, and returns them.

        Raises:
            ProtlmError: They are not those of the unfinished run that is resumed.
        """
        self.note_inputs(new.hash, new.num_records)
        shutil.rmtree(self.proteins_path, ignore_errors=True)
        new.path.rename(self.proteins_path)
        return open_proteins(self.proteins_path)

    def drop_unusable(self, columns: Sequence[Column]) -> None:
        """Removes portions that are damaged, or lack a protein for which there may be enough memory now."""
        for path in self._portions():
            number = int(path.stem)
            try:
                for kind, layer in columns:
                    open_embeddings(path, kind, layer)
            except ShardError:
                path.unlink()
                if number < self.num_assembled:
                    # Portions before it may have been removed, so the output has to be assembled anew.
                    self.forget_output()
            if not self.num_assembled and self._skipped_path(number).exists():
                path.unlink(missing_ok=True)
                self._skipped_path(number).unlink()

    def forget_output(self) -> None:
        """Discards the output assembled so far, so that it is assembled anew."""
        super().forget_output()
        (self.path / _ASSEMBLED).unlink(missing_ok=True)

    def publish(self, layout: Layout) -> None:
        """Moves the complete output and its companion files into place, where they replace earlier ones."""
        made, wanted = layout.paths(self.output_path), layout.paths(self._out)
        # The companions first: once OUT is there, all is.
        moves = list(zip(made, wanted, strict=True))[::-1]
        self.put_in_place(moves, {"records": self.skipped()})

    def _has_finished_work(self) -> bool:
        of_workers = self.path.glob(f"{self.portions_name}-*/*{self.portion_suffix}")
        return super()._has_finished_work() or self.num_assembled > 0 or any(of_workers)

    def _skipped_path(self, portion: int) -> Path:
        return self._portions_path / f"{portion:06d}{_SKIPPED_SUFFIX}"


def check_replaceable(folder: EmbedFolder, layout: Layout, out: Path, *, force: bool) -> None:
    """Checks that no file is in the way of the output, except one of the same layout that may be replaced.

    Raises:
        ProtlmError: A file is in the way.
    """
    existing = [] if folder.is_finished else [path for path in layout.paths(out) if os.path.lexists(path)]
    if not existing:
        return
    first = existing[0]
    if out not in existing and not os.path.lexists(out):
        raise ProtlmError(f"{first}: exists already, and belongs to something else; choose another folder for --out")
    if not force:
        raise ProtlmError(f"{first}: exists already; choose another --out, or replace it with --force")
    if not os.path.lexists(out) or not layout.is_own(out):
        raise ProtlmError(
            f"{first}: holds no embeddings of layout {layout.name}, so --force does not replace it; "
            "choose another --out"
        )
