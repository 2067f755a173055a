"""Causal attention on prefixes and in packed rows, and keys along one row of the projection at a large head_dim."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protlm.ops import draw_projection, favor_attention
from tests.conftest import TOLERANCE, relative_error

HEADS = 2
A = torch.tensor([-0.2, 0.05])
EXPONENTIAL = ("positive", "hyperbolic", "regularised", "oprf")

laws = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**32)
every_map = st.sampled_from([*EXPONENTIAL, "trig", "relu", "bare relu"])


def draw(seed, length, dtype, head_dim=6, features=24):
    """Returns q, k, v and a projection."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, HEADS, length, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v, draw_projection(features, head_dim, num_heads=HEADS, generator=generator, dtype=dtype)


def attend(q, k, v, projection, feature_map, **options):
    """Returns attention by a map of this name; `bare relu` is `relu` without a projection."""
    if feature_map == "oprf":
        options["oprf_a"] = A
    projection = None if feature_map == "bare relu" else projection
    return favor_attention(q, k, v, projection, feature_map=feature_map.removeprefix("bare "), **options)


@laws
@given(seeds, st.integers(1, 300), st.integers(0, 150), every_map)
def test_a_prefix_alone_gives_what_the_whole_gives_for_it(seed, length, num_later, feature_map):
    q, k, v, projection = draw(seed, length + num_later, torch.float64, features=256)
    whole = attend(q, k, v, projection, feature_map, causal=True)[:, :, :length]
    alone = attend(*(x[:, :, :length] for x in (q, k, v)), projection, feature_map, causal=True)
    # The signed sums of `trig` make the rounding of another order of summation grow.
    assert relative_error(alone, whole) < (1e-6 if feature_map == "trig" else TOLERANCE[torch.float64])


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
    # Keys this large, then small ones, make a piece end early.
    k = key_scale * k
    stops = list(accumulate(sizes))
    cu_seqlens = torch.tensor([0, *stops], dtype=torch.int32)
    index = seed % len(sizes)
    start, stop = stops[index] - sizes[index], stops[index]
    first = start + int(share * (sizes[index] - 1))
    plain = attend(q, k, v, projection, feature_map, causal=True, cu_seqlens=cu_seqlens)
    assert plain.isfinite().all()
    spoilt = [x.clone() for x in (q, k, v)]
    for x in spoilt:
        x[:, :, first:stop] *= content
    found = attend(*spoilt, projection, feature_map, causal=True, cu_seqlens=cu_seqlens)
    assert torch.equal(found[:, :, start:first], plain[:, :, start:first])
    others = torch.cat((found[:, :, :start], found[:, :, stop:]), 2)
    assert others.isfinite().all()


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


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("size", [16.0, -16.0, 50.0, 1e3, 1e4, -1e4])
@pytest.mark.parametrize("feature_map", EXPONENTIAL)
def test_a_key_along_a_row_of_the_projection_gives_the_exact_result_and_gradients(feature_map, size, causal):
    q, k, v, projection = draw(0, 60, torch.float64, head_dim=256, features=32)
    direction = projection[:, 0] / projection[:, 0].norm(dim=-1, keepdim=True)
    k[:, :, 30] = size * direction
    q[:, :, 40] = size * direction
    out_grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for attention in (attend, log_space):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, projection, feature_map, causal=causal)
        results.append((out, *torch.autograd.grad(out, leaves, out_grad)))
    found, expected = results
    assert all(x.isfinite().all() for x in found)
    assert relative_error(found[0], expected[0]) < 1e-8
    # Where one key takes all the weight dq and dk are zero, with no relative error: the largest gradient is the scale.
    scale = max(x.abs().max() for x in expected[1:])
    assert all((a - b).abs().max() < 1e-8 * scale for a, b in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("feature_map", EXPONENTIAL)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("direction", ["falling", "rising"])
def test_keys_whose_norm_runs_over_three_decades_give_the_exact_result(direction, causal, feature_map):
    q, k, v, projection = draw(0, 150, torch.float64, features=16)
    norms = torch.linspace(0, 1000, 150, dtype=torch.float64)
    norms = norms if direction == "rising" else norms.flip(0)
    k = k / k.norm(dim=-1, keepdim=True) * norms.view(1, 1, -1, 1)
    found, expected = (f(q, k, v, projection, feature_map, causal=causal) for f in (attend, log_space))
    assert relative_error(found, expected) < 1e-8
