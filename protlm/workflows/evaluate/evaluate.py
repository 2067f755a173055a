"""`protlm eval`: a model's accuracy and perplexity on a split, beside the empirical baseline."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from protlm import files
from protlm.data.storage.dataset import open_dataset
from protlm.errors import ProtlmError
from protlm.inference.scoring import EVALUATION_SEED, Score, score_split, scored_residues
from protlm.pretrained.model_directory import read_model
from protlm.runtime.devices import best_device
from protlm.runtime.progress import StartProgress, no_progress

REPORT_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The content of report.json.

    Attributes:
        format_version: Version of this format.
        split: The split that was scored.
        seed: Seed of the masks.
        objective: `masked`, or `next-token` for a causal model, which is scored at every residue.
        mask_rate: Probability that a residue was scored: the model's own. Unused by `next-token`.
        num_records: Proteins in the split.
        num_cut: Proteins longer than the model's learned positions; their ends were not scored.
        num_targets: Scored residues.
        model: Accuracy and perplexity of the model.
        empirical: Accuracy and perplexity of the empirical baseline on the same targets.
        weights_hash: Hash of the model's weights.
        dataset_hash: Hash of the dataset.
        projection: `fixed`, `redrawn` or `none`: whether training kept the saved projections, redrew them, or had none.
    """

    format_version: int
    split: str
    seed: int
    objective: Literal["masked", "next-token"]
    mask_rate: float
    num_records: int
    num_cut: int
    num_targets: int
    model: Score
    empirical: Score
    weights_hash: str
    dataset_hash: str
    projection: str


def evaluate(
    model_path: Path,
    dataset_path: Path,
    split: str,
    out: Path,
    *,
    seed: int = EVALUATION_SEED,
    tokens_per_batch: int = 8192,
    force: bool = False,
    start_progress: StartProgress = no_progress,
) -> EvalReport:
    """Scores a model on a split and writes out/report.json.

    Args:
        model_path: A model directory or a run.
        dataset_path: A dataset of `protlm prep`.
        split: `train`, `valid`, `test` or `ood`.
        out: Folder for the report, made if there is none.
        seed: Seed of the masks, which are drawn from it and a protein's sequence.
        tokens_per_batch: Budget of a packed row; it changes no result beyond rounding.
        force: Replaces an existing report.
        start_progress: Starts the stage `eval` (residues).

    Raises:
        ProtlmError: The model or the dataset cannot be read, the split is empty, or there is a report already.
    """
    report_path = out / "report.json"
    if (out.exists() and not out.is_dir()) or report_path.is_dir():
        raise ProtlmError(f"{out}: expected a folder for report.json, got something else; choose another --out")
    if report_path.exists() and not force:
        raise ProtlmError(f"{report_path}: exists already; replace it with --force or choose another --out")
    dataset = open_dataset(dataset_path)
    proteins = dataset.split(split)
    model, description = read_model(model_path)
    limit = scored_residues(description)
    num_residues = int(proteins.lengths.sum() if limit is None else np.minimum(proteins.lengths, limit).sum())
    scores = score_split(
        model.to(best_device()),
        description,
        proteins,
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        advance=start_progress("eval", num_residues),
    )
    report = EvalReport(
        format_version=REPORT_FORMAT_VERSION,
        split=split,
        seed=seed,
        objective="next-token" if description.objective.causal else "masked",
        mask_rate=description.mask_rate,
        num_records=proteins.num_records,
        num_cut=0 if limit is None else int((proteins.lengths > limit).sum()),
        num_targets=scores.num_targets,
        model=scores.model,
        empirical=scores.empirical,
        weights_hash=description.weights_hash,
        dataset_hash=dataset.hash,
        projection=_projection_kind(description.model.has_projection, description.redraw_every_steps),
    )
    out.mkdir(parents=True, exist_ok=True)
    with files.written_whole(report_path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _projection_kind(has_projection: bool, redraw_every_steps: int) -> str:
    if not has_projection:
        return "none"
    return "redrawn" if redraw_every_steps else "fixed"
