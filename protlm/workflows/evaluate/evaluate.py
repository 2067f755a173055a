"""`protlm eval`: a model on splits of a dataset, beside the baselines, with the uncertainty of every figure."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from protlm import files
from protlm.choices import UsedPrecision
from protlm.data.batching.masking import Objective
from protlm.data.records import shown
from protlm.data.storage.dataset import Dataset, Split
from protlm.errors import ProtlmError
from protlm.inference.baselines import (
    UNIFORM,
    Markov,
    Predict,
    copies_of_the_visible,
    empirical,
    fit_markov,
    markov_predictions,
    training_counts,
)
from protlm.inference.metrics import MetricSums, replicate_weights, sums_by_protein
from protlm.inference.precision import overflow_hint, set_precision, used_precision
from protlm.inference.pseudo_perplexity import sample_of, single_residue_rows
from protlm.inference.residue_scores import ResidueScores
from protlm.inference.scoring import max_scored_residues, score_rows
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_files import short_name
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.devices import best_device
from protlm.runtime.progress import Advance, StartProgress, no_progress
from protlm.workflows.evaluate.attention import (
    approximation_of,
    approximation_residues,
    attention_of,
    find_proteins,
)
from protlm.workflows.evaluate.breakdowns import Breakdowns
from protlm.workflows.evaluate.measure import Masks, Watcher, has_clusters, measure_split, resampling_key
from protlm.workflows.evaluate.multiqc_row import multiqc_rows
from protlm.workflows.evaluate.page import render_page
from protlm.workflows.evaluate.report import (
    EvalReport,
    MarkovSummary,
    SplitReport,
    calibration_of,
    differences_between_splits,
    exact_row,
    replicates_of,
    score_row,
    verdict_of,
)
from protlm.workflows.evaluate.request import (
    MULTIQC_NAME,
    PAGE_NAME,
    REPORT_NAME,
    RESIDUES_NAME,
    EvalRequest,
    check_options,
    check_request,
)
from protlm.workflows.evaluate.residue_table import ResidueTable, open_residue_table


def evaluate(request: EvalRequest, *, start_progress: StartProgress = no_progress) -> EvalReport:
    """Scores a model and writes out/report.json.

    Args:
        request: What is asked for.
        start_progress: Starts the stage `eval` (residues).

    Raises:
        UsageError: Options that do not fit the model.
        ProtlmError: A model or dataset that cannot be read, an empty split, one of which no residue is scored, or an
            existing report.
    """
    dataset, splits = check_request(request)
    precision = used_precision(request.precision, may_be_half=False)
    model, description = read_named_model(request.model)
    set_precision(model, precision)
    evaluation = _Evaluation(request, dataset, model.to(best_device()), description, precision)
    shown = find_proteins(splits, request.attention)
    advance = start_progress("eval", sum(map(evaluation.num_scored_residues, splits.values())))
    with files.made_folder(request.out):
        with ExitStack() as stack:
            table = None
            if request.residues:
                table = stack.enter_context(open_residue_table(request.out / RESIDUES_NAME))
            reports: dict[str, SplitReport] = {
                name: evaluation.report(split, table, advance) for name, split in splits.items()
            }
            report = evaluation.summary(reports)
            bits = report.model["bits_per_residue"]
            # The attention of a diverged model has no weights to show.
            if bits is not None and math.isfinite(bits):
                report = replace(
                    report,
                    attention_maps=attention_of(model, shown, description.max_residues),
                    approximation=evaluation.approximation(next(iter(splits.values())), start_progress),
                )
            # The report last: who sees it finds the others.
            contents = {
                PAGE_NAME: render_page(report),
                MULTIQC_NAME: multiqc_rows(report),
                REPORT_NAME: json.dumps(report.to_json(), indent=1) + "\n",
            }
        if not request.residues:
            # That of an earlier report, which this one replaces.
            (request.out / RESIDUES_NAME).unlink(missing_ok=True)
        files.write_each_whole(request.out, contents)
    return report


class _Evaluation:
    """The model, the baselines and the masks of one call, and how they measure a split."""

    def __init__(
        self,
        request: EvalRequest,
        dataset: Dataset,
        model: Performer,
        description: ModelDescription,
        precision: UsedPrecision,
    ) -> None:
        trained = description.objective
        self._precision = precision
        self._request, self._dataset, self._model, self._description = request, dataset, model, description
        check_options(request, description)
        rates = trained.rates if request.mask_rate is None else replace(trained.rates, rate=request.mask_rate)
        self._masks = Masks(
            objective=Objective(trained.causal, rates).hiding_all(),
            seed=request.seed,
            num_masks=request.num_masks,
            tokens_per_batch=request.tokens_per_batch,
            window_tokens=description.window_tokens,
            max_residues=max_scored_residues(description),
        )
        self._as_trained = replace(self._masks, objective=Objective(trained.causal, rates))
        self._counts = description.residue_counts or training_counts(dataset)
        self._markov = _markov_of(dataset, self._masks)

    def num_scored_residues(self, split: Split) -> int:
        """Returns the residues of all forward passes over a split."""
        lengths, request = self._reached(split), self._request
        passes = request.num_masks * (1 + request.as_trained + request.random_weights)
        sample = [lengths[record] ** 2 for record in self._sample(split)]
        return int(lengths.sum()) * passes + int(sum(sample))

    def report(self, split: Split, table: ResidueTable | None, advance: Advance) -> SplitReport:
        """Measures everything on one split."""
        breakdowns = Breakdowns(split)
        watchers: list[Watcher] = [lambda _mask, scores, resampled: breakdowns.add(scores, resampled)]
        watchers += self._range_watchers(split)
        if table is not None:
            watchers.append(lambda mask, scores, _resampled: table.add(split, mask, scores))
        baselines: dict[str, Predict] = {"empirical": empirical(self._counts)}
        if self._markov is not None:
            baselines["markov"] = markov_predictions(self._markov.model, self._masks.objective)
            if self._markov.two_sided is not None:
                baselines["two_sided"] = markov_predictions(self._markov.two_sided, self._masks.objective)
        sums = measure_split(self._model, split, self._masks, baselines, watchers=tuple(watchers), advance=advance)
        if not sums["model"].num_targets:
            raise ProtlmError(
                f"{split.directory}: no residue of {split.name} was scored: the positions of this model reach only "
                f"the first {self._masks.max_residues} of each protein, and none of them was hidden; raise --masks"
            )
        rows = {name: score_row(measured) for name, measured in sums.items()} | {"uniform": exact_row(UNIFORM)}
        rows |= self._further_rows(split, advance)
        limit = self._masks.max_residues
        return SplitReport(
            num_records=split.num_records,
            num_cut=0 if limit is None else int((split.lengths > limit).sum()),
            num_lacked=sum(split.summary.residue_counts[letter] for letter in self._description.model.tokens().lacked),
            num_targets=sums["model"].num_targets,
            resampled="clusters" if has_clusters(split) else "proteins",
            scores=rows,
            verdict=verdict_of(split.name, sums),
            pseudo_perplexity=self._pseudo_perplexity(split, advance),
            calibration=calibration_of(sums["model"]),
            breakdowns=breakdowns.report(),
            replicates=replicates_of(sums["model"]),
        )

    def approximation(self, split: Split, start_progress: StartProgress) -> dict[str, Any] | None:
        """Measures how near the attention is to exact attention, if asked for."""
        if not self._request.approximation:
            return None
        return approximation_of(
            self._model,
            split,
            self._masks,
            self._counts,
            redraw_every_steps=self._description.redraw_every_steps,
            advance=start_progress("approximation", approximation_residues(split)),
        )

    def _range_watchers(self, split: Split) -> tuple[Watcher, ...]:
        """Returns what watches in float16 that every number is within its range."""
        if self._precision != "fp16":
            return ()
        return (lambda _mask, scores, _resampled: _check_range(split, scores),)

    def _further_rows(self, split: Split, advance: Advance) -> dict[str, dict[str, float | None]]:
        """Returns the rows that are measured on request only."""
        rows = {}
        if self._request.random_weights:
            twin = Performer(self._description.model)
            twin.reset(self._request.seed)
            set_precision(twin, self._precision)
            watchers = self._range_watchers(split)
            sums = measure_split(twin.to(best_device()), split, self._masks, {}, watchers=watchers, advance=advance)
            rows["random_weights"] = score_row(sums["model"])
        if self._request.as_trained:
            copies = {"copies": copies_of_the_visible(self._counts, self._as_trained.objective)}
            watchers = self._range_watchers(split)
            sums = measure_split(self._model, split, self._as_trained, copies, watchers=watchers, advance=advance)
            rows |= {"model_as_trained": score_row(sums["model"]), "copies": score_row(sums["copies"])}
        return rows

    def _pseudo_perplexity(self, split: Split, advance: Advance) -> dict[str, float | int | None] | None:
        records = self._sample(split)
        if not records:
            return None
        sums = MetricSums()
        for _, scores in score_rows(
            self._model, single_residue_rows(split, records, self._request.tokens_per_batch), advance=advance
        ):
            if self._precision == "fp16":
                _check_range(split, scores)
            members, terms = sums_by_protein(scores)
            keys = [resampling_key(split, record) for record in members.tolist()]
            sums.add(terms, replicate_weights(keys, self._request.seed), keys)
        return {"num_proteins": len(records), "num_targets": sums.num_targets, **score_row(sums)}

    def _sample(self, split: Split) -> list[int]:
        """Returns the proteins of which every residue is hidden alone, all within the model's reach."""
        if not self._request.pseudo_perplexity:
            return []
        return sample_of(split, self._request.pseudo_perplexity, self._request.seed, self._masks.max_residues)

    def _reached(self, split: Split) -> np.ndarray:
        limit = self._masks.max_residues
        return split.lengths if limit is None else np.minimum(split.lengths, limit)

    def summary(self, reports: dict[str, SplitReport]) -> EvalReport:
        """Returns the whole report."""
        description, request, markov = self._description, self._request, self._markov
        name, first = next(iter(reports.items()))
        return EvalReport(
            split=name,
            seed=request.seed,
            objective="next-token" if description.objective.causal else "masked",
            targets="next-token" if description.objective.causal else "hidden",
            mask_rate=self._masks.objective.rates.rate,
            num_masks=request.num_masks,
            num_records=first.num_records,
            num_cut=first.num_cut,
            num_targets=first.num_targets,
            model=first.scores["model"],
            empirical=first.scores["empirical"],
            verdict=first.verdict,
            splits=reports,
            differences=differences_between_splits(reports),
            markov=None if markov is None else _summary_of(markov),
            model_name=short_name(request.model),
            num_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            attention=description.model.attention_name,
            weights_hash=description.weights_hash,
            dataset_hash=self._dataset.hash,
            training_dataset_hash=description.dataset_hash,
            projection=_projection_kind(description.model.has_projection, description.redraw_every_steps),
            precision=self._precision,
        )


def _check_range(split: Split, scores: ResidueScores) -> None:
    """Raises ProtlmError if the probabilities of a residue are no numbers: beyond the range of float16."""
    # A token that the model lacks has the logarithm −∞.
    wrong = np.isnan(scores.log_probabilities).any(axis=1)
    if wrong.any():
        name = shown(split.id(int(scores.records[wrong.argmax()])))
        raise ProtlmError(f"{name}: its probabilities are not finite; {overflow_hint('fp16')}")


def _markov_of(dataset: Dataset, masks: Masks) -> Markov | None:
    """Returns the Markov baseline of a dataset; None without a training split."""
    filled = {name for name, summary in dataset.manifest.splits.items() if summary.num_records}
    if "train" not in filled:
        return None
    valid = dataset.split("valid") if "valid" in filled else None
    return fit_markov(dataset.split("train"), valid, masks.objective, masks.seed)


def _summary_of(markov: Markov) -> MarkovSummary:
    return MarkovSummary(
        order=markov.model.order,
        two_sided_order=None if markov.two_sided is None else markov.two_sided.order,
        num_residues=markov.num_residues,
        chosen_on=markov.chosen_on,
    )


def _projection_kind(has_projection: bool, redraw_every_steps: int) -> str:
    if not has_projection:
        return "none"
    return "redrawn" if redraw_every_steps else "fixed"
