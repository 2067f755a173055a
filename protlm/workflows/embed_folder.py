"""Where embed keeps what is finished until the output is whole: what lies there, and when it may be used again."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protlm.data import files
from protlm.data.layouts import Layout
from protlm.data.protein_store import ProteinStore, open_proteins
from protlm.errors import ProtlmError
from protlm.workflows import work_folder
from protlm.workflows.work_folder import partial_folder, read_json, write_json

FORMAT = "protlm-embed"
FORMAT_VERSION = 1


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
        found = read_json(self.path / "assembled.json")
        return int(found["num_parts"]) if isinstance(found, dict) else 0

    def note_assembled(self, num_parts: int) -> None:
        """Notes that the first parts are in the output."""
        write_json(self.path / "assembled.json", {"num_parts": num_parts})

    def remove_part(self, part: int) -> None:
        """Removes a part that nothing needs any more."""
        self.part_path(part).unlink(missing_ok=True)

    def note_skipped(self, part: int, records: list[int]) -> None:
        """Notes which records of a part did not fit into memory, before the part is finished."""
        if records:
            write_json(self._skipped_path(part), {"records": records})

    def skipped(self) -> list[int]:
        """Returns the records that did not fit into memory, of all parts, rising."""
        found = map(read_json, sorted((self.path / "parts").glob("*.skipped.json")))
        return [record for noted in found if isinstance(noted, dict) for record in noted["records"]]

    def keep_proteins(self, new: ProteinStore) -> ProteinStore:
        """Takes the proteins that were just read in place of those that a run before this one read.

        Raises:
            ProtlmError: They are not the same.
        """
        if self.proteins_path.is_dir():
            before = open_proteins(self.proteins_path)
            shutil.rmtree(new.path)
            if before.hash != new.hash:
                raise ProtlmError(
                    f"{self.path}: made from other proteins than these ({before.num_records:,} then, "
                    f"{new.num_records:,} now); give the same inputs, or start afresh with --force"
                )
            return before
        new.path.rename(self.proteins_path)
        return open_proteins(self.proteins_path)

    def put_in_place(self, layout: Layout) -> None:
        """Renames the finished output, and what belongs to it, to their places; what is there goes only then."""
        write_json(self.path / "finished.json", {})
        made, wanted = layout.paths(self.output_path), layout.paths(self._out)
        # The companions first: once OUT is there, all is.
        for source, target in list(zip(made, wanted, strict=True))[::-1]:
            if source.exists():
                _replace(source, target)

    @property
    def is_finished(self) -> bool:
        """Whether the output is whole, and perhaps in its place already."""
        return (self.path / "finished.json").exists()

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        work_folder.remove_folder(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder meanwhile, and removes what a run that was killed had not finished.

        Raises:
            ProtlmError: Another run is at work.
        """
        with work_folder.locked(self.path):
            for left_over in self.path.glob(f"*/.*{files.PARTIAL_SUFFIX}"):
                _remove(left_over)
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
            if any((self.path / "parts").glob("*.h5")) or self.num_assembled:
                hint = f"what is finished is kept in {self.path}: go on with the same command and --resume"
            else:
                self.remove()
                hint = "nothing was made"
            if isinstance(error, OSError):
                reason = (error.strerror or str(error)).split("\n")[0]
                raise ProtlmError(f"{error.filename or self.path}: {reason}; {hint}") from error
            raise

    def _skipped_path(self, part: int) -> Path:
        return self.path / "parts" / f"{part:06d}.skipped.json"


def open_embed_folder(out: Path, model_hash: str, options: dict[str, Any], *, resume: bool, force: bool) -> EmbedFolder:
    """Makes or finds the folder for an output.

    Args:
        out: The output to be.
        model_hash: Of the weights.
        options: Those that decide about the output.
        resume: Use one that is there.
        force: Remove one that is there.

    Raises:
        ProtlmError: One is there and is not to be used, or was made with another model or other options.
    """
    folder = EmbedFolder(out)
    path = folder.path
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": model_hash, "options": options}
    path.parent.mkdir(parents=True, exist_ok=True)
    work_folder.finish_removing(path)
    if path.exists():
        found = work_folder.check_own(path, FORMAT, "embed")
        if not resume:
            if not force:
                raise ProtlmError(
                    f"{path}: an unfinished run for this output; go on with --resume, or start afresh with --force"
                )
            with work_folder.locked(path):
                work_folder.remove_folder(path)
        elif found != about:
            raise ProtlmError(f"{path}: made with {_difference(found, about)}; start afresh with --force")
    if not path.exists():
        work_folder.make_folder(path, about, ("parts", "output"))
    return folder


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """Returns in words what was different in a run before."""
    if found.get("format_version") != wanted["format_version"]:
        return "another version of protlm"
    if found.get("model") != wanted["model"]:
        return "another model"
    before, now = found.get("options"), wanted["options"]
    if not isinstance(before, dict):
        return "other options"
    name = next(name for name in now if before.get(name) != now[name])
    return f"--{name} {_shown(before.get(name))}, not {_shown(now[name])}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "(left out)" if value is None else str(value)


def check_replaceable(layout: Layout, out: Path, *, force: bool) -> None:
    """Refuses an output that is there already, unless it is of the same layout and may be replaced.

    Raises:
        ProtlmError: Something is in the way.
    """
    there = [path for path in layout.paths(out) if os.path.lexists(path)]
    if not there:
        return
    if not force:
        raise ProtlmError(f"{there[0]}: exists already; choose another --out, or replace it with --force")
    if there[0] != layout.paths(out)[0] or not layout.is_own(out):
        raise ProtlmError(
            f"{there[0]}: holds no embeddings of layout {layout.name}, so --force does not replace it; "
            "choose another --out"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(source, target)
        return
    # Of a run that was killed while it did this.
    for doomed in target.parent.glob(f".{glob.escape(target.name)}.*{files.PARTIAL_SUFFIX}"):
        _remove(doomed)
    old = files.partial_path(target)
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
