"""Seconds and memory: calls take turns in one process; a peak, or other settings, need a process of their own.

Run as a module it is that process. torch is imported only where it is needed: a process that starts others begins them
with its own peak of memory.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "trembl_sample.fasta.gz"
"""Real proteins, the default of every benchmark that needs some."""
MEBIBYTE = 2**20
PAGE_BYTES = 4096
"""The smallest peak that shows: a smaller one counts as this, so that it has a ratio and a logarithm."""
WARM_UP_LENGTH = 256
"""Tokens of the call before a peak is measured, which pays what libraries allocate once."""
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Makes the C library give back what is freed: the heap that a warm-up leaves would cover a peak."""
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Makes the C library keep what is freed: code that allocates much and often, as the peers do, faults less."""

SECONDS = "seconds"

Times = dict[str, dict[str, list[float]]]
"""The value of every repeat, mostly seconds, by name of the call and of the quantity."""

_STATUS = Path("/proc/self/status")
_Key = TypeVar("_Key", bound=Hashable)
_Result = TypeVar("_Result")


def timed(call: Callable[[], object], name: str = SECONDS) -> dict[str, float]:
    """Returns the seconds of a call, by this name."""
    started = time.perf_counter()
    call()
    return {name: time.perf_counter() - started}


def take_turns(
    calls: Mapping[_Key, Callable[[], Mapping[str, float]]], repeats: int
) -> dict[_Key, dict[str, list[float]]]:
    """Returns the figures of calls that take turns within each repeat, after one round to warm up."""
    figures: dict[_Key, dict[str, list[float]]] = {}
    for repeat in range(repeats + 1):
        for key, call in calls.items():
            for name, value in call().items():
                if repeat:
                    figures.setdefault(key, {}).setdefault(name, []).append(value)
    return figures


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Lets torch use this many threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_a_process(variables: Mapping[str, str], function: Callable[..., Any], **arguments: Any) -> Any:
    """Returns the result of a function in a new process, under these environment variables.

    The process has as many threads as this one.

    Args:
        variables: Environment variables, beside those of this process.
        function: One that its module knows by its name.
        **arguments: Its arguments, which cross as JSON, as the result does.
    """
    import torch

    job = {"module": function.__module__, "function": function.__name__, "arguments": arguments}
    result = subprocess.run(
        [sys.executable, "-m", "scripts.measuring", str(torch.get_num_threads())], cwd=ROOT,
        env={**os.environ, **variables}, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


def can_measure_memory() -> bool:
    """Returns whether the system can reset a process's peak of memory: Linux can."""
    return Path("/proc/self/clear_refs").exists()


def resident_bytes() -> int:
    """Returns the resident memory of this process."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Returns the peak of the resident memory of this process."""
    return _status_bytes("VmHWM")


def peak_during(call: Callable[[], _Result]) -> tuple[int, _Result]:
    """Returns the peak of resident memory during a call, and the call's result, which is part of it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    result = call()
    return peak_bytes(), result


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS}: expected a line {field}, got none")


def main() -> None:
    """Prints the result of the function that standard input names."""
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    job = json.load(sys.stdin)
    function = getattr(importlib.import_module(job["module"]), job["function"])
    print(json.dumps(function(**job["arguments"])))


if __name__ == "__main__":
    main()
