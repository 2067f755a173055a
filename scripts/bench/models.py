"""Models of one shape, ours and the peers', built in the same way by the benchmarks of training and of embedding."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from protlm.config import ModelConfig
from protlm.model.performer import Performer
from protlm.vocabulary import MASK, PAD, VOCABULARY_SIZE


@dataclass(frozen=True)
class Sizes:
    """The shape that all models share."""

    num_layers: int
    model_dim: int
    num_heads: int
    ffn_dim: int
    num_features: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, model_dim {self.model_dim}, {self.num_heads} heads, ffn {self.ffn_dim}, "
            f"{self.num_features} features"
        )


def performer(sizes: Sizes, **settings: Any) -> Performer:
    """Returns a freshly drawn model of ours, with rotary positions and no dropout."""
    shape = {
        "num_layers": sizes.num_layers, "model_dim": sizes.model_dim, "num_heads": sizes.num_heads,
        "ffn_dim": sizes.ffn_dim, "num_features": sizes.num_features,
    }  # fmt: skip
    model = Performer(ModelConfig(**shape, projection="orthogonal", positions="rotary", dropout=0.0, **settings))
    model.reset(seed=0)
    return model


def why_missing(module: str) -> str:
    """Returns why a package of a peer cannot be used; empty if it can."""
    try:
        with _without_warnings():
            importlib.import_module(module)
    except ImportError as error:
        return f"it needs {module}: {error}"
    return ""


@contextmanager
def building_a_peer() -> Iterator[None]:
    """Draws a peer's weights from the seed 0, and leaves torch's generator as it was."""
    with _without_warnings(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def esm_config(sizes: Sizes, **settings: Any) -> Any:
    """Returns the configuration of ESM-2 in transformers, with torch's fused attention and no dropout."""
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=VOCABULARY_SIZE, mask_token_id=MASK, pad_token_id=PAD, hidden_size=sizes.model_dim,
        num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_heads, intermediate_size=sizes.ffn_dim,
        position_embedding_type="rotary", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa", **settings,
    )  # fmt: skip


@contextmanager
def _without_warnings() -> Iterator[None]:
    # The imports of the peers use what Python and torch have deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
