"""The processes of a run: who starts them, which of them this one is, and whether they are as many as were asked for.

It reads what torchrun, SLURM and Lightning leave in the environment, and loads none of them.
"""

import os
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Literal

from protlm.errors import ConfigError

if TYPE_CHECKING:
    from protlm.runtime.devices import Devices

Launcher = Literal["torchrun", "srun", "lightning"]
"""Who starts the processes of a run on several devices. Lightning does it from the first process of each machine, and
whoever sets its variables, such as LOCAL_RANK, by hand stands for it."""


_READ_BY_LIGHTNING = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """Returns who starts the processes where a run has several devices."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "srun" if _num_tasks(environment) > 1 else "lightning"


def process_rank(devices: "Devices", environment: Mapping[str, str] = os.environ) -> int:
    """Returns a number for this process before the process group exists: 0 in the first process of the run only.

    A run on one device is one process, whatever the environment says.
    """
    if devices.total == 1:
        return 0
    by = launcher(environment)
    if by == "torchrun":
        return _number(environment, "RANK") or 0
    if by == "srun":
        return _number(environment, "SLURM_PROCID") or 0
    machine = _number(environment, "NODE_RANK") or _number(environment, "GROUP_RANK") or 0
    return machine * devices.per_node + (_number(environment, "LOCAL_RANK") or 0)


def check_processes(devices: "Devices", environment: MutableMapping[str, str] = os.environ) -> None:
    """Checks that there are as many processes as devices, before any of them writes.

    Ranks that are no numbers are taken out of the environment: Lightning would fail while it is loaded.

    The tasks of srun may be programs that have nothing to do with each other, and so each may be a run on one device.
    The processes of torchrun are one program.

    Raises:
        ConfigError: There are more or fewer processes than devices.
    """
    for name in _READ_BY_LIGHTNING:
        if name in environment and _number(environment, name) is None:
            del environment[name]
    by = launcher(environment)
    if by == "torchrun":
        number, source = _number(environment, "WORLD_SIZE"), "torchrun started"
        advice = "ask for as many devices, or start the command without torchrun"
    elif devices.total == 1:
        return
    elif by == "srun":
        number, source = _num_tasks(environment), "srun started"
        advice = "ask for as many devices, or start as many tasks"
    else:
        # Lightning sets both in the processes that it starts.
        number = _number(environment, "WORLD_SIZE") if "LOCAL_RANK" in environment else None
        source = "LOCAL_RANK is set, and WORLD_SIZE says"
        advice = "unset RANK, LOCAL_RANK and WORLD_SIZE if they are left over from something else"
    if number is not None and number != devices.total:
        expected, started = ("1 process" if count == 1 else f"{count} processes" for count in (devices.total, number))
        raise ConfigError(
            f"--devices {devices.per_node}, --num-nodes {devices.num_nodes}: expected {expected}, one for each device; "
            f"{source} {started}; {advice}"
        )


def _num_tasks(environment: Mapping[str, str]) -> int:
    """Returns the number of tasks that srun started, of which this process is one; 1 if srun did not start it.

    SLURM_NTASKS alone says nothing: every shell of a job has it. A task of srun has SLURM_STEP_NUM_TASKS too. Where a
    wrapper has removed that, a task still has its number and place, and is not the script of sbatch, which has both.
    """
    in_step = _number(environment, "SLURM_STEP_NUM_TASKS")
    if in_step is not None:
        return in_step
    has_place = "SLURM_PROCID" in environment and "SLURM_LOCALID" in environment
    if not has_place or environment.get("ENVIRONMENT") == "BATCH":
        return 1
    return _number(environment, "SLURM_NTASKS") or 1


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Returns the value of a variable; None if it is missing, or no number."""
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
