import pytest

from protlm.errors import ConfigError
from protlm.runtime.devices import Devices
from protlm.runtime.launch import check_processes, launcher, process_rank

TWO, FOUR, TWO_MACHINES = Devices(2), Devices(4), Devices(2, 2)
SCRIPT = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}
"""The script of sbatch, in a job of several tasks."""
LEFT_OVER = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "gone", "MASTER_PORT": "1"}


def torchrun(rank, number):
    return {"TORCHELASTIC_RUN_ID": "1", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(number)}


def srun(rank, number):
    return {
        **SCRIPT, "SLURM_NTASKS": str(number), "SLURM_STEP_NUM_TASKS": str(number), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
    }  # fmt: skip


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("devices", "environment", "rank"),
    [
        (TWO, {}, 0),
        (FOUR, torchrun(3, 4), 3),
        (TWO, {"LOCAL_RANK": "1"}, 1),
        # What torchrun left is none of Lightning's.
        (TWO, {"RANK": "5", "LOCAL_RANK": "1"}, 1),
        (TWO_MACHINES, {"NODE_RANK": "1", "LOCAL_RANK": "1"}, 3),
        (TWO_MACHINES, {"NODE_RANK": "1"}, 2),
        (FOUR, srun(3, 4), 3),
        (FOUR, without(srun(3, 4), "SLURM_STEP_NUM_TASKS", "ENVIRONMENT"), 3),
        # torchrun in tasks of srun.
        (FOUR, srun(0, 2) | torchrun(3, 4), 3),
        # Lightning in the script of a job, in its interactive shell, and in the only task of a step.
        (FOUR, SCRIPT | {"LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 1),
        (FOUR, {"SLURM_NTASKS": "4", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 1),
        (FOUR, srun(0, 1) | {"LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 1),
    ],
    ids=str,
)
def test_a_process_knows_its_number_whoever_started_it(devices, environment, rank):
    check_processes(devices, environment)
    assert process_rank(devices, environment) == rank


@pytest.mark.parametrize(
    "environment",
    [
        {}, SCRIPT, LEFT_OVER, SCRIPT | LEFT_OVER, srun(3, 4),
        without(srun(3, 4), "SLURM_STEP_NUM_TASKS", "ENVIRONMENT"), torchrun(0, 1), {"NODE_RANK": "1"},
        {"RANK": "", "WORLD_SIZE": "many", "LOCAL_RANK": "²"},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_on_one_device_is_one_process_whatever_the_environment_says(environment):
    check_processes(Devices(), environment)
    assert process_rank(Devices(), environment) == 0


@pytest.mark.parametrize("rank", ["", "abc", "-1", "9" * 5000])
def test_a_rank_that_is_no_number_is_taken_out_before_lightning_reads_it(rank):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "SLURM_PROCID": rank, "PATH": "kept"}
    check_processes(Devices(), environment)
    assert environment == {"PATH": "kept"}
    assert process_rank(TWO, {"LOCAL_RANK": rank}) == 0


@pytest.mark.parametrize(
    ("devices", "environment", "words"),
    [
        (
            Devices(),
            torchrun(1, 2),
            ("--devices 1", "expected 1 process,", "torchrun started 2 processes", "without torchrun"),
        ),
        (TWO, torchrun(0, 1), ("--devices 2", "torchrun started 1 process;")),
        (TWO_MACHINES, torchrun(0, 2), ("--num-nodes 2", "expected 4 processes,", "torchrun started 2 processes")),
        (TWO, srun(1, 4), ("srun started 4 processes", "as many tasks")),
        (TWO_MACHINES, srun(1, 3), ("expected 4 processes,", "srun started 3 processes")),
        (TWO, LEFT_OVER, ("WORLD_SIZE says 4 processes", "unset RANK, LOCAL_RANK and WORLD_SIZE")),
    ],
    ids=str,
)
def test_processes_that_do_not_fit_the_devices_are_refused_with_both_numbers(devices, environment, words):
    with pytest.raises(ConfigError) as caught:
        check_processes(devices, environment)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "lightning"), (SCRIPT, "lightning"), (srun(0, 1), "lightning"), (LEFT_OVER, "lightning"),
        (srun(1, 2), "srun"), (torchrun(1, 2), "torchrun"), (srun(1, 2) | torchrun(1, 2), "torchrun"),
    ],
    ids=str,
)  # fmt: skip
def test_who_starts_the_processes_is_known(environment, name):
    assert launcher(environment) == name
