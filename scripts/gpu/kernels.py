"""The parts about kernels: whether they are right, and how long they take."""

import itertools
from collections.abc import Iterator
from typing import Any

from protlm.gpu_check import parity as comparison
from protlm.gpu_check import ranks, timing, waiting
from scripts.gpu.setting import Setting

_TINY = comparison.Case(length=30, head_dim=16, features=32, heads=1)
_REPEATS = 10


def parity(setting: Setting) -> Iterator[dict[str, Any]]:
    """Yields the outcome of every case of `python -m protlm.gpu_check`."""
    backend = "triton" if setting.device.startswith("cuda") else "torch"
    cases, steps, rank_cases = comparison.cases(), waiting.steps(), ranks.cases()
    if setting.is_tiny:
        cases, steps, rank_cases = [_TINY], steps[:1], []
    outcomes = itertools.chain(
        comparison.compare_cases(cases, setting.device, backend),
        waiting.try_steps(steps, setting.device),
        ranks.compare_cases(rank_cases, setting.device, backend),
    )
    yield from (vars(outcome) for outcome in outcomes)


def times(setting: Setting) -> Iterator[dict[str, Any]]:
    """Yields the times of attention; torch.compile only at one length, as compiling takes half a minute."""
    lengths, tokens, repeats = timing.LENGTHS, timing.TOKENS, _REPEATS
    if setting.is_tiny:
        lengths, tokens, repeats = (16,), 16, 1
    for length in lengths:
        compiles = length == 8192
        yield from timing.measure((length,), setting.device, setting.gpu_name, repeats, tokens, compiles=compiles)
