"""Attention over a length that is split over processes gives each of them its part of what one process computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from protlm.ops import favor_triton, local_bounds
from tests import process_groups
from tests.reference import context_parallel_worker
from tests.reference.cases import bounds

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("world_size", "checks"),
    [
        (2, "others"),
        pytest.param(3, "others", marks=pytest.mark.slow),
        pytest.param(2, "cuda", marks=pytest.mark.cuda),
        pytest.param(3, "cuda", marks=pytest.mark.cuda),
    ],
)
def test_ranks_agree_with_one_process_and_with_each_other(world_size, checks, tmp_path):
    """All checks are in one run of the processes: to start them costs more than what they compute."""
    if checks == "cuda" and favor_triton.why_not():
        pytest.skip(favor_triton.why_not())
    command = [sys.executable, "-m", context_parallel_worker.__name__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            words = [*command, str(rank), str(world_size), str(tmp_path), checks]
            processes.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stream, stderr=stream))
    try:
        statuses = [process.wait(4 * process_groups.SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0] * world_size, "\n".join(log.read_text() for log in logs)
    failures = [told for rank in range(world_size) for told in json.loads((tmp_path / f"{rank}.json").read_text())]
    assert not failures, "\n".join(failures)


def test_local_bounds_keep_every_segment_and_put_the_parts_together():
    whole = bounds((0, 3, 4, 0, 5))
    parts = [local_bounds(whole, start, stop) for start, stop in ((0, 2), (2, 2), (2, 9), (9, 12))]
    assert [part.diff().tolist() for part in parts] == [[0, 2, 0, 0, 0], [0] * 5, [0, 1, 4, 0, 2], [0, 0, 0, 0, 3]]
    assert torch.equal(sum(part.diff() for part in parts), whole.diff())
    for part, length in zip(parts, (2, 0, 7, 3), strict=True):
        assert (part[0], part[-1], part.dtype) == (0, length, torch.int32)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3)])
def test_bounds_of_a_part_that_is_none_are_a_value_error(start, stop):
    with pytest.raises(ValueError, match=r"^start, stop: expected 0 <= start <= stop, got "):
        local_bounds(bounds((5,)), start, stop)
