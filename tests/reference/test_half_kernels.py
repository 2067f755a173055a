"""The compiled kernels of bfloat16: the float64 twin, and what must not change a bit of a result."""

from itertools import pairwise

import pytest
import torch

from protlm.ops import compiled, favor_attention, favor_cpp, local_attention, local_cpp, reference
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
        assert_equal(actual, expected, TOLERANCE[HALF], f"units of {unit_tokens}", arguments[-1]["feature_map"])


def test_the_kernel_is_closer_than_its_tolerance_and_was_used(kernel, monkeypatch):
    q, k, v, _, projection, options = draw(Case(length=700, head_dim=64, num_features=256, batch=1), HALF)
    expected = reference.favor_attention(q.double(), k.double(), v.double(), projection, **options)
    out = favor_attention(q, k, v, projection, backend="cpp", **options)
    rounded = (expected.to(HALF).double() - expected).norm()
    assert (out.double() - expected).norm() < 2.5 * rounded
    monkeypatch.setattr(compiled, "best_half_kernel", lambda: "")
    of_float32 = favor_attention(q, k, v, projection, backend="cpp", **options)
    assert not torch.equal(of_float32, out)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", 64)
    monkeypatch.setattr(local_cpp, "_UNIT_TOKENS", 64)
    q, k, v, _, projection, options = draw(Case(segments=MIXED, heads=3, head_dim=16), HALF)
    results = []
    for num_threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        local = local_attention(q, k, v, window=900, cu_seqlens=options["cu_seqlens"])
        results.append((favor_attention(q, k, v, projection, backend="cpp", **options), local))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_company_in_a_row_changes_no_bit():
    q, k, v, _, projection, options = draw(Case(segments=MIXED, head_dim=24), HALF)
    places = options["cu_seqlens"].tolist()
    for window in (None, 7, 900):

        def attend(q, k, v, cu_seqlens, window=window):
            if window is None:
                return favor_attention(q, k, v, projection, cu_seqlens=cu_seqlens, backend="cpp")
            return local_attention(q, k, v, window=window, cu_seqlens=cu_seqlens)

        packed = attend(q, k, v, options["cu_seqlens"])
        for start, stop in pairwise(places):
            alone = attend(*(x[:, :, start:stop] for x in (q, k, v)), bounds([stop - start]))
            assert torch.equal(alone, packed[:, :, start:stop])


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


def test_gradients_of_exact_attention_are_those_of_the_float64_twin():
    leaves = [x.requires_grad_() for x in drawn(200, 24)]
    grad = drawn(200, 24, seed=1)[0]
    actual = torch.autograd.grad(local_attention(*leaves, window=200), leaves, grad)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(reference.softmax_attention(*doubles, window=200), doubles, grad.double())
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == HALF
        assert relative_error(a, b) < TOLERANCE[HALF]


@pytest.mark.parametrize("change", [1.5, -1e30])
def test_later_keys_change_no_bit_of_causal_attention(change):
    q, k, v = drawn(300, 32)
    before = local_attention(q, k, v, window=300, causal=True)
    for x in (k, v):
        x[:, :, 150:] *= change
    after = local_attention(q, k, v, window=300, causal=True)
    assert torch.equal(after[:, :, :150], before[:, :, :150])


def test_nan_stays_in_its_segment_and_reaches_all_of_it():
    q, k, v, _, projection, options = draw(Case(segments=(40, 50, 60), head_dim=16), HALF)
    k[:, :, 60] = torch.nan
    for out in (
        favor_attention(q, k, v, projection, backend="cpp", **options),
        local_attention(q, k, v, window=200, cu_seqlens=options["cu_seqlens"]),
    ):
        assert out[:, :, 40:90].isnan().all()
        assert not out[:, :, :40].isnan().any()
        assert not out[:, :, 90:].isnan().any()


@pytest.mark.parametrize("size", [30.0, 300.0, 1e4])
def test_keys_far_beyond_every_guess_leave_results_near_the_twin(size):
    q, k, v, _, projection, options = draw(Case(length=300, head_dim=16, batch=1, num_features=64), HALF)
    k[:, :, 200] *= size
    q[:, :, 100] *= size
    expected = reference.favor_attention(q.double(), k.double(), v.double(), projection, **options)
    out = favor_attention(q, k, v, projection, backend="cpp", **options)
    assert out.isfinite().all()
    unchanged = torch.arange(300) != 100
    assert relative_error(out[:, :, unchanged], expected[:, :, unchanged]) < TOLERANCE[HALF]


def test_equal_keys_share_a_weight_at_scores_of_any_size():
    for size in (1.0, 1e2, 1e4):
        q = drawn(1, 64)[0].expand(-1, -1, 100, -1) * size
        v = drawn(100, 64)[2]
        mean = v.double().mean(2, keepdim=True).expand_as(v)
        assert relative_error(local_attention(q, q, v, window=100), mean) < TOLERANCE[HALF]


def test_padding_of_any_size_changes_no_bit():
    q, k, v, _, projection, options = draw(Case(length=257, padding="some", head_dim=24), HALF)
    expected = favor_attention(q, k, v, projection, backend="cpp", **options)
    hidden = ~options["token_mask"][:, None, :, None].expand_as(q)
    for value in (0.0, 1e30, float("nan")):
        filled = [x.masked_fill(hidden, value) for x in (q, k, v)]
        assert torch.equal(favor_attention(*filled, projection, backend="cpp", **options), expected)


def test_units_of_torch_find_their_own_configuration_again():
    a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).to(HALF) for _ in range(2))
    expected = a @ b
    for _ in range(3):
        local_attention(*drawn(100, 24), window=100)
        assert torch.equal(a @ b, expected)
        favor_attention(*drawn(100, 24), torch.randn(8, 24), backend="cpp")
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
