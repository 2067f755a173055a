"""Comparison of two processes that share a length with the float64 twin of one: how they start and report."""

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
from protlm.gpu_check.tolerances import NAMES
from protlm.ops import favor_attention, local_bounds
from protlm.ops.cuda.launch import capability_of
from protlm.ops.cuda.tiles import MIN_CAPABILITY

RANKS = 2
SECONDS = 300
"""Time-out of a rank that waits for the other."""


def cases() -> list[Case]:
    """Returns a case for each way in which ranks exchange states."""
    packed = Case(segments=SEGMENTS, is_masked=True)
    maps = ("positive", "oprf", "relu")
    return [*(replace(packed, feature_map=name) for name in maps), Case(is_masked=True), replace(packed, causal=True)]


def compare_cases(chosen: list[Case], device: str, backend: str) -> Iterator[Outcome]:
    """Yields the outcome of each case: on two GPUs by NCCL if the first two are new enough, else by gloo on one."""
    if not chosen:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, (chosen, device, backend, folder), nprocs=RANKS)  # type: ignore[no-untyped-call]
            outcomes = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(RANKS)]
        except Exception as error:  # any failure of a process; the last line of its traceback names it
            last_line = next(reversed(str(error).strip().splitlines()), type(error).__name__)
            yield Outcome(f"{RANKS} processes", backend, {}, last_line)
            return
    for of_ranks in zip(*outcomes, strict=True):
        yield max((Outcome(**fields) for fields in of_ranks), key=lambda outcome: outcome.fault is not None)


def _rank(rank: int, chosen: list[Case], device: str, backend: str, folder: str) -> None:
    """Runs in each process: compares the tokens of this rank with the float64 twin, and writes the outcomes."""
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
    outcomes = [_compare(case, rank, device, backend) for case in chosen]
    (Path(folder) / str(rank)).write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    dist.barrier()
    dist.destroy_process_group()


def _compare(case: Case, rank: int, device: str, backend: str) -> Outcome:
    drawn = draw(case, device)
    length = drawn.tensors[0].shape[2]
    # The ranks hold different numbers of tokens, and share a segment.
    start, stop = ((0, length * 3 // 7), (length * 3 // 7, length))[rank]
    own = _tokens_of(drawn, start, stop)
    actual = differentiate(favor_attention, own, {"backend": backend, "process_group": dist.group.WORLD})
    expected = expected_of(drawn, case)
    errors = {
        name: error_of(a, b[:, :, start:stop], b) for name, a, b in zip(NAMES, actual, expected, strict=True)
    }  # fmt: skip
    outcome = outcome_of(case, computed_by(own, backend), errors)
    return replace(outcome, case=f"{case}, {RANKS} processes")


def _tokens_of(drawn: Drawn, start: int, stop: int) -> Drawn:
    q, k, v, out_grad = (x[:, :, start:stop] for x in drawn.tensors)
    options = dict(drawn.options)
    if "token_mask" in options:
        options["token_mask"] = options["token_mask"][:, start:stop]
    if "cu_seqlens" in options:
        options["cu_seqlens"] = local_bounds(options["cu_seqlens"], start, stop)
    return Drawn((q, k, v, out_grad), drawn.projection, options)
