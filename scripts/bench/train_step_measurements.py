"""The measurements of the training-step benchmark: hides what takes turns with what, and what needs its own process.

Run as a module it is that process.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from protlm.config import DataConfig, TrainConfig
from protlm.data.batching.batches import Objective, training_batch, training_rows
from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import MaskRates
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.mixture import Mixture
from scripts.bench.attention_implementations import Times, take_turns
from scripts.bench.attention_measurements import TUNED_MALLOC
from scripts.bench.train_step_models import PROTLM, Learner, Sizes, Task, build, draw_task
from scripts.report.cost import RETURN_FREED_MEMORY, ROOT, WARM_UP_LENGTH, reset_peak, status_bytes

STEP = "step"
"""What is timed: forward, loss, backward and update."""


def speed(names: Sequence[str], sizes: Sizes, batch: int, length: int, repeats: int) -> Times:
    """Returns the times of one step of each model, which take turns."""
    task = draw_task(batch, length)
    calls = {name: partial(_timed, build(name, sizes, length), task) for name in names}
    return take_turns(calls, repeats)


def tuned_malloc(names: Sequence[str], sizes: Sizes, batch: int, length: int, repeats: int) -> Times:
    """Returns the same in a process whose memory allocation suits those that need much."""
    times: Times = in_a_process(
        TUNED_MALLOC, "speed", names=list(names), sizes=asdict(sizes), batch=batch, length=length, repeats=repeats
    )
    return times


def peak_bytes(names: Sequence[str], sizes: Sizes, length: int) -> dict[str, dict[str, int]]:
    """Returns the peaks of one step of each model, from new processes: `whole`, and `above` weights and optimizer."""
    return {
        name: in_a_process(RETURN_FREED_MEMORY, "peak", names=[name], sizes=asdict(sizes), length=length)
        for name in names
    }


def data(dataset: Path, sizes: Sizes, tokens_per_batch: int, steps: int) -> dict[str, Any]:
    """Returns what the rows of training hold, and for how long each of some steps waited for its row.

    The rows are those of `protlm train`, made as by default between the steps; the steps are those of the benchmark.
    """
    config, proteins = DataConfig(tokens_per_batch=tokens_per_batch), Mixture([open_dataset(dataset).split("train")])
    objective = Objective(causal=False, rates=MaskRates(TrainConfig().mask_rate))
    plan = training_rows(Draws.of(proteins, config, seed=0), proteins.lengths, config)
    batches = (training_batch(row, proteins, config, 0, objective) for row in plan)
    learner = build(PROTLM, sizes, tokens_per_batch)
    found: dict[str, Any] = {"row_tokens": [], "residues": [], "waited": [], "seconds": []}
    # The first step warms up.
    for step in range(steps + 1):
        started = time.perf_counter()
        row = next(batches)
        waited = time.perf_counter() - started
        logits = learner.model(row.tokens, row.cu_seqlens, row.target_positions)
        learner.update(F.cross_entropy(logits, row.targets))
        measured = (len(row.tokens), row.num_residues, waited, time.perf_counter() - started)
        if step:
            for values, value in zip(found.values(), measured, strict=True):
                values.append(value)
    return {"tokens_per_batch": tokens_per_batch} | found


def in_a_process(variables: Mapping[str, str], what: str, **job: Any) -> Any:
    """Returns the result of `run` under these environment variables, with as many threads as here."""
    job |= {"what": what, "threads": torch.get_num_threads()}
    result = subprocess.run(
        [sys.executable, "-m", "scripts.bench.train_step_measurements"], cwd=ROOT, env={**os.environ, **variables},
        input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


def run(job: Mapping[str, Any]) -> Any:
    """Returns the result of what a process of its own is asked for."""
    names, sizes, length = job["names"], Sizes(**job["sizes"]), job["length"]
    if job["what"] == "peak":
        (name,) = names
        return _peak_bytes_here(name, sizes, length)
    return speed(names, sizes, job["batch"], length, job["repeats"])


def _timed(learner: Learner, task: Task) -> dict[str, float]:
    started = time.perf_counter()
    learner.step(task)
    return {STEP: time.perf_counter() - started}


def _peak_bytes_here(name: str, sizes: Sizes, length: int) -> dict[str, int]:
    """Returns the peaks of one step in this process; a small model before it pays what libraries allocate once."""
    short = min(length, WARM_UP_LENGTH)
    build(name, replace(sizes, num_layers=1), short).step(draw_task(1, short))
    gc.collect()
    task = draw_task(1, length)
    empty = status_bytes("VmRSS")
    learner = build(name, sizes, length)
    # The first update makes the state of the optimizer.
    learner.step(draw_task(1, short))
    before = status_bytes("VmRSS")
    reset_peak()
    learner.step(task)
    peak = status_bytes("VmHWM")
    return {"whole": peak - empty, "above": peak - before}


def main() -> None:
    """Prints the result of the job that standard input describes."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    print(json.dumps(run(job)))


if __name__ == "__main__":
    main()
