"""The baselines of a report: what is predicted without a network, on the same targets and by the same measures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from protlm.data.batching.batches import EvaluationRow, Proteins, evaluation_rows
from protlm.data.batching.masking import Objective
from protlm.data.storage.dataset import Dataset
from protlm.errors import ShardError
from protlm.inference.markov import MarkovCounts, MarkovModel, TwoSidedMarkovModel, largest_order
from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, RESIDUES, VOCABULARY_SIZE, are_residues

_MOST_COUNTED_RESIDUES = 1 << 28
"""More residues of the training set than this change no figure that a reader could see."""
_MOST_VALID_RECORDS = 2000
_DEFAULT_ORDER = 2
_TOKENS_PER_ROW = 1 << 14

_Model = TypeVar("_Model", MarkovModel, TwoSidedMarkovModel)

Predict = Callable[[EvaluationRow], np.ndarray]
"""Returns the log-probabilities of all tokens at the targets of a row, (targets, 33)."""


@dataclass(frozen=True, kw_only=True)
class Markov:
    """The Markov baseline of a training set.

    Attributes:
        model: The count table of the chosen order, which sees the residues before a target.
        two_sided: The product of the tables of both sides, for masked models, which see both; None for causal ones.
        num_residues: Residues of the training set that were counted.
        chosen_on: The split by whose perplexity the orders were chosen; None: there is no valid split, and the order is
            the default.
    """

    model: MarkovModel
    two_sided: TwoSidedMarkovModel | None
    num_residues: int
    chosen_on: str | None


def training_counts(dataset: Dataset) -> Mapping[str, int]:
    """Returns the residue counts of a dataset's training split, for a model whose own training set is unknown."""
    summary = dataset.manifest.splits.get("train")
    return {} if summary is None else summary.residue_counts


def empirical_log_probabilities(training_counts: Mapping[str, int]) -> np.ndarray:
    """Returns the logarithms of the residue frequencies, smoothed by adding one; float64 (25,).

    Args:
        training_counts: Residues of the training set by letter.
    """
    counts = np.array([training_counts.get(letter, 0) + 1 for letter in RESIDUES], dtype=np.float64)
    logs: np.ndarray = np.log(counts / counts.sum())
    return logs


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


def fit_markov(training: Proteins, valid: Proteins | None, objective: Objective, seed: int) -> Markov:
    """Counts the training split and chooses the orders by perplexity on the valid split.

    On the valid split itself, the baseline is therefore the best of its few orders: a choice in its favour, as that of
    the best model is in the model's.

    Cost: about 40 ns for each of at most `_MOST_COUNTED_RESIDUES`; up to a second and 300 MB for the tables.

    Args:
        training: The proteins that are counted; those beyond the limit are left out.
        valid: The proteins of which the first ones choose; None: the order is the default.
        objective: What is predicted, and what is hidden.
        seed: Of the masks on the valid split.
    """
    counts = _counts(training)
    rows = None
    if valid is not None:
        rows = list(evaluation_rows(Beginning(valid, _MOST_VALID_RECORDS), _TOKENS_PER_ROW, seed, objective))
    before = MarkovModel(counts, counts.order)
    one_sided = [before.shortened(order) for order in range(before.order + 1)]
    two_sided = None
    if not objective.causal:
        after = MarkovModel(counts.reversed(), counts.order)
        pairs = [TwoSidedMarkovModel(model, after.shortened(model.order)) for model in one_sided]
        two_sided = _best(pairs, objective, rows)
    return Markov(
        model=_best(one_sided, objective, rows),
        two_sided=two_sided,
        num_residues=counts.num_residues,
        chosen_on=None if rows is None else "valid",
    )


def _counts(proteins: Proteins) -> MarkovCounts:
    """Returns the counts up to the largest order worth trying."""
    lengths = proteins.lengths
    # Whole proteins, the one that reaches the limit too.
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), _MOST_COUNTED_RESIDUES)) + 1]
    counts = MarkovCounts(max(_DEFAULT_ORDER, largest_order(int(lengths.sum()))))
    counts.add(_checked_tokens(proteins, record) for record in range(len(lengths)))
    return counts


def _checked_tokens(proteins: Proteins, record: int) -> np.ndarray:
    """Returns the residue tokens of a record; opening a shard does not look whether they are."""
    tokens = proteins.tokens(record)
    if not are_residues(tokens):
        raise ShardError(
            f"record {record} to be counted holds tokens that stand for no residue: a shard is damaged; prepare the "
            "dataset again"
        )
    return tokens


def _best(models: Sequence[_Model], objective: Objective, rows: list[EvaluationRow] | None) -> _Model:
    """Returns the model with the lowest loss on some rows; without rows the one of the default order."""
    if rows is None:
        return models[_DEFAULT_ORDER]
    losses = mean_losses([markov_predictions(model, objective) for model in models], rows)
    return models[int(np.argmin(losses))]


def mean_losses(baselines: Sequence[Predict], rows: Iterable[EvaluationRow]) -> list[float]:
    """Returns the mean negative log likelihood of the targets of some rows, in nats, for each of some baselines."""
    totals, num_targets = np.zeros(len(baselines)), 0
    for row in rows:
        targets = row.batch.targets.numpy()
        places = np.arange(len(targets))
        totals -= [float(predict(row)[places, targets].sum(dtype=np.float64)) for predict in baselines]
        num_targets += len(targets)
    return (totals / num_targets).tolist()  # type: ignore[no-any-return]  # NumPy types a list of anything


class Beginning:
    """The first records of a split."""

    def __init__(self, split: Proteins, num_records: int) -> None:
        self._split = split
        self.lengths = split.lengths[:num_records]

    def tokens(self, record: int) -> np.ndarray:
        """Returns the residue tokens of a record."""
        return self._split.tokens(record)


UNIFORM = {
    "accuracy": 1 / len(RESIDUES),
    "top5_accuracy": 5 / len(RESIDUES),
    "perplexity": float(len(RESIDUES)),
    "bits_per_residue": float(np.log2(len(RESIDUES))),
    "calibration_error": 0.0,
}
"""The expected scores of a blind guess among the 25 residue letters."""
