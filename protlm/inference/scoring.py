"""How a model's predictions are measured: the same sums for validation during training and for `protlm eval`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protlm.data.batching.batches import Batch, Objective, Proteins, evaluation_batches
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.runtime.progress import Advance, no_advance
from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, RESIDUES

EVALUATION_SEED = 0
"""Seed of the masks when none is asked for; validation during training always uses it."""


@dataclass(frozen=True)
class Score:
    """Accuracy, as a fraction, and perplexity, exp of the mean negative log likelihood, over the scored residues."""

    accuracy: float
    perplexity: float

    @property
    def loss(self) -> float:
        """Mean negative log likelihood in nats."""
        return math.log(self.perplexity)


@dataclass(frozen=True)
class Scores:
    """A model on a split, beside the empirical baseline on the same targets."""

    num_targets: int
    model: Score
    empirical: Score


@dataclass
class _Sums:
    """What one process has measured: a loss for each of its rows, and counts over all of them."""

    losses: list[float] = field(default_factory=list)
    num_correct: int = 0
    target_counts: np.ndarray = field(default_factory=lambda: np.zeros(NUM_RESIDUES, dtype=np.int64))

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Counts one row."""
        targets = batch.targets.to(logits.device)
        self.losses.append(F.cross_entropy(logits, targets, reduction="none").double().sum().item())
        self.num_correct += int((logits.argmax(-1) == targets).sum())
        self.target_counts += np.bincount(batch.targets.numpy() - FIRST_RESIDUE, minlength=NUM_RESIDUES)


def score_split(
    model: Performer,
    description: ModelDescription,
    proteins: Proteins,
    *,
    seed: int = EVALUATION_SEED,
    tokens_per_batch: int = 8192,
    advance: Advance = no_advance,
    rank: int = 0,
    world_size: int = 1,
) -> Scores:
    """Scores a split by `score_model` as the model was trained: its objective, its masks, its windows."""
    return score_model(
        model,
        proteins,
        description.residue_counts,
        description.objective,
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        window_tokens=description.window_tokens,
        max_residues=scored_residues(description),
        advance=advance,
        rank=rank,
        world_size=world_size,
    )


def scored_residues(description: ModelDescription) -> int | None:
    """Returns the residues of a protein that are scored at most; None where there is no limit, or windows are it."""
    return description.max_residues if description.window_tokens is None else None


# Not inference_mode: tensors of a model in shards that are made in it could not be trained with afterwards.
@torch.no_grad()
def score_model(
    model: Performer,
    proteins: Proteins,
    training_counts: Mapping[str, int],
    objective: Objective,
    *,
    seed: int = EVALUATION_SEED,
    tokens_per_batch: int = 8192,
    window_tokens: int | None = None,
    max_residues: int | None = None,
    advance: Advance = no_advance,
    rank: int = 0,
    world_size: int = 1,
) -> Scores:
    """Scores the targets of every protein of a split, softmax and argmax over all 33 tokens.

    With several processes each takes every world_size-th row, and all return the scores of the whole split; the scores
    do not depend on their number. All make the same number of forward passes, as a model in shards needs.

    Args:
        model: On any device; its mode is restored.
        proteins: The split.
        training_counts: Residues of the training set by letter, for the baseline.
        objective: What is predicted.
        seed: With a protein's sequence it decides what is masked.
        tokens_per_batch: Budget of a packed row; it changes no result beyond rounding.
        window_tokens: Length of a window for a model that was trained on joined proteins; otherwise proteins are whole.
        max_residues: Residues of a protein that the model's positions reach; a longer one is cut.
        advance: Called with the residues of each round of rows, those of all processes together.
        rank: Number of this process.
        world_size: Number of processes.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    sums = _Sums()
    batches = evaluation_batches(
        proteins, tokens_per_batch, seed, objective, window_tokens=window_tokens, max_residues=max_residues
    )
    while rows := list(islice(batches, world_size)):
        # At the end there may be fewer rows than processes: who has none joins in the computation of another's.
        batch = rows[min(rank, len(rows) - 1)]
        logits = model(batch.tokens.to(device), batch.cu_seqlens.to(device), batch.target_positions.to(device))
        if rank < len(rows):
            sums.add(logits.float(), batch)
        advance(sum(row.num_residues for row in rows))
    model.train(was_training)
    parts = [sums] if world_size == 1 else _gathered(sums, world_size)
    target_counts = sum((part.target_counts for part in parts), np.zeros(NUM_RESIDUES, dtype=np.int64))
    num_targets = int(target_counts.sum())
    # The rows in the order of the split, and a sum over them from first to last.
    losses = [loss for turn in zip_longest(*(part.losses for part in parts)) for loss in turn if loss is not None]
    score = Score(sum(part.num_correct for part in parts) / num_targets, _perplexity(sum(losses) / num_targets))
    return Scores(num_targets, score, empirical_score(target_counts, training_counts))


def _gathered(sums: _Sums, world_size: int) -> list[_Sums]:
    """Returns the sums of all processes in the order of their ranks."""
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, sums)
    return parts


def empirical_score(target_counts: np.ndarray, training_counts: Mapping[str, int]) -> Score:
    """Returns the score of always predicting the residue frequencies of the training set, smoothed by adding one.

    Args:
        target_counts: Scored residues, int64 (25,), in token order.
        training_counts: Residues of the training set by letter.
    """
    counts = np.array([training_counts.get(letter, 0) + 1 for letter in RESIDUES], dtype=np.float64)
    nll = -(target_counts * np.log(counts / counts.sum())).sum() / target_counts.sum()
    return Score(float(target_counts[counts.argmax()] / target_counts.sum()), _perplexity(float(nll)))


def _perplexity(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
