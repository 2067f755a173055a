"""The verdict of a probe in words, from planted estimates, and the numbers of its table."""

import numpy as np
import pytest

from protlm.inference.metrics import Estimate
from protlm.inference.probe_metrics import ProbeScores
from protlm.workflows.probe.page import _with_error
from protlm.workflows.probe.report import verdict_of


def scores(model, baselines):
    """Scores of a model and of baselines by name: value, and low and high of the gain over it."""
    return ProbeScores(
        metrics={
            "model": {"accuracy": Estimate(value=model, stderr=0.01, low=0.0, high=1.0)},
            **{name: {"accuracy": Estimate(value=value, stderr=0.01, low=0.0, high=1.0)}
               for name, (value, _, _) in baselines.items()},
        },
        gains={name: Estimate(value=model - value, stderr=0.01, low=low, high=high)
               for name, (value, low, high) in baselines.items()},
    )  # fmt: skip


CASES = {
    "beats all": (
        0.9, {"dipeptides": (0.8, 0.05, 0.15), "constant": (0.1, 0.7, 0.9)}, 50,
        "The model knows more about site than every baseline: accuracy 0.900 against 0.800 of composition and "
        "dipeptides (difference +0.100, 95 % interval +0.050 to +0.150).",
    ),
    "beats the best, but not surely a weaker one": (
        0.9, {"dipeptides": (0.8, 0.05, 0.15), "random_weights": (0.75, -0.01, 0.3)}, 50,
        "Whether the model adds anything to random weights cannot be told; accuracy 0.900 against 0.800 of composition",
    ),
    "may be the same": (
        0.9, {"dipeptides": (0.88, -0.02, 0.06)}, 50, "Whether the model adds anything to the baselines cannot be told:"
    ),
    "is behind": (0.8, {"dipeptides": (0.9, -0.2, -0.05)}, 50, "The model adds nothing to the baselines: accuracy 0.8"),
    "is the same": (1.0, {"residue": (1.0, None, None)}, 50, "The model adds nothing to the baselines: accuracy 1.000"),
    "is better on every draw": (
        1.0, {"constant": (0.0, None, None)}, 50,
        "The model knows more about site than every baseline: accuracy 1.000 against 0.000 of constant (difference "
        "+1.000 on every draw of the proteins).",
    ),
    "too few": (1.0, {"constant": (0.5, None, None)}, 9, "Too few proteins were tested for an interval"),
    "no number": (np.nan, {"constant": (0.5, None, None)}, 50, "Too few proteins were tested for an interval"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_says_what_the_intervals_say(name):
    model, baselines, num_units, words = CASES[name]
    best = max(baselines, key=lambda baseline: baselines[baseline][0])
    verdict = verdict_of("site", "accuracy", scores(model, baselines), best, num_units=num_units)
    assert verdict.startswith(words)


@pytest.mark.parametrize(
    ("value", "stderr", "metric", "text"),
    [
        (0.8765, 0.0123, "accuracy", "0.876 ± 0.012"),
        (1.0, None, "accuracy", "1.000"),
        (-0.25, 0.1, "spearman", "−0.250 ± 0.100"),
        (1.234e-7, 2e-9, "mae", "1.23e−07 ± 2e−09"),
        (np.nan, None, "spearman", "–"),
    ],
)
def test_scores_have_as_many_digits_as_they_need(value, stderr, metric, text):
    assert _with_error(Estimate(value=value, stderr=stderr, low=None, high=None), metric) == text
