"""Sections 4 to 7: whole attention matrices, outputs, stacks of layers, and the bias of an epsilon."""

import math
import statistics
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from scripts.report.approximation import (
    epsilon_biases,
    layer_errors,
    log_log_slope,
    on_sphere,
    output_errors,
    relative_error,
    uniform_errors,
)
from scripts.report.estimates import KINDS, SOFTMAX_MAPS, generator_of, mean_of
from scripts.report.page import Section, table
from scripts.report.plots import Line, conditions, plot
from scripts.report.settings import Settings

HEAD_DIM = 16
UNIFORM_SQUARE = 0.25
UNIFORM_FEATURES = 256
# A maximum over heavy-tailed errors falls somewhat faster than the bound while there are few features.
SLOPES = {"trig": (-0.62, -0.38), "positive": (-0.75, -0.38)}

NORM_HEAD_DIM, NORM_FEATURES, NORM_LENGTH = 64, 256, 1024

STACK_HEADS, STACK_HEAD_DIM, STACK_SQUARE = 4, 32, 2.0
VARIANTS = (
    ("positive", "orthogonal", 64), ("positive", "orthogonal", 256), ("positive", "orthogonal", 1024),
    ("oprf", "orthogonal", 256), ("trig", "orthogonal", 256),
)  # fmt: skip

LINE_WIDTHS = {64: 0.8, 256: 1.6, 1024: 2.8}
"""More features, a thicker line."""

EPSILONS = (1e-4, 1e-6)
EPSILON_SIZES = {"head_dim": 64, "num_features": 256}
EPSILON_CASES = ((1.0, 128), (4.0, 128), (1.0, 1024), (4.0, 1024))
"""Variance of q and k, and length."""
OURS = "favor_attention"


def uniform(settings: Settings, folder: Path) -> Section:
    """Section 4: the largest error of a matrix of weights."""
    features, length = settings.uniform_features, settings.uniform_length
    sizes = {"head_dim": HEAD_DIM, "square": UNIFORM_SQUARE, "draws": settings.draws, "seed": settings.seed}
    lines, rows, by_length, numbers, passed = [], [], [], {}, True
    for feature_map, (lowest, highest) in SLOPES.items():
        errors = [
            mean_of(uniform_errors(feature_map, "orthogonal", length=length, num_features=count, **sizes))
            for count in features
        ]
        means = [error.value for error in errors]
        slope = log_log_slope(features, means)
        holds = lowest < slope < highest
        passed &= holds
        lengths = [
            mean_of(uniform_errors(feature_map, "orthogonal", length=some, num_features=UNIFORM_FEATURES, **sizes))
            for some in settings.uniform_lengths
        ]
        numbers[feature_map] = {
            "features": features, "mean_max_error": means, "standard_errors": [e.standard_error for e in errors],
            "slope": slope, "lengths": settings.uniform_lengths, "mean_max_error_by_length": [e.value for e in lengths],
        }  # fmt: skip
        spread = [error.standard_error for error in errors]
        label = f"{feature_map}, slope {slope:.2f}".replace("-", "−")
        lines.append(Line(label, features, means, feature_map, "orthogonal", spread))
        rows.append((feature_map, *(f"{value:.3f}" for value in means), f"{slope:.2f}"))
        by_length.append((feature_map, *(f"{e.value:.3f} ± {e.standard_error:.3f}" for e in lengths)))
    guide = [means[0] * math.sqrt(features[0] / count) for count in features]
    lines.append(Line("slope −½, for comparison", features, guide, "reference", "reference"))
    name = "uniform.png"
    plot(
        folder / name, lines, x_label="features", y_label="max |A − Â| over all pairs", x_ticks=_ticks(features),
        title=f"Largest error of the un-normalised weights, L = {length}, orthogonal rows",
        foot=conditions(torch.float64),
    )  # fmt: skip
    return Section(
        "The largest error over all pairs falls like one over the root of the number of features",
        [
            "Theorem 4: with M = Θ(d/δ² · log(4d^¾R/δ)) orthogonal rows and `trig`, ‖A − Â‖∞ ≤ ε with any constant "
            "probability, δ = ε·e^−‖x‖²: the error falls like M^−½, and L does not occur. It is proved for `trig` "
            "only; `positive` is shown beside it.",
            f"{length} queries and keys in uniform directions, ‖x‖² = {UNIFORM_SQUARE:g}, d = {HEAD_DIM}, orthogonal "
            f"rows, {settings.draws} draws of points and projection; means over draws.",
        ],
        f"the fitted slope lies in {SLOPES['trig']} for `trig` and in {SLOPES['positive']} for `positive`",
        passed,
        [
            table(["features", *map(str, features), "slope"], rows),
            table(
                ["length", *(f"{some:,}" for some in settings.uniform_lengths)], by_length,
                f"With {UNIFORM_FEATURES} features, against the number of points (growth by rarer pairs of points, "
                "which the theorem bounds by the ball they lie in):",
            ),
        ],
        [(name, "Largest error of the weights against features")],
        numbers=numbers,
    )  # fmt: skip


def outputs(settings: Settings, folder: Path) -> Section:
    """Section 5: the normalised output against exact attention."""
    generator = generator_of(settings.seed)
    shape = (1, settings.draws, settings.output_length, HEAD_DIM)
    features = settings.output_features
    combinations = [(name, kind, count) for name in SOFTMAX_MAPS for kind in KINDS for count in features]
    qkv = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    gaussian = output_errors(*qkv, combinations, settings.seed)
    on_unit_sphere = [on_sphere(shape, 1.0, generator) for _ in range(2)]
    unit = output_errors(*on_unit_sphere, qkv[2], combinations, settings.seed)
    plots = _figure_4(folder, features, gaussian, unit, settings)
    by_norm, norm_numbers = _by_norm(settings, folder)
    plots.append(("norms.png", "Relative error of the output against the norm of queries and keys"))
    below_trig = all(
        gaussian["positive", kind, count].median() < gaussian["trig", kind, count].median()
        for kind in ("iid", "orthogonal") for count in features
    )  # fmt: skip
    below_iid = {name: _wins(unit, name, features) for name in SOFTMAX_MAPS}
    wins_needed = len(features) * settings.draws * len(SOFTMAX_MAPS) * 0.6
    tables = [
        _error_table(features, errors, f"Median over draws of the mean squared error, {inputs}; columns are features:")
        for errors, inputs in ((gaussian, "q, k ~ N(0, 1), so that ‖x‖² is about 4"), (unit, "‖x‖² = 1"))
    ]
    return Section(
        "The output approaches exact attention as features are added",
        [
            "The normalised output is a ratio of estimates, consistent but not unbiased; no theorem gives its error. "
            "The paper's Figure 4 shows the mean squared error of the output: orthogonal below iid, positive below "
            f"`trig`. Here, as there, L = {settings.output_length:,}, d = {HEAD_DIM}, {settings.draws} draws, v ~ "
            "N(0, 1), float64, at equal numbers of *features* (`hyperbolic` and `trig` make two of a row).",
            "The paper does not give the norm of its inputs, and it decides the outcome. With q, k ~ N(0, 1) the "
            "renormaliser of `trig` comes near 0 and its output explodes, while the features are too few for the "
            "others to converge. At ‖x‖² = 1 all converge, orthogonal rows win, and `trig` is the better map.",
        ],
        "for q, k ~ N(0, 1) the median of `positive` is below that of `trig` at every number of features, iid and "
        "orthogonal; at ‖x‖² = 1 orthogonal beats iid in at least 60 % of all draws of the four maps together",
        below_trig and sum(below_iid.values()) >= wins_needed,
        [*tables, by_norm],
        plots,
        [
            f"At ‖x‖² = 1 orthogonal rows beat iid ones in this many of {len(features) * settings.draws} pairs of "
            f"draws: {', '.join(f'{name} {wins}' for name, wins in below_iid.items())}."
        ],
        {"gaussian": _listed(gaussian), "unit": _listed(unit), "wins": below_iid, "norms": norm_numbers},
    )


def _figure_4(
    folder: Path, features: tuple[int, ...], gaussian: dict[tuple[str, str, int], Tensor],
    unit: dict[tuple[str, str, int], Tensor], settings: Settings,
) -> list[tuple[str, str]]:  # fmt: skip
    plots = []
    panels = (("figure_4_gaussian.png", gaussian, "q, k ~ N(0, 1)"), ("figure_4_unit.png", unit, "‖x‖² = ‖y‖² = 1"))
    for name, errors, inputs in panels:
        lines = [
            Line(f"{feature_map}, {kind}", features,
                 [errors[feature_map, kind, count].median().item() for count in features], feature_map, kind)
            for feature_map in ("positive", "trig", "oprf")
            for kind in ("orthogonal", "iid")
        ]  # fmt: skip
        title = f"Error of the output, L = {settings.output_length:,}, d = {HEAD_DIM}, {inputs}"
        plot(
            folder / name, lines, x_label="features", y_label="mean squared error (median of draws)", title=title,
            foot=conditions(torch.float64), x_ticks=_ticks(features),
        )  # fmt: skip
        plots.append((name, title))
    return plots


def _wins(errors: dict[tuple[str, str, int], Tensor], feature_map: str, features: tuple[int, ...]) -> int:
    """Returns in how many draws, of all numbers of features, orthogonal rows have the smaller error."""
    return sum(
        int((errors[feature_map, "orthogonal", count] < errors[feature_map, "iid", count]).sum()) for count in features
    )


def _error_table(features: tuple[int, ...], errors: dict[tuple[str, str, int], Tensor], caption: str) -> str:
    rows = [
        (name, kind, *(f"{errors[name, kind, count].median().item():.1e}" for count in features))
        for name in SOFTMAX_MAPS for kind in KINDS
    ]  # fmt: skip
    return table(["map", "projection", *map(str, features)], rows, caption)


def _listed(errors: dict[tuple[str, str, int], Tensor]) -> list[dict[str, object]]:
    return [
        {"map": name, "kind": kind, "features": count, "median": values.median().item(), "mean": values.mean().item(),
         "min": values.min().item(), "max": values.max().item()}
        for (name, kind, count), values in errors.items()
    ]  # fmt: skip


def _by_norm(settings: Settings, folder: Path) -> tuple[str, dict[str, list[float]]]:
    """Returns relative errors for growing norms, as a table, with the plain average of all values beside them."""
    generator = generator_of(settings.seed)
    heads = settings.draws
    length = min(NORM_LENGTH, settings.output_length)
    shape = (1, heads, length, NORM_HEAD_DIM)
    combinations = [
        ("positive", "iid", NORM_FEATURES), ("positive", "orthogonal", NORM_FEATURES),
        ("hyperbolic", "orthogonal", NORM_FEATURES), ("oprf", "orthogonal", NORM_FEATURES),
        ("oprf", "simplex", NORM_FEATURES), ("trig", "orthogonal", NORM_FEATURES),
    ]  # fmt: skip
    curves: dict[str, list[float]] = {f"{name}, {kind}": [] for name, kind, _ in combinations}
    average: list[float] = []
    for square in settings.norms:
        q, k = (on_sphere(shape, square, generator) for _ in range(2))
        v = torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = functional.scaled_dot_product_attention(q, k, v)
        power = expected.square().mean((0, 2, 3))
        for (name, kind, _), errors in output_errors(q, k, v, combinations, settings.seed).items():
            curves[f"{name}, {kind}"].append((errors / power).sqrt().median().item())
        average.append(relative_error(v.mean(2, keepdim=True).expand_as(v), expected))
    curves["average of all values"] = average
    shown = (("positive", "orthogonal"), ("trig", "orthogonal"), ("oprf", "orthogonal"), ("oprf", "simplex"))
    lines = [Line(f"{name}, {kind}", settings.norms, curves[f"{name}, {kind}"], name, kind) for name, kind in shown]
    lines.append(Line("average of all values, without attention", settings.norms, average, "reference", "reference"))
    plot(
        folder / "norms.png", lines, x_label="‖x‖² = ‖y‖²", y_label="relative error of the output (median of draws)",
        title=f"Error of the output by norms, L = {length:,}, d = {NORM_HEAD_DIM}, {NORM_FEATURES} features",
        foot=conditions(torch.float64), x_ticks={square: f"{square:g}" for square in settings.norms},
    )  # fmt: skip
    useful = [
        square for square, ours, nothing in zip(settings.norms, curves["positive, orthogonal"], average, strict=True)
        if ours < nothing
    ]  # fmt: skip
    rows = [(name, *(f"{value:.3g}" for value in values)) for name, values in curves.items()]
    caption = (
        f"‖out − exact‖/‖exact‖, median of {heads} draws, L = {length:,}, d = {NORM_HEAD_DIM}, {NORM_FEATURES} "
        "features, at ‖x‖² = ‖y‖² = …; the last row ignores q and k and gives what attention to nothing would cost; "
        f"`positive` with orthogonal rows is below it {f'up to ‖x‖² = {useful[-1]:g}' if useful else 'nowhere'}:"
    )
    return table(["", *(f"{square:g}" for square in settings.norms)], rows, caption), curves


def layers(settings: Settings, folder: Path) -> Section:
    """Section 6: the error of a stack of layers."""
    errors = layer_errors(
        VARIANTS, layers=settings.layers, length=settings.layer_length, heads=STACK_HEADS, head_dim=STACK_HEAD_DIM,
        square=STACK_SQUARE, draws=settings.layer_draws, seed=settings.seed,
    )  # fmt: skip
    depths = list(range(1, settings.layers + 1))
    lines, rows, numbers, means = [], [], [], {}
    for variant, samples in errors.items():
        values = torch.tensor(samples, dtype=torch.float64)
        name = f"{variant[0]}, {variant[2]} features"
        means[variant] = values.mean(0)
        spread = (values.std(0) / math.sqrt(len(values))).tolist()
        lines.append(
            Line(name, depths, means[variant].tolist(), variant[0], variant[1], spread, width=LINE_WIDTHS[variant[2]])
        )
        rows.append((name, *(f"{value:.3f}" for value in means[variant].tolist())))
        numbers.append({"map": variant[0], "kind": variant[1], "features": variant[2], "relative_errors": samples})
    plot(
        folder / "layers.png", lines, x_label="layers", y_label="relative error of the residual stream", x_log=False,
        title=f"FAVOR against exact attention in a stack, L = {settings.layer_length}, orthogonal rows",
        foot=conditions(torch.float64),
        x_ticks=_ticks(depths),
    )  # fmt: skip
    fewer = all(bool((means[more] < means[less]).all()) for less, more in pairwise(VARIANTS[:3]))
    return Section(
        "Errors add up over layers, and more features keep them small",
        [
            "No theorem: small errors of one layer go through all later ones (the paper's Figure 14). Both stacks have "
            f"the same random weights: pre-LN attention layers with residuals, {STACK_HEADS} heads of "
            f"{STACK_HEAD_DIM}, queries and keys normalised to ‖x‖² = {STACK_SQUARE:g}, no MLP; FAVOR with orthogonal "
            f"rows, independent for each layer and head. L = {settings.layer_length}, inputs N(0, 1), means of "
            f"{settings.layer_draws} draws, float64; the error is ‖stream − exact‖/‖exact‖.",
        ],
        "for `positive`, four times the features lower the mean error at every depth",
        fewer,
        [table(["after layer", *map(str, depths)], rows)],
        [("layers.png", "Relative error against the number of layers")],
        numbers={"variants": numbers},
    )


def epsilon(settings: Settings, folder: Path) -> Section:
    """Section 7: the bias of the output by the usual epsilon."""
    biases = [
        epsilon_biases(
            EPSILONS, variance=variance, length=length, draws=settings.epsilon_draws, seed=settings.seed,
            **EPSILON_SIZES,
        )
        for variance, length in EPSILON_CASES
    ]  # fmt: skip
    rows = []
    for name in biases[0]:
        label = "**ours, no ε, float32**" if name == OURS else f"ε = {name.replace(', ', ', maximum over the ')}"
        rows.append((label, *(_median_and_range(case[name]) for case in biases)))
    ours = max(max(case[OURS]) for case in biases)
    theirs = min(statistics.median(biases[0][name]) for name in biases[0] if name != OURS)
    columns = ["", *(f"variance {variance:g}, L = {length:,}" for variance, length in EPSILON_CASES)]
    return Section(
        "No epsilon, no bias",
        [
            "Public implementations compute φ(x) = exp(ω·x − ‖x‖²/2 − max) + ε, the maximum for each query and over "
            "all keys. Without ε the maxima cancel. With it every feature has a floor, and attention is pulled to the "
            "plain average. Ours keeps every exponent relative to a reference of its own "
            "feature and adds nothing.",
            f"‖out − out without ε‖/‖out without ε‖ with the same projection, q, k ~ N(0, variance), v ~ N(0, 1), "
            f"d = {EPSILON_SIZES['head_dim']}, {EPSILON_SIZES['num_features']} features, float64; median "
            f"(smallest–largest) of {settings.epsilon_draws} draws. Ours is the float32 op against the same.",
        ],
        "ours is below 1e-4 in every draw; the smallest median with ε at variance 1, L = 128, is above 1e-3",
        ours < 1e-4 and theirs > 1e-3,
        [table(columns, rows)],
        notes=[
            "An earlier measurement gave 13 % and 82 % for 1e-4, and 0.16 % and 51 % for 1e-6. L = 128 gives "
            "the figures of variance 1. The bias is set by the one key with the largest exponent: it grows with the "
            "number of keys, and differs much between draws."
        ],
        numbers={
            f"variance {variance:g}, length {length}": values
            for (variance, length), values in zip(EPSILON_CASES, biases, strict=True)
        },
    )


def _median_and_range(values: list[float]) -> str:
    return f"{_share(statistics.median(values))} ({_share(min(values))}–{_share(max(values))})"


def _share(value: float) -> str:
    return f"{value:.1e}" if value < 1e-4 else f"{100 * value:.2g} %"


def _ticks(values: list[int] | tuple[int, ...]) -> dict[float, str]:
    return {value: f"{value:,}" for value in values}
