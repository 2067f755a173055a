"""Memory that runs out in a forward pass: how it is recognised, and smaller rows in its place."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_NO_CPU_MEMORY = ("can't allocate memory", "not enough memory")


def computed_by_halves(
    compute: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> Iterator[Result | None]:
    """Yields the result of each segment of a row; where memory runs out, the row is halved.

    A segment that does not fit into memory even alone gives None.

    Args:
        compute: Computes a row.
        items: The segments of the row.
    """
    results = _unless_memory_runs_out(compute, items)
    if results is not None:
        yield from results
    elif len(items) == 1:
        yield None
    else:
        half = len(items) // 2
        yield from computed_by_halves(compute, items[:half])
        yield from computed_by_halves(compute, items[half:])


def _unless_memory_runs_out(
    compute: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> Sequence[Result] | None:
    try:
        return compute(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not inside `except`, where the traceback would keep the tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_CPU_MEMORY)
