"""Near-far attention by the compiled kernels against the float64 twin, and what all kernels promise."""

from itertools import product

import numpy as np
import pytest
import torch

from protlm.ops import (
    compiled,
    draw_projection,
    favor_attention,
    favor_cpp,
    favor_torch,
    local_attention,
    near_far_cpp,
    operators,
    reference,
)
from protlm.ops.inputs import AttentionInputs
from tests.conftest import TOLERANCE, relative_error
from tests.reference.cases import MIXED, Case, draw
from tests.reference.test_compiled_kernel import RUNNABLE

pytestmark = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))

JOINING = ("positive", "hyperbolic", "oprf")
MODES = [False, True]
MODE_NAMES = ["bidirectional", "causal"]
FLOAT32 = TOLERANCE[torch.float32]
LAYOUTS = {
    "rows": {"length": 300, "head_dim": 24},
    "wide": {"length": 63, "head_dim": 130, "num_features": 33, "heads": 1},
    "narrow": {"length": 63, "head_dim": 1, "num_features": 1},
    "many features": {"length": 200, "num_features": 700, "batch": 1},
    "padding": {"length": 257, "padding": "some", "head_dim": 20, "is_strided": True},
    "left padding": {"length": 130, "padding": "left"},
    "a row of padding": {"padding": "row", "batch": 3},
    "segments": {"segments": MIXED, "num_features": 130},
    "masked segments": {"segments": MIXED, "padding": "some", "head_dim": 17, "a_axes": "segments"},
    "one projection": {"per_head": False, "heads": 3},
    "no token": {"segments": (0, 0)},
}


def cut_into_units(monkeypatch, blocks):
    """Makes units of at most so many blocks; None for those that a thread holds."""
    if blocks is not None:
        monkeypatch.setattr(near_far_cpp, "_UNIT_BYTES", 0)
        monkeypatch.setattr(near_far_cpp, "_FEWEST_BLOCKS", blocks)


def drawn(case, *, has_bias=True):
    """Returns q, k, v, the gradients of the output and of the log-normaliser, the projection and the options."""
    q, k, v, out_grad, projection, options = draw(case, torch.float32)
    generator = torch.Generator().manual_seed(1)
    log_grad = torch.randn(q.shape[:3], generator=generator)
    if "token_mask" in options:
        log_grad = log_grad.masked_fill(~options["token_mask"].unsqueeze(1), 0.0)
    if has_bias:
        shape = (case.heads, case.rows) if case.per_head else (case.rows,)
        options = {**options, "feature_bias": 0.5 * torch.randn(shape, generator=generator)}
    return q, k, v, out_grad, log_grad, projection, options


def computed(q, k, v, out_grad, log_grad, projection, options, near_block, backend="cpp"):
    """Returns by name the output, the log-normaliser and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    options = {**options, "near_block": near_block}
    if backend == "twin":
        out = reference.favor_attention(*leaves, projection, **options)
        log = reference.log_normaliser(*leaves[:2], projection, **options)
    else:
        out, log = favor_attention(*leaves, projection, return_log_normaliser=True, backend=backend, **options)
    grads = torch.autograd.grad((out, log), leaves, (out_grad, log_grad))
    return dict(zip(("out", "log", "dq", "dk", "dv"), (out.detach(), log.detach(), *grads), strict=True))


def expected_of(*arguments):
    *tensors, options, near_block = arguments
    options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    return computed(*(x.double() for x in tensors), options, near_block, "twin")


def assert_close(actual, expected, told=""):
    scale = max([x.abs().max().item() for x in expected.values() if x.numel()], default=0.0)
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape
        error = (actual[name].double() - wanted).abs().max().item() if wanted.numel() else 0.0
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        # A gradient that vanishes is compared with the others.
        assert error <= FLOAT32 * (size if size > 1e-9 * scale else scale), f"{name} of {told}"


@pytest.mark.parametrize("kernel", ["portable", "avx2", "avx512"])
def test_every_kernel_that_this_machine_can_run_equals_the_float64_twin(kernel, monkeypatch):
    if kernel not in RUNNABLE:
        pytest.skip(f"this machine cannot run the {kernel} kernel")
    monkeypatch.setattr(compiled, "best_kernel", lambda: kernel)
    cases = product(LAYOUTS.items(), JOINING, MODES)
    for number, ((name, options), feature_map, causal) in enumerate(cases):
        case = Case(feature_map=feature_map, causal=causal, **options)
        arguments = drawn(case)
        # Each layout meets all four, with one map or another.
        near_block = (1, 8, 32, 45)[number % 4]
        expected = expected_of(*arguments, near_block)
        for blocks in (None, 4):
            with monkeypatch.context() as patch:
                cut_into_units(patch, blocks)
                assert_close(computed(*arguments, near_block), expected, f"{name}, {case}, {near_block}, {blocks}")


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("blocks", [4, 5, 8, 9, 16, 17, 18, 100])
def test_units_of_every_size_equal_the_float64_twin(blocks, causal, monkeypatch):
    """Sums of later blocks are kept for 8 blocks at a time."""
    cut_into_units(monkeypatch, blocks)
    for length in (95, 161, 263):
        arguments = drawn(Case(length=length, causal=causal, batch=1))
        assert_close(computed(*arguments, 5), expected_of(*arguments, 5), f"{length} tokens, {blocks} blocks")


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
def test_heads_that_are_computed_in_several_rounds_equal_the_torch_backend(causal, monkeypatch):
    """The states of 30 units of a head are more than are held at once."""
    cut_into_units(monkeypatch, 4)
    arguments = drawn(Case(length=950, heads=3, batch=1, head_dim=64, num_features=700, causal=causal))
    expected = {name: x.double() for name, x in computed(*arguments, 8, "torch").items()}
    assert_close(computed(*arguments, 8), expected)


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("blocks", [None, 4])
@pytest.mark.parametrize("feature_map", JOINING)
def test_keys_and_queries_of_very_different_size_equal_the_float64_twin(feature_map, blocks, causal, monkeypatch):
    """Blocks then have references of their own, and some queries features far above their exact weights."""
    cut_into_units(monkeypatch, blocks)
    case = Case(feature_map=feature_map, causal=causal, length=150, batch=1, head_dim=16)
    q, k, v, out_grad, log_grad, projection, options = drawn(case)
    sizes = torch.ones(150, 1)
    sizes[40:64], sizes[104:112], sizes[128:144] = 9.0, 0.01, 11.0
    arguments = q * sizes.flip(0), k * sizes, v, out_grad, log_grad, projection, options
    expected, other = expected_of(*arguments, 8), computed(*arguments, 8, "torch")
    for name, actual in computed(*arguments, 8).items():
        bound = max(FLOAT32, 3 * relative_error(other[name], expected[name]))
        assert relative_error(actual, expected[name]) <= bound, name


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
def test_a_query_whose_features_are_far_above_its_exact_weights_equals_the_twin(causal):
    head_dim, generator = 256, torch.Generator().manual_seed(0)
    row = torch.randn(1, head_dim, generator=generator)
    row *= 16 / row.norm()
    along = row * head_dim**0.25
    q = torch.cat([size * along.expand(8, -1) for size in (0.5, 0.1, 0.45, 0.5)]).view(1, 1, 32, head_dim)
    k = torch.cat((0.5 * along.expand(16, -1), -0.1 * along.expand(16, -1))).view(1, 1, 32, head_dim)
    v = torch.randn(k.shape, generator=generator)
    out = favor_attention(q, k, v, row, near_block=8, causal=causal, backend="cpp")
    expected = reference.favor_attention(q, k, v, row, near_block=8, causal=causal)
    assert relative_error(out, expected) < 10 * FLOAT32


def far_along_a_row(size, num_far, values):
    """Returns near keys of zero behind far ones along the only row, with queries along it in the last block."""
    head_dim, generator = 256, torch.Generator().manual_seed(0)
    row = torch.randn(1, head_dim, generator=generator)
    row *= 16 / row.norm()
    along = size * row[0] / 16 * head_dim**0.25
    k = torch.zeros(1, 1, num_far + 64, head_dim)
    q = k.clone()
    k[:, :, :num_far] = along
    q[:, :, num_far:] = along
    return q, k, values * torch.randn(k.shape, generator=generator), row


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize(("size", "num_far", "values"), [(2.85, 512, 1.0), (2.84, 64, 100.0), (2.8, 64, 1000.0)])
def test_features_of_queries_and_keys_at_the_edge_of_both_ranges_equal_the_twin(size, num_far, values, causal):
    q, k, v, row = far_along_a_row(size, num_far, values)
    out = favor_attention(q, k, v, row, near_block=32, causal=causal, backend="cpp")
    expected = reference.favor_attention(q, k, v, row, near_block=32, causal=causal)
    assert relative_error(out, expected) < FLOAT32


def test_a_state_that_has_vanished_beside_another_adds_nothing():
    head_dim, generator = 256, torch.Generator().manual_seed(0)
    row = torch.randn(1, head_dim, generator=generator)
    row *= 16 / row.norm()
    along = row[0] / 16 * head_dim**0.25
    other = torch.randn(head_dim, generator=generator)
    other -= (other @ along) / (along @ along) * along
    other *= head_dim**0.25 / other.norm()
    # Far below by its norm, and with values that are large.
    lost = 2.86 * along + (577 - 2.86**2) ** 0.5 * other
    blocks = [lost.expand(8, -1), (-1.3 * along).expand(8, -1), *[torch.zeros(8, head_dim)] * 2]
    k = torch.cat(blocks).view(1, 1, 32, head_dim)
    q = torch.zeros_like(k)
    q[:, :, -8:] = 1.5 * along
    v = torch.randn(k.shape, generator=generator)
    v[:, :, :8] *= 1000
    out = favor_attention(q, k, v, row, near_block=8, backend="cpp")
    assert relative_error(out, reference.favor_attention(q, k, v, row, near_block=8)) < FLOAT32


@pytest.mark.parametrize("norm", [1e2, 1e3, 1e4, 1e5, 1e7])
def test_large_scores_lose_nothing_of_the_gradients(norm):
    """Where all weights are exact; the float64 twin has no such range, but local attention is the same."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 64, 32, generator=generator) for _ in range(4)]
    q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in tensors[:2])
    results = []
    for attention in (
        lambda *x: favor_attention(*x, draw_projection(16, 32), near_block=64, backend="cpp"),
        lambda *x: local_attention(*x, window=64, backend="cpp"),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, tensors[2])]
        out = attention(*leaves)
        results.append((out.detach(), torch.autograd.grad(out, leaves, tensors[3])[2]))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < FLOAT32


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("norm", [3e3, 3e4, 1e5, 1e6])
def test_weights_of_large_scores_are_no_larger_than_one(norm, causal):
    """The gradient of v is a sum of weights here, of at most 200 queries."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(1, 2, 200, 64, generator=generator) for _ in range(3)]
        q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in tensors[:2])
        leaves = [x.clone().requires_grad_() for x in (q, k, tensors[2])]
        projection = draw_projection(32, 64, generator=generator)
        out = favor_attention(*leaves, projection, near_block=8, causal=causal, backend="cpp")
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert all(grad.isfinite().all() for grad in grads)
        assert -1e-3 < grads[2].min() <= grads[2].max() < 201


@pytest.mark.parametrize("which", ["one", "all"])
@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
def test_a_bias_of_minus_infinity_switches_a_feature_off(causal, which):
    arguments = drawn(Case(length=100, batch=1, causal=causal))
    bias = arguments[-1]["feature_bias"]
    if which == "one":
        bias[:, 3] = -torch.inf
    else:
        bias[:] = -torch.inf
    assert_close(computed(*arguments, 8), expected_of(*arguments, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_the_default_dtype_of_a_program_changes_nothing(dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 100, 16, generator=generator)
    projection = draw_projection(16, 16, generator=generator)

    def results():
        return (
            favor_attention(q, q, q, projection, near_block=8, backend="cpp"),
            favor_attention(q, q, q, projection, backend="cpp"),
            favor_attention(q, q, q, None, feature_map="relu", backend="cpp"),
            local_attention(q, q, q, window=8, backend="cpp"),
        )

    expected, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        actual = results()
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, actual, expected))


def test_no_head_and_no_token_are_empty_results():
    for heads, length in ((0, 20), (2, 0)):
        q = torch.randn(1, heads, length, 8, requires_grad=True)
        out = favor_attention(q, q, q, torch.randn(heads, 4, 8), near_block=4, backend="cpp")
        out.sum().backward()
        assert out.shape == q.grad.shape == (1, heads, length, 8)


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
def test_the_number_of_threads_changes_no_bit(causal, monkeypatch):
    cut_into_units(monkeypatch, 4)
    for options in ({"length": 500, "heads": 1, "batch": 1}, {"segments": MIXED, "heads": 3}):
        arguments = drawn(Case(causal=causal, head_dim=16, **options))
        results = []
        for num_threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
            results.append(computed(*arguments, 8))
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("causal", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("feature_map", [*JOINING, "regularised"])
@pytest.mark.parametrize("segments", [(), MIXED], ids=["rows", "segments"])
def test_a_feature_bias_without_a_near_field_equals_the_twin(segments, feature_map, causal, monkeypatch):
    monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", 64)
    case = Case(feature_map=feature_map, causal=causal, segments=segments, padding="some", a_axes="segments")
    q, k, v, out_grad, _, projection, options = drawn(case)
    results = []
    for attention, dtype in ((favor_attention, torch.float32), (reference.favor_attention, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        others = {**options, **({"backend": "cpp"} if dtype == torch.float32 else {})}
        out = attention(*leaves, projection.to(dtype), **others)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, out_grad.to(dtype))))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= FLOAT32


def test_auto_takes_the_kernel_for_a_near_field_and_a_bias_and_torch_for_gradients_of_parameters(monkeypatch):
    q, rows = torch.randn(1, 1, 40, 8), draw_projection(16, 8)
    inputs = AttentionInputs(q, q, q, rows, near_block=4, feature_bias=torch.zeros(16))
    assert operators.backend_of("auto", inputs) is favor_cpp
    tasks = []
    for module in (favor_cpp, favor_torch):

        def noted(*arguments, forward=module.forward, name=module.__name__):
            tasks.append(name)
            return forward(*arguments)

        monkeypatch.setattr(module, "forward", noted)
    favor_attention(q, q, q, rows, near_block=4, return_log_normaliser=True)
    favor_attention(q, q, q, rows.clone().requires_grad_(), near_block=4)
    assert [name.rsplit(".")[-1] for name in tasks] == ["favor_cpp", "favor_torch"]


def workspace_bytes(monkeypatch, length, head_dim, num_features):
    """Returns the memory that a backward of 8 heads takes from 2 threads beside inputs and results."""
    sizes = []

    def remember(size, empty=torch.empty, **options):
        sizes.append(size)
        return empty(size, **options)

    q = torch.zeros(1, 8, length, head_dim, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        out = favor_attention(q, q, q, torch.zeros(num_features, head_dim), near_block=32)
        patch.setattr(torch, "empty", remember)
        out.backward(torch.zeros_like(out))
    return max(sizes) * 4


def test_memory_beside_inputs_and_results_stays_below_32_mib_for_titin(monkeypatch):
    assert 0 < workspace_bytes(monkeypatch, 34_350, 32, 128) <= 32 << 20


def test_memory_beside_inputs_and_results_hardly_grows_with_the_length(monkeypatch):
    """Of long segments the states of some units are held, for as many heads at once as fit."""
    short, long = (workspace_bytes(monkeypatch, length, 64, 256) for length in (4_000, 32_000))
    assert short <= long <= short + (12 << 20)


def planned(plan, fault):
    """Returns a plan with a fault."""
    bounds, units = plan.bounds.copy(), plan.units.copy()
    if fault == "a border moved":
        bounds[3] += 1
    elif fault == "a border block dropped":
        units[units[:, 4] + units[:, 5] == units[:, 3], 5] -= 1
        units[:, 3] -= 1
    return near_far_cpp._Plan(bounds, units, plan.groups, plan.num_slots, plan.positions)


@pytest.mark.parametrize("fault", ["none", "a border moved", "a border block dropped"])
@pytest.mark.parametrize("blocks", [None, 4])
def test_a_wrong_division_is_found(blocks, fault, monkeypatch):
    cut_into_units(monkeypatch, blocks)
    arguments = drawn(Case(length=100, batch=1))
    plan_of = near_far_cpp._plan_of
    monkeypatch.setattr(near_far_cpp, "_plan_of", lambda inputs: planned(plan_of(inputs), fault))
    # Far of the last block.
    actual, expected = (compute(*arguments, 5)["out"][:, :, :60] for compute in (computed, expected_of))
    error = relative_error(actual, expected)
    assert error < FLOAT32 if fault == "none" else error > 1e-3


def test_blocks_are_counted_from_the_start_of_a_segment_padding_included():
    mask = torch.tensor([[True, False, True, True, False, False, True, True, True]])
    inputs = AttentionInputs(
        torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4), torch.zeros(2, 4), token_mask=mask,
        cu_seqlens=torch.tensor([0, 7, 9], dtype=torch.int32), near_block=3,
    )  # fmt: skip
    plan = near_far_cpp._plan_of(inputs)
    # Of 0 2 | 3 | 6 and 7 8.
    np.testing.assert_array_equal(plan.positions, [0, 2, 3, 6, 7, 8])
    np.testing.assert_array_equal(plan.bounds, [0, 2, 3, 4, 4, 6])
