"""Time and memory of a forward pass, each measured in a process of its own, so that nothing of before is counted."""

import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

LENGTHS = (512, 4096, 34350)
"""Residues of the proteins; the last is titin's, the longest known."""
MOST_SECONDS = 120
_SHORT_SECONDS = 2
_WARM_UP_RESIDUES = 64


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one forward pass of a protein with logits at every position.

    Attributes:
        length: Residues of the protein, which are random.
        outcome: Whether it was `measured`, was not over after two minutes (`time`), or lacked memory (`memory`).
        seconds: Wall time, the median of three passes, or of one that takes longer than 2 seconds; None if it was not
            measured.
        peak_bytes: Memory that it took above the model, at most; None where the system does not tell.
    """

    length: int
    outcome: Literal["measured", "time", "memory"]
    seconds: float | None
    peak_bytes: int | None


def measure_costs(model: str | Path, max_residues: int | None) -> list[Cost]:
    """Returns the cost of a pass on the CPU, for each of `LENGTHS` that the model's positions reach.

    Args:
        model: MODEL as users write it.
        max_residues: Longest protein that it takes; None: any.
    """
    lengths = [length for length in LENGTHS if max_residues is None or length <= max_residues]
    return [_cost(model, length) for length in lengths or [max_residues or LENGTHS[0]]]


def _cost(model: str | Path, length: int) -> Cost:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, str(model), length), daemon=True)
    process.start()
    sender.close()
    measured: tuple[float, int | None] | None = None
    outcome: Literal["measured", "time", "memory"] = "time"
    try:
        # Loading the model is not counted.
        if receiver.poll(MOST_SECONDS) and receiver.recv() == "loaded" and receiver.poll(MOST_SECONDS):
            measured = receiver.recv()
            outcome = "memory" if measured is None else "measured"
    except EOFError:
        outcome = "memory"  # killed without a word, as the system does where memory is short
    finally:
        process.kill()
        process.join()
    seconds, peak = measured or (None, None)
    return Cost(length=length, outcome=outcome, seconds=seconds, peak_bytes=peak)


def _measure(sender: Connection, model: str, length: int) -> None:
    """Sends the seconds and the peak memory of a pass; runs in a process of its own."""
    import numpy as np
    import torch

    from protlm.data.batching.batches import pack_row
    from protlm.inference.memory import is_out_of_memory
    from protlm.pretrained.model_names import read_named_model
    from protlm.vocabulary import FIRST_RESIDUE, NUM_STANDARD_RESIDUES

    network, _ = read_named_model(model)
    generator = np.random.default_rng(0)

    def run(num_residues: int) -> float:
        residues = generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_STANDARD_RESIDUES, num_residues)
        tokens, bounds = pack_row([residues.astype(np.uint8)])
        start = time.perf_counter()
        with torch.inference_mode():
            network(tokens, bounds)
        return time.perf_counter() - start

    run(min(_WARM_UP_RESIDUES, length))
    sender.send("loaded")
    before = _reset_peak()
    try:
        times = [run(length)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sender.send(None)
        return
    peak = None if before is None else max(0, _peak_bytes() - before)
    if times[0] < _SHORT_SECONDS:
        times += [run(length), run(length)]
    sender.send((statistics.median(times), peak))


def _reset_peak() -> int | None:
    """Starts to measure the peak of the memory anew, and returns the memory in use; None where the system hides it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _peak_bytes()


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
