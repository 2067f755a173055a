"""curves.png of a run: how its tables become a picture, fast enough to draw it again while the run goes on."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from protlm import files
from protlm.errors import CheckpointError
from protlm.workflows.train.run_tables import HEALTH, METRICS, read_thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 1500
"""Points of a curve; more than the picture has columns of pixels would show nothing."""

_MOST_HEALTH_STEPS = 200
_MOST_NAMED_LAYERS = 8
"""Layers that a legend lists one by one; more get a colour bar."""


def plot_curves(run_dir: Path, *, causal: bool = False) -> None:
    """Draws run_dir/curves.png from metrics.csv and, where features were measured, health.csv.

    The upper panel has the perplexity of training, smoothed, and of the valid split; the lower one the effective number
    of features of each layer.

    Args:
        run_dir: The run directory, with its metrics.csv.
        causal: Whether the model predicts the next residue, rather than masked ones.

    Raises:
        CheckpointError: A table that protlm train did not write.
    """
    # The Figure class directly: pyplot would look for a display and keep global state.
    # matplotlib warns on stderr when it has no folder for its font cache, which matters to nobody here.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    lines = _features_by_layer(run_dir / "health.csv")
    figure = Figure(figsize=(7, 7 if lines else 4), layout="constrained")
    panels = figure.subplots(2 if lines else 1, squeeze=False, sharex=True)[:, 0]
    _draw_perplexity(panels[0], run_dir / "metrics.csv", "the next residue" if causal else "hidden residues")
    if lines:
        _draw_features(panels[1], lines)
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.3)
    with files.written_whole(run_dir / "curves.png") as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw_perplexity(axes: "Axes", path: Path, predicted: str) -> None:
    rows = read_thinned(path, METRICS, _MOST_POINTS)
    train = _points(path, "train/perplexity", rows)
    valid = _points(path, "valid/perplexity", [row for row in rows if row["valid/perplexity"]])
    steps, values = [step for step, _ in train], [value for _, value in train]
    axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(values), color="tab:blue", label="train (smoothed)")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=3, label="valid")
    axes.set(
        ylabel=f"perplexity of {predicted}", title="How many residues the model hesitates between: lower is better"
    )
    axes.legend()


def _draw_features(axes: "Axes", lines: dict[int, list[tuple[int, float]]]) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # The end of the colour map would be too pale on white.
    colors = mpl.colormaps["viridis"].resampled(256)
    scale = Normalize(min(lines), max(lines) + 0.15 * (max(lines) - min(lines)))
    for layer, points in sorted(lines.items()):
        axes.plot(*zip(*points, strict=True), color=colors(scale(layer)), linewidth=1.2, label=f"layer {layer}")
    axes.set(
        ylabel="effective number of features",
        title="Random features that share a layer's attention: near 1 is bad",
        ylim=(0, None),
    )
    if len(lines) <= _MOST_NAMED_LAYERS:
        axes.legend(fontsize="small", ncols=2)
        return
    bar = axes.figure.colorbar(ScalarMappable(scale, colors), ax=axes, label="layer (1 is next to the input)")
    bar.ax.set_ylim(min(lines), max(lines))


def _features_by_layer(path: Path) -> dict[int, list[tuple[int, float]]]:
    lines: dict[int, list[tuple[int, float]]] = defaultdict(list)
    if path.exists():
        rows = [row for row in read_thinned(path, HEALTH, _MOST_HEALTH_STEPS) if row["effective_features"]]
        for row, point in zip(rows, _points(path, "effective_features", rows), strict=True):
            lines[int(row["layer"])].append(point)
    return dict(lines)


def _points(path: Path, column: str, rows: list[dict[str, str]]) -> list[tuple[int, float]]:
    try:
        return [(int(row["step"]), float(row[column])) for row in rows]
    except ValueError as error:
        raise CheckpointError(f"{path}: {column}: {error}; move the file away") from None


def _smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    average, result = 0.0, []
    for number, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**number))
    return result
