"""The measurement of a model's predictions: validation during training and `protlm eval` use the same code."""

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
"""The default seed of the masks; validation during training always uses it."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy, a fraction, and perplexity, exp of the mean negative log likelihood, over the scored residues."""

    accuracy: float
    perplexity: float

    @property
    def loss(self) -> float:
        """Mean negative log likelihood in nats."""
        return math.log(self.perplexity)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The score of a model on a split, and that of the empirical baseline on the same targets."""

    num_targets: int
    model: Score
    empirical: Score


@dataclass
class _Sums:
    """The sums of one process: the loss of each of its rows, and counts over all of them."""

    losses: list[float] = field(default_factory=list)
    num_correct: int = 0
    target_counts: np.ndarray = field(default_factory=lambda: np.zeros(NUM_RESIDUES, dtype=np.int64))

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Adds one row."""
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
    """Scores a split with `score_model`, with the objective, masks and windows that the model was trained with."""
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
    """Returns the largest number of residues of a protein that are scored; None if there is no such limit.

    A model that was trained on windows of joined proteins scores all residues.
    """
    return description.max_residues if description.window_tokens is None else None


# Not inference_mode: the tensors that a sharded model makes in it could not be trained with afterwards.
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
    """Scores the targets of every protein of a split, with softmax and argmax over all 33 tokens.

    With several processes each takes every world_size-th row, and all return the scores of the whole split; the scores
    do not depend on the number of processes. All make the same number of forward passes, as a sharded model requires.

    Args:
        model: The network, on any device; its training or evaluation mode is restored.
        proteins: The split.
        training_counts: Residues of the training set by letter, for the empirical baseline.
        objective: The targets: masked residues or next tokens.
        seed: Seed of the masks; together with a protein's sequence it decides which residues are masked.
        tokens_per_batch: Budget of a packed row; it changes no result beyond rounding.
        window_tokens: Length of a window, for a model that was trained on windows of joined proteins; None: proteins
            are scored one by one.
        max_residues: Longest protein that the model's learned positions allow; a longer one is cut. None: no limit.
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
        # In the last round a process without a row of its own repeats another one's, so that all make the same passes.
        batch = rows[min(rank, len(rows) - 1)]
        logits = model(batch.tokens.to(device), batch.cu_seqlens.to(device), batch.target_positions.to(device))
        if rank < len(rows):
            sums.add(logits.float(), batch)
        advance(sum(row.num_residues for row in rows))
    model.train(was_training)
    by_rank = [sums] if world_size == 1 else _gather(sums, world_size)
    target_counts = sum((each.target_counts for each in by_rank), np.zeros(NUM_RESIDUES, dtype=np.int64))
    num_targets = int(target_counts.sum())
    # In the order of the split, so that the sum is the same to the last bit for any number of processes.
    losses = [loss for turn in zip_longest(*(each.losses for each in by_rank)) for loss in turn if loss is not None]
    return Scores(
        num_targets=num_targets,
        model=Score(
            accuracy=sum(each.num_correct for each in by_rank) / num_targets,
            perplexity=_perplexity(sum(losses) / num_targets),
        ),
        empirical=empirical_score(target_counts, training_counts),
    )


def _gather(sums: _Sums, world_size: int) -> list[_Sums]:
    """Returns the sums of all processes, by rank."""
    by_rank: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(by_rank, sums)
    return by_rank


def empirical_score(target_counts: np.ndarray, training_counts: Mapping[str, int]) -> Score:
    """Returns the score of the empirical baseline: the residue frequencies of the training set, add-one smoothed.

    Args:
        target_counts: Number of scored residues of each letter, int64 (25,), in token order.
        training_counts: Residues of the training set by letter.
    """
    counts = np.array([training_counts.get(letter, 0) + 1 for letter in RESIDUES], dtype=np.float64)
    nll = -(target_counts * np.log(counts / counts.sum())).sum() / target_counts.sum()
    return Score(
        accuracy=float(target_counts[counts.argmax()] / target_counts.sum()), perplexity=_perplexity(float(nll))
    )


def _perplexity(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
