import pytest

from protlm.runtime.devices import process_rank


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        ({"LOCAL_RANK": "1"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, 3),
        # A shell inside a job of several tasks, in which Lightning starts the processes.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "LOCAL_RANK": "1"}, 1),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "3"}, 0),
    ],
    ids=str,
)
def test_a_process_knows_its_number_whoever_started_it(environment, rank):
    assert process_rank(environment) == rank


def test_the_first_process_of_another_machine_is_not_the_first():
    assert process_rank({"LOCAL_RANK": "0", "NODE_RANK": "1"}) != 0
    assert process_rank({"NODE_RANK": "1"}) != 0
