"""The measurements of the training-step benchmark: which steps take turns, and which need a process of their own."""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from protlm.config import DataConfig, TrainConfig
from protlm.data.batching.batches import training_batch
from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import MaskRates, Objective
from protlm.data.batching.rows import training_rows
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.mixture import Mixture
from scripts.bench.models import Sizes
from scripts.bench.train_step_models import PROTLM, build, draw_task
from scripts.measuring import (
    RETURN_FREED_MEMORY,
    TUNED_MALLOC,
    WARM_UP_LENGTH,
    Times,
    in_a_process,
    peak_during,
    resident_bytes,
    take_turns,
    timed,
)

STEP = "step"
"""The pass that is timed: forward, loss, backward and update."""


def speed(names: Sequence[str], sizes: Sizes, batch: int, length: int, repeats: int) -> Times:
    """Returns the times of one step of each model, which take turns."""
    task = draw_task(batch, length)
    steps = {name: partial(build(name, sizes, length).step, task) for name in names}
    return take_turns({name: partial(timed, step, STEP) for name, step in steps.items()}, repeats)


def tuned_malloc(names: Sequence[str], sizes: Sizes, batch: int, length: int, repeats: int) -> Times:
    """Returns the same in a process whose memory allocation favours heavy allocators."""
    times: Times = in_a_process(
        TUNED_MALLOC, speed_here, names=list(names), sizes=asdict(sizes), batch=batch, length=length, repeats=repeats
    )
    return times


def speed_here(names: Sequence[str], sizes: dict[str, int], batch: int, length: int, repeats: int) -> Times:
    """Returns the times in this process."""
    return speed(names, Sizes(**sizes), batch, length, repeats)


def peak_bytes(names: Sequence[str], sizes: Sizes, length: int) -> dict[str, dict[str, int]]:
    """Returns the peaks of one step of each model, from new processes: `whole`, and `above` weights and optimizer."""
    return {
        name: in_a_process(RETURN_FREED_MEMORY, peaks_here, name=name, sizes=asdict(sizes), length=length)
        for name in names
    }


def peaks_here(name: str, sizes: dict[str, int], length: int) -> dict[str, int]:
    """Returns the peaks of one step in this process; a small model before it pays what libraries allocate once."""
    shape, short = Sizes(**sizes), min(length, WARM_UP_LENGTH)
    build(name, replace(shape, num_layers=1), short).step(draw_task(1, short))
    gc.collect()
    task = draw_task(1, length)
    empty = resident_bytes()
    learner = build(name, shape, length)
    # The first update makes the state of the optimizer.
    learner.step(draw_task(1, short))
    before = resident_bytes()
    peak, _ = peak_during(partial(learner.step, task))
    return {"whole": peak - empty, "above": peak - before}


def data(dataset: Path, sizes: Sizes, tokens_per_batch: int, steps: int) -> dict[str, Any]:
    """Returns the tokens and residues of the rows of training, and for how long each step waited for its row.

    The rows are those of `protlm train`, made as by default between the steps; the steps are those of the benchmark.
    """
    config, proteins = DataConfig(tokens_per_batch=tokens_per_batch), Mixture([open_dataset(dataset).split("train")])
    objective = Objective(causal=False, rates=MaskRates(TrainConfig().mask_rate))
    plan = training_rows(Draws.of(proteins, config, seed=0), proteins.lengths, config)
    batches = (training_batch(row, proteins, config, 0, objective) for row in plan)
    learner = build(PROTLM, sizes, tokens_per_batch)
    columns: dict[str, Any] = {"row_tokens": [], "residues": [], "waited": [], "seconds": []}
    # The first step warms up.
    for step in range(steps + 1):
        started = time.perf_counter()
        row = next(batches)
        waited = time.perf_counter() - started
        logits = learner.model(row.tokens, row.cu_seqlens, row.target_positions)
        learner.update(F.cross_entropy(logits, row.targets))
        measured = (len(row.tokens), row.num_residues, waited, time.perf_counter() - started)
        if step:
            for values, value in zip(columns.values(), measured, strict=True):
                values.append(value)
    return {"tokens_per_batch": tokens_per_batch} | columns
