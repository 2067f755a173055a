"""curves.png of a run: how its tables become a picture, fast enough to draw it again while the run goes on."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from protlm import files
from protlm.choices import Stage
from protlm.config import Config, ModelConfig
from protlm.errors import RunError
from protlm.model.health import num_features_of
from protlm.vocabulary import NUM_RESIDUES
from protlm.workflows.pages.figures import quiet_matplotlib
from protlm.workflows.pages.log_axis import set_log_scale
from protlm.workflows.pages.palette import BASELINE_MARKS, SPLIT_MARKS
from protlm.workflows.train.run_tables import HEALTH, METRICS, read_thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 1500
"""Points of a curve; more than the picture has columns of pixels would show nothing."""

_MOST_MARKERS = 30
_MOST_HEALTH_STEPS = 200
_MOST_NAMED_LAYERS = 8
"""Layers that a legend lists one by one; more get a colour bar."""

_LONGEST_AVERAGE = 20.0
"""Points that the average of a long curve is over, in effect."""

_LARGEST_EXPONENT = 700.0

BASELINE_LABELS = {
    "uniform": f"uniform: a guess among {NUM_RESIDUES} letters",
    "empirical": "empirical on valid: residue frequencies",
    "markov": "Markov on valid: residues before, best order",
    "two_sided": "Markov on valid: both sides, best order",
}
"""The baselines in the legend, by their keys in the report of an evaluation."""


@quiet_matplotlib()
def plot_curves(run_dir: Path, config: Config, baselines: Mapping[str, float] | None = None) -> None:
    """Draws run_dir/curves.png from metrics.csv and, where features were measured, health.csv.

    The upper panel has the perplexity of training, averaged, and of the valid split, with the baselines; the next one,
    in a stage of a converted model, the loss of the stage; the last one the effective features of each layer.

    Args:
        run_dir: The run directory, with its metrics.csv.
        config: Settings of the run.
        baselines: Perplexities on the valid split, by the keys of `BASELINE_LABELS`; None without that split.

    Raises:
        RunError: A table that protlm train did not write.
    """
    # The Figure class directly: pyplot would look for a display and keep global state.
    from matplotlib.figure import Figure

    lines = _shares_by_layer(run_dir / "health.csv", config.model)
    stage = config.train.stage
    num_panels = 1 + (stage is not None) + bool(lines)
    figure = Figure(figsize=(7, 1.5 + 3 * num_panels), layout="constrained")
    panels = figure.subplots(num_panels, squeeze=False, sharex=True)[:, 0]
    path = run_dir / "metrics.csv"
    rows = read_thinned(path, METRICS, _MOST_POINTS)
    _draw_perplexity(panels[0], path, rows, config, baselines or {})
    if stage is not None:
        _draw_stage(panels[1], path, rows, stage)
    if lines:
        _draw_features(panels[-1], lines, config.model)
    panels[-1].set_xlabel("training step")
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    for axes in panels:
        axes.grid(alpha=0.3)
    with files.written_whole(run_dir / "curves.png") as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw_stage(axes: "Axes", path: Path, rows: list[dict[str, str]], stage: Stage) -> None:
    column = f"train/{stage}_loss"
    points = _points(path, column, [row for row in rows if row[column]])
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    color = SPLIT_MARKS["train"].color
    axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.7)
    axes.plot(steps, _averages(losses), color=color, label="training, average")
    axes.set(title=f"Loss of the stage {stage}, against the teacher", ylabel="loss, log scale (lower is better)")
    if losses and min(losses) > 0:
        set_log_scale(axes, "y")
    axes.legend(fontsize="small")


def _draw_perplexity(
    axes: "Axes", path: Path, rows: list[dict[str, str]], config: Config, baselines: Mapping[str, float]
) -> None:
    train = _points(path, "train/loss", _predicted(rows, config))
    valid = _points(path, "valid/perplexity", [row for row in rows if row["valid/perplexity"]])
    steps, losses = [step for step, _ in train], [loss for _, loss in train]
    color = SPLIT_MARKS["train"].color
    if losses:
        axes.plot(steps, [_perplexity(loss) for loss in losses], color=color, alpha=0.2, linewidth=0.7)
        averages = [_perplexity(loss) for loss in _averages(losses)]
        axes.plot(steps, averages, color=color, label=f"training, average: {_training_targets(config)}")
    measured = [(step, value) for step, value in valid if math.isfinite(value)]
    if measured:
        mark = SPLIT_MARKS["valid"]
        scored = "next residues" if config.model.causal else "hidden residues only"
        size = 4 if len(measured) <= _MOST_MARKERS else 0
        axes.plot(
            *zip(*measured, strict=True), **mark.line, marker=mark.marker, markersize=size, label=f"valid: {scored}"
        )
    known = {"uniform": float(NUM_RESIDUES), **baselines}
    for mark, (key, label) in zip(BASELINE_MARKS, BASELINE_LABELS.items(), strict=True):
        if key in known:
            axes.axhline(known[key], **mark.line, label=f"{label} ({known[key]:.3g})")
    axes.set(
        title=_title(config),
        ylabel="perplexity, log scale (lower is better)",
    )
    set_log_scale(axes, "y")
    axes.legend(fontsize="small")


def _predicted(rows: list[dict[str, str]], config: Config) -> list[dict[str, str]]:
    """Returns the rows of updates that predicted residues: none in `transfer`."""
    return [] if config.train.stage == "transfer" else rows


def _title(config: Config) -> str:
    """Returns what the perplexities are of; training may score other residues than all the rest."""
    if config.model.causal:
        return "Perplexity of the next residue; the training line scores ends of proteins too"
    hidden = "Perplexity of hidden residues"
    return hidden if config.train.mask_share == 1 else f"{hidden}; the training line scores a mixture"


def _training_targets(config: Config) -> str:
    """Returns the residues that the loss of training is the mean over, which need not be those of the valid split."""
    settings = config.train
    if config.model.causal:
        return "next tokens"
    if settings.mask_share == 1:
        return "hidden residues only"
    visible = max(0.0, 1 - settings.mask_share - settings.random_share)
    return f"{settings.mask_share:.0%} hidden, {settings.random_share:.0%} replaced, {visible:.0%} visible"


def _draw_features(axes: "Axes", lines: dict[int, list[tuple[int, float]]], model: ModelConfig) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # The end of the colour map would be too pale on white.
    colors = mpl.colormaps["viridis"].resampled(256)
    scale = Normalize(min(lines), max(lines) + 0.15 * (max(lines) - min(lines)))
    totals = " or ".join(map(str, sorted({_num_features(model, layer) for layer in lines})))
    for layer, points in sorted(lines.items()):
        axes.plot(*zip(*points, strict=True), color=colors(scale(layer)), linewidth=1.2, label=f"layer {layer}")
    axes.set(
        title=f"Share of the {totals} features that carry a layer's attention",
        ylabel="effective features / all (higher is better)",
        ylim=(0, 1),
    )
    if len(lines) <= _MOST_NAMED_LAYERS:
        axes.legend(fontsize="small", ncols=2)
        return
    bar = axes.figure.colorbar(ScalarMappable(scale, colors), ax=axes, label="layer (1 is next to the input)")
    bar.ax.set_ylim(min(lines), max(lines))


def _shares_by_layer(path: Path, model: ModelConfig) -> dict[int, list[tuple[int, float]]]:
    """Returns step and share of the features for each layer that has features."""
    lines: dict[int, list[tuple[int, float]]] = defaultdict(list)
    if path.exists():
        rows = [row for row in read_thinned(path, HEALTH, _MOST_HEALTH_STEPS) if row["effective_features"]]
        for row, (step, features) in zip(rows, _points(path, "effective_features", rows), strict=True):
            layer = _layer(path, row["layer"], model)
            lines[layer].append((step, features / _num_features(model, layer)))
    return dict(lines)


def _num_features(model: ModelConfig, layer: int) -> int:
    """Returns the number of features of a layer that has features."""
    feature_map = model.feature_map_of(model.kinds[layer - 1])
    assert feature_map is not None
    return num_features_of(model, feature_map)


def _layer(path: Path, text: str, model: ModelConfig) -> int:
    """Returns the number of a layer that has features."""
    names = [str(layer) for layer, kind in enumerate(model.kinds, start=1) if model.feature_map_of(kind)]
    if text not in names:
        raise RunError(f"{path}: layer: expected one with features, got {text!r:.40}; move the file away")
    return int(text)


def _points(path: Path, column: str, rows: list[dict[str, str]]) -> list[tuple[int, float]]:
    try:
        return [(int(row["step"]), float(row[column])) for row in rows]
    except ValueError as error:
        raise RunError(f"{path}: {column}: {error}; move the file away") from None


def _averages(losses: list[float]) -> list[float]:
    """Returns the exponential average of the losses up to each one, with the bias towards 0 of its start corrected."""
    # Over a twentieth of the curve: an average over more would lag behind a short run.
    weight = 1 - 1 / min(_LONGEST_AVERAGE, max(1.0, len(losses) / 20))
    average, result = 0.0, []
    for number, loss in enumerate(losses, start=1):
        average = weight * average + (1 - weight) * loss
        result.append(average / (1 - weight**number))
    return result


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, _LARGEST_EXPONENT))
