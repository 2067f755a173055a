"""Workers of a Dask cluster: hides the client, the checks before the first task, retries, and the messages of a loss.

A scheduler runs what it is sent, so it is a cluster of the user's own; tasks and results go as pickles, by Dask's
protocol, and only between its machines.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import platform
import socket
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protlm import __version__
from protlm.errors import ProtlmError
from protlm.runtime import run_marks
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
"""Tasks that are handed out at least, so that a cluster that grows with them sees them."""
_ASK_SECONDS = 5
"""Time between two questions to the scheduler for its workers."""
_SHOWN = 300
"""Letters of a message of Dask that are shown."""
_LOST = "lost the connection to the Dask scheduler"
_COMPARED_PACKAGES = ("torch", "numpy", "h5py")
"""Packages on whose version the bytes of a result depend."""
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
                self.client = _within(
                    2 * _CONNECT_SECONDS,
                    lambda: Client(address, timeout=_CONNECT_SECONDS, set_as_default=False, name="protlm"),
                )
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
            answers = self.client.run(function, *arguments, on_error="return")
        except (OSError, CancelledError) as error:
            raise WorkersError(_LOST) from error
        faults = []
        for address, answer in answers.items():
            if isinstance(answer, ImportError | AttributeError):
                raise ProtlmError(
                    f"the worker at {address} cannot load protlm ({_first_line(answer)}); install protlm {__version__} "
                    "for the workers"
                ) from answer
            if isinstance(answer, OSError | CancelledError):
                # It has gone since; whoever does a task looks again.
                continue
            if isinstance(answer, BaseException):
                raise answer
            faults.append(answer)
        return faults

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
        self._num_submitted = 0
        # The tasks that had not ended when the last one was handed out, with the addresses of the workers they are for.
        self._pending: dict[Any, str | None] = {}
        # Threads of each worker by its address.
        self._workers: dict[str, int] = {}
        self._asked = float("-inf")

    @property
    def number(self) -> int:
        """Number of tasks that the workers do at a time, at least 1; as it was some seconds ago."""
        return max(1, sum(self._places().values()))

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
        self._mark = run_marks.new_mark(self._folder)
        try:
            for fault in filter(None, self._cluster.faults(_fault_of_paths, [str(self._folder), *self._inputs])):
                raise ProtlmError(fault)
            # A task, since Dask repeats it where its result is lost with a worker.
            self._shared_future = self._handed_out(_itself, self._shared)
        except BaseException:
            run_marks.end_run(self._mark)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is at work on a worker goes on until it looks for the mark; a lost scheduler has nothing to cancel.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._cluster.client.cancel(list(self._pending))
        run_marks.end_run(self._mark)

    def _places(self) -> dict[str, int]:
        """Returns the number of tasks that each worker does at a time, by its address; as it was some seconds ago."""
        if time.monotonic() > self._asked + _ASK_SECONDS:
            self._asked = time.monotonic()
            # A lost scheduler is told where a result is awaited.
            with contextlib.suppress(Exception):
                self._workers = self._cluster.client.nthreads()
        return dict.fromkeys(self._workers, 1) if self._is_one_per_process else self._workers

    def _least_loaded(self) -> str | None:
        """Returns the address of the worker whose unfinished tasks are fewest for its threads; None without workers.

        Left to itself, Dask gives tasks to the worker that has what they share, as long as that has a thread.
        """
        places = self._places()
        self._pending = {future: address for future, address in self._pending.items() if not future.done()}
        loads = Counter(self._pending.values())
        return min(places, key=lambda address: loads[address] / places[address], default=None)

    def _submit(self, function: Callable[[Any, Task], Result], task: Task) -> Any:
        self._num_submitted += 1
        address = self._least_loaded()
        future = self._handed_out(
            _perform, str(self._mark), _versions(), self._shared_future, function, task,
            key=f"{function.__name__.strip('_')}-{uuid.uuid4().hex}", retries=_TRIES - 1,
            priority=-self._num_submitted, workers=address and [address], allow_other_workers=address is not None,
        )  # fmt: skip
        self._pending[future] = address
        return future

    def _handed_out(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with warnings.catch_warnings():
                # Of large objects in tasks.
                warnings.simplefilter("ignore")
                return self._cluster.client.submit(function, *arguments, pure=False, **options)
        except Exception as error:  # what Dask raises without a connection is of several types
            raise WorkersError(_LOST) from error

    def _is_any_done(self, futures: Sequence[Any], seconds: float) -> bool:
        from distributed import wait

        try:
            with self._cluster.client.as_current():
                wait(futures, timeout=seconds, return_when="FIRST_COMPLETED")
        except TimeoutError:
            return False
        except (CancelledError, OSError):
            # Told by the result.
            return True
        return True

    def _result(self, task: NamedTask, future: Any) -> Any:
        from distributed import KilledWorker

        self._pending.pop(future, None)
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


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """Returns the result of a function that may never return.

    Raises:
        TimeoutError: It takes longer; it goes on in a thread that does not keep Python from ending.
    """
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # raised again below
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():
            raise
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None


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


@functools.cache
def _installed() -> Mapping[str, str]:
    # Builds of one version, such as 2.13.0+cpu and 2.13.0+cu130, count as the same.
    return {name: importlib.metadata.version(name).partition("+")[0] for name in _COMPARED_PACKAGES}


def _versions() -> Mapping[str, str]:
    """Returns the versions on which the result of a task depends, by the names of what has them."""
    return {"protlm": __version__, "Python": ".".join(platform.python_version_tuple()[:2]), **_installed()}


def _fault_of_versions(wanted: Mapping[str, str]) -> str:
    """Returns why a worker has other versions than the process whose tasks it does; empty if it has the same."""
    own = _versions()
    others = [name for name in wanted if own.get(name) != wanted[name]]
    if not others:
        return ""
    theirs, ours = (
        " and ".join(f"{name} {versions.get(name, 'of another protlm')}" for name in others)
        for versions in (own, wanted)
    )
    return (
        f"the worker on {socket.gethostname()} has {theirs}, and this process {ours}; start the workers with the "
        "versions of this process"
    )


def _itself(shared: Any) -> Any:
    return shared


def _fault_of_paths(paths: Sequence[str]) -> str:
    """Returns which path a worker does not see; empty if it sees all."""
    for path in paths:
        if not os.path.exists(path):
            return (
                f"the worker on {socket.gethostname()} does not see {path}; inputs, model and output must be on a file "
                "system that all machines share, under the same paths"
            )
    return ""


def _perform(
    mark: str, versions: Mapping[str, str], shared: Any, function: Callable[[Any, Any], Any], task: Any
) -> Any:
    """Does a task on a worker; an error that would come up anywhere is returned, any other raised for another try."""
    from distributed import get_worker

    # Dask has its workers give every byte back.
    keep_memory()
    threads_of_task.set(get_worker().state.nthreads)
    is_task_wanted.set(run_marks.MarkWatch(Path(mark)).is_there)
    folder = str(Path(mark).parent)
    fault = _fault_of_versions(versions) or _fault_of_paths([folder]) or run_marks.fault_of_mark(Path(mark))
    if fault:
        return _Failed(ProtlmError(fault))
    try:
        return function(shared, task)
    except ProtlmError as error:
        return _Failed(error)
    except OSError as error:
        # With the host: another one may have the file, or room on its disk.
        raise OSError(f"{error} (on {socket.gethostname()})") from error
