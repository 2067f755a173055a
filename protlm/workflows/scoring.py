"""How a model's predictions are measured: the same sums for validation during training and for `protlm eval`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from protlm.data.batches import Proteins, evaluation_batches
from protlm.model.performer import Performer
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


@torch.inference_mode()
def score_model(
    model: Performer,
    proteins: Proteins,
    training_counts: Mapping[str, int],
    *,
    mask_rate: float,
    seed: int = EVALUATION_SEED,
    tokens_per_batch: int = 8192,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Scores the masked residues of every protein of a split, whole proteins, softmax and argmax over all 33 tokens.

    Args:
        model: On any device; its mode is restored.
        proteins: The split.
        training_counts: Residues of the training set by letter, for the baseline.
        mask_rate: Probability that a residue is scored.
        seed: With a protein's sequence it decides what is masked.
        tokens_per_batch: Budget of a packed row; it changes no result beyond rounding.
        progress: Called with the number of residues after each row.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    nll, num_correct = 0.0, 0
    target_counts = np.zeros(NUM_RESIDUES, dtype=np.int64)
    for batch in evaluation_batches(proteins, tokens_per_batch, seed, mask_rate):
        targets = batch.targets.to(device)
        logits = model(batch.tokens.to(device), batch.cu_seqlens.to(device), batch.target_positions.to(device)).float()
        nll += F.cross_entropy(logits, targets, reduction="none").double().sum().item()
        num_correct += int((logits.argmax(-1) == targets).sum())
        target_counts += np.bincount(batch.targets.numpy() - FIRST_RESIDUE, minlength=NUM_RESIDUES)
        if progress is not None:
            progress(batch.num_residues)
    model.train(was_training)
    num_targets = int(target_counts.sum())
    score = Score(num_correct / num_targets, _perplexity(nll / num_targets))
    return Scores(num_targets, score, empirical_score(target_counts, training_counts))


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
