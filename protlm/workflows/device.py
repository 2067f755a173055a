"""Where a model runs when nobody says so."""

import torch


def best_device() -> torch.device:
    """Returns the first CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
