"""metrics.csv and curves.png of a run: hides how a resumed run continues the file of the run before it."""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path

from protlm.data import files
from protlm.errors import CheckpointError

COLUMNS = (
    "step", "epoch", "train/loss", "train/perplexity", "lr", "grad_norm",
    "valid/loss", "valid/accuracy", "valid/perplexity",
)  # fmt: skip


class MetricsFile:
    """One row per optimizer update; each is on disk when `append` returns to the operating system."""

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        """Opens the file, keeping the rows up to last_step and dropping those past it."""
        kept = [row for row in read_metrics(path) if int(row["step"]) <= last_step] if path.exists() else []
        with files.written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="")

    def append(self, row: Mapping[str, float]) -> None:
        """Adds one row; columns it lacks stay empty. Floats are written with all their digits."""
        self._writer.writerow(
            {key: value if isinstance(value, int) else repr(float(value)) for key, value in row.items()}
        )
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Returns the complete rows of a metrics.csv as texts by column; a row cut off by a kill is left out.

    Raises:
        CheckpointError: The file is no metrics.csv.
    """
    with path.open(newline="", encoding="utf-8") as file:
        whole_lines = (line for line in file if line.endswith("\n"))
        try:
            rows = csv.DictReader(whole_lines)
            if tuple(rows.fieldnames or ()) != COLUMNS:
                raise CheckpointError(f"{path}: line 1: expected the columns of protlm train; delete the file")
            return [row for row in rows if row["step"].isdigit() and None not in row.values()]
        except (UnicodeDecodeError, csv.Error) as error:
            raise CheckpointError(f"{path}: not a metrics file of protlm train ({error}); delete the file") from None


def plot_curves(metrics_path: Path, picture_path: Path) -> None:
    """Draws perplexity against step for training, smoothed, and for the valid split."""
    # The figure class is used directly: pyplot would look for a display and keep global state.
    # It says on stderr when it finds no folder for its font cache, which is no news to anyone.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [float(row["train/perplexity"]) for row in rows]
    axes.plot(steps, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(train), color="tab:blue", label="train (smoothed)")
    valid = [(int(row["step"]), float(row["valid/perplexity"])) for row in rows if row["valid/perplexity"]]
    if valid:
        axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=3, label="valid")
    axes.set(xlabel="step", ylabel="perplexity of masked residues", title="Training")
    axes.grid(alpha=0.3)
    axes.legend()
    with files.written_whole(picture_path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    average, result = 0.0, []
    for number, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**number))
    return result
