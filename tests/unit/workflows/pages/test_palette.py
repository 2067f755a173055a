"""The palette by computation: contrasts, and differences as readers with each kind of colour blindness see them."""

import itertools

import numpy as np
import pytest

from protlm.workflows.pages import palette
from protlm.workflows.pages.palette import DARK, LIGHT, MODEL_MARKS, NUM_LEVELS, SPLIT_MARKS

LINEAR_TO_CONES = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                            [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
CONES_TO_OKLAB = np.array([[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
                           [0.0259040371, 0.7827717662, -0.808675766]])  # fmt: skip
# Machado, Oliveira and Fernandes 2009, at full severity.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.01182, 0.04294, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.3039]]),
}  # fmt: skip

modes = pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])


def linear(color):
    channels = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(first, second):
    """The contrast of WCAG 2, 1 to 21."""
    dark, bright = sorted(linear(color) @ np.array([0.2126, 0.7152, 0.0722]) for color in (first, second))
    return (bright + 0.05) / (dark + 0.05)


def difference(first, second, blindness):
    """The distance in OKLab, times 100: about 2 can just be seen side by side."""
    a, b = (
        CONES_TO_OKLAB @ np.cbrt(LINEAR_TO_CONES @ np.clip(BLINDNESS[blindness] @ linear(color), 0, 1))
        for color in (first, second)
    )
    return 100 * float(np.linalg.norm(a - b))


@modes
def test_text_has_the_contrast_that_reading_needs(colors):
    for text in ("ink", "soft", "link"):
        assert contrast(colors[text], colors["page"]) >= 4.5, text
    assert contrast(colors["ink"], colors["warning"]) >= 4.5
    for scale, level in itertools.product(("heat", "balance"), range(NUM_LEVELS)):
        assert contrast(colors["ink"], colors[f"{scale}-{level}"]) >= 4.5, (scale, level)


@modes
def test_lines_and_bars_stand_out_from_the_page(colors):
    roles = [mark.role for mark in (*SPLIT_MARKS.values(), *MODEL_MARKS, palette.ALL_MARK, *palette.BASELINE_MARKS)]
    for role in roles:
        assert contrast(colors[role], colors["page"]) >= 3.0, role


@modes
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_splits_and_models_can_be_told_apart_with_any_eyes(colors, blindness):
    roles = [mark.role for mark in (*SPLIT_MARKS.values(), *MODEL_MARKS)]
    least = 12.0 if blindness == "none" else 8.0
    for first, second in itertools.combinations(roles, 2):
        assert difference(colors[first], colors[second], blindness) >= least, (first, second)


def test_a_colour_has_one_meaning_and_a_name_in_both_modes():
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert len(set(DARK.values())) == len(DARK)


@pytest.mark.parametrize("marks", [tuple(SPLIT_MARKS.values()), MODEL_MARKS, palette.BASELINE_MARKS])
def test_marks_can_be_told_apart_without_colour(marks):
    for attribute in ("dash", "marker", "hatch"):
        assert len({getattr(mark, attribute) for mark in marks}) == len(marks)


def test_scales_run_from_end_to_end_in_even_steps():
    assert (LIGHT["heat-0"], LIGHT["heat-8"], LIGHT["heat-16"]) == ("#f4f7fb", "#aeccef", "#69a3e4")
    red = [int(LIGHT[f"heat-{level}"][1:3], 16) for level in range(NUM_LEVELS)]
    assert set(np.diff(red)) <= {-8, -9}
