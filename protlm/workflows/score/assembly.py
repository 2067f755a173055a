"""Finished portions become scores: row by row, in the order of the input, with the baselines beside them."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protlm import vocabulary
from protlm.data.mutations import Substitution
from protlm.data.storage.protein_store import ProteinStore
from protlm.inference.blosum import STANDARD_RESIDUES, blosum62_score
from protlm.inference.marginals import marginal_score, perplexity_score
from protlm.inference.site_frequencies import SiteFrequencies
from protlm.runtime.progress import Advance
from protlm.workflows.score.csv_rows import csv_row
from protlm.workflows.score.inputs import Assay, Variant, read_variants, substitutions_of
from protlm.workflows.score.plan import Plan
from protlm.workflows.score.request import BASELINE_COLUMNS, ScoreRequest

_MANY_ROWS = 4096
_MOST_UNMEASURED = 1_000_000
_STANDARD = frozenset(STANDARD_RESIDUES)


@dataclass
class AssayScores:
    """The scores of the rows of one assay: all with a measurement, and the first million of those without.

    The latter are for the agreement with the baselines alone: a scan of a proteome has hundreds of millions.

    Attributes:
        assay: The assay.
        target: Number of its first protein in the store.
        num_variants: Rows.
        scores: Of the model.
        baselines: Of each baseline by name; NaN for a variant that it has no score for.
        measured: The measurements; NaN where there is none.
        is_fit: Whether each counts as fit: 1, 0, or −1 where the assay does not say.
        num_multiple: Rows with several substitutions.
        num_indels: Rows with insertions or deletions.
        num_not_standard: Rows that replace, or put in, another residue than the 20 standard ones.
        keeps_singles: Whether `singles` is asked for.
        singles: The model's score of each single substitution, (num_residues, 20) in the order of STANDARD_RESIDUES;
            NaN where there is none. None unless it is asked for.
    """

    assay: Assay
    target: int = 0
    num_variants: int = 0
    scores: "array[float]" = field(default_factory=lambda: array("d"))
    baselines: "dict[str, array[float]]" = field(default_factory=dict)
    measured: "array[float]" = field(default_factory=lambda: array("d"))
    is_fit: "array[int]" = field(default_factory=lambda: array("b"))
    num_multiple: int = 0
    num_indels: int = 0
    num_not_standard: int = 0
    keeps_singles: bool = False
    singles: np.ndarray | None = None

    def add(
        self, variant: Variant, substitutions: tuple[Substitution, ...], score: float, baselines: dict[str, float]
    ) -> None:
        """Takes a row: its score, and those of the baselines."""
        if not self.num_variants:
            self.target = variant.target
        self.num_variants += 1
        if variant.measured is not None or len(self.scores) < _MOST_UNMEASURED:
            self.scores.append(score)
            self.measured.append(np.nan if variant.measured is None else variant.measured)
            self.is_fit.append(-1 if variant.is_fit is None else variant.is_fit)
            for name, value in baselines.items():
                self.baselines[name].append(value)
        self.num_multiple += len(substitutions) > 1
        self.num_indels += variant.mutant is None
        self.num_not_standard += any(not {wild_type, mutant} <= _STANDARD for _, wild_type, mutant in substitutions)
        if self.singles is not None and len(substitutions) == 1:
            position, _, mutant = substitutions[0]
            if mutant in STANDARD_RESIDUES:
                self.singles[position, STANDARD_RESIDUES.index(mutant)] = score


class Scorer:
    """The score of each row by the log-probabilities at the sites, and those of the baselines.

    Attributes:
        protein: The residues of the protein that was turned to.
        baselines: The names of the baselines.
    """

    def __init__(
        self, proteins: ProteinStore, plan: Plan, log_probabilities: np.ndarray, frequencies: SiteFrequencies | None
    ) -> None:
        self._proteins, self._plan, self._logs = proteins, plan, log_probabilities
        self._target = -1
        self.protein = ""
        self._losses = _losses(plan, log_probabilities) if plan.num_columns == 1 else None
        self._frequencies = frequencies
        self.baselines = BASELINE_COLUMNS[: 1 if frequencies is None else 2]

    def turn_to(self, target: int) -> None:
        """Prepares for the rows of a protein."""
        if target == self._target:
            return
        self._target = target
        self.protein = vocabulary.decode(self._proteins.tokens(target))
        if self._losses is None:
            leader = int(self._proteins.first[target])
            start, stop = self._plan.sites.bounds[leader : leader + 2].tolist()
            self._site_positions = self._plan.sites.positions(leader, start, stop)
            self._site_logs = np.asarray(self._logs[start:stop])

    def score(self, variant: Variant, substitutions: tuple[Substitution, ...]) -> float:
        """Returns the score of a row of the protein that was turned to."""
        if self._losses is None:
            return marginal_score(self._site_logs, self._site_positions, substitutions) if substitutions else 0.0
        assert variant.sequence is not None
        first = self._proteins.first
        return perplexity_score(self._losses[int(first[self._target])], self._losses[int(first[variant.sequence])])

    def baseline_scores(self, variant: Variant, substitutions: tuple[Substitution, ...]) -> list[float]:
        """Returns the score of each baseline; NaN for insertions and deletions, which none of them knows."""
        if variant.mutant is None:
            return [np.nan] * len(self.baselines)
        scores = [blosum62_score(substitutions)]
        if self._frequencies is not None:
            scores.append(self._frequencies.score(substitutions))
        return scores


def _losses(plan: Plan, log_probabilities: np.ndarray) -> dict[int, float]:
    """Returns the logarithm of the pseudo-perplexity of every protein that was computed."""
    bounds = plan.sites.bounds
    (computed,) = np.nonzero(np.diff(bounds))
    return {
        record: -float(log_probabilities[bounds[record] : bounds[record + 1]].mean(dtype=np.float64))
        for record in computed.tolist()
    }


def write_scores(
    variants_path: Path,
    assays: list[Assay],
    scorer: Scorer,
    proteins: ProteinStore,
    request: ScoreRequest,
    path_of: dict[str, Path],
    advance: Advance,
) -> Iterator[AssayScores]:
    """Yields the scores of each assay once its table is written.

    Args:
        variants_path: The rows that were read.
        assays: What they are of, in order.
        scorer: Scores them.
        proteins: All proteins.
        request: The options of the run.
        path_of: The table to write, by the name of the assay.
        advance: Called with the number of rows that were scored.
    """
    rows = read_variants(variants_path)
    variant = next(rows, None)
    renames = request.kind == "singles"
    for number, assay in enumerate(assays):
        collected = AssayScores(assay, baselines={name: array("d") for name in scorer.baselines})
        collected.keeps_singles = request.heat_map is not None
        with path_of[assay.name].open("w", newline="", encoding="utf-8") as file:
            # A table that was scored before, by another model, has the columns of the baselines.
            added = [name for name in scorer.baselines if name not in assay.columns]
            file.write(csv_row([*assay.columns, request.column, *added]))
            while variant is not None and variant.assay == number:
                fields, score, baselines = _scored(variant, collected, scorer)
                if renames:
                    # Repeated ids are numbered, as everywhere.
                    fields = [proteins.id(variant.target), *fields[1:]]
                file.write(csv_row([*fields, *map(_text, (score, *(baselines[name] for name in added)))]))
                variant = next(rows, None)
                if collected.num_variants % _MANY_ROWS == 0:
                    advance(_MANY_ROWS)
        advance(collected.num_variants % _MANY_ROWS)
        yield collected


def _scored(variant: Variant, collected: AssayScores, scorer: Scorer) -> tuple[list[str], float, dict[str, float]]:
    """Returns the fields of a row, its score and those of the baselines, which are collected too."""
    scorer.turn_to(variant.target)
    if collected.keeps_singles and collected.singles is None:
        collected.singles = np.full((len(scorer.protein), len(STANDARD_RESIDUES)), np.nan)
    substitutions = substitutions_of(variant, scorer.protein)
    score = scorer.score(variant, substitutions)
    baselines = dict(zip(scorer.baselines, scorer.baseline_scores(variant, substitutions), strict=True))
    collected.add(variant, substitutions, score, baselines)
    return variant.fields, score, baselines


def _text(score: float) -> str:
    return "" if np.isnan(score) else f"{score:.6g}"


def output_paths(output: Path, assays: list[Assay], folder_name: str | None) -> dict[str, Path]:
    """Returns the path of each table, by the name of its assay: the output itself, or a file in a folder of it."""
    if folder_name is None:
        return {"": output}
    return {assay.name: output / folder_name / f"{assay.stem}.csv" for assay in assays}
