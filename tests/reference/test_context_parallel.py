"""Attention over a length that is split over processes gives each of them its part of what one process computes."""

import json

import pytest
import torch

from protlm.ops import favor_triton, local_bounds
from tests import forked
from tests.reference import context_parallel_worker
from tests.reference.cases import bounds


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
    forked.spawn(context_parallel_worker.main, (world_size, tmp_path, checks), nprocs=world_size)
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
