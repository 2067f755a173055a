"""The measurements of the attention benchmark: hides what takes turns with what, and what needs a process of its own.

Run as a module it is that process.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from protlm import read_records
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.batches import pack
from scripts.bench.attention_implementations import (
    BOTH,
    FORWARD,
    GEMM,
    Attention,
    Inputs,
    Times,
    draw_inputs,
    gemm,
    implementations,
    take_turns,
    timed,
    using_threads,
)
from scripts.report.cost import RETURN_FREED_MEMORY, ROOT, WARM_UP_LENGTH, reset_peak, status_bytes

SAMPLE = ROOT / "data" / "trembl_sample.fasta.gz"
PEER_MAX_LENGTH = 8192
"""Longer rows are timed for `LONG_ROWS` only: exact attention would take minutes, the formulas gigabytes."""
LONG_ROWS = ("favor", "favor relu")
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Makes the C library keep what is freed: who allocates much and often, as the peers do, is spared the page faults."""
NUM_PACKED_ROWS = 4
PACKED, UNPACKED = "packed", "one segment"


def speed(functions: Mapping[str, Attention], lengths: Sequence[int], repeats: int) -> dict[int, Times]:
    """Returns the times of all implementations and of a matrix product, by length."""
    found = {}
    for length in lengths:
        # One code object has few compiled forms before torch gives up, and every length needs two.
        torch.compiler.reset()
        inputs = draw_inputs(length)
        names = [name for name in functions if length <= PEER_MAX_LENGTH or name in LONG_ROWS]
        calls = {name: partial(timed, functions[name], inputs) for name in names}
        found[length] = take_turns({GEMM: gemm(), **calls}, repeats)
    return found


def threads(attention: Attention, length: int, counts: Sequence[int], repeats: int) -> Times:
    """Returns the times of one head of one sequence, by number of threads."""
    inputs = draw_inputs(length, heads=1)

    def call(count: int) -> dict[str, float]:
        with using_threads(count):
            return timed(attention, inputs)

    return take_turns({str(count): partial(call, count) for count in counts}, repeats)


def slope(attention: Attention, lengths: Sequence[int], repeats: int) -> Times:
    """Returns the times by length; the lengths take turns."""
    return take_turns({str(length): partial(timed, attention, draw_inputs(length)) for length in lengths}, repeats)


def packed(attention: Attention, row_tokens: int, repeats: int) -> Times:
    """Returns the times of some rows of packed proteins, and of the same rows taken as one protein each."""
    num_residues = np.array([len(record.sequence) for record in read_records(SAMPLE)])
    num_residues = num_residues[num_residues + SPECIAL_TOKENS_PER_SEGMENT <= row_tokens]
    rows: list[tuple[Attention, Inputs]] = []
    for stretch in itertools.islice(pack(num_residues, row_tokens), NUM_PACKED_ROWS):
        ends = np.cumsum(num_residues[stretch] + SPECIAL_TOKENS_PER_SEGMENT)
        bounds = torch.tensor([0, *ends.tolist()], dtype=torch.int32)
        rows.append((partial(attention, cu_seqlens=bounds), draw_inputs(int(ends[-1]))))

    def call(is_packed: bool) -> dict[str, float]:
        times = [timed(in_segments if is_packed else attention, inputs) for in_segments, inputs in rows]
        return {what: sum(seconds[what] for seconds in times) for what in (FORWARD, BOTH)}

    return take_turns({PACKED: partial(call, True), UNPACKED: partial(call, False)}, repeats)


def tuned_malloc(names: Sequence[str], length: int, repeats: int) -> Times:
    """Returns the times of these implementations in a process whose memory allocation suits those that need much."""
    times: Times = in_a_process(TUNED_MALLOC, "speed", names=list(names), length=length, repeats=repeats)
    return times


def peak_bytes(names: Sequence[str], length: int) -> dict[str, int]:
    """Returns for each the peak memory of a forward and a backward above inputs and outputs, from new processes."""
    return {name: in_a_process(RETURN_FREED_MEMORY, "peak", names=[name], length=length) for name in names}


def in_a_process(variables: Mapping[str, str], what: str, **job: Any) -> Any:
    """Returns the result of `run` under these environment variables, with as many threads as here."""
    job |= {"what": what, "threads": torch.get_num_threads()}
    result = subprocess.run(
        [sys.executable, "-m", "scripts.bench.attention_measurements"], cwd=ROOT, env={**os.environ, **variables},
        input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


def _peak_bytes_here(attention: Attention, length: int) -> int:
    """Returns the peak of one call in this process; a short call before it pays what libraries allocate once."""
    draw_inputs(WARM_UP_LENGTH).backward(attention)
    inputs = draw_inputs(length)
    before = status_bytes("VmRSS")
    reset_peak()
    outputs = inputs.backward(attention)
    return status_bytes("VmHWM") - before - sum(output.nbytes for output in outputs)


def run(job: Mapping[str, Any]) -> Any:
    """Returns the result of what a process of its own is asked for."""
    functions = implementations()
    chosen = {name: functions[name] for name in job["names"]}
    if job["what"] == "peak":
        (attention,) = chosen.values()
        return _peak_bytes_here(attention, job["length"])
    return speed(chosen, [job["length"]], job["repeats"])[job["length"]]


def main() -> None:
    """Prints the result of the job that standard input describes."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    print(json.dumps(run(job)))


if __name__ == "__main__":
    main()
