"""Laws of the attention op that hold whatever the numbers: company and padding change nothing, no epsilon biases it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protlm.ops import draw_projection, favor_attention, reference
from tests.conftest import TOLERANCE, relative_error
from tests.property.padding_law import assert_padding_changes_nothing

HEADS, HEAD_DIM, FEATURES = 2, 6, 8
FLOAT64 = TOLERANCE[torch.float64]

laws = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**32)
lengths = st.integers(1, 90)
# `trig` obeys the laws too, but with so few features its renormaliser is no more than noise, and so are its digits.
MAPS = ("positive", "hyperbolic", "regularised", "oprf", "relu")
feature_maps = st.sampled_from(MAPS)
every_map = st.sampled_from([*MAPS, "trig"])


def draw(seed, batch, length, dtype=torch.float64):
    """Returns q, k, v and a projection."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, length, HEAD_DIM)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return *tensors, draw_projection(FEATURES, HEAD_DIM, num_heads=HEADS, generator=generator, dtype=dtype)


def differentiate(q, k, v, projection, out_grad, **options):
    """Returns the output and the gradients of q, k and v."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    out = favor_attention(*leaves, projection, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, out_grad)


def of(feature_map, causal=False):
    """Returns the options that choose a map and a mode."""
    needs_a = feature_map == "oprf" and causal
    return {"feature_map": feature_map, "causal": causal} | ({"oprf_a": torch.tensor([-0.1, 0.05])} if needs_a else {})


def bounds(*sizes):
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)


@laws
@given(
    seeds,
    st.integers(2, 300),
    every_map,
    st.booleans(),
    st.sampled_from([0.0, -1.0, 1e3, 1e30, -1e30, 1e38]),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_padding_of_any_finite_content_changes_no_output_and_no_gradient(
    seed, length, feature_map, causal, content, dtype, is_packed
):
    q, k, v, projection = draw(seed, 1 if is_packed else 2, length, dtype)
    generator = torch.Generator().manual_seed(seed)
    token_mask = torch.rand(q.shape[0], length, generator=generator) < 0.6
    out_grad = torch.randn(q.shape, generator=generator).to(dtype)
    options = {**of(feature_map, causal), "token_mask": token_mask}
    if is_packed:
        options["cu_seqlens"] = bounds(length // 3, 0, length - length // 3)
    assert_padding_changes_nothing(differentiate, q, k, v, projection, out_grad, content, **options)


@laws
@given(seeds, lengths, st.integers(1, 40), feature_maps, st.booleans(), st.sampled_from([1.0, 40.0]))
def test_a_padded_row_gives_what_the_row_alone_gives(seed, length, num_padding, feature_map, causal, key_scale):
    q, k, v, projection = draw(seed, 1, length + num_padding)
    # The features of large keys are as good as zero, and only what is exactly zero does not outweigh them.
    k = key_scale * k
    out_grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    token_mask = torch.arange(length + num_padding).unsqueeze(0) < length
    options = of(feature_map, causal)
    padded = differentiate(q, k, v, projection, out_grad, token_mask=token_mask, **options)
    short = (tensor[:, :, :length] for tensor in (q, k, v))
    alone = differentiate(*short, projection, out_grad[:, :, :length], **options)
    scale = max(tensor.abs().max().item() for tensor in alone)
    for a, b in zip(padded, alone, strict=True):
        assert (a[:, :, :length] - b).abs().max() < FLOAT64 * scale


@laws
@given(seeds, lengths, st.integers(2, 5), feature_maps, st.booleans())
def test_a_row_does_not_depend_on_its_batch_mates(seed, length, batch, feature_map, causal):
    q, k, v, projection = draw(seed, batch, length)
    together = favor_attention(q, k, v, projection, **of(feature_map, causal))
    for row in range(batch):
        alone = favor_attention(*(x[row : row + 1] for x in (q, k, v)), projection, **of(feature_map, causal))
        assert relative_error(together[row : row + 1], alone) < FLOAT64


@laws
@given(
    seeds,
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
    feature_maps,
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_segment_does_not_depend_on_what_it_is_packed_with(seed, sizes, feature_map, causal, random):
    q, k, v, projection = draw(seed, 1, sum(sizes))
    parts = [torch.stack((q, k, v)).split(sizes, dim=3)[index] for index in range(len(sizes))]
    order = random.sample(range(len(sizes)), len(sizes))
    shuffled = torch.cat([parts[index] for index in order], dim=3)
    packed = favor_attention(
        *shuffled, projection, **of(feature_map, causal), cu_seqlens=bounds(*(sizes[index] for index in order))
    )
    for index, segment in zip(order, packed.split([sizes[index] for index in order], dim=2), strict=True):
        alone = favor_attention(*parts[index], projection, **of(feature_map, causal))
        assert relative_error(segment, alone) < FLOAT64


@laws
@given(seeds, lengths, feature_maps, st.booleans())
def test_values_of_one_give_one(seed, length, feature_map, causal):
    q, k, v, projection = draw(seed, 2, length)
    out = favor_attention(q, k, torch.ones_like(v), projection, **of(feature_map, causal))
    assert relative_error(out, torch.ones_like(out)) < FLOAT64


@laws
@given(seeds, lengths, feature_maps, st.booleans(), st.floats(-3, 3))
def test_the_output_is_linear_in_the_values(seed, length, feature_map, causal, factor):
    q, k, v, projection = draw(seed, 1, length)
    other = draw(seed + 1, 1, length)[2]
    of_v, of_other, of_both = (
        favor_attention(q, k, x, projection, **of(feature_map, causal)) for x in (v, other, v + factor * other)
    )
    assert (of_both - (of_v + factor * of_other)).abs().max() < FLOAT64


@laws
@given(seeds, lengths, feature_maps)
def test_the_order_of_keys_does_not_matter_and_that_of_queries_is_kept(seed, length, feature_map):
    q, k, v, projection = draw(seed, 1, length)
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (torch.randperm(length, generator=generator) for _ in range(2))
    plain = favor_attention(q, k, v, projection, feature_map=feature_map)
    permuted = favor_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], projection, feature_map=feature_map)
    assert relative_error(permuted, plain[:, :, queries]) < FLOAT64


@laws
@given(seeds, lengths, feature_maps, st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_inputs_of_norm_1000_give_finite_averages_and_finite_gradients(seed, length, feature_map, causal, dtype):
    q, k, v, projection = draw(seed, 1, length, dtype)
    q, k = (1e3 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out, *gradients = differentiate(q, k, v, projection, torch.ones_like(v), **of(feature_map, causal))
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    # An average of the values, of which one key may take all.
    assert out.abs().max() <= v.abs().max() * (1 + 2 * TOLERANCE[dtype])
    assert out.any()


@pytest.mark.parametrize("feature_map", [*MAPS, "trig"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_fully_masked_segment_gives_zero_output_and_zero_gradients(feature_map, causal, is_packed):
    q, k, v, projection = draw(0, 1 if is_packed else 3, 30)
    token_mask = torch.ones(q.shape[0], 30, dtype=torch.bool)
    options = {**of(feature_map, causal), "token_mask": token_mask}
    if is_packed:
        options["cu_seqlens"] = bounds(10, 10, 10)
        token_mask[0, 10:20] = False
    else:
        token_mask[1] = False
    is_padding = ~token_mask[:, None, :, None].expand_as(q)
    tensors = differentiate(q, k, v, projection, torch.ones_like(v), **options)
    for tensor in tensors:
        assert tensor.isfinite().all()
        assert not tensor[is_padding].any()
    assert tensors[0][~is_padding].all()


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_in_a_real_token_propagates_inside_its_segment_only(which, feature_map):
    q, k, v, projection = draw(0, 1, 20)
    {"q": q, "k": k, "v": v}[which][0, 0, 3, 2] = torch.nan
    out = favor_attention(q, k, v, projection, feature_map=feature_map, cu_seqlens=bounds(10, 10))
    assert not out[0, :, 10:].isnan().any()
    assert not out[0, 1].isnan().any()
    if which == "q":
        assert out[0, 0, 3].isnan().all()
    elif which == "k":
        assert out[0, 0, :10].isnan().all()
    else:
        assert out[0, 0, :10, 2].isnan().all()


def test_nan_in_the_a_of_one_head_propagates_in_that_head_only():
    q, k, v, projection = draw(0, 1, 20)
    out = favor_attention(q, k, v, projection, feature_map="oprf", oprf_a=torch.tensor([torch.nan, -0.1]))
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("feature_map", [*MAPS, "trig"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": bounds(0)}, {"token_mask": torch.ones(1, 0, dtype=torch.bool)}])
def test_length_zero_gives_length_zero(options, causal, feature_map):
    q, k, v, projection = draw(0, 1, 0)
    tensors = differentiate(q, k, v, projection, torch.ones_like(v), **of(feature_map, causal), **options)
    assert [tensor.shape for tensor in tensors] == [(1, HEADS, 0, HEAD_DIM)] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_epsilon_biases_the_output_at_variance_4(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 200, 64, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    q, k = 2 * q, 2 * k
    projection = draw_projection(64, 64, generator=generator, dtype=dtype)
    expected = reference.favor_attention(q, k, v, projection)
    # Exponents of size 50 cost float32 some digits; the epsilon of other implementations costs it all of them.
    error = relative_error(favor_attention(q, k, v, projection), expected)
    assert error < 10 * TOLERANCE[dtype]
    q_features, k_features = (reference.kernel_features(x, projection) for x in (q, k))
    q_features, k_features = (x / x.amax((-2, -1), keepdim=True) + 1e-6 for x in (q_features, k_features))
    weights = q_features @ k_features.transpose(-1, -2)
    biased = weights @ v.double() / weights.sum(-1, keepdim=True)
    assert relative_error(biased, expected) > 0.1


@laws
@given(seeds, lengths, st.floats(-100, 100))
def test_a_factor_that_all_key_features_share_cancels_however_small(seed, length, shift):
    # No ω sees the first coordinate, so that the keys' features all shrink by exp(−shift²/(2√d)): an epsilon would win.
    q, k, v, projection = draw(seed, 1, length)
    projection[..., 0] = 0.0
    k[..., 0] = 0.0
    plain = favor_attention(q, k, v, projection)
    k[..., 0] = shift
    assert relative_error(favor_attention(q, k, v, projection), plain) < FLOAT64


@laws
@given(seeds, lengths, feature_maps)
def test_a_key_that_comes_twice_counts_twice(seed, length, feature_map):
    q, k, v, projection = draw(seed, 1, length)
    doubled = (torch.cat(pair, 2) for pair in ((q, q), (k, k), (v, -v)))
    assert favor_attention(*doubled, projection, feature_map=feature_map).abs().max() < FLOAT64
