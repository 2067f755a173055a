"""The compiled kernels of bfloat16: the float64 twin, and what must not change a bit of a result."""

from itertools import pairwise

import pytest
import torch

from protlm.gpu_check.tolerances import NAMES
from protlm.ops import compiled, draw_projection, favor_attention, favor_cpp, local_attention, local_cpp, reference
from tests.conftest import TOLERANCE, relative_error
from tests.reference.cases import MIXED, Case, assert_equal, bounds, computed_of, draw, expected_of, maps_on

BEST = "" if compiled.why_not() else compiled.best_half_kernel()
RUNNABLE = {"amx": ("amx", "avx512bf16"), "avx512bf16": ("avx512bf16",), "": ()}[BEST]
HALF = torch.bfloat16
LAYOUTS = {
    "rows": {"length": 100, "head_dim": 24},
    "long rows": {"length": 1000, "head_dim": 64, "num_features": 256, "batch": 1, "heads": 1},
    "padding": {"length": 257, "padding": "some", "head_dim": 60, "is_strided": True},
    "padded rows": {"length": 40, "padding": "row", "head_dim": 16},
    "segments": {"segments": MIXED, "num_features": 130},
    "masked segments": {"segments": MIXED, "padding": "some", "head_dim": 17},
    "wide": {"length": 63, "head_dim": 256, "num_features": 33},
    "wider": {"length": 40, "head_dim": 300, "num_features": 40},
    "narrow": {"length": 63, "head_dim": 1, "num_features": 1},
    "many features": {"length": 70, "head_dim": 8, "num_features": 1000},
}


@pytest.fixture(params=["amx", "avx512bf16"], autouse=True)
def kernel(request, monkeypatch):
    """The kernel that computes all calls of bfloat16."""
    if request.param not in RUNNABLE:
        pytest.skip(f"this machine cannot run the {request.param} kernel")
    monkeypatch.setattr(compiled, "best_half_kernel", lambda: request.param)
    return request.param


def drawn(length, head_dim, seed=0, heads=3):
    """Returns q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, head_dim, generator=generator).to(HALF) for _ in range(3)]


@pytest.mark.parametrize("feature_map", maps_on("cpp"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_float64_twin(feature_map, layout, monkeypatch):
    arguments = draw(Case(feature_map=feature_map, **LAYOUTS[layout]), HALF)
    expected = expected_of(*arguments)
    for unit_tokens in (favor_cpp._UNIT_TOKENS, 70):
        monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", unit_tokens)
        actual = computed_of(arguments, "cpp")
        assert {x.dtype for x in actual} == {HALF}
        # By one tolerance for all maps: of bfloat16 it is wide enough for those that are near to cancel too.
        assert_equal(actual, expected, TOLERANCE[HALF], f"units of {unit_tokens}")


def differentiated(attend, tensors, grad):
    """Returns the output of attention to q, k and v, and their gradients, given that of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def test_the_kernels_are_closer_than_their_tolerance_and_were_used(kernel, monkeypatch):
    *tensors, grad, projection, options = draw(Case(length=700, head_dim=64, num_features=256, batch=1), HALF)

    def attend(*tensors):
        return favor_attention(*tensors, projection, backend="cpp", **options)

    def attend_exactly(*tensors):
        return local_attention(*tensors, window=300)

    def attend_by_twin(*tensors):
        return reference.favor_attention(*tensors, projection, **options)

    def attend_exactly_by_twin(*tensors):
        return reference.softmax_attention(*tensors, window=300)

    doubles = [x.double() for x in tensors]
    for ours, twin in ((attend, attend_by_twin), (attend_exactly, attend_exactly_by_twin)):
        computed = differentiated(ours, tensors, grad)
        # One rounding of the result, and of gradients also those of weights and their gradients on the way.
        for actual, expected, roundings in zip(
            computed, differentiated(twin, doubles, grad), (2.5, 4, 4, 4), strict=True
        ):
            rounded = (expected.to(HALF).double() - expected).norm()
            assert (actual.double() - expected).norm() < roundings * rounded
        monkeypatch.setattr(compiled, "best_half_kernel", lambda: "")
        of_float32 = differentiated(ours, tensors, grad)
        assert not any(torch.equal(a, b) for a, b in zip(of_float32, computed, strict=True))
        monkeypatch.setattr(compiled, "best_half_kernel", lambda: kernel)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", 64)
    monkeypatch.setattr(local_cpp, "_UNIT_TOKENS", 64)
    *tensors, grad, projection, options = draw(Case(segments=MIXED, heads=3, head_dim=16), HALF)

    def attend(*tensors):
        return favor_attention(*tensors, projection, backend="cpp", **options)

    def attend_exactly(*tensors):
        return local_attention(*tensors, window=900, cu_seqlens=options["cu_seqlens"])

    results = []
    for num_threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        results.append([x for op in (attend, attend_exactly) for x in differentiated(op, tensors, grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("unit_tokens", [64, 512])
def test_company_in_a_row_changes_no_bit(unit_tokens, monkeypatch):
    for module in (favor_cpp, local_cpp):
        monkeypatch.setattr(module, "_UNIT_TOKENS", unit_tokens)
    *tensors, grad, projection, options = draw(Case(segments=MIXED, head_dim=24), HALF)
    places = options["cu_seqlens"].tolist()
    for window in (None, 7, 900):

        def attend(q, k, v, cu_seqlens, window=window):
            if window is None:
                return favor_attention(q, k, v, projection, cu_seqlens=cu_seqlens, backend="cpp")
            return local_attention(q, k, v, window=window, cu_seqlens=cu_seqlens)

        packed = differentiated(lambda *x: attend(*x, options["cu_seqlens"]), tensors, grad)
        for start, stop in pairwise(places):
            part = [x[:, :, start:stop] for x in (*tensors, grad)]
            alone = differentiated(lambda *x: attend(*x, bounds([stop - start])), part[:3], part[3])  # noqa: B023
            assert all(torch.equal(a, b[:, :, start:stop]) for a, b in zip(alone, packed, strict=True))


@pytest.mark.parametrize("feature_map", maps_on("cpp"))
def test_weights_sum_to_one(feature_map):
    q, k, _, _, projection, options = draw(Case(length=300, head_dim=64, feature_map=feature_map, num_features=8), HALF)
    ones = torch.ones_like(q)
    assert torch.equal(favor_attention(q, k, ones, projection, backend="cpp", **options), ones)
    assert torch.equal(local_attention(q, k, ones, window=300), ones)


@pytest.mark.parametrize("head_dim", [1, 16, 24, 32, 40, 64, 128, 200])
@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize("window", [1, 31, 32, 100, 1000])
def test_exact_attention_equals_the_float64_twin(head_dim, causal, window):
    q, k, v = drawn(300, head_dim)
    cu_seqlens = bounds([130, 1, 0, 169])
    options = {"window": window, "cu_seqlens": cu_seqlens, "causal": causal}
    expected = reference.softmax_attention(q.double(), k.double(), v.double(), **options)
    assert relative_error(local_attention(q, k, v, **options), expected) < TOLERANCE[HALF]


@pytest.mark.parametrize("head_dim", [1, 16, 24, 40, 64, 300])
@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize("window", [1, 31, 100, 1000])
def test_gradients_of_exact_attention_equal_the_float64_twin(head_dim, causal, window, monkeypatch):
    tensors, grad = drawn(500, head_dim), drawn(500, head_dim, seed=1)[0]
    options = {"window": window, "causal": causal, "cu_seqlens": bounds([130, 1, 0, 369])}
    doubles = [x.double() for x in tensors]
    expected = differentiated(lambda *x: reference.softmax_attention(*x, **options), doubles, grad)
    for unit_tokens in (512, 96, 32):
        monkeypatch.setattr(local_cpp, "_UNIT_TOKENS", unit_tokens)
        actual = differentiated(lambda *x: local_attention(*x, **options), tensors, grad)
        for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
            assert ours.dtype == HALF
            assert relative_error(ours, theirs) < TOLERANCE[HALF], (unit_tokens, name)


@pytest.mark.parametrize("feature_map", maps_on("cpp"))
def test_constant_values_give_queries_no_gradient(feature_map):
    q, k, _, grad, projection, options = draw(Case(length=300, head_dim=64, feature_map=feature_map), HALF)
    for attend in (
        lambda *x: favor_attention(*x, projection, backend="cpp", **options),
        lambda *x: local_attention(*x, window=300),
    ):
        _, q_grad, *_ = differentiated(attend, (q, k, torch.ones_like(q)), grad)
        _, usual, *_ = differentiated(attend, (q, k, torch.randn_like(q)), grad)
        assert q_grad.abs().max() < 1e-4 * usual.abs().max()


def test_rows_of_a_batch_and_strides_of_any_order_are_found():
    tensors, grad = drawn(150, 32), drawn(150, 32, seed=1)[0]
    # Rows of a batch, whose tokens come before their heads in memory.
    in_rows = [x.view(3, 150, 1, 32).expand(3, 150, 2, 32).clone().transpose(1, 2) for x in (*tensors, grad)]
    for window in (9, 150):
        expected = differentiated(lambda *x: local_attention(*x, window=window), tensors, grad)  # noqa: B023
        actual = differentiated(lambda *x: local_attention(*x, window=window), in_rows[:3], in_rows[3])  # noqa: B023
        for ours, alone in zip(actual, expected, strict=True):
            for head in (0, 1):
                assert torch.equal(ours[:, head], alone[0])


def test_scores_far_from_zero_have_finite_gradients_also_at_the_end_of_a_segment():
    q, k, v = drawn(70, 32)
    # All scores are far below zero: what only fills a block up would have a weight without bound.
    k = -8 * q.abs().mean(2, keepdim=True).expand_as(k) + 0.1 * k
    tensors, grad = (q.abs() * 8, k, v), drawn(70, 32, seed=1)[0]
    expected = differentiated(
        lambda *x: reference.softmax_attention(*x, window=70), [x.double() for x in tensors], grad
    )
    for ours, theirs in zip(
        differentiated(lambda *x: local_attention(*x, window=70), tensors, grad), expected, strict=True
    ):
        assert ours.isfinite().all()
        # Nearly all weight is on one key: gradients are small differences of numbers rounded to bfloat16.
        assert relative_error(ours, theirs) < 10 * TOLERANCE[HALF]


@pytest.mark.parametrize("change", [1.5, -1e30])
def test_later_keys_change_no_bit_of_causal_attention(change):
    q, k, v = drawn(300, 32)
    before = local_attention(q, k, v, window=300, causal=True)
    for x in (k, v):
        x[:, :, 150:] *= change
    after = local_attention(q, k, v, window=300, causal=True)
    assert torch.equal(after[:, :, :150], before[:, :, :150])


def test_nan_stays_in_its_segment_and_reaches_all_of_it():
    *tensors, grad, projection, options = draw(Case(segments=(40, 50, 60), head_dim=16), HALF)
    tensors[1][:, :, 60] = torch.nan
    for attend in (
        lambda *x: favor_attention(*x, projection, backend="cpp", **options),
        lambda *x: local_attention(*x, window=200, cu_seqlens=options["cu_seqlens"]),
    ):
        for result in differentiated(attend, tensors, grad):
            assert result[:, :, 40:90].isnan().all()
            assert result[:, :, :40].isfinite().all()
            assert result[:, :, 90:].isfinite().all()


@pytest.mark.parametrize("size", [30.0, 300.0, 1e4])
def test_keys_far_beyond_every_guess_leave_results_near_the_twin(size):
    *tensors, grad, projection, options = draw(Case(length=300, head_dim=16, batch=1, num_features=64), HALF)
    tensors[1][:, :, 200] *= size
    tensors[0][:, :, 100] *= size
    doubles = [x.double() for x in tensors]
    expected = reference.favor_attention(*doubles, projection, **options)
    results = differentiated(lambda *x: favor_attention(*x, projection, backend="cpp", **options), tensors, grad)
    assert all(result.isfinite().all() for result in results)
    unchanged = torch.arange(300) != 100
    assert relative_error(results[0][:, :, unchanged], expected[:, :, unchanged]) < TOLERANCE[HALF]


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6])
def test_equal_keys_share_a_weight_at_scores_of_any_size(size):
    q, _, v = drawn(100, 64)
    q = q[:, :, :1].expand(-1, -1, 100, -1) * size
    grad = drawn(100, 64, seed=1)[0]
    projection = draw_projection(32, 64)

    def check(result, given):
        mean = given.double().mean(2, keepdim=True).expand_as(given)
        assert relative_error(result, mean) < TOLERANCE[HALF]

    out, *_, v_grad = differentiated(lambda *x: local_attention(*x, window=100), (q, q, v), grad)
    check(out, v)
    check(v_grad, grad)
    out, *grads = differentiated(lambda *x: favor_attention(*x, projection, backend="cpp"), (q, q, v), grad)
    check(out, v)
    assert all(result.isfinite().all() for result in grads)
    # As for float32, beside a larger number the logarithm of a feature's sum does not hold how many keys there are.
    if size <= 1e2:
        check(grads[2], grad)


@pytest.mark.parametrize("feature_map", maps_on("cpp"))
def test_values_with_a_mean_of_their_own_leave_gradients_near_those_of_the_kernels_of_float32(
    feature_map, kernel, monkeypatch
):
    case = Case(length=400, head_dim=32, batch=1, num_features=128, feature_map=feature_map)
    q, k, v, grad, projection, options = draw(case, HALF)
    v = v + 5
    doubles = [x.double() for x in (q, k, v)]
    for ours, twin in (
        (
            lambda *x: favor_attention(*x, projection, backend="cpp", **options),
            lambda *x: reference.favor_attention(*x, projection, **options),
        ),
        (
            lambda *x: local_attention(*x, window=400),
            lambda *x: reference.softmax_attention(*x, window=400),
        ),
    ):
        expected = differentiated(twin, doubles, grad)
        errors = {}
        for name in (kernel, ""):
            monkeypatch.setattr(compiled, "best_half_kernel", lambda name=name: name)
            computed = differentiated(ours, (q, k, v), grad)
            errors[name] = [(a.double() - b).norm() / b.norm() for a, b in zip(computed, expected, strict=True)]
        # Here the output, rounded to bfloat16, is what gradients lose most by, in either.
        for half, full in zip(errors[kernel], errors[""], strict=True):
            assert half < 3 * full + 4e-3


def test_padding_of_any_size_changes_no_bit():
    *tensors, grad, projection, options = draw(Case(length=257, padding="some", head_dim=24), HALF)

    def attend(*tensors):
        return favor_attention(*tensors, projection, backend="cpp", **options)

    expected = differentiated(attend, tensors, grad)
    hidden = ~options["token_mask"][:, None, :, None].expand_as(grad)
    for value in (0.0, 1e30, float("nan")):
        filled = [x.masked_fill(hidden, value) for x in (*tensors, grad)]
        results = differentiated(attend, filled[:3], filled[3])
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(("batch", "length"), [(1, 0), (0, 100)])
def test_without_a_token_there_is_nothing_to_compute(batch, length):
    tensors = [torch.zeros(batch, 8, length, 64, dtype=HALF) for _ in range(3)]
    grad, projection = torch.zeros_like(tensors[0]), draw_projection(256, 64, num_heads=8)
    for attend in (
        lambda *x: local_attention(*x, window=100),
        lambda *x: favor_attention(*x, projection, backend="cpp"),
        lambda *x: favor_attention(*x, projection, feature_map="relu", backend="cpp"),
    ):
        assert all(result.shape == grad.shape for result in differentiated(attend, tensors, grad))


def test_units_of_torch_find_their_own_configuration_again():
    a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).to(HALF) for _ in range(2))
    expected = a @ b
    projection, grad = draw_projection(8, 24), drawn(100, 24, seed=1)[0]
    for _ in range(3):
        for attend in (
            lambda *x: local_attention(*x, window=100),
            lambda *x: favor_attention(*x, projection, backend="cpp"),
        ):
            differentiated(attend, drawn(100, 24), grad)
            assert torch.equal(a @ b, expected)


def test_float16_and_bfloat16_without_units_are_computed_in_float32(monkeypatch):
    monkeypatch.setattr(compiled, "best_half_kernel", lambda: "")
    for dtype in (torch.float16, HALF):
        q, k, v, _, projection, options = draw(Case(length=60), dtype)
        out = favor_attention(q, k, v, projection, backend="cpp", **options)
        wider = favor_attention(q.float(), k.float(), v.float(), projection.float(), backend="cpp", **options)
        assert torch.equal(out, wider.to(dtype))
        local = local_attention(q, k, v, window=9)
        assert torch.equal(local, local_attention(q.float(), k.float(), v.float(), window=9).to(dtype))
