"""The machine, the versions and the commit that a measured figure depends on, for all scripts that measure."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from protlm.runtime.devices import processor_name


def environment() -> dict[str, Any]:
    """Returns machine, processor, cores, threads, versions and commit; a commit with changes on top is `dirty`."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }
