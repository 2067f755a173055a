"""Faults planted into the kernels, each of which the comparison with the twin of the op has to see."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from protlm.ops.cuda import call, near_call, unit_call
from tests.reference import cases
from tests.reference.cases import Case, computed_of, draw, expected_of
from tests.reference.cuda import calls, test_units_triton

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
    "sizes are forgotten": ("key_gradients", "weights *= size[None, :]", "weights *= 1.0"),
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
UNIT_CASES = tuple(
    test_units_triton.drawn(
        kind, Case(feature_map=name, segments=(70, 0, 17), padding="some", head_dim=16, num_features=40)
    )
    for kind, name in (
        ("causal", "positive"),
        ("causal", "relu"),
        ("near-far", "oprf"),
        ("causal near-far", "positive"),
    )
)
"""Calls whose units have states of their own; the kernels for near tokens are those of local attention too."""
UNIT_BUGS = {
    "prefixes are not rescaled": ("scan_states", "context *= shrink[:, None]", "context *= 1.0"),
    "a unit sees itself": ("scan_states", "else unit - GAP - 1", "else unit - GAP"),
    "the suffix forgets the prefix": ("scan_states", "if is_suffix and HAS_BEFORE:", "if False:"),
    "the last unit is not scanned": (
        "scan_states", "is_there = (seen >= first) & (seen < stop)",
        "is_there = (seen >= first) & (seen < stop - 1)",
    ),
    "inner products are not merged": ("scan_states", "inner += seen_inner * weights", "inner += seen_inner"),
    "sizes are forgotten": ("scan_states", "merged_inner *= scale", "merged_inner *= 1.0"),
    "queries are not divided by their normalisers": ("fold_queries", "exponents - normalisers[None, :]", "exponents"),
    "the norm of queries is forgotten": (
        "fold_queries", "normalisers += half_squares(queries, is_in, norm_factor)",
        "normalisers += 0.0",
    ),
    "padded features weigh": ("fold_queries", "(sums == 0) | (features >= FEATURES)", "sums == 0"),
    "the inner products are forgotten": ("fold_queries", "weights * inners_of_tile[None, :]", "weights"),
    "near tokens see the next segment": ("near_forward", "tl.minimum(high, ", "tl.minimum(high + 5, "),
    "near: earlier sums are not rescaled": ("near_forward", "sums = sums * shrink", "sums = sums"),
    "near: the far part is not absolute": ("near_forward", "largest -= tl.where", "largest -= 0.0 * tl.where"),
    "near: outputs are not taken off": ("near_query_gradients", " - inners[:, None]", ""),
    "near: the far gradient is lost": (
        "near_query_gradients", "total += load_rows(far_grad",
        "total += 0.0 * load_rows(far_grad",
    ),
    "near: keys see padding": ("near_key_gradients", "weights = tl.where(visible, weights, 0.0)", "weights = weights"),
    "near: queries are not taken off": ("near_key_gradients", " - inners[None, :]", ""),
    "far queries: the norm gets no gradient": ("query_gradients", "total -= queries.to", "total -= 0.0 * queries.to"),
    "far queries: the normaliser gets no gradient": (
        "query_gradients", "inners -= tl.load(sums_grad",
        "inners -= 0.0 * tl.load(sums_grad",
    ),
    "triangle: tiles of keys are not rescaled": ("triangle_forward", "products *= shrink[:, None]", "products *= 1.0"),
    "triangle: a query does not see itself": (
        "triangle_forward", "sees(steps, steps, TILE_TOKENS, 0)",
        "sees(steps, steps, TILE_TOKENS, -1)",
    ),
    "triangle: pairs are not rescaled": (
        "triangle_forward", "products = products * shrink + ",
        "products = products + ",
    ),
    "triangle: queries see later tokens": (
        "triangle_query_gradients", "sees(steps, steps, TILE_TOKENS, 0)",
        "sees(steps, steps, TILE_TOKENS, 1)",
    ),
    "triangle: the reference is forgotten": ("triangle_query_gradients", "exponents + reference[None, :]", "exponents"),
    "triangle: keys miss the next tile": (
        "triangle_key_gradients", "range(start + TILE_TOKENS, stop",
        "range(start + 2 * TILE_TOKENS, stop",
    ),
    "triangle: the norm of keys gets no gradient": (
        "triangle_key_gradients", "of_keys -= keys",
        "of_keys -= 0.0 * keys",
    ),
    "triangle: values of the tile get no gradient": (
        "triangle_key_gradients", "weights = tl.where(visible, products, 0.0)",
        "weights = 0.0 * products",
    ),
}  # fmt: skip
MODULES = (call, near_call, unit_call)
"""The modules that launch kernels."""


def worst_unit_error():
    """Returns the largest error over calls whose units have states."""
    errors = [
        cases.relative_error(actual, right)
        for arguments in UNIT_CASES
        for actual, right in zip(
            test_units_triton.computed(*arguments), test_units_triton.expected(*arguments), strict=True
        )
    ]
    return max(error if error == error else float("inf") for error in errors)


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


ALWAYS_PLANTED = ("sums are not rescaled", "one kernel: sums get no gradient", "a unit sees itself")
"""By units, in one kernel, and in a scan of states; the others are left to the long checks."""


def planted(bug, tmp_path, monkeypatch):
    """Plants a fault, of kernel, right and wrong text, and the module where it stands if that is not the kernel's."""
    kernel, right, wrong, *elsewhere = bug

    def plant(source):
        assert right in source
        return source.replace(right, wrong)

    if elsewhere:
        shared = module_of(*elsewhere, plant, folder=tmp_path)
        monkeypatch.setitem(sys.modules, f"protlm.ops.cuda.{elsewhere[0]}", shared)
        faulty = module_of(kernel, folder=tmp_path)
    else:
        faulty = module_of(kernel, plant, folder=tmp_path)
    for module in MODULES:
        if hasattr(module, kernel):
            monkeypatch.setattr(module, kernel, getattr(faulty, kernel))
    monkeypatch.setattr(call, "_ENOUGH_SHORT_PROGRAMS", 0 if kernel.startswith("short") else 10**9)
    monkeypatch.setattr(unit_call, "CAUSAL_UNIT_TOKENS", 32)


@pytest.mark.parametrize(
    "bug", [bug if bug in ALWAYS_PLANTED else pytest.param(bug, marks=pytest.mark.cuda) for bug in BUGS]
)
def test_a_planted_bug_is_seen(bug, tmp_path, monkeypatch):
    planted(BUGS[bug], tmp_path, monkeypatch)
    assert worst_error(CASES) > 100 * calls.TOLERANCE


@pytest.mark.parametrize(
    "bug", [bug if bug in ALWAYS_PLANTED else pytest.param(bug, marks=pytest.mark.cuda) for bug in UNIT_BUGS]
)
def test_a_planted_bug_of_units_is_seen(bug, tmp_path, monkeypatch):
    planted(UNIT_BUGS[bug], tmp_path, monkeypatch)
    assert worst_unit_error() > 100 * calls.TOLERANCE


@pytest.mark.cuda
def test_without_a_bug_the_same_calls_of_units_are_right(monkeypatch):
    monkeypatch.setattr(unit_call, "CAUSAL_UNIT_TOKENS", 32)
    assert worst_unit_error() < 10 * calls.TOLERANCE


@pytest.mark.parametrize("enough", [0, pytest.param(10**9, marks=pytest.mark.cuda)])
def test_without_a_bug_the_same_cases_are_right(enough, monkeypatch):
    monkeypatch.setattr(call, "_ENOUGH_SHORT_PROGRAMS", enough)
    assert worst_error(CASES) < 10 * calls.TOLERANCE
