"""The folder `OUT.partial` of a command that computes in portions: hides how a run resumes, and when it may.

The command plans its work as portions, each a file here once it is finished. A note says for which model and options
the folder was made, another for which inputs. The processes of a run on several devices share the portions that are
left.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from protlm import files
from protlm.errors import ProtlmError
from protlm.runtime import locks, run_marks, work_folder
from protlm.runtime.work_folder import partial_folder, read_json, write_json
from protlm.runtime.workers import WorkersError

_INPUTS = "proteins"


class PortionFolder:
    """The folder `OUT.partial`, beside the place of the output; each command has a class of its own.

    Attributes:
        command: Name of the command.
        format: The format in the note, by which the command recognises its folder.
        format_version: Version of the content of the folder.
        portions_name: Name of the subfolder of the portions.
        portion_suffix: Suffix of a portion's file.
        path: The folder.
    """

    command: ClassVar[str]
    format: ClassVar[str]
    format_version: ClassVar[int]
    portions_name: ClassVar[str]
    portion_suffix: ClassVar[str]

    def __init__(self, out: Path) -> None:
        self.path = partial_folder(out)
        self._out = Path(os.path.realpath(out))

    @classmethod
    def opened(cls, out: Path, model_hash: str, options: dict[str, Any], *, resume: bool, force: bool) -> Self:
        """Returns the folder for an output: a new one, or that of an unfinished run.

        Args:
            out: The place of the output.
            model_hash: Hash of the weights.
            options: The options that shape the output, by their names.
            resume: Use an existing folder.
            force: Without `resume`, remove an existing folder.

        Raises:
            ProtlmError: As `check_start`.
        """
        folder = cls(out)
        folder.check_start(model_hash, options, resume=resume, force=force)
        if folder.path.exists() and not resume:
            with locks.locked(folder.path):
                files.remove_at_once(folder.path)
        if not folder.path.exists():
            work_folder.make_folder(folder.path, folder._about(model_hash, options), ())
        for name in (cls.portions_name, "output"):
            (folder.path / name).mkdir(exist_ok=True)
        return folder

    def check_start(self, model_hash: str, options: dict[str, Any], *, resume: bool, force: bool) -> None:
        """Checks that a run may start, or may resume the unfinished run before it.

        Raises:
            ProtlmError: A folder exists and may not be used, or was made with another model or other options.
        """
        if not self.path.exists():
            return
        before = work_folder.read_own(self.path, self.format, self.command)
        if not resume and not force:
            raise ProtlmError(
                f"{self.path}: an unfinished run for this output; go on with --resume, or start afresh with --force"
            )
        if resume and before != (about := self._about(model_hash, options)):
            raise ProtlmError(f"{self.path}: made with {_difference(before, about)}; start afresh with --force")

    def check_not_in_use(self, *, resume: bool, force: bool) -> None:
        """Checks, before model and options are known, that no unfinished run is in the way; a finished one is not.

        Raises:
            ProtlmError: An unfinished run, or a folder that the command did not make.
        """
        if not self.is_finished and not resume:
            self.check_start("", {}, resume=False, force=force)

    @property
    def proteins_path(self) -> Path:
        """The place of the proteins that are computed."""
        return self.path / _INPUTS

    @property
    def new_proteins_path(self) -> Path:
        """The place of proteins that are being read."""
        return self.path / f"{_INPUTS}.new"

    @property
    def output_path(self) -> Path:
        """The place of the output until it is complete; it has its final name there."""
        return self.path / "output" / self._out.name

    def portion_path(self, portion: int) -> Path:
        """Returns the file of a portion."""
        return self._portions_path / f"{portion:06d}{self.portion_suffix}"

    def unfinished_portions(self, num_portions: int) -> list[int]:
        """Returns the portions that are not computed yet."""
        names = {path.name for path in self._portions_path.iterdir()}
        return [portion for portion in range(num_portions) if self.portion_path(portion).name not in names]

    def remove_portion(self, portion: int) -> None:
        """Removes a portion that is no longer needed."""
        self.portion_path(portion).unlink(missing_ok=True)

    def note_inputs(self, content_hash: str, num_records: int) -> None:
        """Notes the inputs of a new run, or checks that they are those of the run that is resumed.

        Args:
            content_hash: Hash of all that was read.
            num_records: Number of records, for the message.

        Raises:
            ProtlmError: They are others.
        """
        note = self._inputs_note
        # A finished run that was killed while it removed this folder may have it in its last note only.
        before = read_json(note) or (work_folder.finished_note(self.path) or {}).get("inputs")
        if before is None and not any(self._portions()):
            write_json(note, {"hash": content_hash, "num_records": num_records})
        elif not isinstance(before, dict) or before.get("hash") != content_hash:
            shutil.rmtree(self.new_proteins_path)
            then = before.get("num_records") if isinstance(before, dict) else None
            raise ProtlmError(
                f"{self.path}: made from other inputs than these ({then or 'an unknown number'} then, "
                f"{num_records} now); give the same inputs, or start afresh with --force"
            )

    def put_in_place(self, moves: Sequence[tuple[Path, Path]], notes: Mapping[str, Any]) -> None:
        """Notes that the output is complete, and from which inputs, and moves it to its place.

        Args:
            moves: As for `work_folder.put_in_place`.
            notes: What else a run that is killed meanwhile has to know when it is resumed.

        Raises:
            ProtlmError, OSError: As `work_folder.finish_moves`.
        """
        work_folder.put_in_place(self.path, moves, {**notes, "inputs": read_json(self._inputs_note)})

    def forget_output(self) -> None:
        """Discards the note on a complete output, so that it is made anew from the portions."""
        (self.path / work_folder.FINISHED_NAME).unlink(missing_ok=True)

    def complete_killed_run(self, *, resume: bool) -> None:
        """Publishes the finished output of a killed run, as that had begun to; unless resumed, removes the folder then.

        Raises:
            ProtlmError: Another run is at work, or something else has come to the place of the output.
        """
        for made in (self.path, self._out):
            work_folder.remove_left_overs(made)
        if not self.is_finished:
            return
        work_folder.read_own(self.path, self.format, self.command)
        with locks.locked(self.path):
            work_folder.finish_moves(self.path)
            if not work_folder.is_in_place(self.path):
                # Moved away since: it is made again, from the portions that are left.
                self.forget_output()
            elif not resume:
                work_folder.remove_finished(self.path)

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
            run_marks.end_runs(self.path)
            for left_over in self.path.glob(f"*/.*{files.PARTIAL_SUFFIX}"):
                files.remove(left_over)
            shutil.rmtree(self.new_proteins_path, ignore_errors=True)
            yield

    @contextlib.contextmanager
    def kept_or_removed(self) -> Iterator[None]:
        """On an error, keeps the folder if it has finished portions, or else removes it; the message says which."""
        try:
            yield
        except BaseException as error:
            is_kept = self._has_finished_work() or self.is_finished
            if is_kept:
                hint = f"what is finished is kept in {self.path}: go on with the same command and --resume"
            else:
                self.remove()
                hint = "nothing was made"
            if isinstance(error, MemoryError):
                # Portions are of the rows that they were planned for.
                advice = "lower --tokens-per-batch" + (", which has to start afresh with --force" if is_kept else "")
                raise ProtlmError(f"not enough memory; {advice}; {hint}") from error
            if isinstance(error, OSError):
                reason = (error.strerror or str(error)).split("\n")[0]
                raise ProtlmError(f"{error.filename or self.path}: {reason}; {hint}") from error
            if isinstance(error, WorkersError):
                raise ProtlmError(f"{error}; {hint}") from error
            raise

    def _has_finished_work(self) -> bool:
        return any(self._portions())

    @property
    def _inputs_note(self) -> Path:
        return self.path / f"{_INPUTS}.json"

    @property
    def _portions_path(self) -> Path:
        return self.path / self.portions_name

    def _portions(self) -> Iterator[Path]:
        return (path for path in self._portions_path.glob(f"*{self.portion_suffix}") if path.stem.isdecimal())

    def _about(self, model_hash: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"format": self.format, "format_version": self.format_version, "model": model_hash, "options": options}


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
