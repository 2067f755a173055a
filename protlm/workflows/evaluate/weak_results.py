"""Which results of an evaluation are weak, and the line that tells each."""

from collections.abc import Iterator

from protlm.workflows.evaluate.report import BASELINE_NAMES, EvalReport, SplitReport


def single_proteins(report: EvalReport) -> Iterator[str]:
    """Yields a line for each scored split of a single protein."""
    for name, split in report.splits.items():
        if split.num_records == 1:
            yield f"split '{name}' is a single protein, and so its scores say nothing about others"


def lost_comparisons(report: EvalReport) -> Iterator[str]:
    """Yields the verdict on each split on which the model is no better than the best of the baselines."""
    for name, split in report.splits.items():
        if not _is_better(name, split):
            yield split.verdict


def _is_better(name: str, split: SplitReport) -> bool:
    bits = split.scores["model"]["bits_per_residue"]
    names = ["empirical"] if name == "train" else [key for key in BASELINE_NAMES if key in split.scores]
    others = [split.scores[key]["bits_per_residue"] for key in names]
    # A model without a number has diverged.
    return bits is not None and all(other is None or bits < other for other in others)
