"""The folder `OUT.partial` of score: the files beside its portions, and the publishing of tables and reports."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from protlm import files
from protlm.data.storage.protein_store import ProteinStore
from protlm.runtime import work_folder
from protlm.runtime.portion_folder import PortionFolder
from protlm.runtime.work_folder import read_json, write_json
from protlm.workflows.score.sites import BOUNDS_NAME, POSITIONS_NAME, Sites, read_sites

VARIANTS_NAME = "variants.jsonl"
_ASSAYS, _PICTURE = "assays.json", "picture.json"
_HASHED_BYTES = 1 << 20


class ScoreFolder(PortionFolder):
    """The folder `OUT.partial`, beside the place of the output; a portion is an array of log-probabilities."""

    command = "score"
    format = "protlm-score"
    format_version = 1
    portions_name = "portions"
    portion_suffix = ".npy"

    @property
    def store_path(self) -> Path:
        """The proteins that are computed; beside them lies what else was read."""
        return self.proteins_path / "store"

    @property
    def variants_path(self) -> Path:
        """The rows to score, one after the other, as `inputs.ScoreInputs` writes them."""
        return self.proteins_path / VARIANTS_NAME

    def keep_inputs(self, new: ProteinStore, others: str) -> None:
        """Moves what was just read, in the folder of new proteins, to its place.

        Args:
            new: The proteins there.
            others: A hash of inputs that are kept nowhere.

        Raises:
            ProtlmError: It is not that of the unfinished run that is resumed.
        """
        content_hash = xxhash.xxh3_128(f"{new.hash} {others}".encode())
        for name in (VARIANTS_NAME, POSITIONS_NAME, BOUNDS_NAME, _ASSAYS):
            path = self.new_proteins_path / name
            if not path.exists():
                continue
            with path.open("rb") as file:
                while block := file.read(_HASHED_BYTES):
                    content_hash.update(block)
        self.note_inputs(content_hash.hexdigest(), new.num_records)
        shutil.rmtree(self.proteins_path, ignore_errors=True)
        self.new_proteins_path.rename(self.proteins_path)

    def sites(self) -> Sites:
        """Returns the positions that are computed of all proteins."""
        return read_sites(self.proteins_path)

    def assays(self) -> Any:
        """Returns the descriptions of the assays, as they were written."""
        return read_json(self.proteins_path / _ASSAYS)

    def drop_unusable(self, sizes: list[int], num_columns: int) -> None:
        """Removes portions that are damaged.

        Args:
            sizes: The number of sites in each portion.
            num_columns: Numbers of each site.
        """
        for path in list(self._portions()):
            number = int(path.stem)
            try:
                shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            except (OSError, ValueError, EOFError):
                shape = None  # cut short by a crash of the machine
            if number >= len(sizes) or shape != (sizes[number], num_columns):
                path.unlink()

    def picture_path(self, heat_map: Path) -> Path:
        """Returns the place of the picture until the output is complete.

        Args:
            heat_map: Its final place.
        """
        return self.path / f"picture{heat_map.suffix.lower()}"

    @contextlib.contextmanager
    def picture_written(self, path: Path) -> Iterator[Path]:
        """Yields a temporary name beside the place of a picture, which is put there on success.

        It is noted before, so that a run that is killed and resumed knows its own picture from any other.
        """
        with files.written_whole(path) as partial:
            yield partial
            write_json(self.path / _PICTURE, {"inode": partial.stat().st_ino})

    def has_written(self, path: Path) -> bool:
        """Returns whether a picture is that of the unfinished run."""
        note = read_json(self.path / _PICTURE)
        return isinstance(note, dict) and path.is_file() and path.lstat().st_ino == note.get("inode")

    def publish(self, report: dict[str, Any]) -> None:
        """Moves the complete output into its place; the report is kept for a run that is killed meanwhile."""
        self.put_in_place([(self.output_path, self._out)], {"report": report})

    def report(self) -> dict[str, Any]:
        """Returns the report of the complete output."""
        note = work_folder.finished_note(self.path)
        assert note is not None, "the output is complete"
        report: dict[str, Any] = note["report"]
        return report


def write_read_inputs(path: Path, sites: Sites, assays: list[dict[str, Any]]) -> None:
    """Writes what was read beside the proteins and variants into the folder of new proteins."""
    sites.write(path)
    write_json(path / _ASSAYS, {"assays": assays})
