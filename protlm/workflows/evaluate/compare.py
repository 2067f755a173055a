"""`protlm eval --compare`: models and reports in, comparison.json and comparison.html out."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from protlm import files
from protlm.data.storage.manifest import is_dataset
from protlm.errors import ProtlmError, UsageError
from protlm.pretrained.model_files import is_checkpoint_file, short_name
from protlm.workflows.evaluate.comparison import Comparison, check_related, comparison_of
from protlm.workflows.evaluate.page_comparison import render_comparison
from protlm.workflows.evaluate.request import REPORT_FILES, REPORT_NAME, check_folder
from protlm.workflows.evaluate.saved_report import read_report

COMPARISON_NAME = "comparison.json"
COMPARISON_PAGE_NAME = "comparison.html"

Evaluate = Callable[[Path, Path, Path], object]
"""Evaluates a model on a dataset and writes its report into a folder: called with the three paths."""


def compare(items: Sequence[Path], out: Path, evaluate: Evaluate, *, force: bool = False) -> Comparison:
    """Compares reports, or models that are evaluated first, and writes out/comparison.json and out/comparison.html.

    Everything that can be refused is refused before the first model is evaluated. The reports of models stay in `out`,
    also if a later model fails.

    Args:
        items: `report.json` files, folders with one, and models; with models also the dataset to evaluate them on.
        out: Folder of the comparison, and of the reports of models.
        evaluate: Evaluates a model.
        force: Replace an existing comparison, and existing reports of models in `out`.

    Raises:
        UsageError: Fewer than two reports or models; models without a dataset, or with several.
        ProtlmError: A report or model that cannot be read, reports that do not belong together, an existing comparison.
    """
    check_folder(out, (COMPARISON_NAME, COMPARISON_PAGE_NAME), force=force)
    datasets = [item for item in items if is_dataset(item)]
    others = [item for item in items if item not in datasets]
    paths = [_report_path(item) for item in others]
    if len(others) < 2:
        raise UsageError("--compare takes at least two reports or models")
    models = {
        number: (item, out / f"model-{number}")
        for number, (item, path) in enumerate(zip(others, paths, strict=True), start=1)
        if path is None
    }
    if models and len(datasets) != 1:
        item, _ = next(iter(models.values()))
        raise UsageError(f"--compare: {item} is no report, so one DATASET is needed to evaluate it on")
    given = [os.path.realpath(path) for path in paths if path is not None]
    for item, folder in models.values():
        # Looks whether there is such a model, before others are evaluated.
        short_name(item)
        if os.path.realpath(folder / REPORT_NAME) in given:
            raise ProtlmError(f"{folder}: compared here, and where the report of {item} goes; choose another --out")
        _check_report_folder(item, folder, force=force)
    reports = {number: (path, read_report(path)) for number, path in enumerate(paths, start=1) if path is not None}
    check_related(list(reports.values()))
    for number, (item, folder) in models.items():
        evaluate(item, datasets[0], folder)
        reports[number] = folder / REPORT_NAME, read_report(folder / REPORT_NAME)
    comparison = comparison_of([reports[number] for number in sorted(reports)])
    # The JSON last: who sees it finds the page.
    contents = {
        COMPARISON_PAGE_NAME: render_comparison(comparison),
        COMPARISON_NAME: json.dumps(comparison.to_json(), indent=1) + "\n",
    }
    with files.made_folder(out):
        files.write_each_whole(out, contents)
    return comparison


def _check_report_folder(model: Path, folder: Path, *, force: bool) -> None:
    """Raises ProtlmError if a model's report cannot be written."""
    if (folder / REPORT_NAME).exists() and not force:
        raise ProtlmError(
            f"{folder}: holds a report already, perhaps of an interrupted comparison; to use it, pass {folder} in "
            f"place of {model}; to evaluate again, use --force or another --out"
        )
    check_folder(folder, REPORT_FILES, force=force)


def _report_path(item: Path) -> Path | None:
    if item.is_file():
        return None if is_checkpoint_file(item) else item
    return item / REPORT_NAME if (item / REPORT_NAME).is_file() else None
