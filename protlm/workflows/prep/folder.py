"""Where prep keeps what is finished until the dataset is whole: what lies there, and when it may be used again."""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from protlm import files
from protlm.data.building.pieces import PieceFile, open_piece_file
from protlm.data.parsing.sources import STDIN
from protlm.data.records import Format
from protlm.data.storage import dataset
from protlm.data.storage.dataset import Part
from protlm.errors import ProtlmError
from protlm.runtime import work_folder
from protlm.runtime.work_folder import partial_folder, read_json, write_json

FORMAT = "protlm-prep"
FORMAT_VERSION = 1

_WORTH_KEEPING_BYTES = 64 << 20

Start = Literal["new", "resume", "part", "merge"]


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read, and the part of the dataset that it is given as."""

    part: Part
    path: str

    @property
    def state(self) -> tuple[int, int] | None:
        """Size and time of the last change, by which a change is noticed; None for a pipe, which is read only once."""
        if self.path == STDIN or not stat.S_ISREG((found := os.stat(self.path)).st_mode):
            return None
        return found.st_size, found.st_mtime_ns

    @property
    def num_bytes(self) -> int:
        """Size on disk, 0 for a pipe."""
        return 0 if self.state is None else self.state[0]


@dataclass(frozen=True, slots=True)
class FinishedSource:
    """A file that was read to its end."""

    name: str
    sha256: str
    format: Format
    num_pieces: int
    num_records: int
    state: Sequence[int] | None


class PrepFolder:
    """The folder `DATASET.partial` beside the dataset to be.

    Attributes:
        path: The folder.
        inputs: The files to read, in order.
    """

    def __init__(self, path: Path, inputs: Sequence[InputFile]) -> None:
        self.path = path
        self.inputs = inputs
        self._read_here: set[int] = set()

    @property
    def codes_path(self) -> Path:
        """The file of decisions."""
        return self.path / "codes.bin"

    @property
    def dataset_path(self) -> Path:
        """The folder that becomes the dataset."""
        return self.path / "dataset"

    @contextlib.contextmanager
    def locked(self, start: Start) -> Iterator[None]:
        """Keeps other runs out of the folder meanwhile; parts share it.

        Raises:
            ProtlmError: Another run is at work.
        """
        with work_folder.locked(self.path, shared=start == "part"):
            self._remove_left_overs(start)
            yield

    def _remove_left_overs(self, start: Start) -> None:
        """Removes what a run that was killed had not finished; parts may be at work on pieces of theirs."""
        for folder in {"new": ("*",), "resume": ("*",), "merge": ("dataset",), "part": ()}[start]:
            for left_over in self.path.glob(f"{folder}/.*{files.PARTIAL_SUFFIX}"):
                left_over.unlink(missing_ok=True)

    def piece_path(self, number: int, piece: int) -> Path:
        """Returns where a piece of a file lies."""
        return self.path / "pieces" / f"{number:05d}-{piece:06d}.piece"

    @property
    def finished_bytes(self) -> int:
        """Bytes of the finished pieces."""
        return sum(path.stat().st_size for path in (self.path / "pieces").glob("*.piece"))

    def finished_source(self, number: int) -> FinishedSource | None:
        """Returns what is known of a file that was read to its end and has not changed since."""
        try:
            found = FinishedSource(**read_json(self._source_path(number)))
            state = self.inputs[number].state
        except (OSError, TypeError):
            return None
        # What came through a pipe before may not be what comes now.
        is_same = number in self._read_here if state is None else list(found.state or ()) == list(state)
        has_all = all(self.piece_path(number, piece).exists() for piece in range(found.num_pieces))
        return found if is_same and has_all else None

    def finish_source(self, number: int, source: FinishedSource) -> None:
        """Notes that a file was read to its end."""
        self._read_here.add(number)
        write_json(self._source_path(number), asdict(source))

    def pieces(self, number: int) -> list[PieceFile]:
        """Returns the pieces of a file that was read to its end."""
        source = self.finished_source(number)
        assert source is not None
        given = self.inputs[number]
        found = [
            open_piece_file(self.piece_path(number, piece), given.path, given.part)
            for piece in range(source.num_pieces)
        ]
        pieces = [piece for piece in found if piece is not None]
        if len(pieces) < source.num_pieces:
            raise ProtlmError(f"{self.path}: a piece of {given.path} is damaged; remove {self.path} to start afresh")
        return pieces

    def begin_dataset(self, plan: Mapping[str, Any]) -> None:
        """Makes the folder of the dataset; shards of another plan are gone, those of the same are kept."""
        plan_path = self.path / "plan.json"
        if not (self.dataset_path.is_dir() and read_json(plan_path) == plan):
            shutil.rmtree(self.dataset_path, ignore_errors=True)
            write_json(plan_path, plan)
        self.dataset_path.mkdir(exist_ok=True)

    def note_finished(self, digest: str) -> None:
        """Notes that the dataset is whole, and its hash, before it leaves the folder."""
        write_json(self.path / "finished.json", {"hash": digest})

    def is_finished(self, digest: str) -> bool:
        """Says whether the dataset of this hash left this folder."""
        return not self.dataset_path.exists() and read_json(self.path / "finished.json") == {"hash": digest}

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        files.remove_at_once(self.path)

    def _source_path(self, number: int) -> Path:
        return self.path / "sources" / f"{number:05d}.json"


def open_prep_folder(
    out: Path, inputs: Sequence[InputFile], labels: Mapping[str, str | None], start: Start, *, force: bool
) -> PrepFolder:
    """Makes or finds the folder for a dataset.

    Args:
        out: The dataset to be.
        inputs: The files to read.
        labels: The sha256 of each file that tells clusters, families or splits, by kind; they are part of the pieces.
        start: `new` wants none there, `resume` uses one that is there, `part` shares it, `merge` needs one.
        force: With `new`, an unfinished one is removed.

    Raises:
        ProtlmError: It is there, or not there, or made from other inputs.
    """
    path = partial_folder(out)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "inputs": [[given.part, given.path] for given in inputs],
        "labels": dict(labels),
    }
    if start != "part":
        # Other parts may be at work on theirs.
        work_folder.finish_removing(path)
    if path.exists() and start == "new":
        _about(path)
        if not force:
            raise ProtlmError(
                f"{path}: an unfinished run for this dataset; go on with --resume, or start afresh with --force"
            )
        with PrepFolder(path, inputs).locked(start):
            files.remove_at_once(path)
    if not path.exists():
        if start == "merge":
            raise ProtlmError(f"{path}: nothing to merge; make the parts first, with the same command and --part i/n")
        work_folder.make_folder(path, about, ("pieces", "sources"))
    if (found := _about(path)) != about:
        differing = next(name for name in about if found.get(name) != about[name])
        raise ProtlmError(f"{path}: made with other {differing}; give the same, or remove this folder to start afresh")
    return PrepFolder(path, inputs)


def _about(path: Path) -> Mapping[str, Any]:
    return work_folder.read_own(path, FORMAT, "prep")


def finished_before(out: Path) -> dataset.Dataset | None:
    """Returns the dataset of a run that was killed once it was in place, and removes what is left of the run."""
    folder = PrepFolder(partial_folder(out), [])
    if not (folder.path.is_dir() and dataset.is_dataset(out)):
        return None
    found = dataset.open_dataset(out)
    if not folder.is_finished(found.hash):
        return None
    folder.remove()
    return found


def check_replaceable(out: Path, *, force: bool) -> None:
    """Refuses an output that is there already, unless it is a dataset or an empty folder and may be replaced.

    Raises:
        ProtlmError: Something is in the way that may not be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ProtlmError(f"{out}: expected a folder to make or replace, got a file; choose another --out")
    if not force:
        raise ProtlmError(f"{out}: exists already; choose another --out, or replace it with --force")
    entries = sorted(os.listdir(out))
    if entries and not dataset.is_dataset(out):
        raise ProtlmError(f"{out}: not a protlm dataset, so --force does not replace it; choose another --out")
    own = (dataset.MANIFEST_NAME, dataset.REPORT_NAME, dataset.REJECTS_NAME)
    for entry in entries:
        if entry not in own and not re.search(dataset.SHARD_NAME_PATTERN, entry):
            raise ProtlmError(f"{out}: holds {entry!r}, which is no part of a dataset, so --force does not replace it")


def put_in_place(folder: Path, out: Path, *, force: bool) -> None:
    """Renames a finished dataset to its place; one that is there goes only once the new one has its name."""
    check_replaceable(out, force=force)
    files.publish(folder, out)


@contextlib.contextmanager
def kept_or_removed(folder: PrepFolder, start: Start) -> Iterator[None]:
    """Where something goes wrong, keeps the folder and says how to go on; what a moment can make again is removed."""
    try:
        yield
    except BaseException as error:
        is_system = isinstance(error, OSError)
        worth_keeping = _WORTH_KEEPING_BYTES if start == "new" and not is_system else 1
        if start == "part":
            hint = "run the same command again to go on"
        elif start == "merge" or folder.finished_bytes >= worth_keeping:
            option = "" if start == "merge" else " and --resume"
            hint = f"what is finished is kept in {folder.path}: go on with the same command{option}"
        else:
            folder.remove()
            hint = "nothing was made"
            if not is_system:
                raise
        if isinstance(error, OSError):
            reason = (error.strerror or str(error)).split("\n")[0]
            raise ProtlmError(f"{error.filename or folder.path}: {reason}; {hint}") from error
        if isinstance(error, ProtlmError) and start in ("new", "resume") and "--resume" not in str(error):
            raise ProtlmError(f"{error}; {hint}") from error
        raise
