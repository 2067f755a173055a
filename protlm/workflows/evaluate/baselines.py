"""The baselines of a report: what is predicted without a network, on the same targets and by the same measures."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from protlm.data.batching.batches import EvaluationRow, Objective, evaluation_rows
from protlm.data.storage.dataset import Dataset, Split
from protlm.inference.markov import MarkovCounts, MarkovModel, largest_order
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
        model: The count table of the chosen order.
        num_residues: Residues of the training set that were counted.
        chosen_on: The split by whose perplexity the order was chosen; None: the dataset has no valid split, and the
            order is the default.
    """

    model: MarkovModel
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


def markov_predictions(model: MarkovModel, objective: Objective) -> Predict:
    """Returns the Markov baseline: a residue from those before it, as far as they are not hidden."""
    # The prediction of a causal model stands one token before its target.
    offset = 1 if objective.causal else 0

    def predict(row: EvaluationRow) -> np.ndarray:
        return model.log_probabilities(row.batch.tokens.numpy(), row.batch.target_positions.numpy() + offset)

    return predict


def fit_markov(dataset: Dataset, objective: Objective, seed: int) -> Markov | None:
    """Counts the training split and chooses the order by perplexity on the valid split; None without a training split.

    Args:
        dataset: The dataset that is evaluated.
        objective: What is predicted, and what is hidden.
        seed: Of the masks on the valid split.
    """
    splits = {name for name, summary in dataset.manifest.splits.items() if summary.num_records}
    if "train" not in splits:
        return None
    counts = MarkovCounts()
    counts.add(_first_residues(dataset.split("train")))
    if "valid" not in splits:
        return Markov(model=MarkovModel(counts, _DEFAULT_ORDER), num_residues=counts.num_residues, chosen_on=None)
    valid = Beginning(dataset.split("valid"), _MOST_VALID_RECORDS)
    rows = list(evaluation_rows(valid, _TOKENS_PER_ROW, seed, objective))
    longest = MarkovModel(counts, largest_order(counts.num_residues))
    models = [longest.shortened(order) for order in range(longest.order + 1)]
    losses = [_loss(markov_predictions(model, objective), rows) for model in models]
    return Markov(model=models[int(np.argmin(losses))], num_residues=counts.num_residues, chosen_on="valid")


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
