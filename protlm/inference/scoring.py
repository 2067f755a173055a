"""A model on a split: hides how rows are shared among processes, and that the scores do not depend on it.

`score_rows` yields the stream of scores; everything that is measured is a reduction of it. `score_model` keeps the sums
of the metrics, which is what a training run needs; `protlm eval` takes more from the same stream.
"""

from collections.abc import Iterator, Mapping
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protlm.data.batching.batches import Batch, EvaluationRow, Proteins, evaluation_rows
from protlm.data.batching.masking import EVALUATION_SEED, Objective
from protlm.inference.baselines import Predict, empirical
from protlm.inference.metrics import NUM_SUMS, MetricSums, sums_by_protein
from protlm.inference.residue_scores import ResidueScores
from protlm.model.performer import Performer
from protlm.model.token_table import TokenTable
from protlm.pretrained.model_description import ModelDescription
from protlm.runtime.progress import Advance, no_advance

_ROUNDS_BETWEEN_MERGES = 64


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
    try:
        while round_of_rows := list(islice(rows, world_size)):
            # At the end there may be fewer rows than processes: who has none joins in the computation of another's.
            row = round_of_rows[min(rank, len(round_of_rows) - 1)]
            scores = score_row(model, row)
            if rank < len(round_of_rows):
                yield row, scores
            advance(sum(member.batch.num_residues for member in round_of_rows))
    finally:
        model.train(was_training)


def score_row(model: Performer, row: EvaluationRow) -> ResidueScores:
    """Returns the scores of the targets of one row.

    Args:
        model: In evaluation mode, on any device.
        row: The row.
    """
    batch, device = row.batch, model.embedding.weight.device
    # Not inference_mode: tensors of a model in shards that are made in it could not be trained with afterwards.
    with torch.no_grad():
        logits = model(batch.tokens.to(device), batch.cu_seqlens.to(device), batch.target_positions.to(device))
        log_probabilities = _in_columns(model.token_table, torch.log_softmax(logits.float(), dim=-1), batch)
    return ResidueScores(row.records, row.positions, batch.targets.numpy(), log_probabilities)


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
) -> dict[str, MetricSums]:
    """Scores a split by `score_model`: hidden residues, or all residues of a causal model, in the model's windows.

    Returns:
        The sums under `model`, and under `empirical` those of the frequencies of the model's training set.
    """
    return score_model(
        model,
        proteins,
        description.objective.hiding_all(),
        {"empirical": empirical(description.residue_counts or {})},
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
    objective: Objective,
    baselines: Mapping[str, Predict],
    *,
    seed: int = EVALUATION_SEED,
    tokens_per_batch: int = 8192,
    window_tokens: int | None = None,
    max_residues: int | None = None,
    advance: Advance = no_advance,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, MetricSums]:
    """Returns the sums over the targets of every protein of a split, without replicates.

    All processes return the sums of the whole split, which do not depend on their number.

    Args:
        model: On any device; its mode is restored.
        proteins: The split.
        objective: What is predicted, and what is hidden.
        baselines: Baselines by name, on the same targets.
        seed: Determines, together with a protein's sequence, which residues are targets.
        tokens_per_batch: Budget of a packed row; it changes no result beyond rounding.
        window_tokens: Length of a window for a model that was trained on joined proteins; otherwise proteins are whole.
        max_residues: Residues of a protein that the model's positions reach; a longer one is cut.
        advance: Called with the residues of each round of rows, those of all processes together.
        rank: Number of this process.
        world_size: Number of processes.

    Returns:
        The sums by name; those of the model are under `model`.
    """
    rows = evaluation_rows(
        proteins, tokens_per_batch, seed, objective, window_tokens=window_tokens, max_residues=max_residues
    )
    names = ("model", *baselines)
    in_order = _SumsInOrder(len(names), world_size, advance)
    for row, scores in score_rows(model, rows, advance=in_order.after_round, rank=rank, world_size=world_size):
        predicted = [scores, *(scores.predicted_as(predict(row)) for predict in baselines.values())]
        in_order.own.append(np.stack([_row_sums(each) for each in predicted]))
    in_order.merge()
    return {name: MetricSums.of(sums) for name, sums in zip(names, in_order.total, strict=True)}


class _SumsInOrder:
    """Adds the sums of rows from the first row of a split to the last, whichever process has computed them.

    Attributes:
        own: Sums of this process's rows that are not in the total yet.
        total: float64 (predictions, NUM_SUMS), the same in all processes.
    """

    def __init__(self, num_predictions: int, world_size: int, advance: Advance) -> None:
        self.own: list[np.ndarray] = []
        self.total = np.zeros((num_predictions, NUM_SUMS))
        self._world_size, self._advance, self._num_rounds = world_size, advance, 0

    def after_round(self, amount: int) -> None:
        """Merges now and then, in the same rounds in all processes, so that few rows are kept."""
        self._num_rounds += 1
        if self._num_rounds % _ROUNDS_BETWEEN_MERGES == 0:
            self.merge()
        self._advance(amount)

    def merge(self) -> None:
        """Adds the rows since the last merge; all processes must call it together."""
        everyone = [self.own] if self._world_size == 1 else _gathered(self.own, self._world_size)
        for turn in zip_longest(*everyone):
            for sums in turn:
                if sums is not None:
                    self.total += sums
        self.own = []


def _row_sums(scores: ResidueScores) -> np.ndarray:
    """Returns the sums of a row, float64 (NUM_SUMS,)."""
    sums: np.ndarray = sums_by_protein(scores)[1].sum(axis=0)
    return sums


def _gathered(sums: list[np.ndarray], world_size: int) -> list[list[np.ndarray]]:
    """Returns the sums of the rows of all processes in the order of their ranks."""
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, sums)
    return gathered
