"""All fits of a run: every set of features, in every fold of every seed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protlm.data.records import shown
from protlm.errors import ProtlmError
from protlm.inference.linear_probe import Features, Fit, Fold, fit_probe, predict_constant
from protlm.inference.row_embeddings import default_tokens_per_batch
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.devices import best_device
from protlm.runtime.progress import Advance, StartProgress
from protlm.workflows.probe.features import embed_layers, sequence_baselines
from protlm.workflows.probe.labels import LabelledProteins
from protlm.workflows.probe.request import ProbeRequest, check_model, probed_layers
from protlm.workflows.probe.targets import Targets


@dataclass
class Fits:
    """The predictions of a run.

    Attributes:
        description: The model.
        num_parameters: Its parameters.
        layers: The layers that were probed.
        tested: The rows that were tested, rising, int64; the same ones by every seed.
        predictions: Of the tested rows, by the name of the features, one array a seed.
        fold_numbers: The fold of each tested row, one array a seed.
        chosen: How many folds chose each layer.
        num_fitted: Most rows that a fit took.
        num_unfinished: Fits that did not come to their end.
    """

    description: ModelDescription
    num_parameters: int
    layers: tuple[int, ...]
    tested: np.ndarray
    predictions: dict[str, list[np.ndarray]] = field(default_factory=dict)
    fold_numbers: list[np.ndarray] = field(default_factory=list)
    chosen: Counter[int] = field(default_factory=Counter)
    num_fitted: int = 0
    num_unfinished: int = 0


def layer_name(layer: int) -> str:
    """Returns the name of the features of a layer."""
    return f"layer_{layer}"


def fit_all(
    request: ProbeRequest,
    labelled: LabelledProteins,
    targets: Targets,
    folds: Sequence[Sequence[Fold]],
    folder: Path,
    start_progress: StartProgress,
) -> Fits:
    """Returns the predictions of a model's layers and of all baselines.

    Args:
        request: The options of the run.
        labelled: The proteins.
        targets: Their labels.
        folds: The folds of each seed.
        folder: Holds the embeddings meanwhile.
        start_progress: Starts the stages `embed` (residues) and `fit` (fits).

    Raises:
        ProtlmError: A model that cannot be read or does not reach a protein, or embeddings that cannot be made.
    """
    model, description = read_named_model(request.model)
    check_model(request, description)
    _check_lengths(request, labelled, description)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = probed_layers(request, description)
    fits = Fits(description, num_parameters, layers, np.sort(np.concatenate([fold.test for fold in folds[0]])))
    run = _Run(request, labelled, targets, folds, folder, start_progress, fits)
    # Their file takes up disk only as long as they are named: no second one stands beside it.
    run.fit_model(run.embed(model))
    run.fit_sequences()
    for number in range(len(folds)):
        twin = Performer(description.model)
        twin.reset(request.seed + number)
        run.fit_random_weights(run.embed(twin), number)
    return fits


class RowsWithTarget:
    """The features of the rows that have a target, numbered among these."""

    def __init__(self, features: Features, places: np.ndarray) -> None:
        self._features, self._places = features, places

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the features of some rows."""
        return self._features.rows(self._places[numbers])


class _Run:
    """The fits of one call."""

    def __init__(
        self,
        request: ProbeRequest,
        labelled: LabelledProteins,
        targets: Targets,
        folds: Sequence[Sequence[Fold]],
        folder: Path,
        start_progress: StartProgress,
        fits: Fits,
    ) -> None:
        self._request, self._labelled, self._targets = request, labelled, targets
        self._folds, self._folder, self._start_progress = folds, folder, start_progress
        self.fits = fits
        self.fits.num_fitted = max(len(fold.train) + len(fold.valid) for of_seed in folds for fold in of_seed)
        for of_seed in folds:
            numbers = np.repeat(np.arange(len(of_seed)), [len(fold.test) for fold in of_seed])
            self.fits.fold_numbers.append(numbers[_order_of(of_seed)])

    def embed(self, model: Performer) -> dict[int, Features]:
        """Returns the features of the layers of a network."""
        proteins = self._labelled.proteins
        is_first = np.asarray(proteins.first) == np.arange(len(proteins))
        advance = self._start_progress("embed", int(np.asarray(proteins.lengths)[is_first].sum()))
        return embed_layers(
            model.to(best_device()).eval(), proteins, self.fits.layers, self._folder / "embeddings.bin",
            of_residues=self._targets.task == "per-residue", cut=self._request.cut,
            tokens_per_batch=self._request.tokens_per_batch or default_tokens_per_batch(), advance=advance,
        )  # fmt: skip

    def fit_sequences(self) -> None:
        """Adds the predictions from sequences alone, and the constant ones."""
        baselines = sequence_baselines(self._labelled.proteins, of_residues=self._targets.task == "per-residue")
        advance = self._start_progress("fit", len(baselines) * sum(map(len, self._folds)))
        for name, features in baselines.items():
            for number, fits in enumerate(self._fit_seeds(features, advance)):
                self._add(name, [fit.predicted for fit in fits], number)
        for number, folds in enumerate(self._folds):
            constants = [
                predict_constant(
                    self._targets.values, fold, is_regression=self._targets.is_regression, is_known=len(folds) > 1
                )
                for fold in folds
            ]
            self._add("constant", constants, number)

    def fit_model(self, layers: Mapping[int, Features]) -> None:
        """Adds the predictions from each layer of the model, and those from the layer that each fold chooses."""
        advance = self._start_progress("fit", len(layers) * sum(map(len, self._folds)))
        by_layer = {layer: list(self._fit_seeds(features, advance)) for layer, features in layers.items()}
        for number in range(len(self._folds)):
            of_seed = {layer: fits[number] for layer, fits in by_layer.items()}
            chosen = _chosen(of_seed)
            self.fits.chosen.update(chosen)
            predicted = [of_seed[layer][place].predicted for place, layer in enumerate(chosen)]
            self._add("model", predicted, number)
            for layer, fits in of_seed.items():
                self._add(layer_name(layer), [fit.predicted for fit in fits], number)

    def fit_random_weights(self, layers: Mapping[int, Features], number: int) -> None:
        """Adds the predictions from a network with random weights, those of one seed, by the layers that it chooses."""
        folds = self._folds[number]
        advance = self._start_progress("fit", len(layers) * len(folds))
        of_seed = {layer: [self._fit(features, fold, advance) for fold in folds] for layer, features in layers.items()}
        predicted = [of_seed[layer][place].predicted for place, layer in enumerate(_chosen(of_seed))]
        self._add("random_weights", predicted, number)

    def _fit_seeds(self, features: Features, advance: Advance) -> Iterator[list[Fit]]:
        """Yields the fits of each seed, one a fold; those of a fold that the first seed has too are taken again."""
        of_first: list[Fit] = []
        for folds in self._folds:
            fits = []
            for place, fold in enumerate(folds):
                if of_first and fold == self._folds[0][place]:
                    fits.append(of_first[place])
                    advance(1)
                else:
                    fits.append(self._fit(features, fold, advance))
            of_first = of_first or fits
            yield fits

    def _fit(self, features: Features, fold: Fold, advance: Advance) -> Fit:
        targets = self._targets
        placed = RowsWithTarget(features, targets.places)
        fit = fit_probe(placed, targets.values, fold, is_regression=targets.is_regression)
        self.fits.num_unfinished += not fit.is_converged
        advance(1)
        return fit

    def _add(self, name: str, predicted: Sequence[np.ndarray], number: int) -> None:
        in_order = np.concatenate(predicted)[_order_of(self._folds[number])]
        self.fits.predictions.setdefault(name, []).append(in_order)


def _chosen(fits: Mapping[int, Sequence[Fit]]) -> list[int]:
    """Returns the layer that each fold chooses: the best on the rows that are neither fitted nor tested."""
    num_folds = len(next(iter(fits.values())))
    return [max(fits, key=lambda layer: fits[layer][place].valid_score) for place in range(num_folds)]


def _order_of(folds: Sequence[Fold]) -> np.ndarray:
    """Returns the order in which the tested rows of all folds rise."""
    return np.argsort(np.concatenate([fold.test for fold in folds]))


def _check_lengths(request: ProbeRequest, labelled: LabelledProteins, description: ModelDescription) -> None:
    """Raises ProtlmError if a protein is longer than the model's learned positions."""
    limit, lengths = description.max_residues, np.asarray(labelled.proteins.lengths)
    if limit is None or request.window is not None or lengths.max() <= limit:
        return
    too_long = np.flatnonzero(lengths > limit)
    first = int(too_long[0])
    others = f" (and {len(too_long) - 1:,} more proteins are too long)" if len(too_long) > 1 else ""
    raise ProtlmError(
        f"{shown(labelled.proteins.id(first))}: has {int(lengths[first]):,} residues, and the positions of this model "
        f"reach {limit:,}{others}; compute long proteins in windows with --window {limit}"
    )
