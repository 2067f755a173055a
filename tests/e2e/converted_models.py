"""A small exact model that was trained, and the model with random features that is made of it."""

from pathlib import Path

import torch

from protlm.data.storage.dataset import open_dataset
from protlm.inference.attention_swap import SwapSettings, measure_moments, swap_attention
from protlm.pretrained.model_directory import save_model
from protlm.pretrained.model_names import read_named_model
from tests.e2e.train_tools import train

EXACT = [
    "--set", "model.attention=softmax,local,softmax", "--set", "model.local_window=8", "--set", "train.warmup_steps=5",
]  # fmt: skip


def train_exact(dataset: Path, out: Path, *arguments: object) -> None:
    """Trains a model for some steps; two of its three layers are exact over whole proteins."""
    assert train(dataset, out, *EXACT, "--max-steps", 30, *arguments) == 0


def convert(source: Path, out: Path, dataset: Path, **settings: object) -> Path:
    """Saves a model with random features in the place of the exact attention of another, and returns its folder."""
    model, description = read_named_model(source)
    chosen = {
        "attention": "positive",
        "num_features": 16,
        "near_block": 0,
        "balance": "diagonal",
        "seed": 0,
        **settings,
    }
    split = open_dataset(dataset).split("train")
    proteins = [split.tokens(number) for number in range(16)]
    with torch.no_grad():
        converted = swap_attention(model, SwapSettings(**chosen), measure_moments(model, proteins))
    save_model(out, converted, description.model_copy(update={"model": converted.config, "valid": None}))
    return out
