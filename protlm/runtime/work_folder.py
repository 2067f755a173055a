"""The folder `OUT.partial` in which a command keeps what is finished until its output is whole.

Hides how such a folder appears and goes at once, how two runs are kept out of each other's way, and how a run tells its
own folder from one in the way.
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
"""Says what a folder was made for; its `format` says by which command."""


def partial_folder(out: Path) -> Path:
    """Returns where the folder for an output lies; through a link it is the target's.

    Raises:
        ProtlmError: The output has no name.
    """
    target = Path(os.path.realpath(out))
    if not target.name:
        raise ProtlmError(f"{out}: expected the name of something to make; choose another --out")
    return target.with_name(target.name + files.PARTIAL_SUFFIX)


def make_folder(path: Path, about: Mapping[str, Any], subfolders: Sequence[str]) -> None:
    """Makes the folder with all that it begins with at once: other processes may be doing the same."""
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
    """Removes what a run that was killed was about to remove."""
    for doomed in files.left_overs(path):
        shutil.rmtree(doomed)


def read_own(path: Path, expected_format: str, command: str) -> Mapping[str, Any]:
    """Returns what a folder says it was made for.

    Raises:
        ProtlmError: It is nothing that this command made.
    """
    found = read_json(path / ABOUT_NAME)
    if not isinstance(found, dict) or found.get("format") != expected_format:
        raise ProtlmError(f"{path}: in the way, and nothing that {command} made; remove it, or choose another --out")
    return found


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Keeps other runs out of the folder meanwhile, or other than those that share it.

    Raises:
        ProtlmError: Another run is at work.
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
            # A file system without locks: then nothing is kept out.
            pass
        yield


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; None where there is none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with files.written_whole(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
