import os

import pytest
import torch

from protlm.runtime import devices
from protlm.runtime.devices import device_name, processor_name


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


@pytest.fixture
def groups(tmp_path):
    """Returns the limits that a process sees: given its groups, and the files of the system below /sys/fs/cgroup."""

    def limits(own, **system):
        (tmp_path / "own").write_text(own)
        for path, content in system.items():
            file = tmp_path / "system" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return sorted(devices._group_limits(tmp_path / "own", tmp_path / "system"))

    return limits


@pytest.mark.parametrize(
    ("own", "system", "limits"),
    [
        ("0::/\n", {"memory.max": "4096\n"}, [4096]),
        ("0::/\n", {"memory.max": "max\n"}, []),
        ("0::/job/step\n", {"job/memory.max": "8192\n", "job/step/memory.max": "max\n"}, [8192]),
        ("0::/job/step\n", {"job/memory.max": "8192\n", "job/step/memory.max": "4096\n"}, [4096, 8192]),
        # The name outside of the container, whose root is the group itself.
        ("5:cpu:/docker/1\n4:memory,x:/docker/1\n", {"memory/memory.limit_in_bytes": "4096\n"}, [4096]),
        ("5:cpu:/\n", {"memory.max": "1\n", "memory/memory.limit_in_bytes": "1\n"}, []),
        ("0::/../../job\n", {"memory.max": "4096\n"}, [4096]),
        ("", {}, []),
    ],
)
def test_the_limits_of_a_container_or_a_job_are_found(groups, own, system, limits):
    assert groups(own, **system) == limits


def test_the_memory_is_that_of_the_machine_or_what_a_limit_leaves_of_it(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(devices, "_group_limits", lambda: [2**70])
    assert devices.memory_bytes(torch.device("cpu")) == whole
    monkeypatch.setattr(devices, "_group_limits", lambda: [2**70, 4096])
    assert devices.memory_bytes(torch.device("cpu")) == 4096
