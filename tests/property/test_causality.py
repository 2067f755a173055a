"""Causal attention: what comes later tells nothing, and what came before is never lost, whatever its size."""

from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protlm.ops import draw_projection, favor_attention, favor_torch
from tests.conftest import TOLERANCE, relative_error

HEADS, HEAD_DIM = 2, 6
TRIG_TOLERANCE = 1e-6
"""In float64: the signed sums of `trig` make the rounding of another order of summation grow."""
A = torch.tensor([-0.2, 0.05])

laws = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**32)
EXPONENTIAL = ("positive", "hyperbolic", "regularised", "oprf")
every_map = st.sampled_from([*EXPONENTIAL, "trig", "relu", "bare relu"])
later_contents = st.sampled_from([0.0, 1.0, -30.0, 1e4, 1e6, 1e13, torch.inf, torch.nan])


def draw(seed, length, dtype, head_dim=HEAD_DIM, features=24):
    """Returns q, k, v and a projection."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, HEADS, length, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v, draw_projection(features, head_dim, num_heads=HEADS, generator=generator, dtype=dtype)


def attend(q, k, v, projection, feature_map, **options):
    """Returns causal attention by a map of this name; `bare relu` is `relu` without a projection."""
    if feature_map == "oprf":
        options["oprf_a"] = A
    options = {"feature_map": feature_map.removeprefix("bare "), "causal": True, **options}
    return favor_attention(q, k, v, None if feature_map == "bare relu" else projection, **options)


def tolerance_of(feature_map):
    return TRIG_TOLERANCE if feature_map == "trig" else TOLERANCE[torch.float64]


@laws
@given(seeds, st.integers(2, 300), st.floats(0, 1), every_map, later_contents, st.sets(st.sampled_from("qkv")))
@example(0, 300, 0.5, "positive", torch.nan, {"v"})
@example(0, 300, 0.5, "relu", torch.inf, {"k", "v"})
def test_nothing_later_changes_a_bit_of_an_earlier_output(seed, length, share, feature_map, content, changed):
    q, k, v, projection = draw(seed, length, torch.float32)
    first = 1 + int(share * (length - 1))
    tensors = {"q": q, "k": k, "v": v}
    plain = attend(*tensors.values(), projection, feature_map)
    assert plain.isfinite().all()
    for name in changed:
        tensors[name] = tensors[name].clone()
        # Content of no size stands as it is; any other multiplies what was there, so that no two tokens are alike.
        tensors[name][:, :, first:] *= content
    assert torch.equal(attend(*tensors.values(), projection, feature_map)[:, :, :first], plain[:, :, :first])


@laws
@given(seeds, every_map, st.sampled_from([1e4, -1e4, 50.0]), st.integers(1, 199))
def test_a_later_key_along_a_row_of_the_projection_changes_nothing_before_it(seed, feature_map, size, place):
    q, k, v, projection = draw(seed, 200, torch.float32, head_dim=256, features=32)
    plain = attend(q, k, v, projection, feature_map)
    k = k.clone()
    k[:, :, place] = size * projection[:, 0] / projection[:, 0].norm(dim=-1, keepdim=True)
    out = attend(q, k, v, projection, feature_map)
    assert out.isfinite().all()
    assert torch.equal(out[:, :, :place], plain[:, :, :place])


@laws
@given(seeds, st.lists(st.integers(0, 80), min_size=2, max_size=6), every_map, st.sampled_from([1e4, torch.nan]))
def test_another_segment_changes_nothing(seed, sizes, feature_map, content):
    q, k, v, projection = draw(seed, sum(sizes), torch.float64)
    cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    whole = attend(q, k, v, projection, feature_map, cu_seqlens=cu_seqlens)
    generator = torch.Generator().manual_seed(seed)
    chosen = int(torch.randint(len(sizes), (), generator=generator))
    start, stop = cu_seqlens[chosen].item(), cu_seqlens[chosen + 1].item()
    spoilt = [x.clone() for x in (q, k, v)]
    for x in spoilt:
        x[:, :, :start] *= content
        x[:, :, stop:] *= content
    alone = attend(*spoilt, projection, feature_map, cu_seqlens=cu_seqlens)[:, :, start:stop]
    # Not to the bit: where a key of one segment ends a stretch early, it does so for all.
    assert relative_error(alone, whole[:, :, start:stop]) < (TRIG_TOLERANCE if feature_map == "trig" else 1e-12)


@laws
@given(seeds, st.integers(1, 300), st.integers(0, 150), every_map)
def test_a_prefix_alone_gives_what_the_whole_gives_for_it(seed, length, num_later, feature_map):
    q, k, v, projection = draw(seed, length + num_later, torch.float64, features=256)
    whole = attend(q, k, v, projection, feature_map)[:, :, :length]
    alone = attend(*(x[:, :, :length] for x in (q, k, v)), projection, feature_map)
    assert relative_error(alone, whole) < tolerance_of(feature_map)


@laws
@given(
    seeds,
    st.lists(st.integers(1, 150), min_size=2, max_size=6),
    st.floats(0, 1),
    every_map,
    st.sampled_from([1e-3, 50.0, 1e6, torch.inf, torch.nan]),
    st.sampled_from([1.0, 40.0]),
)
def test_nothing_later_in_its_segment_changes_a_bit_of_a_packed_output(
    seed, sizes, share, feature_map, content, key_scale
):
    q, k, v, projection = draw(seed, sum(sizes), torch.float32)
    # Keys this large, then small ones, make a stretch end early.
    k = key_scale * k
    stops = list(accumulate(sizes))
    cu_seqlens = torch.tensor([0, *stops], dtype=torch.int32)
    index = seed % len(sizes)
    start, stop = stops[index] - sizes[index], stops[index]
    first = start + int(share * (sizes[index] - 1))
    plain = attend(q, k, v, projection, feature_map, cu_seqlens=cu_seqlens)
    assert plain.isfinite().all()
    spoilt = [x.clone() for x in (q, k, v)]
    for x in spoilt:
        x[:, :, first:stop] *= content
    out = attend(*spoilt, projection, feature_map, cu_seqlens=cu_seqlens)
    assert torch.equal(out[:, :, start:first], plain[:, :, start:first])
    others = torch.cat((out[:, :, :start], out[:, :, stop:]), 2)
    assert others.isfinite().all()


@laws
@given(seeds, st.integers(1, 300), every_map)
def test_the_last_output_is_that_of_bidirectional_attention(seed, length, feature_map):
    q, k, v, projection = draw(seed, length, torch.float64, features=256)
    causal = attend(q, k, v, projection, feature_map)[:, :, -1]
    both_ways = attend(q, k, v, projection, feature_map, causal=False)[:, :, -1]
    assert relative_error(causal, both_ways) < tolerance_of(feature_map)


@laws
@given(seeds, st.integers(2, 300), st.floats(0, 1), every_map)
def test_gradients_flow_backwards_in_time_only(seed, length, share, feature_map):
    q, k, v, projection = draw(seed, length, torch.float32)
    first = 1 + int(share * (length - 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, projection, feature_map)
    for gradient in torch.autograd.grad(out[:, :, :first].sum(), leaves, retain_graph=True):
        assert not gradient[:, :, first:].any()
    q_gradient, _, v_gradient = torch.autograd.grad(out[:, :, first:].sum(), leaves)
    assert not q_gradient[:, :, :first].any()
    assert v_gradient[:, :, :first].any()


def log_space(q, k, v, projection, feature_map, *, causal):
    """Returns attention from the logarithm of every weight, which no size of q and k overflows."""
    scale, length = q.shape[-1] ** -0.25, q.shape[2]
    rows, constants = projection, 0.0
    if feature_map == "hyperbolic":
        rows = torch.cat((rows, -rows), -2)
    if feature_map == "regularised":
        rows = rows * q.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True)
    if feature_map == "oprf":
        a = A.double().view(HEADS, 1, 1)
        constants = 2 * a.unsqueeze(-1) * rows.square().sum(-1).view(HEADS, 1, 1, -1)
        rows = (1 - 4 * a).sqrt() * rows
    queries, keys = (x * scale @ rows.transpose(-1, -2) for x in (q, k))
    keys = keys - (k * scale).square().sum(-1, keepdim=True) / 2
    logs = torch.logsumexp(queries.unsqueeze(3) + keys.unsqueeze(2) + constants, -1)
    if causal:
        logs = logs.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(logs, -1) @ v


def assert_exact(q, k, v, projection, feature_map, *, causal):
    """Fails unless output and gradients are those of the computation in log space."""
    out_grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for attention in (attend, log_space):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, projection, feature_map, causal=causal)
        results.append((out, *torch.autograd.grad(out, leaves, out_grad)))
    actual, expected = results
    assert all(x.isfinite().all() for x in actual)
    assert relative_error(actual[0], expected[0]) < 1e-8
    # Where one key takes all the weight dq and dk are zero, with no relative error: the largest gradient is the scale.
    scale = max(x.abs().max() for x in expected[1:])
    assert all((a - b).abs().max() < 1e-8 * scale for a, b in zip(actual[1:], expected[1:], strict=True))


NORMS = {
    "falling": torch.linspace(1000, 0, 150),
    "rising": torch.linspace(0, 1000, 150),
    "jumping": torch.tensor([0.1, 300.0, 1.0, 1000.0, 0.0] * 30),
    "one large": torch.tensor([1.0] * 100 + [1e5] + [1.0] * 49),
    "one small": torch.tensor([500.0] * 100 + [1.0] + [500.0] * 49),
}


@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("stretch_length", [128, 7])
@pytest.mark.parametrize("feature_map", EXPONENTIAL)
def test_keys_of_any_size_give_the_exact_result_and_its_gradients(feature_map, norms, stretch_length, monkeypatch):
    monkeypatch.setattr(favor_torch, "_CAUSAL_STRETCH_LENGTH", stretch_length)
    q, k, v, projection = draw(0, 150, torch.float64, features=16)
    k = k / k.norm(dim=-1, keepdim=True) * norms.view(1, 1, -1, 1).double()
    assert_exact(q, k, v, projection, feature_map, causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("size", [16.0, -16.0, 50.0, 1e3, 1e4, -1e4])
@pytest.mark.parametrize("feature_map", EXPONENTIAL)
def test_a_key_along_a_row_of_the_projection_gives_the_exact_result_and_gradients(feature_map, size, causal):
    q, k, v, projection = draw(0, 60, torch.float64, head_dim=256, features=32)
    direction = projection[:, 0] / projection[:, 0].norm(dim=-1, keepdim=True)
    k[:, :, 30] = size * direction
    q[:, :, 40] = size * direction
    assert_exact(q, k, v, projection, feature_map, causal=causal)


@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
def test_keys_of_any_size_give_finite_averages_in_float32(norms):
    q, k, v, projection = draw(0, 150, torch.float32, head_dim=256)
    k = k / k.norm(dim=-1, keepdim=True) * norms.view(1, 1, -1, 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, projection, "positive")
    assert (out.abs() <= v.abs().cummax(2).values * (1 + 1e-5)).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_left_padding_is_no_history():
    q, k, v, projection = draw(0, 200, torch.float64)
    token_mask = torch.arange(200).unsqueeze(0) >= 70
    out = attend(q, k, v, projection, "positive", token_mask=token_mask)
    alone = attend(*(x[:, :, 70:] for x in (q, k, v)), projection, "positive")
    assert relative_error(out[:, :, 70:], alone) < 1e-13
    assert not out[:, :, :70].any()


def test_a_nan_in_one_head_hides_no_large_key_of_another():
    q, k, v, projection = draw(0, 40, torch.float32)
    k[:, :, :20] *= 300.0
    expected = attend(q, k, v, projection, "positive")[:, 1]
    assert expected.isfinite().all()
    k[:, 0, 20] = torch.nan
    assert torch.equal(attend(q, k, v, projection, "positive")[:, 1], expected)
