"""The size of a run, from its settings and the lengths of its proteins alone: told at once, before torch is loaded."""

from dataclasses import dataclass

import numpy as np

from protlm.choices import EXACT_KINDS, AttentionKind
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, Config, DataConfig, ModelConfig
from protlm.data.batching.draws import Draws
from protlm.data.batching.rows import epoch_size
from protlm.data.storage.mixture import Mixture
from protlm.model.shapes import tensor_shapes
from protlm.workflows.train.memory import MemoryEstimate, estimate_memory

TWO_FEATURES_A_ROW = frozenset(("hyperbolic", "trig"))
"""The feature maps that make two features of each row of the projection."""

_PASSES, _PASSES_WITH_CHECKPOINTS = 3, 4
"""Work of a training step in forward passes: the backward pass is two, and recomputing activations another."""


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """The size of a run.

    Attributes:
        memory: Estimated memory of a step, by purpose, on a GPU that holds the whole model.
        num_records: Training proteins.
        residues_per_epoch: Residues in the rows of an epoch.
        tokens_per_epoch: Tokens in them, special tokens included.
        rows_per_epoch: Number of rows.
        steps: Updates of the whole run.
        epochs: Passes of the whole run over the data.
        row_flops: Floating-point operations of a training step of one row of mean size.
    """

    memory: MemoryEstimate
    num_records: int
    residues_per_epoch: int
    tokens_per_epoch: int
    rows_per_epoch: int
    steps: int
    epochs: float
    row_flops: float


def size_of(settings: Config, proteins: Mixture, teacher: ModelConfig | None = None) -> RunSize:
    """Returns the size of a run with these settings on these training proteins.

    Args:
        settings: Settings of the run.
        proteins: Its training proteins.
        teacher: The shape of its teacher; None without one.

    Raises:
        ProtlmError: Settings that do not fit the datasets.
    """
    lengths, data, train = proteins.lengths, settings.data, settings.train
    epoch = epoch_size(Draws.of(proteins, data, train.seed), lengths, data)
    tokens = epoch.num_tokens / epoch.num_rows
    targets = tokens * (1.0 if settings.model.causal else train.mask_rate)
    forward = tokens * _token_flops(settings.model, _reach(lengths, data)) + targets * _target_flops(settings.model)
    passes = _PASSES_WITH_CHECKPOINTS if train.activation_checkpointing else _PASSES
    # The teacher's pass takes about as much work as one of the model.
    passes += train.stage is not None
    return RunSize(
        memory=estimate_memory(settings, in_place=False, teacher=teacher),
        num_records=proteins.num_records,
        residues_per_epoch=epoch.num_residues,
        tokens_per_epoch=epoch.num_tokens,
        rows_per_epoch=epoch.num_rows,
        steps=train.max_steps,
        epochs=train.max_steps * train.accumulate / epoch.num_rows,
        row_flops=passes * forward,
    )


def _reach(lengths: np.ndarray, data: DataConfig) -> float:
    """Returns the tokens that the attention of a token covers, in the mean over tokens."""
    if data.mode == "concatenated":
        return data.window_tokens
    sizes = np.minimum(lengths, data.window).astype(np.float64) + SPECIAL_TOKENS_PER_SEGMENT
    return float((sizes**2).sum() / sizes.sum())


def _token_flops(model: ModelConfig, reach: float) -> float:
    """Returns the floating-point operations of all layers for a token in a forward pass, two for a multiplication."""
    shapes = tensor_shapes(model)
    matrices = sum(
        tensor.size for name, tensor in shapes.items() if tensor.role == "matrix" and name.startswith("layers.")
    )
    convolution = 2 * model.conv_width * 3 * model.model_dim
    attention = sum(_attention_flops(model, kind, reach) for kind in model.kinds)
    return 2 * matrices + attention + model.num_layers * convolution


def _attention_flops(model: ModelConfig, kind: AttentionKind, reach: float) -> float:
    """Returns those of the attention of one layer, without the products with its weights."""
    dim = model.model_dim
    if kind in EXACT_KINDS:
        num_keys = reach if kind == "softmax" else min(reach, 2 * model.local_window + 1)
        # Scores and the weighted sum of values, of which a causal model needs half.
        return 4 * dim * num_keys / (2 if model.causal else 1)
    num_rows = model.num_features if model.has_projection else 0
    num_features = num_rows * (2 if model.feature_map_of(kind) in TWO_FEATURES_A_ROW else 1) or model.head_dim
    near = 4 * dim * min(reach, 3 * model.near_block) if kind == "near-far" else 0
    # The features of q and k; the state, and what is read from it.
    return 4 * dim * num_rows + 4 * dim * num_features + near


def _target_flops(model: ModelConfig) -> float:
    """Returns those of the head for a scored token."""
    dense = model.model_dim**2 if model.head == "dense" else 0
    return 2.0 * (dense + model.model_dim * len(model.tokens()))
