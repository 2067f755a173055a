"""The sections of a report on how a model attends: maps of single proteins, similarity of residues, approximation."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from protlm.workflows.evaluate.page_details import CHEMISTRY, agreement_words, by_chemistry
from protlm.workflows.evaluate.report import EvalReport
from protlm.workflows.pages.figures import draw, heat_map, matrix
from protlm.workflows.pages.page import Block, Figure, Section, Table, Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_MOST_PICTURES = 24
_COLUMNS = 4


def attention_section(report: EvalReport) -> Section | None:
    """Returns the attention maps of proteins and the similarity of residues; None if they were not read."""
    content = report.attention_maps
    if content is None:
        return None
    blocks: list[Block] = [
        Text(
            "Each map has the keys across and the queries down, from `<cls>` at 0 to `<eos>`; stronger blue is more "
            "attention, each map in its own scale. A "
            "**diagonal** head attends to neighbours, a **vertical** one to the same few residues from everywhere, and "
            "a **diffuse** one to everything. The weights are read out exactly from the random features."
        )
    ]
    blocks += [_maps_figure(protein) for protein in content["proteins"]]
    blocks.append(_similarity_figure(content["similarity"]))
    return Section("attention", "How does it attend?", blocks)


def _maps_figure(protein: dict[str, Any]) -> Block:
    heads = protein["heads"][:_MOST_PICTURES]
    num_rows = -(-len(heads) // _COLUMNS)

    def plot(figure: "Drawing") -> None:
        grid = figure.subplots(num_rows, _COLUMNS, squeeze=False).ravel()
        for axes in grid[len(heads) :]:
            axes.set_visible(False)
        for axes, head in zip(grid, heads, strict=False):
            picture = np.array(head["picture"])
            # Single strong weights would leave the rest of the map blank.
            top = float(np.quantile(picture, 0.99)) or float(picture.max()) or 1.0
            axes.imshow(picture, cmap=heat_map(), vmin=0, vmax=top, interpolation="nearest",
                        extent=(0, protein["num_tokens"], protein["num_tokens"], 0))  # fmt: skip
            axes.set_title(f"{head['layer']}.{head['head']} {head['pattern']}", fontsize=8.5)
            axes.set_xticks([0, protein["num_tokens"]])
            axes.set_yticks([0, protein["num_tokens"]])
            axes.grid(visible=False)
        figure.supxlabel("key, position in the protein", fontsize=9)
        figure.supylabel("query, position in the protein", fontsize=9)

    patterns = Counter(head["pattern"] for head in protein["heads"])
    counts = ", ".join(f"{count} {pattern}" for pattern, count in sorted(patterns.items()))
    reading = f"The heads of all layers on {protein['id']} ({protein['num_residues']:,} residues): {counts}."
    rows = [
        (f"{head['layer']}.{head['head']}", head["pattern"], f"{head['local_share']:.3f}",
         f"{head['uniform_local_share']:.3f}", f"{head['column_share']:.3f}", f"{head['uniform_column_share']:.3f}",
         f"{head['entropy']:.3f}")
        for head in protein["heads"]
    ]  # fmt: skip
    header = (
        "layer.head", "pattern", "share near the diagonal", "if uniform", "on the strongest columns", "if uniform",
        "entropy, of log length",
    )  # fmt: skip
    data = Table(header, rows, ("text", "text", "number", "number", "number", "number", "number"))
    label = f"Attention maps of {protein['id']}"
    return Figure(draw(plot, label, height=0.5 + 1.45 * num_rows, width=6.4), reading, data)


def _similarity_figure(similarity: dict[str, Any]) -> Block:
    letters = list(CHEMISTRY)
    log_odds = np.array([[np.nan if value is None else value for value in row] for row in similarity["log_odds"]])
    values = by_chemistry(log_odds, similarity["residues"])

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        matrix(axes, values, letters, letters, label="log-odds of attention", diverging=True)
        axes.set(xlabel="residue", ylabel="residue")

    reading = (
        "How much more residues attend to each other than frequencies alone would give, over "
        f"{similarity['num_proteins']} proteins. {agreement_words(similarity['blosum62'])}"
    )
    rows = [
        (letter, *("" if np.isnan(value) else f"{value:+.2f}" for value in line))
        for letter, line in zip(letters, values, strict=True)
    ]
    return Figure(draw(plot, "Similarity of residues by attention", height=4.6), reading, Table(("", *letters), rows))


def approximation_section(report: EvalReport) -> Section | None:
    """Returns how near the model's attention is to exact attention; None if it was not measured."""
    content = report.approximation
    if content is None:
        return None
    errors = content["errors"]
    blocks: list[Block] = [Text(f"**{content['sentence']}**"), _replacements_table(content)]
    # Reports of before lack it.
    if content.get("swap") is not None:
        blocks += _swap_tables(content)
    if errors["is_softmax_estimate"]:
        blocks.append(_errors_figure(errors))
    blocks += _head_tables(errors)
    return Section("approximation", "How near is its attention to softmax?", blocks)


def _head_tables(errors: dict[str, Any]) -> list[Block]:
    """Returns the errors of every head, and what decides them: one table of both would be wider than a screen."""
    names = [f"{head['layer']}.{head['head']}" for head in errors["heads"]]
    caption = (
        f"The attention's output against exact attention on {errors['num_proteins']} proteins, {errors['num_draws']} "
        "draws; 95 % intervals in parentheses."
    )
    measured = Table(
        ("layer.head", "relative error", "with a fresh draw", "squared bias", "variance"),
        [(name, *(_estimate(head[key]) for key in _ERRORS)) for name, head in zip(names, errors["heads"], strict=True)],
        caption=caption,
    )
    reasons = Table(
        ("layer.head", "mean ‖q‖²", "mean ‖k‖²", f"effective features of {errors['num_features']}"),
        [
            (name, f"{head['q_norm']:.2f}", f"{head['k_norm']:.2f}", f"{head['effective_features']:.1f}")
            for name, head in zip(names, errors["heads"], strict=True)
        ],
        caption="What decides the error: norms of q and k as the features see them.",
    )
    return [measured, reasons]


_ERRORS = ("relative_error", "redrawn_relative_error", "squared_bias", "variance")


def _estimate(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    # A rounded nothing has no sign.
    value, low, high = (
        None if estimate[key] is None else round(estimate[key], 3) or 0.0 for key in ("value", "low", "high")
    )
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _span(estimate: dict[str, Any]) -> tuple[float, float]:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return (0.0, 0.0) if low is None or high is None else (max(0.0, value - low), max(0.0, high - value))


def _replacements_table(content: dict[str, Any]) -> Table:
    scores = content["scores"]
    rows = [("the model's own attention", f"{scores['saved']['accuracy']:.4f}", f"{scores['saved']['perplexity']:.2f}")]
    for key, name in (
        ("exact", "exact attention in its place"),
        ("near_only", "the exact weights of near tokens alone"),
        ("far_only", "estimates of all weights, those of near tokens too"),
    ):
        # Reports of before lack the latter two.
        if (score := scores.get(key)) is not None:
            rows.append((name, f"{score['accuracy']:.4f}", f"{score['perplexity']:.2f}"))
    if scores["redrawn_accuracy"] is not None:
        accuracy, perplexity = scores["redrawn_accuracy"], scores["redrawn_perplexity"]
        rows.append((
            f"other draws (mean ± spread of {len(scores['redrawn'])})",
            f"{accuracy['mean']:.4f} ± {accuracy['std']:.4f}", f"{perplexity['mean']:.2f} ± {perplexity['std']:.2f}",
        ))  # fmt: skip
    empirical = scores["empirical"]
    rows.append(("empirical baseline", f"{empirical['accuracy']:.4f}", f"{empirical['perplexity']:.2f}"))
    caption = f"The same weights on the first {content['num_scored_proteins']:,} proteins of {content['split']}."
    return Table(("", "accuracy", "perplexity"), rows, caption=caption)


def _swap_tables(content: dict[str, Any]) -> list[Block]:
    """Returns the tables on a swapped model, and on each part of its attention, beside exact attention."""
    scores = content["swap"]
    rows = [
        (
            each["name"], _estimate(each["accuracy"]), _estimate(each["kept"]), f"{each['kl']:.3f}",
            f"{each['agreement']:.3f}", f"{each['cosine']:.3f}",
        )
        for each in scores
    ]  # fmt: skip
    caption = (
        "A model with estimates in the place of exact attention, beside the same weights with exact attention: "
        "accuracy, the share of it that is kept, the mean divergence of the predictions in nats, equal first choices, "
        "and the cosine of the last hidden states; 95 % intervals in parentheses."
    )
    kept = Table(("attention", "accuracy", "kept", "KL", "agree", "cosine"), rows, caption=caption)
    layers = [str(number) for number in range(1, 1 + len(scores[0]["layer_errors"]))]
    errors = [(each["name"], *(f"{error:.2f}" for error in each["layer_errors"])) for each in scores[1:]]
    caption = (
        "‖out − exact‖/‖exact‖ of the attention's output by layer, given what the layer sees with exact attention."
    )
    return [kept, Table(("attention", *layers), errors, caption=caption)]


def _errors_figure(errors: dict[str, Any]) -> Block:
    from protlm.workflows.pages.palette import ALL_MARK, BASELINE_MARKS

    heads = [head for head in errors["heads"] if head["relative_error"] is not None]
    names = [f"{head['layer']}.{head['head']}" for head in heads]

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        places = range(len(heads))
        for key, label, mark in (
            ("relative_error", "the saved draw", ALL_MARK),
            ("redrawn_relative_error", "fresh draws", BASELINE_MARKS[0]),
        ):
            drawn = [(place, head[key]) for place, head in zip(places, heads, strict=True) if head[key] is not None]
            spans = np.array([_span(estimate) for _, estimate in drawn]).reshape(-1, 2)
            axes.errorbar([place for place, _ in drawn], [estimate["value"] for _, estimate in drawn], yerr=spans.T,
                          label=label, elinewidth=1, **mark.points)  # fmt: skip
        axes.set_xticks(places, names, rotation=60 if len(names) > 12 else 0)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="layer.head", ylabel="relative error, 95 % interval")
        figure.legend(loc="outside upper left", ncols=2)

    mean = float(np.mean([head["relative_error"]["value"] for head in heads]))
    reading = f"The output of a head differs from that of exact attention by {mean:.0%} on average."
    rows = [(name, _estimate(head["relative_error"])) for name, head in zip(names, heads, strict=True)]
    return Figure(draw(plot, "Error of the attention by head"), reading, Table(("layer.head", "relative error"), rows))
