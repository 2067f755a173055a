"""The baselines of a report: what is predicted without a network, on the same targets and by the same measures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from protlm.data.batching.batches import EvaluationRow, Objective, evaluation_rows
from protlm.data.storage.dataset import Dataset, Split
from protlm.inference.markov import MarkovCounts, MarkovModel, TwoSidedMarkovModel, largest_order
from protlm.inference.scoring import empirical_log_probabilities
from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, RESIDUES, VOCABULARY_SIZE

_MOST_COUNTED_RESIDUES = 1 << 28
"""More residues of the training set than this change no figure that a reader could see."""
_MOST_VALID_RECORDS = 2000
_DEFAULT_ORDER = 2
_TOKENS_PER_ROW = 1 << 14

Predict = Callable[[EvaluationRow], np.ndarray]
"""Returns the log-probabilities of all tokens at the targets of a row, (targets, 33)."""


@dataclass(frozen=True, kw_only=True)
class Markov:
    """The Markov baseline of a dataset.

    Attributes:
        model: The count table of the chosen order, which sees the residues before a target.
        two_sided: The product of the tables of both sides, for masked models, which see both; None for causal ones.
        num_residues: Residues of the training set that were counted.
        chosen_on: The split by whose perplexity the order was chosen; None: the dataset has no valid split, and the
            order is the default.
    """

    model: MarkovModel
    two_sided: TwoSidedMarkovModel | None
    num_residues: int
    chosen_on: str | None


def empirical(training_counts: Mapping[str, int]) -> Predict:
    """Returns the empirical baseline: the residue frequencies of the model's training set, whatever the context."""
    distribution = np.full(VOCABULARY_SIZE, -np.inf)
    distribution[FIRST_RESIDUE : FIRST_RESIDUE + NUM_RESIDUES] = empirical_log_probabilities(training_counts)

    def predict(row: EvaluationRow) -> np.ndarray:
        return np.broadcast_to(distribution, (len(row.records), VOCABULARY_SIZE))

    return predict


def copies_of_the_visible(training_counts: Mapping[str, int], objective: Objective) -> Predict:
    """Returns a copier without any context: it repeats what stands at the target, and guesses where nothing stands.

    A visible residue is the true one with the probability that the shares of the mixture give it; otherwise, and for a
    hidden one, the residue frequencies of the training set decide. This is what scores on a mixture reward.
    """
    frequencies = np.exp(empirical_log_probabilities(training_counts))
    rates = objective.rates
    kept = 1 - rates.mask_share - rates.random_share
    visible = kept + rates.random_share
    share = 0.0 if visible <= 0 else kept / visible
    residues = slice(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES)

    def predict(row: EvaluationRow) -> np.ndarray:
        seen = row.batch.tokens.numpy()[row.batch.target_positions.numpy()] - FIRST_RESIDUE
        probabilities = np.tile(frequencies, (len(seen), 1))
        (visible_targets,) = np.nonzero((seen >= 0) & (seen < NUM_RESIDUES))
        probabilities[visible_targets] *= 1 - share
        probabilities[visible_targets, seen[visible_targets]] += share
        predicted = np.full((len(seen), VOCABULARY_SIZE), -np.inf)
        with np.errstate(divide="ignore"):
            predicted[:, residues] = np.log(probabilities)
        return predicted

    return predict


def markov_predictions(model: MarkovModel | TwoSidedMarkovModel, objective: Objective) -> Predict:
    """Returns a Markov baseline: a residue from those before it, or on both sides, as far as they are not hidden."""
    # The prediction of a causal model stands one token before its target.
    offset = 1 if objective.causal else 0

    def predict(row: EvaluationRow) -> np.ndarray:
        return model.log_probabilities(row.batch.tokens.numpy(), row.batch.target_positions.numpy() + offset)

    return predict


def fit_markov(dataset: Dataset, objective: Objective, seed: int) -> Markov | None:
    """Counts the training split and chooses the orders by perplexity on the valid split; None without a training split.

    Args:
        dataset: The dataset that is evaluated.
        objective: What is predicted, and what is hidden.
        seed: Of the masks on the valid split.
    """
    splits = {name for name, summary in dataset.manifest.splits.items() if summary.num_records}
    if "train" not in splits:
        return None
    before = _table(dataset.split("train"))
    rows = None
    if "valid" in splits:
        valid = Beginning(dataset.split("valid"), _MOST_VALID_RECORDS)
        rows = list(evaluation_rows(valid, _TOKENS_PER_ROW, seed, objective))
    one_sided = [before.model.shortened(order) for order in range(before.model.order + 1)]
    both_sides: list[MarkovModel | TwoSidedMarkovModel] = []
    if not objective.causal:
        after = _table(dataset.split("train"), is_reversed=True)
        both_sides = [TwoSidedMarkovModel(model, after.model.shortened(model.order)) for model in one_sided]
    chosen = _best(one_sided, objective, rows)
    assert isinstance(chosen, MarkovModel)
    two_sided = _best(both_sides, objective, rows) if both_sides else None
    assert not isinstance(two_sided, MarkovModel)
    return Markov(
        model=chosen,
        two_sided=two_sided,
        num_residues=before.num_residues,
        chosen_on=None if rows is None else "valid",
    )


class _Table(NamedTuple):
    model: MarkovModel
    num_residues: int


def _table(split: Split, *, is_reversed: bool = False) -> _Table:
    """Returns the table of the largest order worth trying."""
    counts = MarkovCounts()
    step = -1 if is_reversed else 1
    counts.add(tokens[::step] for tokens in _first_residues(split))
    return _Table(MarkovModel(counts, max(_DEFAULT_ORDER, largest_order(counts.num_residues))), counts.num_residues)


def _best(
    models: Sequence[MarkovModel | TwoSidedMarkovModel], objective: Objective, rows: list[EvaluationRow] | None
) -> MarkovModel | TwoSidedMarkovModel:
    """Returns the model with the lowest loss on some rows; without rows the one of the default order."""
    if rows is None:
        return models[_DEFAULT_ORDER]
    return models[int(np.argmin([_loss(markov_predictions(model, objective), rows) for model in models]))]


class Beginning:
    """The first records of a split."""

    def __init__(self, split: Split, num_records: int) -> None:
        self._split = split
        self.lengths = split.lengths[:num_records]

    def tokens(self, record: int) -> np.ndarray:
        """Returns the residue tokens of a record."""
        return self._split.tokens(record)


def _first_residues(split: Split) -> Iterator[np.ndarray]:
    num_residues = 0
    for record in range(split.num_records):
        if num_residues >= _MOST_COUNTED_RESIDUES:
            return
        tokens = split.tokens(record)
        num_residues += len(tokens)
        yield tokens


def _loss(predict: Predict, rows: list[EvaluationRow]) -> float:
    total = num_targets = 0.0
    for row in rows:
        targets = row.batch.targets.numpy()
        total -= float(predict(row)[np.arange(len(targets)), targets].sum(dtype=np.float64))
        num_targets += len(targets)
    return total / num_targets


UNIFORM = {
    "accuracy": 1 / len(RESIDUES),
    "top5_accuracy": 5 / len(RESIDUES),
    "perplexity": float(len(RESIDUES)),
    "bits_per_residue": float(np.log2(len(RESIDUES))),
    "calibration_error": 0.0,
}
"""The expected scores of a blind guess among the 25 residue letters."""
