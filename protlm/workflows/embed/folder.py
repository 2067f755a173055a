"""The folder `OUT.partial` in which embed keeps finished work until the output is complete, and when it is reused."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from protlm import files
from protlm.data.embeddings.layouts import Column, Layout
from protlm.data.embeddings.reader import open_embeddings
from protlm.data.storage.protein_store import ProteinStore, open_proteins
from protlm.errors import ProtlmError, ShardError
from protlm.runtime import locks, work_folder
from protlm.runtime.work_folder import partial_folder, read_json, write_json

FORMAT = "protlm-embed"
FORMAT_VERSION = 1

_ASSEMBLED = "assembled.json"
_SKIPPED_SUFFIX = ".skipped.json"
# Portions were called parts when the format of this folder was made; on disk they keep that name, so that --resume
# works across versions.
_PORTIONS, _NUM_PORTIONS = "parts", "num_parts"


class EmbedFolder:
    """The folder `OUT.partial`, beside the place of the output.

    Attributes:
        path: The folder.
    """

    def __init__(self, out: Path) -> None:
        self.path = partial_folder(out)
        self._out = Path(os.path.realpath(out))

    @property
    def proteins_path(self) -> Path:
        """The proteins that are embedded."""
        return self.path / "proteins"

    @property
    def output_path(self) -> Path:
        """The place of the output until it is complete; it has its final name there."""
        return self.path / "output" / self._out.name

    def portion_path(self, portion: int) -> Path:
        """Returns the file of a portion: embeddings in the layout `protlm`."""
        return self._portions_path / f"{portion:06d}.h5"

    def unfinished_portions(self, num_portions: int) -> list[int]:
        """Returns the portions that are not computed yet."""
        names = {path.name for path in self._portions_path.iterdir()}
        portions = range(self.num_assembled, num_portions)
        return [portion for portion in portions if self.portion_path(portion).name not in names]

    @property
    def num_assembled(self) -> int:
        """Number of portions that are in the output already."""
        note = read_json(self.path / _ASSEMBLED)
        number = note.get(_NUM_PORTIONS) if isinstance(note, dict) else None
        return number if isinstance(number, int) and number > 0 else 0

    def note_assembled(self, num_portions: int) -> None:
        """Notes that so many portions, from the first on, are in the output."""
        write_json(self.path / _ASSEMBLED, {_NUM_PORTIONS: num_portions})

    def remove_portion(self, portion: int) -> None:
        """Removes a portion that is no longer needed."""
        self.portion_path(portion).unlink(missing_ok=True)

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
        note = self.path / "proteins.json"
        before = read_json(note)
        if before is None and not any(self._portions()):
            write_json(note, {"hash": new.hash, "num_records": new.num_records})
        elif not isinstance(before, dict) or before.get("hash") != new.hash:
            shutil.rmtree(new.path)
            then = before.get("num_records") if isinstance(before, dict) else None
            raise ProtlmError(
                f"{self.path}: made from other proteins than these ({then or 'an unknown number'} then, "
                f"{new.num_records} now); give the same inputs, or start afresh with --force"
            )
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
        for name in (work_folder.FINISHED_NAME, _ASSEMBLED):
            (self.path / name).unlink(missing_ok=True)

    def complete_killed_run(self, *, resume: bool) -> None:
        """Completes what a killed run had begun to do with its finished output; unless resumed, the folder then goes.

        Raises:
            ProtlmError: Another run is at work, or something else has come to the place of the output.
        """
        for made in (self.path, self._out):
            work_folder.remove_left_overs(made)
        if not self.is_finished:
            return
        work_folder.read_own(self.path, FORMAT, "embed")
        with locks.locked(self.path):
            work_folder.finish_moves(self.path)
            if not work_folder.is_in_place(self.path):
                # Moved away since: it is made again, from the portions that are left.
                self.forget_output()
            elif not resume:
                work_folder.remove_finished(self.path)

    def put_in_place(self, layout: Layout) -> None:
        """Moves the complete output and its companion files into place, where they replace earlier ones."""
        made, wanted = layout.paths(self.output_path), layout.paths(self._out)
        # The companions first: once OUT is there, all is.
        moves = list(zip(made, wanted, strict=True))[::-1]
        work_folder.put_in_place(self.path, moves, {"records": self.skipped()})

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete; it may be in its place already."""
        return work_folder.finished_note(self.path) is not None

    def remove(self) -> None:
        """Removes the folder and its content."""
        files.remove_at_once(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against other runs, and removes incomplete files of a run that was killed.

        Raises:
            ProtlmError: Another run holds the lock.
        """
        with locks.locked(self.path):
            for left_over in self.path.glob(f"*/.*{files.PARTIAL_SUFFIX}"):
                files.remove(left_over)
            shutil.rmtree(self.new_proteins_path, ignore_errors=True)
            yield

    @property
    def new_proteins_path(self) -> Path:
        """The place of proteins that are being read."""
        return self.path / "proteins.new"

    @contextlib.contextmanager
    def kept_or_removed(self) -> Iterator[None]:
        """On an error, keeps the folder if it has finished portions, or else removes it; the message says which."""
        try:
            yield
        except BaseException as error:
            if any(self._portions()) or self.num_assembled:
                hint = f"what is finished is kept in {self.path}: go on with the same command and --resume"
            else:
                self.remove()
                hint = "nothing was made"
            if isinstance(error, MemoryError):
                raise ProtlmError(f"not enough memory; lower --tokens-per-batch; {hint}") from error
            if isinstance(error, OSError):
                reason = (error.strerror or str(error)).split("\n")[0]
                raise ProtlmError(f"{error.filename or self.path}: {reason}; {hint}") from error
            raise

    def _skipped_path(self, portion: int) -> Path:
        return self._portions_path / f"{portion:06d}{_SKIPPED_SUFFIX}"

    @property
    def _portions_path(self) -> Path:
        return self.path / _PORTIONS

    def _portions(self) -> Iterator[Path]:
        return (path for path in self._portions_path.glob("*.h5") if path.stem.isdecimal())


def open_embed_folder(out: Path, model_hash: str, options: dict[str, Any], *, resume: bool, force: bool) -> EmbedFolder:
    """Returns the folder for an output: a new one, or that of an unfinished run.

    Args:
        out: The place of the output.
        model_hash: Hash of the weights.
        options: The options that shape the output.
        resume: Use an existing folder.
        force: Without `resume`, remove an existing folder.

    Raises:
        ProtlmError: As `check_start`.
    """
    folder = EmbedFolder(out)
    path = folder.path
    check_start(folder, model_hash, options, resume=resume, force=force)
    if path.exists() and not resume:
        with locks.locked(path):
            files.remove_at_once(path)
    if not path.exists():
        work_folder.make_folder(path, _about(model_hash, options), ())
    for name in (_PORTIONS, "output"):
        (path / name).mkdir(exist_ok=True)
    return folder


def check_start(folder: EmbedFolder, model_hash: str, options: dict[str, Any], *, resume: bool, force: bool) -> None:
    """Checks that a run may start, or may resume the unfinished run before it.

    Raises:
        ProtlmError: A folder exists and may not be used, or was made with another model or other options.
    """
    path = folder.path
    if not path.exists():
        return
    before = work_folder.read_own(path, FORMAT, "embed")
    if not resume and not force:
        raise ProtlmError(
            f"{path}: an unfinished run for this output; go on with --resume, or start afresh with --force"
        )
    if resume and before != (about := _about(model_hash, options)):
        raise ProtlmError(f"{path}: made with {_difference(before, about)}; start afresh with --force")


def _about(model_hash: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "model": model_hash, "options": options}


def _difference(before: Mapping[str, Any], now: dict[str, Any]) -> str:
    """Returns in words the first difference between an unfinished run and this one."""
    if before.get("format_version") != now["format_version"]:
        return "another version of protlm"
    if before.get("model") != now["model"]:
        return "another model"
    old, new = before.get("options"), now["options"]
    if not isinstance(old, dict):
        return "other options"
    name = next((name for name in new if old.get(name) != new[name]), None)
    if name is None:
        return "other options"
    return f"--{name} {_shown(old.get(name))}, not {_shown(new[name])}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "(left out)" if value is None else str(value)


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
