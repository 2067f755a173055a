"""The folder `OUT.partial` in which a command keeps finished work until its output is complete.

It is created and removed in one step, is locked against other runs, and carries a note by which a command recognises
its own folder.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from protlm import files
from protlm.errors import ProtlmError

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

ABOUT_NAME = "work.json"
"""The note in a folder: the run that it was made for, and as its `format` the command that made it."""


def partial_folder(out: Path) -> Path:
    """Returns the folder for an output; if the output is a link, the folder lies beside its target.

    Raises:
        ProtlmError: The path of the output does not end in a name.
    """
    target = Path(os.path.realpath(out))
    if not target.name:
        raise ProtlmError(f"{out}: expected the name of something to make; choose another --out")
    return target.with_name(target.name + files.PARTIAL_SUFFIX)


def make_folder(path: Path, about: Mapping[str, Any], subfolders: Sequence[str]) -> None:
    """Makes the folder, with its note and subfolders, in one step: other processes may be making it too."""
    temporary = files.partial_path(path)
    temporary.mkdir(parents=True)
    for name in subfolders:
        (temporary / name).mkdir()
    write_json(temporary / ABOUT_NAME, about)
    try:
        temporary.rename(path)
    except OSError:
        shutil.rmtree(temporary)
        if not path.exists():
            raise


def finish_removing(path: Path) -> None:
    """Removes folders that a run was removing when it was killed."""
    for doomed in files.left_overs(path):
        shutil.rmtree(doomed)


def read_own(path: Path, expected_format: str, command: str) -> Mapping[str, Any]:
    """Returns the note in a folder.

    Raises:
        ProtlmError: This command did not make the folder.
    """
    note = read_json(path / ABOUT_NAME)
    if not isinstance(note, dict) or note.get("format") != expected_format:
        raise ProtlmError(f"{path}: in the way, and nothing that {command} made; remove it, or choose another --out")
    return note


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Locks the folder against other runs; with `shared`, only against those that do not share it.

    Raises:
        ProtlmError: Another run holds the lock.
    """
    if fcntl is None:
        yield
        return
    with (path / ABOUT_NAME).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
        except BlockingIOError as error:
            raise ProtlmError(f"{path}: another run is at work here; wait for it, or stop it") from error
        except OSError:
            # The file system has no locks; the run goes on without one.
            pass
        yield


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; None if it is missing or cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, completely or not at all."""
    with files.written_whole(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
