"""Small models, proteins, and attention whose queries and keys are made by hand."""

import math

import numpy as np
import torch

from protlm.model.attention import SelfAttention
from protlm.vocabulary import FIRST_RESIDUE
from tests.unit.model.small_models import build


def random_protein(num_residues, seed=0, num_types=20):
    generator = np.random.default_rng(seed)
    return generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + num_types, num_residues).astype(np.uint8)


def model_with(monkeypatch, q, k, **options):
    """Returns a model of one layer whose queries and keys are the given ones, (length, heads, head_dim)."""
    _, num_heads, head_dim = q.shape
    options = {"attention": "softmax", "num_layers": 1, "num_heads": num_heads, **options}
    model = build(**{"model_dim": num_heads * head_dim, **options})
    monkeypatch.setattr(SelfAttention, "queries_keys_values", lambda self, *arguments: (q, k, torch.ones_like(q)))
    return model


def sharp_positions(length, head_dim, sharpness):
    """Returns vectors whose products fall with the distance of their positions, (length, head_dim)."""
    angles = torch.arange(length).unsqueeze(1) * torch.logspace(-1.5, 0.3, head_dim // 2)
    return math.sqrt(sharpness) * torch.cat((angles.cos(), angles.sin()), 1)
