"""Faults planted into the kernels, each of which the comparison with the twin of the op has to see."""

import importlib.util
from pathlib import Path

import pytest
import torch

from protlm.ops.cuda import call
from tests.reference import cases
from tests.reference.cases import Case, draw, expected_of, found_of
from tests.reference.cuda import calls

CASES = (
    Case(segments=(300, 0, 37), padding="some", head_dim=16, num_features=20),
    Case(length=20, batch=1, head_dim=16, num_features=130),
    Case(feature_map="relu", length=40, padding="some", head_dim=16, num_features=20),
)
BUGS = {
    "context is not rescaled": ("fold_keys", "context *= shrink[:, None]", "context *= 1.0"),
    "sums are not rescaled": ("fold_keys", "sums = sums * shrink + tl.sum", "sums = sums + tl.sum"),
    "the mask of keys is forgotten": ("fold_keys", "load_is_real(token_mask, steps, is_in, HAS_MASK)", "is_in"),
    "padded features weigh": ("fold_keys", "(sums == 0) | ~is_feature", "sums == 0"),
    "units are merged without weights": ("merge_states", "weights = tl.math.exp2(weights - risen)", "weights = 1.0"),
    "the logarithms are not read": ("read_state", "exponents += bias[None, :]", "exponents += 0.0"),
    "a maximum is not carried": ("read_state", "sums *= shrink", "sums *= 1.0"),
    "the inner product is forgotten": ("query_gradients", " - inners[:, None]", ""),
    "outputs are not taken off": ("state_gradients", "weights * inners[None, :]", "weights"),
    "only the first unit counts": ("add_gradients", "of_means += tl.load", "of_means = tl.load"),
    "sizes are forgotten": ("key_gradients", "(weights * size[None, :])", "(weights)"),
    "the sums get no gradient": ("key_gradients", " - tl.load(sum_grads + features)[None, :]", ""),
    "the norm of keys gets no gradient": ("key_gradients", "of_keys -= keys", "of_keys -= 0.0 * keys"),
    "one kernel: context is not rescaled": ("short_forward", "context *= shrink[:, None]", "context *= 1.0"),
    "one kernel: the mask is forgotten": (
        "short_forward", "load_is_real(token_mask, tokens, is_in, HAS_MASK)", "is_in"
    ),
    "one kernel: the logarithms are not read": ("short_forward", "exponents += bias[None, :]", "exponents += 0.0"),
    "one kernel: values of a state get too large a gradient": (
        "short_backward", "of_means = product(weights.to", "of_means = 2.0 * product(weights.to"
    ),
    "one kernel: sums get no gradient": ("short_backward", " - of_sums[:, None]", ""),
    "one kernel: outputs are not taken off": ("short_backward", " - inners[None, :]", ""),
    "one kernel: the norm of keys gets no gradient": ("short_backward", "of_keys -= keys", "of_keys -= 0.0 * keys"),
}  # fmt: skip


def worst_error(only):
    """Returns the largest error of a tensor over some cases, infinite for what is not a number."""
    worst = 0.0
    for case in only:
        arguments = draw(case, torch.float32)
        for found, expected in zip(found_of(arguments, "triton"), expected_of(*arguments), strict=True):
            error = cases.relative_error(found, expected)
            worst = max(worst, error if error == error else float("inf"))
    return worst


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug, tmp_path, monkeypatch):
    kernel, right, wrong = BUGS[bug]
    module = importlib.import_module(f"protlm.ops.cuda.{kernel}")
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert right in source
    path = tmp_path / f"{kernel}.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"faulty_{kernel}", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    monkeypatch.setattr(call, kernel, getattr(faulty, kernel))
    monkeypatch.setattr(call, "_ENOUGH_SHORT_PROGRAMS", 0 if kernel.startswith("short") else 10**9)
    assert worst_error(CASES) > 100 * calls.TOLERANCE


@pytest.mark.parametrize("enough", [0, 10**9])
def test_without_a_bug_the_same_cases_are_right(enough, monkeypatch):
    monkeypatch.setattr(call, "_ENOUGH_SHORT_PROGRAMS", enough)
    assert worst_error(CASES) < 10 * calls.TOLERANCE
