import pytest
import torch

from protlm.runtime import devices
from protlm.runtime.devices import device_name, process_rank, processor_name


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


def test_the_processor_is_named_by_its_model_or_its_kind(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "_CPU_INFO", info)
    assert processor_name()
    info.write_text("processor\t: 0\nmodel name\t: Fast Chip 9000 @ 5 GHz\nmodel name\t: another\n")
    assert processor_name() == "Fast Chip 9000 @ 5 GHz"
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cpu"))
    assert device_name() == "Fast Chip 9000 @ 5 GHz"


def test_a_gpu_is_named_where_there_is_one(monkeypatch):
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    assert device_name() == "GPU 0"
