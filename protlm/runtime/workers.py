"""Workers share tasks, so that the result does not depend on their number: processes of this machine, or those of Dask.

Nobody but who opens them knows which they are. A task is repeatable, and what it makes lies in files of its folder, so
that a worker may be lost at any time.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from protlm.errors import ProtlmError

if TYPE_CHECKING:
    from protlm.runtime.dask_workers import DaskCluster


class WorkersError(ProtlmError):
    """Workers, or what connects them, failed; the same work may succeed on others, or later."""


class NamedTask(Protocol):
    """A task of workers."""

    @property
    def title(self) -> str:
        """What the task is about, for a message: a file, or the number of a part of the work."""


Task = TypeVar("Task", bound=NamedTask)
Result = TypeVar("Result")

_WAIT_SECONDS = 0.5
"""Time between two looks at what happens meanwhile."""

threads_of_task: ContextVar[int | None] = ContextVar("threads_of_task", default=None)
"""Threads that a task of a cluster may use; None where nobody said."""
is_task_wanted: ContextVar[Callable[[], bool]] = ContextVar("is_task_wanted", default=lambda: True)
"""Tells whether the run of the current task still goes on; set by who does the task."""


class UnwantedTaskError(ProtlmError):
    """The run of a task has ended, so that nobody waits for its result."""


def check_wanted() -> None:
    """Ends a task that nobody waits for any longer; long tasks call it now and then, and before they publish a file.

    Raises:
        UnwantedTaskError: The run of the task has ended.
    """
    if not is_task_wanted.get()():
        raise UnwantedTaskError("the run of this task has ended")


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Where the scheduler of a Dask cluster is: one of the two.

    Attributes:
        address: Its address, such as `tcp://10.0.0.1:8786`.
        file: A file that holds the address, as `dask scheduler --scheduler-file` writes it.
    """

    address: str | None = None
    file: Path | None = None


def nothing() -> None:
    """Does nothing: the default of what happens while a result is awaited."""


class Workers(ABC):
    """Workers that share a common object. Use it as a context manager."""

    @property
    @abstractmethod
    def number(self) -> int:
        """Number of tasks that are done at a time."""

    @property
    @abstractmethod
    def are_here(self) -> bool:
        """Whether tasks are done in this process, so that their data are not copied."""

    @abstractmethod
    def __enter__(self) -> "Workers": ...

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def in_order(
        self,
        function: Callable[[Any, Task], Result],
        tasks: Iterable[Task],
        *,
        ahead: int = 0,
        meanwhile: Callable[[], object] = nothing,
    ) -> Iterator[Result]:
        """Yields function(shared, task) for each task, in the order of the tasks; few are in memory at a time.

        Args:
            function: A function of a module, which the workers import.
            tasks: The tasks.
            ahead: Most tasks, with their results, in memory where one of them takes long: meanwhile the workers go on
                with those after it. 0: no more than otherwise.
            meanwhile: Called now and then while a result is awaited.

        Raises:
            WorkersError: Workers were lost and cannot be replaced, or a task fails on all of them.
            Exception: As the function raises.
        """
        waiting: deque[tuple[Task, Any]] = deque()
        at_work: list[Any] = []
        for task in tasks:
            while len(waiting) > self.num_waiting:
                if waiting[0][1].done():
                    yield self._result(*waiting.popleft())
                    continue
                at_work = [future for future in at_work if not future.done()]
                if len(at_work) <= self.num_waiting and len(waiting) < ahead:
                    break
                awaited = at_work if len(waiting) < ahead else [waiting[0][1]]
                if not self._is_any_done(awaited, _WAIT_SECONDS):
                    meanwhile()
                elif not any(future.done() for future in awaited):
                    # Lost, as the result tells.
                    yield self._result(*waiting.popleft())
            waiting.append((task, self._submit(function, task)))
            at_work = [*(future for future in at_work if not future.done()), waiting[-1][1]]
        while waiting:
            while not self._is_any_done([waiting[0][1]], _WAIT_SECONDS):
                meanwhile()
            yield self._result(*waiting.popleft())

    @property
    def num_waiting(self) -> int:
        """Number of tasks at work, besides one, before a result is awaited."""
        return self.number

    @abstractmethod
    def _submit(self, function: Callable[[Any, Task], Result], task: Task) -> Any:
        """Hands out a task, and returns its future."""

    @abstractmethod
    def _is_any_done(self, futures: Sequence[Any], seconds: float) -> bool:
        """Waits until a task of some has ended, and returns whether one has.

        Args:
            futures: The futures of the tasks, at least one.
            seconds: Longest time to wait, above 0.
        """

    @abstractmethod
    def _result(self, task: NamedTask, future: Any) -> Any:
        """Returns the result of a task that has ended, or raises its error."""


@contextlib.contextmanager
def connected(scheduler: Scheduler | None) -> Iterator["DaskCluster | None"]:
    """Connects to the scheduler of a Dask cluster for a `with` block; without one, to nothing.

    Raises:
        ProtlmError: Dask is not installed, nobody answers there, or a worker has another version of protlm or Python.
    """
    if scheduler is None:
        yield None
        return
    # Takes most of a second to import, and is an extra.
    from protlm.runtime.dask_workers import DaskCluster

    with DaskCluster(scheduler) as cluster:
        yield cluster


def open_workers(
    number: int,
    cluster: "DaskCluster | None",
    shared: Any,
    folder: Path,
    inputs: Sequence[str] = (),
    *,
    one_per_process: bool = False,
) -> Workers:
    """Returns the workers of a cluster, or so many of this machine; nothing is started before the `with` block.

    Args:
        number: Processes of this machine; unused with a cluster.
        cluster: What `connected` returned.
        shared: The object passed to the function together with each task.
        folder: The folder of the work, which all workers must see under this path.
        inputs: Absolute paths of what else they must see.
        one_per_process: A process of a cluster does one task at a time, with all of its threads.
    """
    if cluster is not None:
        from protlm.runtime.dask_workers import DaskWorkers

        return DaskWorkers(cluster, shared, folder, inputs, one_per_process=one_per_process)
    from protlm.runtime.local_workers import LocalWorkers

    return LocalWorkers(number, shared)
