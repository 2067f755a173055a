"""Whether two processes that share a length get what one gets: hides how they are started and what they exchange."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from protlm.gpu_check.parity import (
    NAMES,
    SEGMENTS,
    Case,
    Drawn,
    Outcome,
    computed_by,
    differentiate,
    draw,
    error_of,
    expected_of,
    outcome_of,
)
from protlm.ops import favor_attention, local_bounds
from protlm.ops.cuda.launch import capability_of
from protlm.ops.cuda.tiles import MIN_CAPABILITY

RANKS = 2
SECONDS = 300
"""How long a rank waits for the other."""


def cases() -> list[Case]:
    """Returns a case of each way that ranks exchange states."""
    packed = Case(segments=SEGMENTS, is_masked=True)
    maps = ("positive", "oprf", "relu")
    return [*(replace(packed, feature_map=name) for name in maps), Case(is_masked=True), replace(packed, causal=True)]


def check(chosen: list[Case], device: str, backend: str) -> Iterator[Outcome]:
    """Yields the outcome of each case: on two GPUs by NCCL, where the first two are new enough, else by gloo on one."""
    if not chosen:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, (chosen, device, backend, folder), nprocs=RANKS)  # type: ignore[no-untyped-call]
            outcomes = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(RANKS)]
        except Exception as error:  # whatever a process died of; the last line of its traceback says it
            told = next(reversed(str(error).strip().splitlines()), type(error).__name__)
            yield Outcome(f"{RANKS} processes", backend, {}, told)
            return
    for of_ranks in zip(*outcomes, strict=True):
        yield max((Outcome(**found) for found in of_ranks), key=lambda outcome: outcome.fault is not None)


def _rank(rank: int, chosen: list[Case], device: str, backend: str, folder: str) -> None:
    """Runs in each process: compares this rank's part with that of the float64 twin, and writes what it found."""
    has_gpu_each = (
        torch.device(device).type == "cuda"
        and torch.cuda.device_count() >= RANKS
        and all(capability_of(index) >= MIN_CAPABILITY for index in range(RANKS))
    )
    if has_gpu_each:
        device = f"cuda:{rank}"
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if has_gpu_each else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
    )
    found = [_check_one(case, rank, device, backend) for case in chosen]
    (Path(folder) / str(rank)).write_text(json.dumps([asdict(outcome) for outcome in found]))
    dist.barrier()
    dist.destroy_process_group()


def _check_one(case: Case, rank: int, device: str, backend: str) -> Outcome:
    drawn = draw(case, device)
    length = drawn.tensors[0].shape[2]
    # Parts of different length; a segment goes on across them.
    start, stop = ((0, length * 3 // 7), (length * 3 // 7, length))[rank]
    part = _part(drawn, start, stop)
    found = differentiate(favor_attention, part, {"backend": backend, "process_group": dist.group.WORLD})
    expected = expected_of(drawn, case)
    errors = {
        name: error_of(a, b[:, :, start:stop], b) for name, a, b in zip(NAMES, found, expected, strict=True)
    }  # fmt: skip
    outcome = outcome_of(case, computed_by(part, backend), errors)
    return replace(outcome, case=f"{case}, {RANKS} processes")


def _part(drawn: Drawn, start: int, stop: int) -> Drawn:
    q, k, v, out_grad = (x[:, :, start:stop] for x in drawn.tensors)
    options = dict(drawn.options)
    if "token_mask" in options:
        options["token_mask"] = options["token_mask"][:, start:stop]
    if "cu_seqlens" in options:
        options["cu_seqlens"] = local_bounds(options["cu_seqlens"], start, stop)
    return Drawn((q, k, v, out_grad), drawn.projection, options)
