"""Workers of a Dask cluster: hides the client, the checks before the first task, retries, and the messages of a loss.

A scheduler runs what it is sent, so it is a cluster of the user's own; tasks and results go as pickles, by Dask's
protocol, and only between its machines.
"""

import contextlib
import json
import logging
import os
import platform
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protlm import __version__
from protlm.errors import ProtlmError
from protlm.runtime.local_workers import keep_memory
from protlm.runtime.workers import (
    NamedTask,
    Result,
    Scheduler,
    Task,
    Workers,
    WorkersError,
    is_task_wanted,
    threads_of_task,
)

_CONNECT_SECONDS = 10
_TRIES = 3
"""How often a task is tried that fails by no fault of its input."""
_LEAST_WAITING = 16
"""Tasks that wait at the scheduler at least, so that a cluster that grows with them sees them."""
_NEW_FILE_SECONDS = 60
"""Longest time in which a network file system shows a new file to another machine."""
_ASK_SECONDS = 5
"""Time between two questions to the scheduler for its workers."""
_LOOK_SECONDS = 0.5
"""Time between two looks of a task at the mark of its run."""
_SHOWN = 300
"""Letters of a message of Dask that are shown."""
_LOST = "lost the connection to the Dask scheduler"
_MARK, _ENDED = "run", "ended"
"""The beginnings of the names of a file in the folder of the work, by which workers know it and its run."""
_INSTALL = "pip install 'protlm[cluster]'"


@dataclass(frozen=True, slots=True)
class _Failed:
    """The error of a task that would fail anywhere: sent back as a result, since Dask would try it again."""

    error: ProtlmError


class DaskCluster:
    """A connection to the scheduler of a cluster. Use it as a context manager.

    Attributes:
        client: Dask's client.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        """Connects, and compares the versions of the workers that are there.

        Raises:
            ProtlmError: As `workers.connected`.
        """
        try:
            from distributed import Client
        except ImportError:
            raise ProtlmError(f"--scheduler: needs Dask, which is not installed here; install it: {_INSTALL}") from None
        # Its loggers tell losses in pages of tracebacks; the messages below tell them in one line.
        for name in ["distributed", *logging.root.manager.loggerDict]:
            if name.partition(".")[0] == "distributed":
                logging.getLogger(name).setLevel(logging.CRITICAL)
        address = _address_in(scheduler.file) if scheduler.address is None else scheduler.address
        try:
            with warnings.catch_warnings():
                # Versions are compared below.
                warnings.simplefilter("ignore")
                self.client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False, name="protlm")
        except (OSError, ValueError, TypeError) as error:
            raise ProtlmError(
                f"{address}: no Dask scheduler answers there ({_first_line(error)}); give the address that "
                "`dask scheduler` prints, such as tcp://10.0.0.1:8786"
            ) from error
        try:
            self._num_workers = self._check_workers()
        except BaseException:
            self.client.close()
            raise

    def __enter__(self) -> "DaskCluster":
        return self

    def __exit__(self, *_: object) -> None:
        # What is still waiting is cancelled with the client. Without a scheduler there is nothing to close.
        with contextlib.suppress(Exception):
            self.client.close(timeout=_CONNECT_SECONDS)

    @property
    def description(self) -> str:
        """A line on the cluster: its address, its workers, its dashboard."""
        workers = {0: "no workers yet", 1: "1 worker"}.get(self._num_workers, f"{self._num_workers:,} workers")
        link = self.client.dashboard_link
        return f"Dask at {self.client.scheduler.address}, {workers}" + (f"; dashboard: {link}" if link else "")

    def faults(self, function: Callable[..., str], *arguments: Any) -> list[str]:
        """Returns the fault that a function finds on each worker that is there; empty texts for none.

        Raises:
            ProtlmError: A worker cannot load protlm, or one of another version of it; or the scheduler is lost.
        """
        try:
            return list(self.client.run(function, *arguments).values())
        except (ImportError, AttributeError) as error:
            raise ProtlmError(
                f"a worker cannot load protlm ({_first_line(error)}); install protlm {__version__} for the workers"
            ) from error
        except (OSError, CancelledError) as error:
            raise WorkersError(_LOST) from error

    def _check_workers(self) -> int:
        """Returns the number of workers, all of the versions of this process."""
        faults = self.faults(_fault_of_versions, _versions())
        for fault in filter(None, faults):
            raise ProtlmError(fault)
        return len(faults)


class DaskWorkers(Workers):
    """The workers of a cluster, which may come and go."""

    def __init__(
        self, cluster: DaskCluster, shared: Any, folder: Path, inputs: Sequence[str], *, one_per_process: bool
    ) -> None:
        """Starts nothing yet.

        Args:
            cluster: The connection.
            shared: The object passed to the function together with each task.
            folder: The folder of the work.
            inputs: What else all workers must see.
            one_per_process: A process does one task at a time.
        """
        self._cluster, self._shared, self._folder, self._inputs = cluster, shared, folder, inputs
        self._is_one_per_process = one_per_process
        self._mark = folder / f"{_MARK}-{uuid.uuid4().hex}"
        self._num_submitted = 0
        self._pending: set[Any] = set()
        self._number, self._asked = 1, float("-inf")

    @property
    def number(self) -> int:
        """Number of threads of all workers, or of their processes, at least 1; as it was some seconds ago."""
        if time.monotonic() > self._asked + _ASK_SECONDS:
            self._asked = time.monotonic()
            # A lost scheduler is told where a result is awaited.
            with contextlib.suppress(Exception):
                threads = self._cluster.client.nthreads()
                self._number = max(1, len(threads) if self._is_one_per_process else sum(threads.values()))
        return self._number

    @property
    def are_here(self) -> bool:
        """False: they are other processes."""
        return False

    @property
    def num_waiting(self) -> int:
        """Twice their number, so that none waits for the next task, and at least some.

        Where a process does one task at a time, no more than their number: one that waits there counts as at work.
        """
        return self.number if self._is_one_per_process else max(2 * self.number, _LEAST_WAITING)

    def __enter__(self) -> "DaskWorkers":
        # Those of runs that were killed: this run has the folder to itself.
        for mark in self._folder.glob(f"{_MARK}-*"):
            mark.rename(_ended(mark))
        self._mark.touch()
        try:
            for fault in filter(None, self._cluster.faults(_fault_of_paths, [str(self._folder), *self._inputs])):
                raise ProtlmError(fault)
            # A task, since Dask repeats it where its result is lost with a worker.
            self._shared_future = self._handed_out(_itself, self._shared)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is at work on a worker goes on until it looks for the mark; a lost scheduler has nothing to cancel.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._cluster.client.cancel(list(self._pending))
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._mark.rename(_ended(self._mark))

    def _submit(self, function: Callable[[Any, Task], Result], task: Task) -> Any:
        self._num_submitted += 1
        future = self._handed_out(
            _perform, str(self._mark), _versions(), self._shared_future, function, task,
            key=f"{function.__name__.strip('_')}-{uuid.uuid4().hex}", retries=_TRIES - 1,
            priority=-self._num_submitted,
        )  # fmt: skip
        self._pending.add(future)
        return future

    def _handed_out(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with warnings.catch_warnings():
                # Of large objects in tasks.
                warnings.simplefilter("ignore")
                return self._cluster.client.submit(function, *arguments, pure=False, **options)
        except Exception as error:  # what Dask raises without a connection is of several types
            raise WorkersError(_LOST) from error

    def _is_done(self, future: Any, seconds: float) -> bool:
        from distributed import wait

        try:
            with self._cluster.client.as_current():
                wait([future], timeout=seconds)
        except TimeoutError:
            return False
        except (CancelledError, OSError):
            # Told by the result.
            return True
        return True

    def _result(self, task: NamedTask, future: Any) -> Any:
        from distributed import KilledWorker

        self._pending.discard(future)
        try:
            result = future.result()
        except KilledWorker as error:
            raise WorkersError(
                f"{task.title}: lost several workers that were at it, perhaps for want of memory; give each worker more"
            ) from error
        except CancelledError as error:
            raise WorkersError(_LOST) from error
        except Exception as error:  # the task's own, of any type, or Dask's in fetching its result
            if future.status != "error":
                raise WorkersError(_LOST) from error
            told = f"{type(error).__name__}: {_first_line(error)}"
            raise WorkersError(f"{task.title}: failed {_TRIES} times on the workers, last with {told}") from error
        if isinstance(result, _Failed):
            raise result.error
        return result


def _address_in(path: Path | None) -> str:
    """Returns the address in a scheduler file.

    Raises:
        ProtlmError: There is no such file, or it holds none.
    """
    assert path is not None
    try:
        address = json.loads(path.read_text(encoding="utf-8"))["address"]
        if isinstance(address, str):
            return address
    except OSError as error:
        raise ProtlmError(f"{path}: {error.strerror}; is the scheduler running?") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise ProtlmError(f"{path}: no scheduler file; expected what `dask scheduler --scheduler-file` writes")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:_SHOWN]


def _versions() -> tuple[str, str]:
    return __version__, ".".join(platform.python_version_tuple()[:2])


def _fault_of_versions(wanted: tuple[str, str]) -> str:
    """Returns why a worker has other versions than the process whose tasks it does; empty if it has the same."""
    if _versions() == wanted:
        return ""
    theirs, ours = ("protlm {} and Python {}".format(*pair) for pair in (_versions(), wanted))
    return (
        f"the worker on {socket.gethostname()} has {theirs}, and this process {ours}; start the workers with the "
        "versions of this process"
    )


def _itself(shared: Any) -> Any:
    return shared


def _ended(mark: Path) -> Path:
    """Returns the name that the mark of a run gets when the run has ended."""
    return mark.with_name(mark.name.replace(_MARK, _ENDED, 1))


def _fault_of_paths(paths: Sequence[str]) -> str:
    """Returns which path a worker does not see; empty if it sees all."""
    for path in paths:
        if not os.path.exists(path):
            return (
                f"the worker on {socket.gethostname()} does not see {path}; inputs, model and output must be on a file "
                "system that all machines share, under the same paths"
            )
    return ""


def _fault_of_mark(path: Path) -> str:
    """Returns why a worker does not see the mark of a run that goes on; empty if it sees it."""
    end = time.monotonic() + _NEW_FILE_SECONDS
    # Listing a folder makes a network file system ask its server, unlike looking for a name.
    while path.name not in (names := os.listdir(path.parent)):
        if _ended(path).name in names:
            return "the run of this task has ended"
        if time.monotonic() > end:
            return (
                f"the worker on {socket.gethostname()} sees another folder as {path.parent}; inputs, model and output "
                "must be on a file system that all machines share"
            )
        time.sleep(1)
    return ""


class _Mark:
    """The mark of a run, for its tasks to look at now and then."""

    def __init__(self, path: Path) -> None:
        self._ended, self._looked, self._is_there = _ended(path), time.monotonic(), True

    def is_there(self) -> bool:
        """Returns whether the run went on a moment ago."""
        if time.monotonic() > self._looked + _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._is_there = self._ended.parent.is_dir() and not self._ended.exists()
        return self._is_there


def _perform(mark: str, versions: tuple[str, str], shared: Any, function: Callable[[Any, Any], Any], task: Any) -> Any:
    """Does a task on a worker; an error that would come up anywhere is returned, any other raised for another try."""
    from distributed import get_worker

    # Dask has its workers give every byte back.
    keep_memory()
    threads_of_task.set(get_worker().state.nthreads)
    is_task_wanted.set(_Mark(Path(mark)).is_there)
    fault = _fault_of_versions(versions) or _fault_of_paths([str(Path(mark).parent)]) or _fault_of_mark(Path(mark))
    if fault:
        return _Failed(ProtlmError(fault))
    try:
        return function(shared, task)
    except ProtlmError as error:
        return _Failed(error)
    except OSError as error:
        # With the host: another one may have the file, or room on its disk.
        raise OSError(f"{error} (on {socket.gethostname()})") from error
