"""Groups of gloo processes in tests: how a rank joins one, and how it ends."""

import os
import sys
from datetime import timedelta

import torch

SECONDS = 60
"""How long a rank waits for the others."""


def join(rank, world_size, folder):
    """Meets the other ranks, by a file in a folder; each computes with one thread."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )


def leave():
    """Ends this process once all ranks are here; an ordinary exit, with gloo's threads about, aborts now and then."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
