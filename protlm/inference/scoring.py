"""A model on a split: hides how rows are shared among processes, and that the scores do not depend on it.

`score_rows` yields the stream of scores; everything that is measured is a reduction of it. `score_split` is the short
reduction of a training run: accuracy and perplexity.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protlm.data.batching.batches import Batch, EvaluationRow, Objective, Proteins, evaluation_rows
from protlm.inference.residue_scores import ResidueScores
from protlm.model.performer import Performer
from protlm.model.token_table import TokenTable
from protlm.pretrained.model_description import ModelDescription
from protlm.runtime.progress import Advance, no_advance
from protlm.vocabulary import NUM_RESIDUES, RESIDUES

EVALUATION_SEED = 0
"""Default seed of the masks; validation during training always uses it."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy, as a fraction, and perplexity, exp of the mean negative log likelihood, over the scored residues."""

    accuracy: float
    perplexity: float

    @property
    def loss(self) -> float:
        """Mean negative log likelihood in nats."""
        return math.log(self.perplexity)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A model on a split, beside the empirical baseline on the same targets."""

    num_targets: int
    model: Score
    empirical: Score


@dataclass
class _Sums:
    """The sums of one process: a loss for each of its rows, and counts over all of them."""

    losses: list[float] = field(default_factory=list)
    num_correct: int = 0
    target_counts: np.ndarray = field(default_factory=lambda: np.zeros(NUM_RESIDUES, dtype=np.int64))

    def add(self, scores: ResidueScores) -> None:
        """Adds one row."""
        self.losses.append(-float(scores.true_log_probabilities().sum()))
        self.num_correct += int((scores.ranks() == 0).sum())
        self.target_counts += np.bincount(scores.residues, minlength=NUM_RESIDUES)


def score_rows(
    model: Performer,
    rows: Iterator[EvaluationRow],
    *,
    advance: Advance = no_advance,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[EvaluationRow, ResidueScores]]:
    """Yields the rows of this process with the scores of their targets, softmax over all tokens of the model.

    With several processes each takes every world_size-th row. All make the same number of forward passes, as a model in
    shards needs. The stream must be read to its end; the model is in evaluation mode meanwhile.

    Args:
        model: On any device; its mode is restored at the end.
        rows: The rows of the split, the same in every process.
        advance: Called with the residues of each round of rows, those of all processes together.
        rank: Number of this process.
        world_size: Number of processes.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    try:
        while round_of_rows := list(islice(rows, world_size)):
            # At the end there may be fewer rows than processes: who has none joins in the computation of another's.
            row = round_of_rows[min(rank, len(round_of_rows) - 1)]
            batch = row.batch
            # Not inference_mode: tensors of a model in shards that are made in it could not be trained with afterwards.
            with torch.no_grad():
                logits = model(batch.tokens.to(device), batch.cu_seqlens.to(device), batch.target_positions.to(device))
                log_probabilities = _in_columns(model.token_table, torch.log_softmax(logits.float(), dim=-1), batch)
            if rank < len(round_of_rows):
                yield row, ResidueScores(row.records, row.positions, batch.targets.numpy(), log_probabilities)
            advance(sum(member.batch.num_residues for member in round_of_rows))
    finally:
        model.train(was_training)


def _in_columns(table: TokenTable, log_probabilities: Tensor, batch: Batch) -> np.ndarray:
    """Returns log-probabilities of the model's tokens in a column for each token of data, (targets, 33).

    A target that the model lacks has the probability of the token as which the model reads it.
    """
    columns: np.ndarray = table.columns(log_probabilities).cpu().numpy()
    if table.vocabulary.is_ours:
        return columns
    vocabulary, targets = table.vocabulary, batch.targets.numpy()
    (rows,) = np.nonzero(vocabulary.columns[targets] != vocabulary.ids[targets])
    lacked = targets[rows]
    own = vocabulary.ids[lacked]
    # Each probability stands once: not also in the column of the token that stands in.
    columns[rows] = np.where(vocabulary.columns == own[:, None], -np.inf, columns[rows])
    columns[rows, lacked] = log_probabilities.cpu().numpy()[rows, own]
    return columns


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
    """Scores a split by `score_model`: hidden residues, or all residues of a causal model, in the model's windows."""
    return score_model(
        model,
        proteins,
        description.residue_counts or {},
        description.objective.hiding_all(),
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        window_tokens=description.window_tokens,
        max_residues=max_scored_residues(description),
        advance=advance,
        rank=rank,
        world_size=world_size,
    )


def max_scored_residues(description: ModelDescription) -> int | None:
    """Returns how many residues of a protein are scored at most; None without a limit, as where windows are scored."""
    return description.max_residues if description.window_tokens is None else None


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
    """Returns accuracy and perplexity over the targets of every protein of a split.

    All processes return the scores of the whole split, which do not depend on their number.

    Args:
        model: On any device; its mode is restored.
        proteins: The split.
        training_counts: Residues of the training set by letter, for the empirical baseline.
        objective: What is predicted, and what is hidden.
        seed: Determines, together with a protein's sequence, which residues are targets.
        tokens_per_batch: Budget of a packed row; it changes no result beyond rounding.
        window_tokens: Length of a window for a model that was trained on joined proteins; otherwise proteins are whole.
        max_residues: Residues of a protein that the model's positions reach; a longer one is cut.
        advance: Called with the residues of each round of rows, those of all processes together.
        rank: Number of this process.
        world_size: Number of processes.
    """
    rows = evaluation_rows(
        proteins, tokens_per_batch, seed, objective, window_tokens=window_tokens, max_residues=max_residues
    )
    own = _Sums()
    for _, scores in score_rows(model, rows, advance=advance, rank=rank, world_size=world_size):
        own.add(scores)
    all_sums = [own] if world_size == 1 else _gathered(own, world_size)
    target_counts = sum((sums.target_counts for sums in all_sums), np.zeros(NUM_RESIDUES, dtype=np.int64))
    num_targets = int(target_counts.sum())
    # The rows in the order of the split, and a sum over them from first to last.
    losses = [loss for turn in zip_longest(*(sums.losses for sums in all_sums)) for loss in turn if loss is not None]
    score = Score(
        accuracy=sum(sums.num_correct for sums in all_sums) / num_targets,
        perplexity=_perplexity(sum(losses) / num_targets),
    )
    return Scores(num_targets=num_targets, model=score, empirical=empirical_score(target_counts, training_counts))


def _gathered(sums: _Sums, world_size: int) -> list[_Sums]:
    """Returns the sums of all processes in the order of their ranks."""
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, sums)
    return gathered


def empirical_log_probabilities(training_counts: Mapping[str, int]) -> np.ndarray:
    """Returns the empirical baseline: logarithms of the residue frequencies, smoothed by adding one; float64 (25,).

    Args:
        training_counts: Residues of the training set by letter.
    """
    counts = np.array([training_counts.get(letter, 0) + 1 for letter in RESIDUES], dtype=np.float64)
    logs: np.ndarray = np.log(counts / counts.sum())
    return logs


def empirical_score(target_counts: np.ndarray, training_counts: Mapping[str, int]) -> Score:
    """Returns the score of the empirical baseline.

    Args:
        target_counts: Scored residues, int64 (25,), in token order.
        training_counts: Residues of the training set by letter.
    """
    logs = empirical_log_probabilities(training_counts)
    nll = -(target_counts * logs).sum() / target_counts.sum()
    return Score(accuracy=float(target_counts[logs.argmax()] / target_counts.sum()), perplexity=_perplexity(float(nll)))


def _perplexity(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
