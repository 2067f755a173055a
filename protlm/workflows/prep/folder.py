"""The folder of a prep run, `DATASET.partial`: what it holds, and when its finished work may be used again."""

import contextlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import xxhash

from protlm import files
from protlm.data.building.pieces import PieceFile, open_piece_file
from protlm.data.parsing.sources import STDIN
from protlm.data.records import Format
from protlm.data.storage import dataset
from protlm.data.storage.manifest import (
    MANIFEST_NAME,
    MULTIQC_NAME,
    REJECTS_NAME,
    REPORT_NAME,
    SHARD_NAME_PATTERN,
    InputRole,
    is_dataset,
)
from protlm.errors import ProtlmError
from protlm.runtime import locks, run_marks, work_folder
from protlm.runtime.work_folder import partial_folder, read_json, write_json
from protlm.runtime.workers import WorkersError

FORMAT = "protlm-prep"
FORMAT_VERSION = 3

Start = Literal["new", "resume", "part", "merge"]


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read, and its role in the dataset."""

    role: InputRole
    path: str

    @property
    def state(self) -> tuple[int, int] | None:
        """Size and time of the last change, which show whether it has changed; None for a pipe, which has neither."""
        if self.path == STDIN or not stat.S_ISREG((status := os.stat(self.path)).st_mode):
            return None
        return status.st_size, status.st_mtime_ns

    @property
    def num_bytes(self) -> int:
        """Size on disk, 0 for a pipe."""
        return 0 if self.state is None else self.state[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSource:
    """A file that was read to its end.

    Attributes:
        name: Its base name.
        sha256: Hash of its bytes on disk.
        format: Its format.
        num_pieces: Number of its pieces.
        pieces_hash: Hash of the hashes of their texts.
        num_records: Good records in it.
        state: Size and time of the last change when reading began; None of a pipe.
    """

    name: str
    sha256: str
    format: Format
    num_pieces: int
    pieces_hash: str
    num_records: int
    state: Sequence[int] | None


class PrepFolder:
    """The folder `DATASET.partial` beside the dataset that is being made.

    Subfolders are named after what shapes their content. So a worker of an earlier run, which nobody could stop, writes
    what this run would write, or to a place that this run does not look at, unless a file was changed in between, which
    `pieces` notices.

    Attributes:
        path: The folder.
        inputs: The files to read, in order.
        worth_keeping_bytes: What has to be finished, in all new runs, for the folder to be kept after a failure.
    """

    worth_keeping_bytes: ClassVar[int] = 64 << 20

    def __init__(self, path: Path, inputs: Sequence[InputFile], about_hash: str) -> None:
        """Takes the folder as it is.

        Args:
            path: The folder.
            inputs: The files to read, in order.
            about_hash: Hash of the inputs and labels that it was made for.
        """
        self.path = path
        self.inputs = inputs
        self._about_hash = about_hash
        self._finished_here: dict[int, FinishedSource] = {}
        self._codes_name = f"codes-{uuid.uuid4().hex}.bin"
        self._dataset_path: Path | None = None

    @property
    def codes_path(self) -> Path:
        """The file with the split or the reason of rejection of every record; another one in each run."""
        return self.path / self._codes_name

    @property
    def dataset_path(self) -> Path:
        """The folder that becomes the dataset, once `begin_dataset` has named it after its plan."""
        assert self._dataset_path is not None
        return self._dataset_path

    @property
    def reading_path(self) -> Path:
        """The folder in which workers note how much of a file they have read."""
        return self._named("reading")

    @contextlib.contextmanager
    def locked(self, start: Start) -> Iterator[None]:
        """Keeps other runs out of the folder in a `with` block; parts share it.

        Raises:
            ProtlmError: Another run is at work.
        """
        with locks.locked(self.path, shared=start == "part"):
            if start != "part":
                run_marks.end_runs(self.path)
            self._remove_left_overs(start)
            yield

    def _remove_left_overs(self, start: Start) -> None:
        """Removes unfinished files of killed runs, except where other parts may be writing theirs."""
        for folder in {"new": ("*",), "resume": ("*",), "merge": ("dataset*",), "part": ()}[start]:
            for left_over in self.path.glob(f"{folder}/.*{files.PARTIAL_SUFFIX}"):
                left_over.unlink(missing_ok=True)
        if start != "part":
            for left_over in self.path.glob("codes-*.bin"):
                left_over.unlink(missing_ok=True)

    def piece_path(self, number: int, piece: int) -> Path:
        """Returns the path of a piece of a file."""
        return self._named("pieces") / f"{number:05d}-{piece:06d}.piece"

    @property
    def finished_bytes(self) -> int:
        """Bytes of the finished pieces."""
        return sum(path.stat().st_size for path in self._named("pieces").glob("*.piece"))

    def finished_source(self, number: int) -> FinishedSource | None:
        """Returns the record of a file that was read to its end and has not changed since, or None."""
        # The machine of this process may see the file of a worker elsewhere late.
        source = self._finished_here.get(number)
        try:
            source = source or FinishedSource(**read_json(self._source_path(number)))
            state = self.inputs[number].state
        except (OSError, TypeError):
            return None
        # A pipe may deliver other content the next time.
        is_same = number in self._finished_here if state is None else list(source.state or ()) == list(state)
        has_all = all(self.piece_path(number, piece).exists() for piece in range(source.num_pieces))
        return source if is_same and has_all else None

    def finish_source(self, number: int, source: FinishedSource) -> None:
        """Records that a file was read to its end by this process."""
        self.know_finished(number, source)
        write_json(self._source_path(number), asdict(source))

    def know_finished(self, number: int, source: FinishedSource) -> None:
        """Takes note that a file was read to its end by a worker, which has recorded it."""
        self._finished_here[number] = source

    def elsewhere(self) -> "PrepFolder":
        """Returns this folder for workers that have another working directory."""
        inputs = [
            replace(file, path=file.path if file.path == STDIN else os.path.abspath(file.path)) for file in self.inputs
        ]
        folder = PrepFolder(self.path, inputs, self._about_hash)
        folder._finished_here = self._finished_here
        return folder

    def pieces(self, number: int) -> list[PieceFile]:
        """Returns the pieces of a file that was read to its end."""
        source = self.finished_source(number)
        assert source is not None
        input_file = self.inputs[number]
        pieces = []
        for index in range(source.num_pieces):
            piece = open_piece_file(self.piece_path(number, index), input_file.path, input_file.role)
            if piece is None:
                raise ProtlmError(
                    f"{self.path}: a piece of {input_file.path} is damaged; remove {self.path} to start afresh"
                )
            pieces.append(piece)
        if pieces_hash_of(piece.text_hash for piece in pieces) != source.pieces_hash:
            self._source_path(number).unlink()
            raise ProtlmError(
                f"{input_file.path}: a worker of an earlier run has replaced what was read of it; go on with --resume"
            )
        return pieces

    def begin_dataset(self, plan: Mapping[str, Any]) -> None:
        """Makes the folder of the dataset; shards of the same plan are kept, those of another are removed."""
        self._dataset_path = self.path / f"dataset-{_hash_of(plan)}"
        for other in self.path.glob("dataset*"):
            if other != self._dataset_path:
                shutil.rmtree(other, ignore_errors=True)
        self._dataset_path.mkdir(exist_ok=True)

    def put_in_place(self, out: Path, *, force: bool) -> None:
        """Moves the complete dataset to its place; an old one is removed only after that.

        Raises:
            ProtlmError: Something that may not be replaced has come to its place meanwhile.
        """
        check_replaceable(out, force=force)
        # A task that Dask did twice may have left one.
        for left_over in self.dataset_path.glob(f".*{files.PARTIAL_SUFFIX}"):
            left_over.unlink(missing_ok=True)
        work_folder.put_in_place(self.path, [(self.dataset_path, out)], {})

    def remove(self) -> None:
        """Removes the folder and its content."""
        files.remove_at_once(self.path)

    def _source_path(self, number: int) -> Path:
        return self._named("sources") / f"{number:05d}.json"

    def _named(self, kind: str) -> Path:
        return self.path / f"{kind}-{self._about_hash}"


def pieces_hash_of(text_hashes: Iterable[str]) -> str:
    """Returns the hash of the hashes of the texts of a file's pieces, in their order."""
    return xxhash.xxh3_128_hexdigest("".join(text_hashes).encode())


def open_prep_folder(
    out: Path, inputs: Sequence[InputFile], labels: Mapping[str, str | None], start: Start, *, force: bool
) -> PrepFolder:
    """Returns the folder of the run for a dataset, made if it is new.

    Args:
        out: The dataset that will be made.
        inputs: The files to read.
        labels: The sha256 of the file of clusters, families and splits, by kind; pieces contain their labels.
        start: `new` expects no folder, `resume` uses an existing one, `part` shares it, `merge` needs one.
        force: With `new`, the folder of an unfinished run is removed.

    Raises:
        ProtlmError: The folder exists, or is missing, or was made from other inputs.
    """
    path = partial_folder(out)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "inputs": [[input_file.role, input_file.path] for input_file in inputs],
        "labels": dict(labels),
    }
    about_hash = _hash_of(about)
    if path.exists() and start == "new":
        _about(path)
        if not force:
            raise ProtlmError(
                f"{path}: an unfinished run for this dataset; go on with --resume, or start afresh with --force"
            )
        with PrepFolder(path, inputs, about_hash).locked(start):
            files.remove_at_once(path)
    if not path.exists():
        if start == "merge":
            raise ProtlmError(f"{path}: nothing to merge; make the parts first, with the same command and --part i/n")
        names = [f"{kind}-{about_hash}" for kind in ("pieces", "sources", "reading")]
        work_folder.make_folder(path, about, names)
    if (existing := _about(path)) != about:
        differing = next(name for name in about if existing.get(name) != about[name])
        if differing == "format_version":
            raise ProtlmError(f"{path}: made by another version of protlm; remove this folder to start afresh")
        raise ProtlmError(f"{path}: made with other {differing}; give the same, or remove this folder to start afresh")
    return PrepFolder(path, inputs, about_hash)


def _hash_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def _about(path: Path) -> Mapping[str, Any]:
    return work_folder.read_own(path, FORMAT, "prep")


def complete_killed_run(out: Path) -> dataset.Dataset | None:
    """Publishes the finished dataset of a killed run, as that had begun to, and removes the folders of killed runs.

    Returns:
        The dataset, if it was in its folder, or that folder had not been removed.

    Raises:
        ProtlmError: Another run is at work, or something else has come to the place of the dataset.
    """
    path = partial_folder(out)
    for made in (path, out):
        work_folder.remove_left_overs(made)
    if not path.is_dir() or work_folder.finished_note(path) is None:
        return None
    _about(path)
    with locks.locked(path):
        work_folder.finish_moves(path)
        if not work_folder.is_in_place(path):
            # Moved away since: it is made again from the pieces.
            (path / work_folder.FINISHED_NAME).unlink()
            return None
        work_folder.remove_finished(path)
    return dataset.open_dataset(out)


def check_replaceable(out: Path, *, force: bool) -> None:
    """Refuses an existing output, unless it is a dataset or an empty folder and may be replaced.

    Raises:
        ProtlmError: The output exists and may not be replaced.
    """
    # A link to itself is there too, although it does not exist.
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ProtlmError(f"{out}: expected a folder to make or replace, got a file; choose another --out")
    if not force:
        raise ProtlmError(f"{out}: exists already; choose another --out, or replace it with --force")
    entries = sorted(os.listdir(out))
    if entries and not is_dataset(out):
        raise ProtlmError(f"{out}: not a protlm dataset, so --force does not replace it; choose another --out")
    own = (MANIFEST_NAME, REPORT_NAME, MULTIQC_NAME, REJECTS_NAME)
    for entry in entries:
        if entry not in own and not re.search(SHARD_NAME_PATTERN, entry):
            raise ProtlmError(f"{out}: holds {entry!r}, which is no part of a dataset, so --force does not replace it")


@contextlib.contextmanager
def kept_or_removed(folder: PrepFolder, start: Start) -> Iterator[None]:
    """Keeps the folder if the run fails, and adds how to go on to the error; little work is removed instead."""
    try:
        yield
    except BaseException as error:
        is_system = isinstance(error, OSError | WorkersError)
        worth_keeping = folder.worth_keeping_bytes if start == "new" and not is_system else 1
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
        is_told = is_system or start in ("new", "resume")
        if isinstance(error, ProtlmError) and is_told and "--resume" not in str(error):
            raise ProtlmError(f"{error}; {hint}") from error
        raise
