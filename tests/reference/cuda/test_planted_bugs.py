"""Faults planted into the kernels, each of which the comparison with the twin of the op has to see."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from protlm.ops.cuda import call
from tests.reference import cases
from tests.reference.cases import Case, computed_of, draw, expected_of
from tests.reference.cuda import calls

CASES = (
    Case(segments=(300, 0, 37), padding="some", head_dim=16, num_features=20),
    Case(length=20, batch=1, head_dim=16, num_features=130),
    Case(feature_map="relu", length=40, padding="some", head_dim=16, num_features=20),
)
BUGS = {
    "context is not rescaled": ("fold_keys", "context *= shrink[:, None]", "context *= 1.0", "device_code"),
    "sums are not rescaled": ("fold_keys", "sums *= shrink", "sums *= 1.0", "device_code"),
    "the mask of keys is forgotten": ("fold_keys", "load_is_real(token_mask, steps, is_in, HAS_MASK)", "is_in"),
    "padded features weigh": ("fold_keys", "(sums == 0) | (features >= FEATURES)", "sums == 0"),
    "units are merged without weights": ("merge_states", "weights = tl.math.exp2(weights - risen)", "weights = 1.0"),
    "the logarithms are not read": ("read_state", "exponents += bias[None, :]", "exponents += 0.0"),
    "a maximum is not carried": ("read_state", "sums *= shrink", "sums *= 1.0"),
    "the inner product is forgotten": ("query_gradients", " - inners[:, None]", ""),
    "outputs are not taken off": ("state_gradients", "weights * inners[None, :]", "weights"),
    "only the first unit counts": ("add_gradients", "of_means += tl.load", "of_means = tl.load"),
    "sizes are forgotten": ("key_gradients", "(weights * size[None, :])", "(weights)"),
    "the sums get no gradient": ("key_gradients", " - tl.load(sum_grads + features)[None, :]", ""),
    "the norm of keys gets no gradient": ("key_gradients", "of_keys -= keys", "of_keys -= 0.0 * keys"),
    "one kernel: context is not rescaled": (
        "short_forward", "context *= shrink[:, None]", "context *= 1.0", "device_code"
    ),
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
        for actual, expected in zip(computed_of(arguments, "triton"), expected_of(*arguments), strict=True):
            error = cases.relative_error(actual, expected)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def module_of(file, change=lambda source: source, *, folder):
    """Returns a module of the kernels' folder made anew, from a changed source."""
    path = folder / f"{file}.py"
    path.write_text(change((Path(call.__file__).parent / path.name).read_text(encoding="utf-8")), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"faulty_{file}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ALWAYS_PLANTED = ("sums are not rescaled", "one kernel: sums get no gradient")
"""By units and in one kernel; the others are left to the long checks."""


@pytest.mark.parametrize(
    "bug", [bug if bug in ALWAYS_PLANTED else pytest.param(bug, marks=pytest.mark.cuda) for bug in BUGS]
)
def test_a_planted_bug_is_seen(bug, tmp_path, monkeypatch):
    kernel, right, wrong, *elsewhere = BUGS[bug]

    def plant(source):
        assert right in source
        return source.replace(right, wrong)

    if elsewhere:
        shared = module_of(*elsewhere, plant, folder=tmp_path)
        monkeypatch.setitem(sys.modules, f"protlm.ops.cuda.{elsewhere[0]}", shared)
        faulty = module_of(kernel, folder=tmp_path)
    else:
        faulty = module_of(kernel, plant, folder=tmp_path)
    monkeypatch.setattr(call, kernel, getattr(faulty, kernel))
    monkeypatch.setattr(call, "_ENOUGH_SHORT_PROGRAMS", 0 if kernel.startswith("short") else 10**9)
    assert worst_error(CASES) > 100 * calls.TOLERANCE


@pytest.mark.parametrize("enough", [0, pytest.param(10**9, marks=pytest.mark.cuda)])
def test_without_a_bug_the_same_cases_are_right(enough, monkeypatch):
    monkeypatch.setattr(call, "_ENOUGH_SHORT_PROGRAMS", enough)
    assert worst_error(CASES) < 10 * calls.TOLERANCE
