"""The measurements of the attention benchmark: which calls take turns, and which need a process of their own."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from protlm import read_records
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.rows import pack
from scripts.attention_calls import BOTH, FORWARD, Attention, Inputs, draw_inputs, peak_above_inputs
from scripts.bench.attention_implementations import GEMM, both_passes, gemm, implementations
from scripts.measuring import RETURN_FREED_MEMORY, SAMPLE, TUNED_MALLOC, Times, in_a_process, take_turns, using_threads

PEER_MAX_LENGTH = 8192
"""Longer rows are timed for `LONG_ROWS` only: exact attention would take minutes, the formulas gigabytes."""
LONG_ROWS = ("favor", "favor relu")
NUM_PACKED_ROWS = 4
PACKED, UNPACKED = "packed", "one segment"
FAVOR = "favor"
FAVOR_HALF, EXACT_HALF = "favor, bfloat16", "exact (SDPA), bfloat16"


def speed(functions: Mapping[str, Attention], lengths: Sequence[int], repeats: int) -> dict[int, Times]:
    """Returns the times of all implementations and of a matrix product, by length."""
    times = {}
    for length in lengths:
        # One code object has few compiled forms before torch gives up, and every length needs two.
        torch.compiler.reset()
        inputs = draw_inputs(length)
        names = [name for name in functions if length <= PEER_MAX_LENGTH or name in LONG_ROWS]
        calls = {name: partial(both_passes, functions[name], inputs) for name in names}
        times[length] = take_turns({GEMM: gemm(), **calls}, repeats)
    return times


def half(favor: Attention, exact: Attention, length: int, repeats: int) -> Times:
    """Returns the times of FAVOR in float32, and in bfloat16 beside exact attention."""
    full = draw_inputs(length)
    short = full.to(torch.bfloat16)
    calls = {FAVOR: (favor, full), FAVOR_HALF: (favor, short), EXACT_HALF: (exact, short)}
    return take_turns({name: partial(both_passes, *call) for name, call in calls.items()}, repeats)


def threads(attention: Attention, length: int, counts: Sequence[int], repeats: int) -> Times:
    """Returns the times of one head of one sequence, by number of threads."""
    inputs = draw_inputs(length, heads=1)

    def call(count: int) -> dict[str, float]:
        with using_threads(count):
            return both_passes(attention, inputs)

    return take_turns({str(count): partial(call, count) for count in counts}, repeats)


def slope(attention: Attention, lengths: Sequence[int], repeats: int) -> Times:
    """Returns the times by length; the lengths take turns."""
    calls = {str(length): partial(both_passes, attention, draw_inputs(length)) for length in lengths}
    return take_turns(calls, repeats)


def packed(attention: Attention, row_tokens: int, repeats: int) -> Times:
    """Returns the times of some rows of packed proteins, and of the same rows taken as one protein each."""
    num_residues = np.array([len(record.sequence) for record in read_records(SAMPLE)])
    num_residues = num_residues[num_residues + SPECIAL_TOKENS_PER_SEGMENT <= row_tokens]
    rows: list[tuple[Attention, Inputs]] = []
    for proteins in itertools.islice(pack(num_residues, row_tokens), NUM_PACKED_ROWS):
        ends = np.cumsum(num_residues[proteins] + SPECIAL_TOKENS_PER_SEGMENT)
        bounds = torch.tensor([0, *ends.tolist()], dtype=torch.int32)
        rows.append((partial(attention, cu_seqlens=bounds), draw_inputs(int(ends[-1]))))

    def call(is_packed: bool) -> dict[str, float]:
        times = [both_passes(in_segments if is_packed else attention, inputs) for in_segments, inputs in rows]
        return {work: sum(seconds[work] for seconds in times) for work in (FORWARD, BOTH)}

    return take_turns({PACKED: partial(call, True), UNPACKED: partial(call, False)}, repeats)


def tuned_malloc(names: Sequence[str], length: int, repeats: int) -> Times:
    """Returns the times of these implementations in a process whose memory allocation favours heavy allocators."""
    times: Times = in_a_process(TUNED_MALLOC, speed_here, names=list(names), length=length, repeats=repeats)
    return times


def speed_here(names: Sequence[str], length: int, repeats: int) -> Times:
    """Returns the times of these implementations at one length."""
    functions = implementations()
    return speed({name: functions[name] for name in names}, [length], repeats)[length]


def peak_bytes(names: Sequence[str], length: int) -> dict[str, int]:
    """Returns for each the peak memory of a forward and a backward above inputs and outputs, from new processes."""
    return {name: in_a_process(RETURN_FREED_MEMORY, peak_here, name=name, length=length) for name in names}


def peak_here(name: str, length: int) -> int:
    """Returns the peak of one call in this process."""
    return peak_above_inputs(implementations()[name], length, BOTH)
