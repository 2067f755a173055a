"""Laws of near-far attention, of feature biases and of the log-normaliser; planted faults show that they can fail."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protlm.ops import draw_projection, favor_attention, near_far_blocks, reference, torch_maps
from tests.conftest import TOLERANCE, relative_error
from tests.property.padding_law import assert_padding_changes_nothing

HEADS, HEAD_DIM, FEATURES = 2, 6, 8
FLOAT64 = TOLERANCE[torch.float64]
# Of the worst of a few dozen z values: a right draw stays below (p < 1e-4), a planted fault is far above.
MAX_Z = 5.0

laws = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**32)
lengths = st.one_of(st.sampled_from([1, 31, 32, 33, 63, 100]), st.integers(1, 300))
near_blocks = st.sampled_from([1, 4, 8, 32])
MAPS = ("positive", "hyperbolic", "oprf")
maps = st.sampled_from(MAPS)


def draw(seed, batch, length, dtype=torch.float64):
    """Returns q, k, v and a projection."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, length, HEAD_DIM)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return *tensors, draw_projection(FEATURES, HEAD_DIM, num_heads=HEADS, generator=generator, dtype=dtype)


def of(feature_map, near_block, causal=False):
    """Returns the options that choose a map and a mode."""
    needs_a = feature_map == "oprf" and causal
    options = {"feature_map": feature_map, "causal": causal, "near_block": near_block}
    return options | ({"oprf_a": torch.tensor([-0.1, 0.05])} if needs_a else {})


def bounds(*sizes):
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)


def differentiate(q, k, v, projection, out_grad, **options):
    """Returns the output and the gradients of q, k and v."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    out = favor_attention(*leaves, projection, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, out_grad)


@laws
@given(seeds, lengths, maps, st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_a_block_as_long_as_the_segment_gives_exact_softmax(seed, length, feature_map, causal, dtype, is_packed):
    q, k, v, projection = draw(seed, 1 if is_packed else 2, length, dtype)
    options = {"cu_seqlens": bounds(length // 3, 0, length - length // 3)} if is_packed else {}
    out = favor_attention(q, k, v, projection, **of(feature_map, length, causal), **options)
    assert relative_error(out, reference.softmax_attention(q, k, v, causal=causal, **options)) < TOLERANCE[dtype]
    # Two blocks are neighbours.
    halves = favor_attention(q, k, v, projection, **of(feature_map, math.ceil(length / 2), causal), **options)
    assert relative_error(halves, out) < TOLERANCE[dtype]


@laws
@given(seeds, lengths, maps, near_blocks, st.integers(0, 5))
def test_far_keys_may_be_permuted(seed, length, feature_map, near_block, block):
    q, k, v, projection = draw(seed, 1, length)
    blocks = torch.arange(length) // near_block
    far = ((blocks - block).abs() > 1).nonzero().squeeze(1)
    order = torch.arange(length)
    order[far] = far[torch.randperm(len(far), generator=torch.Generator().manual_seed(seed))]
    options = of(feature_map, near_block)
    plain = favor_attention(q, k, v, projection, **options)
    permuted = favor_attention(q, k[:, :, order], v[:, :, order], projection, **options)
    own = blocks == block
    assert relative_error(permuted[:, :, own], plain[:, :, own]) < FLOAT64


@laws
@given(
    seeds,
    st.integers(2, 200),
    maps,
    near_blocks,
    st.booleans(),
    st.sampled_from([0.0, -1.0, 1e3, 1e30, 1e38]),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_padding_of_any_finite_content_changes_no_output_and_no_gradient(
    seed, length, feature_map, near_block, causal, content, dtype, is_packed
):
    q, k, v, projection = draw(seed, 1 if is_packed else 2, length, dtype)
    generator = torch.Generator().manual_seed(seed)
    token_mask = torch.rand(q.shape[0], length, generator=generator) < 0.6
    out_grad = torch.randn(q.shape, generator=generator).to(dtype)
    options = {**of(feature_map, near_block, causal), "token_mask": token_mask}
    if is_packed:
        options["cu_seqlens"] = bounds(length // 3, 0, length - length // 3)
    assert_padding_changes_nothing(differentiate, q, k, v, projection, out_grad, content, **options)


@laws
@given(seeds, lengths, st.integers(1, 40), maps, near_blocks, st.booleans())
def test_a_padded_row_gives_what_the_row_alone_gives(seed, length, num_padding, feature_map, near_block, causal):
    q, k, v, projection = draw(seed, 1, length + num_padding)
    out_grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    token_mask = torch.arange(length + num_padding).unsqueeze(0) < length
    options = of(feature_map, near_block, causal)
    padded = differentiate(q, k, v, projection, out_grad, token_mask=token_mask, **options)
    short = (tensor[:, :, :length] for tensor in (q, k, v))
    alone = differentiate(*short, projection, out_grad[:, :, :length], **options)
    scale = max(tensor.abs().max().item() for tensor in alone)
    for a, b in zip(padded, alone, strict=True):
        assert (a[:, :, :length] - b).abs().max() < FLOAT64 * scale


@laws
@given(
    seeds,
    st.lists(st.integers(0, 90), min_size=1, max_size=8),
    maps,
    near_blocks,
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_segment_does_not_depend_on_what_it_is_packed_with(seed, sizes, feature_map, near_block, causal, random):
    q, k, v, projection = draw(seed, 1, sum(sizes))
    parts = [torch.stack((q, k, v)).split(sizes, dim=3)[index] for index in range(len(sizes))]
    order = random.sample(range(len(sizes)), len(sizes))
    shuffled = torch.cat([parts[index] for index in order], dim=3)
    cu_seqlens = bounds(*(sizes[index] for index in order))
    options = of(feature_map, near_block, causal)
    packed = favor_attention(*shuffled, projection, **options, cu_seqlens=cu_seqlens)
    for index, segment in zip(order, packed.split([sizes[index] for index in order], dim=2), strict=True):
        assert relative_error(segment, favor_attention(*parts[index], projection, **options)) < FLOAT64


@laws
@given(seeds, lengths, maps, near_blocks, st.booleans(), st.floats(-3, 3))
def test_the_output_is_linear_in_the_values_and_one_for_ones(seed, length, feature_map, near_block, causal, factor):
    q, k, v, projection = draw(seed, 1, length)
    other, options = draw(seed + 1, 1, length)[2], of(feature_map, near_block, causal)
    of_v, of_other, of_both = (favor_attention(q, k, x, projection, **options) for x in (v, other, v + factor * other))
    assert (of_both - (of_v + factor * of_other)).abs().max() < FLOAT64
    ones = favor_attention(q, k, torch.ones_like(v), projection, **options)
    assert relative_error(ones, torch.ones_like(v)) < FLOAT64


@laws
@given(
    seeds,
    lengths,
    maps,
    near_blocks,
    st.booleans(),
    st.sampled_from([1e3, 1e4, 1e5, 1e6, 1e13]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_inputs_of_any_norm_give_finite_averages_and_finite_gradients(
    seed, length, feature_map, near_block, causal, norm, dtype
):
    q, k, v, projection = draw(seed, 1, length, dtype)
    q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out, *gradients = differentiate(q, k, v, projection, torch.ones_like(v), **of(feature_map, near_block, causal))
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert out.abs().max() <= v.abs().max() * (1 + 2 * TOLERANCE[dtype])
    assert out.any()


@laws
@given(seeds, st.integers(2, 200), st.floats(0, 1), near_blocks, maps, st.sampled_from([0.0, 50.0, 1e6, torch.nan]))
def test_nothing_later_changes_a_bit_of_an_earlier_output(seed, length, share, near_block, feature_map, content):
    q, k, v, projection = draw(seed, 1, length, torch.float32)
    first = 1 + int(share * (length - 1))
    options = of(feature_map, near_block, causal=True)
    plain = favor_attention(q, k, v, projection, **options)
    assert plain.isfinite().all()
    for tensor in (q, k, v):
        tensor[:, :, first:] *= content
    assert torch.equal(favor_attention(q, k, v, projection, **options)[:, :, :first], plain[:, :, :first])
    if math.isnan(content):
        assert favor_attention(q, k, v, projection, **options)[:, :, first:].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_in_a_real_token_propagates_inside_its_segment_only(which, causal):
    q, k, v, projection = draw(0, 1, 40)
    {"q": q, "k": k, "v": v}[which][0, 0, 3, 2] = torch.nan
    options = of("positive", 4, causal) | {"cu_seqlens": bounds(20, 20)}
    out, *gradients = differentiate(q, k, v, projection, torch.ones_like(v), **options)
    for tensor in (out, *gradients):
        assert tensor[0, :, 20:].isfinite().all()
        assert tensor[0, 1].isfinite().all()
    seen = {"q": out[0, 0, 3], "k": out[0, 0, 3:20], "v": out[0, 0, 3:20, 2]}[which]
    assert seen.isnan().all()


def test_a_fully_masked_segment_gives_zero():
    q, k, v, projection = draw(0, 3, 30)
    token_mask = torch.ones(3, 30, dtype=torch.bool)
    token_mask[1] = False
    for causal in (False, True):
        options = of("positive", 4, causal) | {"token_mask": token_mask}
        for tensor in differentiate(q, k, v, projection, torch.ones_like(v), **options):
            assert tensor.isfinite().all()
            assert not tensor[1].any()
        _, logs = favor_attention(q, k, v, projection, return_log_normaliser=True, **options)
        assert not logs[1].any()


@laws
@given(seeds, st.integers(1, 60), maps, st.booleans())
def test_the_log_normaliser_of_exact_weights_is_their_logarithm(seed, length, feature_map, causal):
    q, k, v, projection = draw(seed, 2, length)
    _, logs = favor_attention(q, k, v, projection, return_log_normaliser=True, **of(feature_map, length, causal))
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1) & causal
    torch.testing.assert_close(logs, scores.masked_fill(later, -torch.inf).logsumexp(-1), rtol=1e-12, atol=1e-12)


@laws
@given(seeds, lengths, maps, st.sampled_from([0, 300]))
def test_a_key_that_comes_twice_doubles_the_normaliser(seed, length, feature_map, near_block):
    q, k, v, projection = draw(seed, 1, length)
    options = of(feature_map, near_block) | {"return_log_normaliser": True}
    if feature_map == "oprf":
        options["oprf_a"] = torch.tensor([-0.1, 0.05])
    _, once = favor_attention(q, k, v, projection, **options)
    _, twice = favor_attention(*(torch.cat((x, x), 2) for x in (q, k, v)), projection, **options)
    torch.testing.assert_close(twice, (once + math.log(2)).repeat(1, 1, 2), rtol=1e-12, atol=1e-12)


# One token sequence in every head, and a projection of its own for each.
DRAWS, LENGTH, DIM = 20_000, 12, 4


def estimates(feature_map, near_block, *, shift=0.0, bias_factor=1.0, **options):
    """Returns denominators, numerators and their true values, for every query, of many draws of the projection.

    With a shift the rows are ω + μ, and the bias is that which makes up for it.
    """
    generator = torch.Generator().manual_seed(3)
    q, k, v = 0.7 * torch.randn(3, 1, 1, LENGTH, DIM, generator=generator, dtype=torch.float64)
    rows = draw_projection(8, DIM, num_heads=DRAWS, generator=generator, dtype=torch.float64)
    mean = shift * torch.randn(DIM, generator=generator, dtype=torch.float64)
    bias = -(rows @ mean) - mean.square().sum() / 2
    if feature_map == "oprf":
        options["oprf_a"] = torch.full((DRAWS,), -0.05, dtype=torch.float64)
    out, logs = favor_attention(
        *(x.expand(-1, DRAWS, -1, -1) for x in (q, k, v)),
        rows + mean,
        feature_map=feature_map,
        near_block=near_block,
        feature_bias=bias_factor * bias if shift else None,
        return_log_normaliser=True,
        **options,
    )
    weights = torch.exp(q @ k.transpose(-1, -2) / DIM**0.5)
    weights = weights.tril() if options.get("causal") else weights
    denominators, numerators = logs.exp()[0], (out * logs.exp().unsqueeze(-1))[0].sum(-1)
    return (denominators, weights.sum(-1)[0, 0]), (numerators, (weights @ v).sum(-1)[0, 0])


def worst_z(samples, expected):
    """Returns the largest |z| of the means over draws; 0 for what no draw changes, if it is right."""
    errors = samples.std(0) / len(samples) ** 0.5
    differences = (samples.mean(0) - expected).abs()
    is_exact = errors < 1e-12
    assert (differences[is_exact] < 1e-10).all()
    return (differences / errors)[~is_exact].max().item()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("near_block", [0, 2])
@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["plain", "shifted"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_numerator_and_denominator_are_unbiased(feature_map, near_block, shift, causal):
    for samples, expected in estimates(feature_map, near_block, shift=shift, causal=causal):
        assert worst_z(samples, expected) < MAX_Z


@pytest.mark.parametrize("bias_factor", [0.0, 0.5, 2.0])
def test_another_bias_for_the_same_shift_is_found(bias_factor):
    """None, or one that is added to the exponents of one side by half, or to those of both."""
    (samples, expected), _ = estimates("positive", 2, shift=0.5, bias_factor=bias_factor)
    assert worst_z(samples, expected) > 3 * MAX_Z


def test_the_bias_of_a_mean_shift_centres_q_and_k():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 50, 8, generator=generator, dtype=torch.float64)
    q, k = q + 1.5, k - 0.5
    rows = draw_projection(16, 8, num_heads=2, generator=generator, dtype=torch.float64)
    mean = ((q.mean(2) + k.mean(2)) * 8**-0.25)[0].unsqueeze(1)
    bias = -(rows * mean).sum(-1) - mean.square().sum(-1) / 2
    out = favor_attention(q, k, v, rows + mean, feature_bias=bias)
    # Of x = x̄ + a and y = ȳ + b the product has a·b, which is estimated, and more that is exact.
    centred_q, centred_k = (x - x.mean(2, keepdim=True) for x in (q, k))
    estimate = reference.kernel_features(centred_q, rows) @ reference.kernel_features(centred_k, rows).transpose(2, 3)
    exact = (q @ k.transpose(2, 3) - centred_q @ centred_k.transpose(2, 3)) / 8**0.5
    weights = estimate * exact.exp()
    assert relative_error(out, weights @ v / weights.sum(-1, keepdim=True)) < FLOAT64


def error_to_twin():
    q, k, v, projection = draw(0, 1, 100)
    out = favor_attention(q, k, v, projection, near_block=8)
    return relative_error(out, reference.favor_attention(q, k, v, projection, near_block=8))


@pytest.mark.parametrize(
    ("row", "column", "is_read"), [(1, 2, True), (0, 4, False)], ids=["a neighbour twice", "a border block dropped"]
)
def test_a_wrong_set_of_far_blocks_is_found(row, column, is_read, monkeypatch):
    assert error_to_twin() < FLOAT64
    plain = near_far_blocks._read_columns

    def faulty(*arguments):
        columns = plain(*arguments).clone()
        columns[row, column] = is_read
        return columns

    monkeypatch.setattr(near_far_blocks, "_read_columns", faulty)
    assert error_to_twin() > 1e-3


def test_a_relative_reference_is_found(monkeypatch):
    plain = torch_maps.ExponentialMap.absolute_query_exponents

    def relative(feature_map, q):
        return plain(feature_map, q) + math.log(feature_map.num_features)

    monkeypatch.setattr(torch_maps.ExponentialMap, "absolute_query_exponents", relative)
    assert error_to_twin() > 1e-2
    (samples, expected), _ = estimates("positive", 2)
    assert worst_z(samples, expected) > 3 * MAX_Z
