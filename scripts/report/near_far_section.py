"""Section 8: exact weights of near tokens beside FAVOR for far ones."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from protlm.ops import draw_projection, favor_attention
from scripts.report.approximation import relative_error
from scripts.report.estimates import generator_of
from scripts.report.page import Section, table
from scripts.report.plots import Line, conditions, plot
from scripts.report.settings import Settings

HEAD_DIM, SQUARE, CORRELATION = 32, 2.0, 0.9
LINE_WIDTHS = (0.8, 1.6, 2.8)
"""More features, a thicker line."""
INDEPENDENT, SIMILAR = "independent tokens", "similar neighbours"


def near_far(settings: Settings, folder: Path) -> Section:
    """Section 8: the output with exact near weights, by near_block and features."""
    length, blocks, features = settings.near_length, settings.near_blocks, settings.near_features
    found, averages = {}, {}
    for name, correlation in ((SIMILAR, CORRELATION), (INDEPENDENT, 0.0)):
        q, k, v = draw(settings.draws, length, correlation, settings.seed)
        expected = functional.scaled_dot_product_attention(q, k, v)
        averages[name] = relative_error(v.mean(2, keepdim=True).expand_as(v), expected)
        for count in features:
            found[name, count] = [
                median_error(q, k, v, expected, count, block, settings.seed) for block in (0, *blocks)
            ]
    # Two blocks are neighbours: all weights are exact.
    exact = median_error(q, k, v, expected, features[0], length // 2, settings.seed)
    similar = [found[SIMILAR, count] for count in features]
    passed = exact < 1e-10 and all(earlier > later for errors in similar for earlier, later in pairwise(errors))
    rows = [
        (name, f"{count}", *(_cell(error, averages[name]) for error in errors), f"{averages[name]:.3f}")
        for (name, count), errors in found.items()
    ]
    _figure(folder / "near_far.png", found, settings)
    return Section(
        "Exact weights of near tokens lower the error where near tokens matter",
        [
            "With `near_block` = W the weights of a query's own block of W tokens and of its two neighbours are exact. "
            "That removes their share of the error, no more: where attention is spread over the whole length near "
            "tokens are few, and little is gained.",
            f"L = {length:,}, d = {HEAD_DIM}, ‖x‖² = {SQUARE:g}, `positive` with orthogonal rows, v ~ N(0, 1), "
            f"{settings.draws} draws, float64. “{SIMILAR}”: q = k is a random walk over directions, in which tokens "
            f"n apart correlate by {CORRELATION:g}ⁿ before they are brought to one length, as the attention of a "
            f"trained model prefers what is near. “{INDEPENDENT}”: q and k are random directions, of which nothing is "
            "near to anything.",
            "Bold errors are below that of the plain average of all values, which ignores q and k. The others are no "
            "use.",
        ],
        f"for {SIMILAR} the median error falls with every larger block, at each number of features; with W = L/2 it is "
        "below 1e-10",
        passed,
        [
            table(
                ["inputs", "features", "FAVOR alone", *(f"W = {block}" for block in blocks), "average of all values"],
                rows, "‖out − exact‖/‖exact‖, median of draws; the last column ignores q and k:",
            )
        ],
        [("near_far.png", "Relative error of the output against near_block")],
        numbers={
            "near_blocks": [0, *blocks], "average": averages,
            "errors": [
                {"inputs": name, "features": count, "median": errors} for (name, count), errors in found.items()
            ],
        },
    )  # fmt: skip


def _cell(error: float, average: float) -> str:
    return f"**{error:.3f}**" if error < average else f"{error:.3f}"


def draw(heads: int, length: int, correlation: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v (1, heads, length, head_dim): q = k of correlated neighbours, or independent q and k."""
    generator = generator_of(seed)
    q, k, v = torch.randn(3, 1, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64)
    if correlation:
        for token in range(1, length):
            q[:, :, token] = correlation * q[:, :, token - 1] + (1 - correlation**2) ** 0.5 * q[:, :, token]
        k = q
    scale = SQUARE**0.5 * HEAD_DIM**0.25
    return functional.normalize(q, dim=-1) * scale, functional.normalize(k, dim=-1) * scale, v


def median_error(q: Tensor, k: Tensor, v: Tensor, expected: Tensor, features: int, near_block: int, seed: int) -> float:
    """Returns the median over heads, which are the draws, of the relative error of the output."""
    projection = draw_projection(
        features, HEAD_DIM, num_heads=q.shape[1], generator=generator_of(seed + 1), dtype=torch.float64
    )
    out = favor_attention(q, k, v, projection, near_block=near_block)
    errors: Tensor = (out - expected).square().mean((0, 2, 3)) / expected.square().mean((0, 2, 3))
    return errors.sqrt().median().item()


def _figure(path: Path, found: dict[tuple[str, int], list[float]], settings: Settings) -> None:
    lines = []
    for width, count in zip(LINE_WIDTHS, settings.near_features, strict=True):
        alone, *errors = found[SIMILAR, count]
        blocks = settings.near_blocks
        lines.append(Line(f"near-far, {count} features", blocks, errors, "near-far", "orthogonal", width=width))
        level = [alone] * len(blocks)
        lines.append(Line(f"FAVOR, {count} features", blocks, level, "positive", "orthogonal", width=width))
    plot(
        path, lines, x_label="near_block", y_label="relative error of the output (median of draws)",
        title=f"Near-far attention and FAVOR against exact attention, L = {settings.near_length:,}, {SIMILAR}",
        foot=conditions(torch.float64), x_ticks={block: str(block) for block in settings.near_blocks},
        legend_above=True,
    )  # fmt: skip
