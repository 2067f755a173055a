"""Commands in processes of their own that start with everything imported: a server imports it once and forks them.

A new interpreter takes four seconds to import torch and Lightning, which is more than what most commands then do.
"""

import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import torch

from protlm.cli.app import main

# On macOS, system libraries that were loaded before a fork may crash after it.
_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
_CONTEXT.set_forkserver_preload(["protlm.cli.app", "protlm.workflows.train.train", "protlm.workflows.embed.embed"])

TIMEOUT_SECONDS = 150
"""Less than the time-out of a test, so that a process that never ends is killed and its errors are shown."""


class Forked:
    """`protlm ARGUMENTS…` with one thread, as in all tests: the order of sums decides last bits.

    It has those attributes and methods of `subprocess.Popen` that tests use.
    """

    def __init__(self, *arguments, stdin=os.devnull, variables=(), prepare=None):
        """Starts the process.

        Args:
            arguments: The words after `protlm`.
            stdin: The file that is its standard input.
            variables: Of the environment, besides those of this process.
            prepare: Called in the process before the command; a function that can be pickled.
        """
        self._folder = Path(tempfile.mkdtemp())
        self._streams = [self._folder / name for name in ("stdout", "stderr")]
        for path in self._streams:
            path.touch()
        words = [str(argument) for argument in arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(variables)}
        streams = [str(stdin), *map(str, self._streams)]
        self._process = _CONTEXT.Process(target=_run, args=(words, environment, os.getcwd(), streams, prepare))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """The exit status, minus the number of a signal that ended the process, or None while it runs."""
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def communicate(self):
        """Waits for the end of the process and returns (stdout, stderr)."""
        self._process.join(TIMEOUT_SECONDS)
        if self.returncode is None:
            self.kill()
            self._process.join()
            raise TimeoutError(f"not finished after {TIMEOUT_SECONDS} s:\n{self._streams[1].read_text()}")
        texts = tuple(path.read_text() for path in self._streams)
        shutil.rmtree(self._folder)
        return texts


def fork_ranks(number, *arguments, prepare=None):
    """Starts a command in several processes, as torchrun does, and returns them in the order of their ranks."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    group = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}  # fmt: skip
    return [
        Forked(*arguments, variables={key: str(value) for key, value in (group | own).items()}, prepare=prepare)
        for own in ({"RANK": rank, "LOCAL_RANK": rank} for rank in range(number))
    ]


def spawn(function, args, nprocs):
    """Does what `torch.multiprocessing.spawn` does, with processes that are forked."""
    torch.multiprocessing.start_processes(function, args, nprocs, start_method=_METHOD)


def _run(words, environment, folder, streams, prepare):
    """Gives the process all that a new one would have been started with, and runs the command in it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - open as long as the process lives
    sys.argv = ["protlm", *words]
    if prepare is not None:
        prepare()
    torch.set_num_threads(1)
    sys.exit(main(words))
