"""Work is shared among processes so that its result does not depend on their number."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from protlm.errors import ProtlmError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Threads help because nearly all of the work (hashing, parsing, copying, writing) releases Python's lock.
_THREADS = 2
# Time between two checks of a worker that its parent is still alive.
_PARENT_SECONDS = 0.5

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES, _KEPT_BYTES = 32 << 20, 64 << 20

_shared: Any = None


class Workers:
    """Worker processes that share a common object; a single worker is this process, with threads.

    Use it as a context manager; the processes end with it.

    Attributes:
        number: Number of processes.
    """

    def __init__(self, number: int, shared: Any) -> None:
        """Starts nothing yet.

        Args:
            number: Number of processes.
            shared: The object passed to the function together with each task.
        """
        self.number = number
        self._shared = shared
        self._executor: Executor

    def __enter__(self) -> "Workers":
        if self.number > 1:
            # A forked process inherits the shared object and starts quickly; forking is safe only on Linux.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._executor = ProcessPoolExecutor(
                self.number, mp_context=context, initializer=_begin, initargs=(self._shared,)
            )
        else:
            self._executor = ThreadPoolExecutor(_THREADS)
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yields function(shared, task) for each task, in the order of the tasks; few are in memory at a time.

        Raises:
            ProtlmError: A process died.
        """
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                if len(waiting) > self.number:
                    yield waiting.popleft().result()
                waiting.append(self._submit(function, task))
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ProtlmError(
                "a worker process died, perhaps for want of memory; go on with --resume and fewer --workers"
            ) from error

    def _submit(self, function: Callable[[Any, Task], Result], task: Task) -> "Future[Result]":
        if self.number == 1:
            return self._executor.submit(function, self._shared, task)
        with _forks_of_threads_allowed(), _interrupts_put_off():
            return self._executor.submit(_call, function, task)


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


def _begin(shared: Any) -> None:
    global _shared
    _shared = shared
    # Ctrl-C reaches every process of the terminal; only the parent reacts to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _keep_memory()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent was killed without ending its workers."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _keep_memory() -> None:
    """Makes glibc keep freed memory: requesting memory anew for each piece takes a tenth of the time."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_shared, task)
