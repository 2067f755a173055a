"""Time and peak memory of attention against length: which cases are measured, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from protlm.ops import favor_attention
from scripts.attention_calls import BOTH, FORWARD, HEAD_DIM, Attention, draw_inputs, exact, peak_above_inputs
from scripts.measuring import RETURN_FREED_MEMORY, SECONDS, in_a_process, take_turns, timed

NEAR_BLOCK = 32
_LABELS = {
    "favor": "FAVOR", "near-far": "near-far", "exact": "exact (SDPA)", "formed": "exact, matrix formed",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A measurement: of which implementation, whether it is causal, and whether gradients are made.

    `favor` is FAVOR, `near-far` FAVOR with exact weights in blocks of `NEAR_BLOCK`, `exact` is SDPA. `formed` is exact
    attention as the formula reads: the matrix of all pairs is in memory.
    """

    implementation: str
    causal: bool
    backward: bool

    @property
    def name(self) -> str:
        """For tables and plots."""
        return f"{_LABELS[self.implementation]}, {'causal' if self.causal else 'bidirectional'}"

    @property
    def work(self) -> str:
        """The passes that are timed."""
        return BOTH if self.backward else FORWARD

    @property
    def attention(self) -> Attention:
        """The function that is called."""
        if self.implementation == "formed":
            return _with_matrix_formed
        if self.implementation == "near-far":
            return partial(favor_attention, causal=self.causal, near_block=NEAR_BLOCK)
        return partial(favor_attention if self.implementation == "favor" else exact, causal=self.causal)


CASES = [
    Case(name, causal, backward)
    for backward in (False, True)
    for name, causal in (
        ("favor", False), ("favor", True), ("near-far", False), ("exact", False), ("exact", True), ("formed", False),
    )
]  # fmt: skip


def seconds(cases: Sequence[Case], length: int, repeats: int) -> dict[Case, list[float]]:
    """Returns the times of all cases, which take turns, after one turn to warm up."""
    inputs = draw_inputs(length)

    def call(case: Case) -> dict[str, float]:
        return timed(partial(inputs.outputs, case.attention, case.work))

    times = take_turns({case: partial(call, case) for case in cases}, repeats)
    return {case: measured[SECONDS] for case, measured in times.items()}


def peak_bytes(calls: Sequence[tuple[Case, int]]) -> list[int]:
    """Returns for each (case, length) the peak memory of one call above inputs and outputs, from a new process."""
    words = [(case.implementation, case.causal, case.backward, length) for case, length in calls]
    peaks: list[int] = in_a_process(RETURN_FREED_MEMORY, peaks_here, calls=words)
    return peaks


def peaks_here(calls: Sequence[tuple[str, bool, bool, int]]) -> list[int]:
    """Returns the peaks of calls in this process."""
    cases = [(Case(*words), length) for *words, length in calls]
    return [peak_above_inputs(case.attention, length, case.work) for case, length in cases]


def _with_matrix_formed(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Returns exact attention by its formula; the projection is not used."""
    return torch.softmax(q @ k.transpose(-1, -2) / HEAD_DIM**0.5, -1) @ v
