"""All fits of a run: every set of features, in every fold of every seed."""

from collections import Counter
from collections.abc import Mapping, Sequence
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
        chosen: How many folds chose each layer.
        num_fitted: Most rows that a fit took.
        num_unfinished: Fits that did not come to their end.
    """

    description: ModelDescription
    num_parameters: int
    layers: tuple[int, ...]
    tested: np.ndarray
    predictions: dict[str, list[np.ndarray]] = field(default_factory=dict)
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
    embeddings = run.embed(model, "model")
    run.fit_sequences()
    run.fit_layers("model", embeddings, range(len(folds)))
    for number in range(len(folds)):
        twin = Performer(description.model)
        twin.reset(request.seed + number)
        run.fit_layers("random_weights", run.embed(twin, f"random-{number}"), [number])
    return fits


class _OfRows:
    """The features of the rows that have a target, where others are left out."""

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
        self._of_first_seed: dict[tuple[str, int], Fit] = {}

    def embed(self, model: Performer, name: str) -> dict[int, Features]:
        """Returns the features of the layers of a network."""
        proteins = self._labelled.proteins
        is_first = np.asarray(proteins.first) == np.arange(len(proteins))
        advance = self._start_progress("embed", int(np.asarray(proteins.lengths)[is_first].sum()))
        path = self._folder / f"{name}.bin"
        try:
            return embed_layers(
                model.to(best_device()).eval(), proteins, self.fits.layers, path,
                of_residues=self._labelled.is_of_residues, cut=self._request.cut,
                tokens_per_batch=self._request.tokens_per_batch or default_tokens_per_batch(), advance=advance,
            )  # fmt: skip
        finally:
            # The map keeps the file, and so it goes with the map.
            path.unlink(missing_ok=True)

    def fit_sequences(self) -> None:
        """Adds the predictions from sequences alone, and the constant ones."""
        baselines = sequence_baselines(self._labelled.proteins, of_residues=self._labelled.is_of_residues)
        num_fits = len(baselines) * sum(map(len, self._folds))
        advance = self._start_progress("fit", num_fits)
        for name, features in baselines.items():
            for number in range(len(self._folds)):
                self._add(name, [fit.predicted for fit in self._fit_seed(name, features, number, advance)], number)
        for number, folds in enumerate(self._folds):
            self._add("constant", [self._constant(fold, len(folds)) for fold in folds], number)

    def fit_layers(self, name: str, layers: Mapping[int, Features], numbers: Sequence[int]) -> None:
        """Adds the predictions from a network's layers, for the seeds of some numbers.

        The layer is chosen in each fold by the proteins that are neither fitted nor tested. For the model, the
        predictions of each layer are added too.
        """
        advance = self._start_progress("fit", len(layers) * sum(len(self._folds[number]) for number in numbers))
        for number in numbers:
            by_layer = {
                # Random weights are others for each seed.
                layer: self._fit_seed(f"{name if name == 'model' else number} {layer}", features, number, advance)
                for layer, features in layers.items()
            }
            chosen = []
            for place in range(len(self._folds[number])):
                best = max(by_layer, key=lambda layer: by_layer[layer][place].valid_score)
                chosen.append(by_layer[best][place].predicted)
                if name == "model":
                    self.fits.chosen[best] += 1
            self._add(name, chosen, number)
            if name == "model":
                for layer, fits in by_layer.items():
                    self._add(layer_name(layer), [fit.predicted for fit in fits], number)

    def _constant(self, fold: Fold, num_folds: int) -> np.ndarray:
        values, is_regression = self._targets.values, self._targets.is_regression
        # The mean of the others is low where a fold is high: over several folds it would correlate with the labels.
        if is_regression and num_folds > 1:
            return np.full(len(fold.test), values.mean())
        return predict_constant(values, fold, is_regression=is_regression)

    def _fit_seed(self, name: str, features: Features, number: int, advance: Advance) -> list[Fit]:
        """Returns the fits in all folds of a seed; those of a fold that the first seed had too are taken again."""
        fits, placed = [], _OfRows(features, self._targets.places)
        for place, fold in enumerate(self._folds[number]):
            fit = self._of_first_seed.get((name, place)) if fold == self._folds[0][place] else None
            if fit is None:
                fit = fit_probe(placed, self._targets.values, fold, is_regression=self._targets.is_regression)
                self.fits.num_unfinished += not fit.is_converged
            if number == 0:
                self._of_first_seed[name, place] = fit
            fits.append(fit)
            advance(1)
        return fits

    def _add(self, name: str, predicted: Sequence[np.ndarray], number: int) -> None:
        tests = np.concatenate([fold.test for fold in self._folds[number]])
        self.fits.predictions.setdefault(name, []).append(np.concatenate(predicted)[np.argsort(tests)])


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
