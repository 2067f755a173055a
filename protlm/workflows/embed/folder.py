"""Where embed keeps what is finished until the output is whole: what lies there, and when it may be used again."""

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
from protlm.runtime import work_folder
from protlm.runtime.work_folder import partial_folder, read_json, write_json

FORMAT = "protlm-embed"
FORMAT_VERSION = 1

_ASSEMBLED, _FINISHED = "assembled.json", "finished.json"
_SKIPPED_SUFFIX = ".skipped.json"


class EmbedFolder:
    """The folder `OUT.partial` beside the output to be.

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
        """Where the output lies until it is whole, under its own name."""
        return self.path / "output" / self._out.name

    def part_path(self, part: int) -> Path:
        """Returns where a finished part lies: embeddings in protlm's own layout."""
        return self.path / "parts" / f"{part:06d}.h5"

    def unfinished_parts(self, num_parts: int) -> list[int]:
        """Returns the parts that were not computed yet."""
        there = {path.name for path in (self.path / "parts").iterdir()}
        return [part for part in range(self.num_assembled, num_parts) if self.part_path(part).name not in there]

    @property
    def num_assembled(self) -> int:
        """Parts that are in the output already."""
        found = read_json(self.path / _ASSEMBLED)
        number = found.get("num_parts") if isinstance(found, dict) else None
        return number if isinstance(number, int) and number > 0 else 0

    def note_assembled(self, num_parts: int) -> None:
        """Notes that the first parts are in the output."""
        write_json(self.path / _ASSEMBLED, {"num_parts": num_parts})

    def remove_part(self, part: int) -> None:
        """Removes a part that nothing needs any more."""
        self.part_path(part).unlink(missing_ok=True)

    def note_skipped(self, part: int, records: list[int]) -> None:
        """Notes which records of a part did not fit into memory, before the part is finished."""
        if records:
            write_json(self._skipped_path(part), {"records": records})
        else:
            # A process that was killed may have had less memory.
            self._skipped_path(part).unlink(missing_ok=True)

    def skipped(self) -> list[int]:
        """Returns the records that did not fit into memory, of all parts, rising."""
        found = map(read_json, sorted((self.path / "parts").glob(f"*{_SKIPPED_SUFFIX}")))
        return [record for noted in found if isinstance(noted, dict) for record in noted.get("records", ())]

    def keep_proteins(self, new: ProteinStore) -> ProteinStore:
        """Takes the proteins that were just read, if they are those that a run before this one read.

        Raises:
            ProtlmError: They are not the same.
        """
        note = self.path / "proteins.json"
        before = read_json(note)
        if before is None and not any(self._parts()):
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
        """Removes finished parts that are damaged, or that lack a protein for which there may be memory now."""
        for path in self._parts():
            number = int(path.stem)
            try:
                for kind, layer in columns:
                    open_embeddings(path, kind, layer)
            except ShardError:
                path.unlink()
                if number < self.num_assembled:
                    # Others of those before it are gone already.
                    self.forget_output()
            if not self.num_assembled and self._skipped_path(number).exists():
                path.unlink(missing_ok=True)
                self._skipped_path(number).unlink()

    def forget_output(self) -> None:
        """Drops what was put together so far, so that it is made again."""
        for name in (_FINISHED, _ASSEMBLED):
            (self.path / name).unlink(missing_ok=True)

    def targets(self, layout: Layout) -> list[Path]:
        """Returns the places of the output that a finished run has not put there yet; otherwise all of them."""
        made, wanted = layout.paths(self.output_path), layout.paths(self._out)
        waiting = [target for source, target in zip(made, wanted, strict=True) if os.path.lexists(source)]
        return waiting if self.is_finished else list(wanted)

    def has_lost_output(self) -> bool:
        """Says whether a finished output is neither here nor in its place."""
        return self.is_finished and not os.path.lexists(self.output_path) and not os.path.lexists(self._out)

    def put_in_place(self, layout: Layout) -> None:
        """Renames the finished output, and what belongs to it, to their places; what is there goes only then."""
        write_json(self.path / _FINISHED, {})
        made, wanted = layout.paths(self.output_path), layout.paths(self._out)
        # The companions first: once OUT is there, all is.
        for source, target in list(zip(made, wanted, strict=True))[::-1]:
            if source.exists():
                files.publish(source, target)

    @property
    def is_finished(self) -> bool:
        """Whether the output is whole, and perhaps in its place already."""
        return (self.path / _FINISHED).exists()

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        files.remove_at_once(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder meanwhile, and removes what a run that was killed had not finished.

        Raises:
            ProtlmError: Another run is at work.
        """
        with work_folder.locked(self.path):
            for left_over in self.path.glob(f"*/.*{files.PARTIAL_SUFFIX}"):
                files.remove(left_over)
            shutil.rmtree(self.new_proteins_path, ignore_errors=True)
            yield

    @property
    def new_proteins_path(self) -> Path:
        """Where proteins are read to."""
        return self.path / "proteins.new"

    @contextlib.contextmanager
    def kept_or_removed(self) -> Iterator[None]:
        """Where something goes wrong, keeps the folder and says how to go on; without a finished part it is removed."""
        try:
            yield
        except BaseException as error:
            if any(self._parts()) or self.num_assembled:
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

    def _skipped_path(self, part: int) -> Path:
        return self.path / "parts" / f"{part:06d}{_SKIPPED_SUFFIX}"

    def _parts(self) -> Iterator[Path]:
        return (path for path in (self.path / "parts").glob("*.h5") if path.stem.isdecimal())


def open_embed_folder(out: Path, model_hash: str, options: dict[str, Any], *, resume: bool, force: bool) -> EmbedFolder:
    """Makes or finds the folder for an output.

    Args:
        out: The output to be.
        model_hash: Of the weights.
        options: Those that decide about the output.
        resume: Use one that is there.
        force: Without `resume`, remove one that is there.

    Raises:
        ProtlmError: As `check_start`.
    """
    folder = EmbedFolder(out)
    path = folder.path
    path.parent.mkdir(parents=True, exist_ok=True)
    work_folder.finish_removing(path)
    check_start(folder, model_hash, options, resume=resume, force=force)
    if path.exists() and not resume:
        with work_folder.locked(path):
            files.remove_at_once(path)
    if not path.exists():
        work_folder.make_folder(path, _about(model_hash, options), ())
    for name in ("parts", "output"):
        (path / name).mkdir(exist_ok=True)
    return folder


def check_start(folder: EmbedFolder, model_hash: str, options: dict[str, Any], *, resume: bool, force: bool) -> None:
    """Looks whether a run may begin, or go on with what one before it left.

    Raises:
        ProtlmError: A folder is there and is not to be used, or was made with another model or other options.
    """
    path = folder.path
    if not path.exists():
        return
    found = work_folder.read_own(path, FORMAT, "embed")
    if not resume and not force:
        raise ProtlmError(
            f"{path}: an unfinished run for this output; go on with --resume, or start afresh with --force"
        )
    if resume and found != (about := _about(model_hash, options)):
        raise ProtlmError(f"{path}: made with {_difference(found, about)}; start afresh with --force")


def _about(model_hash: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "model": model_hash, "options": options}


def _difference(found: Mapping[str, Any], wanted: dict[str, Any]) -> str:
    """Returns in words what was different in a run before."""
    if found.get("format_version") != wanted["format_version"]:
        return "another version of protlm"
    if found.get("model") != wanted["model"]:
        return "another model"
    before, now = found.get("options"), wanted["options"]
    if not isinstance(before, dict):
        return "other options"
    name = next((name for name in now if before.get(name) != now[name]), None)
    if name is None:
        return "other options"
    return f"--{name} {_shown(before.get(name))}, not {_shown(now[name])}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "(left out)" if value is None else str(value)


def check_replaceable(folder: EmbedFolder, layout: Layout, out: Path, *, force: bool) -> None:
    """Refuses an output that is there already, unless it is of the same layout and may be replaced.

    Raises:
        ProtlmError: Something is in the way.
    """
    there = [path for path in folder.targets(layout) if os.path.lexists(path)]
    if not there:
        return
    if out not in there and not os.path.lexists(out):
        raise ProtlmError(f"{there[0]}: exists already, and belongs to something else; choose another folder for --out")
    if not force:
        raise ProtlmError(f"{there[0]}: exists already; choose another --out, or replace it with --force")
    if not os.path.lexists(out) or not layout.is_own(out):
        raise ProtlmError(
            f"{there[0]}: holds no embeddings of layout {layout.name}, so --force does not replace it; "
            "choose another --out"
        )
