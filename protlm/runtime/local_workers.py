"""Workers of this machine: hides how processes are started, interrupted and ended, and that one worker is threads."""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from protlm.runtime.workers import NamedTask, Result, Task, Workers, WorkersError, is_task_wanted

# Threads help because nearly all of the work (hashing, parsing, copying, writing) releases Python's lock.
_THREADS = 2
# Time between two checks of a worker that its parent is still alive.
_PARENT_SECONDS = 0.5

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES, _KEPT_BYTES = 32 << 20, 64 << 20

_shared: Any = None


class LocalWorkers(Workers):
    """Worker processes of this machine; a single worker is this process, with threads."""

    def __init__(self, number: int, shared: Any) -> None:
        """Starts nothing yet.

        Args:
            number: Number of processes.
            shared: The object passed to the function together with each task.
        """
        self._number = number
        self._shared = shared
        self._is_over = threading.Event()
        self._executor: Executor

    @property
    def number(self) -> int:
        """Number of processes."""
        return self._number

    def __enter__(self) -> "LocalWorkers":
        if self._number > 1:
            # A forked process inherits the shared object and starts quickly; forking is safe only on Linux.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._executor = ProcessPoolExecutor(
                self._number, mp_context=context, initializer=_begin, initargs=(self._shared, os.getpid())
            )
        else:
            self._executor = ThreadPoolExecutor(_THREADS)
        return self

    @property
    def are_here(self) -> bool:
        """Whether there is only one worker, which is this process."""
        return self._number == 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over.set()
        if kind is not None and isinstance(self._executor, ProcessPoolExecutor):
            # Tasks may take hours; they are repeatable, and their files appear whole or not at all.
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def _submit(self, function: Callable[[Any, Task], Result], task: Task) -> "Future[Result]":
        with _lost_process_told():
            if self._number == 1:
                return self._executor.submit(self._call_here, function, task)
            with _forks_of_threads_allowed(), _interrupts_put_off():
                return self._executor.submit(_call, function, task)

    def _call_here(self, function: Callable[[Any, Task], Result], task: Task) -> Result:
        is_task_wanted.set(lambda: not self._is_over.is_set())
        return function(self._shared, task)

    def _is_any_done(self, futures: Sequence["Future[Any]"], seconds: float) -> bool:
        return bool(wait(futures, seconds, FIRST_COMPLETED).done)

    def _result(self, task: NamedTask, future: "Future[Any]") -> Any:
        with _lost_process_told():
            return future.result()


@contextlib.contextmanager
def _lost_process_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise WorkersError("a worker process died, perhaps for want of memory; try fewer --workers") from error


@contextlib.contextmanager
def _forks_of_threads_allowed() -> Iterator[None]:
    # Newer Pythons warn of every fork in a process with threads. The workers use no library that needs its threads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Delays Ctrl-C while a worker is started: one that the executor does not know yet would never be ended."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(shared: Any, parent: int) -> None:
    global _shared
    _shared = shared
    # Ctrl-C reaches every process of the terminal; only the parent reacts to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    keep_memory()
    # Not by asking for the parent here, which may be dead by now.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent was killed without ending its workers."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


@functools.cache
def keep_memory() -> None:
    """Makes glibc keep freed memory: requesting memory anew for each piece takes a tenth of the time."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_shared, task)
