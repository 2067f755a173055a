"""The folder `OUT.partial` in which a command keeps finished work until its output is complete.

It is created in one step, is locked against other runs, and carries a note by which a command recognises its own
folder. A second note says that the output is complete, and which files take which names: from then on any command on
the same OUT first brings this to its end, so that an output of several files appears as one.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from protlm import files
from protlm.errors import ProtlmError
from protlm.runtime import locks

ABOUT_NAME = "work.json"
"""The note in a folder: the run that it was made for, and as its `format` the command that made it."""

FINISHED_NAME = "finished.json"
"""The note that the output is complete: its `moves`, and what else the command has to know after a kill."""

_ATTEMPTS = 20


def partial_folder(out: Path) -> Path:
    """Returns the folder for an output; if the output is a link, the folder lies beside its target.

    Raises:
        ProtlmError: The path of the output does not end in a name.
    """
    target = Path(os.path.realpath(out))
    if not target.name:
        raise ProtlmError(f"{out}: expected the name of something to make; choose another --out")
    return target.with_name(target.name + files.PARTIAL_SUFFIX)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path` to be renamed to it, locked so that no other process takes it for a left-over.

    Unless it was renamed it is removed at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_ATTEMPTS):
        temporary = files.partial_path(path)
        temporary.mkdir()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.locked(temporary))
            except (FileNotFoundError, locks.FolderGoneError):
                # Another process removed it before it was locked.
                continue
            try:
                yield temporary
            finally:
                if temporary.exists():
                    files.discard(temporary)
            return
    raise ProtlmError(f"{path}: other processes keep removing its beginnings; run the command again")


def make_folder(path: Path, about: Mapping[str, Any], subfolders: Sequence[str]) -> None:
    """Makes the folder, with its note and subfolders, in one step: other processes may be making it too."""
    with new_folder(path) as temporary:
        for name in subfolders:
            (temporary / name).mkdir()
        write_json(temporary / ABOUT_NAME, about)
        try:
            temporary.rename(path)
        except OSError:
            if not path.exists():
                raise


def remove_left_overs(path: Path) -> None:
    """Removes what killed processes left beside a file or folder, and brings it back if its replacement was killed."""
    for left_over in files.left_overs(path):
        if not left_over.is_dir() or left_over.is_symlink():
            files.remove(left_over)
        elif not locks.is_locked(left_over):
            # One that another process is just making is locked in this moment, or made again.
            with contextlib.suppress(ProtlmError, FileNotFoundError), locks.locked(left_over):
                files.discard(left_over)
    if not locks.is_locked(files.replaced_path(path)):
        files.restore(path)


def read_own(path: Path, expected_format: str, command: str) -> Mapping[str, Any]:
    """Returns the note in a folder.

    Raises:
        ProtlmError: This command did not make the folder.
    """
    note = read_json(path / ABOUT_NAME)
    if not isinstance(note, dict) or note.get("format") != expected_format:
        raise ProtlmError(f"{path}: in the way, and nothing that {command} made; remove it, or choose another --out")
    return note


def finished_note(path: Path) -> Mapping[str, Any] | None:
    """Returns the note that the output in a folder is complete; None if it is not."""
    note = read_json(path / FINISHED_NAME)
    is_whole = isinstance(note, dict) and isinstance(note.get("moves"), list) and all(map(_is_move, note["moves"]))
    return note if is_whole else None


def _is_move(move: Any) -> bool:
    """Returns whether a move of a note stays in the folder and beside it."""
    if not isinstance(move, dict) or not all(isinstance(move.get(end), str) for end in ("source", "target")):
        return False
    source, target = Path(move["source"]), Path(move["target"])
    return not source.is_absolute() and ".." not in source.parts and target.name == move["target"] and "inode" in move


def put_in_place(path: Path, moves: Sequence[tuple[Path, Path]], notes: Mapping[str, Any]) -> None:
    """Notes that the output in a folder is complete, and moves it to its place.

    Args:
        path: The folder.
        moves: Files and folders in it, and the paths beside it that they take; what lies there may be replaced.
        notes: What else the command has to know after a kill.

    Raises:
        ProtlmError, OSError: As `finish_moves`.
    """
    noted = [
        {
            "source": str(source.relative_to(path)),
            "target": target.name,
            "inode": source.stat().st_ino,
            "replaces": _state(target),
        }
        for source, target in moves
    ]
    write_json(path / FINISHED_NAME, {**notes, "moves": noted})
    finish_moves(path)


def finish_moves(path: Path) -> None:
    """Moves what is complete in a folder, and was not moved before a kill, to its place.

    Raises:
        ProtlmError: Something else has come to its place since.
        OSError: A file cannot be renamed.
    """
    note = finished_note(path)
    if note is None:
        return
    for move in note["moves"]:
        source, target = path / move["source"], path.with_name(move["target"])
        if not os.path.lexists(source):
            continue
        state, inode = _state(target), source.lstat().st_ino
        if inode != move["inode"]:
            if state is not None and state[0] == move["inode"]:
                # What was replaced: it took this name in the exchange.
                files.discard(source)
                continue
            # The folder was copied since, with what is complete in it.
            move["inode"] = inode
            write_json(path / FINISHED_NAME, note)
        if state is not None and state != move.get("replaces"):
            raise ProtlmError(
                f"{target}: in the way of the finished output in {path}, and not what was there before; move it away, "
                "then go on with --resume"
            )
        files.publish(source, target)


def is_in_place(path: Path) -> bool:
    """Returns whether the complete output of a folder lies where it was moved to."""
    note = finished_note(path)
    if note is None:
        return False
    states = [(_state(path.with_name(move["target"])), move["inode"]) for move in note["moves"]]
    return all(state is not None and state[0] == inode for state, inode in states)


def remove_finished(path: Path) -> None:
    """Removes a folder whose output is in place; the notes go last, so that a kill is seen for what it was."""
    for entry in sorted(path.iterdir()):
        if entry.name not in (ABOUT_NAME, FINISHED_NAME, locks.LOCK_NAME):
            files.discard(entry)
    files.remove_at_once(path)


def _state(path: Path) -> list[int] | None:
    """Returns what changes when something else takes a path; None if there is nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; None if it is missing or cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, completely or not at all, and syncs it: what it vouches for may be removed then."""
    with files.written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content))
        file.flush()
        os.fsync(file.fileno())
