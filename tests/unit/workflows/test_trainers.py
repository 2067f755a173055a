import pytest
from lightning_fabric.utilities.rank_zero import rank_zero_only

from protlm.runtime.devices import Devices
from protlm.workflows.trainers import cluster_environment, lightning_strategy

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, instead of those that are there."""

    def set_to(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        # Also removed again, where the code sets it.
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
        monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_to


def test_several_devices_are_joined_by_ddp_unless_shards_are_asked_for():
    assert lightning_strategy(Devices(1)) == "auto"
    assert type(lightning_strategy(Devices(2, 2))).__name__ == "DDPStrategy"
    assert type(lightning_strategy(Devices(2, 1, "fsdp"))).__name__ == "ModelParallelStrategy"


def test_one_device_is_told_to_lightning_as_one_process_whatever_the_environment_says(environment, monkeypatch):
    # As Lightning read it when it was imported.
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    environment(
        RANK=3, WORLD_SIZE=4, LOCAL_RANK=3, NODE_RANK=1, MASTER_ADDR="gone", MASTER_PORT=1, SLURM_NTASKS=4,
        SLURM_PROCID=3, SLURM_LOCALID=3,
    )  # fmt: skip
    alone = cluster_environment(Devices())
    assert (alone.world_size(), alone.global_rank(), alone.local_rank(), alone.node_rank()) == (1, 0, 0, 0)
    assert rank_zero_only.rank == 0
    assert alone.creates_processes_externally
    assert alone.main_address == "127.0.0.1"
    assert alone.main_port == alone.main_port > 1


def test_the_tasks_of_srun_are_the_processes_without_the_variables_of_its_options_too(environment):
    environment(SLURM_NTASKS=4, SLURM_STEP_NUM_TASKS=4, SLURM_PROCID=3, SLURM_LOCALID=1, SLURM_NODEID=1)
    tasks = cluster_environment(Devices(2, 2))
    # Of the job, which has more nodes than the step.
    environment(
        SLURM_NTASKS=4, SLURM_STEP_NUM_TASKS=4, SLURM_PROCID=3, SLURM_LOCALID=1, SLURM_NODEID=1,
        SLURM_NTASKS_PER_NODE=8, SLURM_NNODES=3,
    )  # fmt: skip
    tasks.validate_settings(2, 2)
    assert (tasks.world_size(), tasks.global_rank(), tasks.local_rank(), tasks.node_rank()) == (4, 3, 1, 1)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        # A shell in a job of several tasks, in which Lightning starts the processes.
        ({"SLURM_NTASKS": 2}, "LightningEnvironment"),
        ({"SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}, "LightningEnvironment"),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}, "TorchElasticEnvironment"),
    ],
)
def test_lightning_is_told_who_starts_several_processes(variables, name, environment):
    environment(**variables)
    assert type(cluster_environment(Devices(2))).__name__ == name
