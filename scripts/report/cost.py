"""Time and peak memory of attention against length: hides how a peak is measured, in a process of its own.

Run as a module it is that process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from protlm.ops import draw_projection, favor_attention

ROOT = Path(__file__).resolve().parents[2]
HEADS, HEAD_DIM, FEATURES = 8, 64, 256
STATUS = Path("/proc/self/status")
WARM_UP_LENGTH = 256
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Makes the C library give back what is freed: what the warm-up leaves in its heap would hide a peak."""


@dataclass(frozen=True)
class Case:
    """What is measured: `favor`, `exact` (torch SDPA) or `formed`, which way it looks, and whether gradients are made.

    `formed` is exact attention as the formula reads: the matrix of all pairs is in memory.
    """

    implementation: str
    causal: bool
    backward: bool

    @property
    def name(self) -> str:
        """For tables and plots."""
        label = {"favor": "FAVOR", "exact": "exact (SDPA)", "formed": "exact, matrix formed"}[self.implementation]
        return f"{label}, {'causal' if self.causal else 'bidirectional'}"

    @property
    def work(self) -> str:
        """What is timed."""
        return "forward + backward" if self.backward else "forward"


CASES = [
    Case(name, causal, backward)
    for backward in (False, True)
    for name, causal in (("favor", False), ("favor", True), ("exact", False), ("exact", True), ("formed", False))
]


def prepare(case: Case, length: int) -> Callable[[], list[Tensor]]:
    """Returns a call that computes the outputs, its inputs being made: the output, and gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_(case.backward) for _ in range(3))
    projection = draw_projection(FEATURES, HEAD_DIM, num_heads=HEADS, generator=generator)
    out_grad = torch.randn(shape, generator=generator) if case.backward else None

    def call() -> list[Tensor]:
        if case.implementation == "favor":
            out = favor_attention(q, k, v, projection, causal=case.causal)
        elif case.implementation == "formed":
            out = torch.softmax(q @ k.transpose(-1, -2) / HEAD_DIM**0.5, -1) @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        return [out] if out_grad is None else [out.detach(), *torch.autograd.grad(out, (q, k, v), out_grad)]

    return call


def seconds(cases: Sequence[Case], length: int, repeats: int) -> dict[Case, list[float]]:
    """Returns the times of all cases, which take turns, after one turn to warm up."""
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for repeat in range(repeats + 1):
        for case in cases:
            call = prepare(case, length)
            started = time.perf_counter()
            call()
            elapsed = time.perf_counter() - started
            if repeat:
                times[case].append(elapsed)
    return times


def can_measure_memory() -> bool:
    """Tells whether the system can reset a process's peak: Linux can."""
    return Path("/proc/self/clear_refs").exists()


def peak_bytes(calls: Sequence[tuple[Case, int]]) -> list[int]:
    """Returns for each (case, length) the peak memory of one call above inputs and outputs, from a new process."""
    words = [[case.implementation, case.causal, case.backward, length] for case, length in calls]
    result = subprocess.run(
        [sys.executable, "-m", "scripts.report.cost", str(torch.get_num_threads())],
        cwd=ROOT, env={**os.environ, **RETURN_FREED_MEMORY}, input=json.dumps(words), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    peaks: list[int] = json.loads(result.stdout)
    return peaks


def peak_bytes_here(case: Case, length: int) -> int:
    """Returns the peak of one call in this process; a short call before it pays what libraries allocate once."""
    prepare(case, WARM_UP_LENGTH)()
    call = prepare(case, length)
    before = status_bytes("VmRSS")
    reset_peak()
    outputs = call()
    return status_bytes("VmHWM") - before - sum(output.nbytes for output in outputs)


def reset_peak() -> None:
    """Makes what is resident now the peak of this process."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(field: str) -> int:
    """Returns a size that Linux tells of this process: `VmRSS` is what is resident, `VmHWM` its peak."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS}: expected a line {field}, got none")


def main() -> None:
    """Prints the peaks of the calls that standard input lists."""
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps([peak_bytes_here(Case(*words), length) for *words, length in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
