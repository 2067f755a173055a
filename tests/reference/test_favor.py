"""The fast op against its float64 twin: the output and every gradient, for every map and mode, at awkward shapes."""

from itertools import product

import pytest
import torch

from protlm.ops import draw_projection, favor_attention, kernel_features, reference
from tests.conftest import TOLERANCE, relative_error
from tests.reference.cases import (
    MAPS,
    MIXED,
    Case,
    assert_equal,
    assert_op_equals_twin,
    computed_of,
    draw,
    expected_of,
    make_stretches_small,
    segments_of,
)

DTYPES = (torch.float32, torch.float64)
LENGTHS = (1, 15, 16, 17, 63, 100, 257, 1000)
HEAD_DIMS = (8, 24, 60, 64, 128, 256)
MODES = ("plain", "mask", "packed", "packed mask")


def case_of(feature_map, mode, causal, length, head_dim):
    return Case(
        length=length,
        head_dim=head_dim,
        feature_map=feature_map,
        causal=causal,
        padding="some" if "mask" in mode else "",
        segments=segments_of(length) if "packed" in mode else (),
        batch=1 if length == 1000 else 2,
    )


def is_in_the_covering(mode, length, head_dim):
    """Every length with one head_dim, which rotates with the mode, and every head_dim at length 63.

    Of length 1,000, which takes as long as all others together, only the simplest mode and the one that has everything.
    """
    if length == 1000 and mode not in ("plain", "packed mask"):
        return False
    rotated = HEAD_DIMS[(LENGTHS.index(length) + MODES.index(mode)) % len(HEAD_DIMS)]
    return head_dim == rotated or length == 63


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", MAPS)
def test_output_and_gradients_equal_the_float64_twin(feature_map, mode, causal):
    for dtype, length, head_dim in product(DTYPES, LENGTHS, HEAD_DIMS):
        if is_in_the_covering(mode, length, head_dim):
            assert_op_equals_twin(case_of(feature_map, mode, causal, length, head_dim), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", MAPS)
def test_every_other_length_and_head_dim_equals_the_float64_twin(feature_map, mode, causal):
    for dtype, length, head_dim in product(DTYPES, LENGTHS, HEAD_DIMS):
        if not is_in_the_covering(mode, length, head_dim):
            assert_op_equals_twin(case_of(feature_map, mode, causal, length, head_dim), dtype)


SHAPES = {
    "one projection for all heads": {"per_head": False, "head_dim": 24},
    "strided": {"is_strided": True, "padding": "some", "head_dim": 24, "length": 257},
    "more features than head_dim": {"num_features": 130, "head_dim": 24},
    "one feature": {"num_features": 1},
    "one head": {"heads": 1},
    "a row that is all padding": {"padding": "row", "batch": 3},
    "left padding": {"padding": "left", "length": 257},
    "one segment": {"segments": (50,)},
    "no token at all": {"segments": (0,)},
    "empty segments": {"segments": (0, 1, 0)},
    "mixed segments": {"segments": MIXED, "head_dim": 60, "is_strided": True},
    "long segments in stretches": {"segments": (300, 5, 400), "stretch_tokens": 64, "causal_stretch_length": 16},
    "small stretches": {"length": 257, "batch": 1, "stretch_tokens": 64, "causal_stretch_length": 7},
    "stretches of one token": {
        "length": 40,
        "batch": 1,
        "padding": "some",
        "stretch_tokens": 1,
        "causal_stretch_length": 1,
    },
    "rows in one stretch": {"batch": 5, "padding": "some", "stretch_tokens": 220, "causal_stretch_length": 30},
    "mixed segments in small stretches": {"segments": MIXED, "stretch_tokens": 64, "causal_stretch_length": 7},
    "masked segments in small stretches": {
        "segments": MIXED,
        "padding": "some",
        "stretch_tokens": 200,
        "causal_stretch_length": 7,
    },
}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_every_layout_equals_the_float64_twin(options, feature_map, causal, monkeypatch):
    case = Case(feature_map=feature_map, causal=causal, **options)
    make_stretches_small(case, monkeypatch)
    for dtype in DTYPES:
        assert_op_equals_twin(case, dtype)


@pytest.mark.parametrize("a_axes", ["heads", "segments"])
@pytest.mark.parametrize("segments", [(), MIXED], ids=["rows", "segments"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_given_a_is_used_for_its_head_and_segment(a_axes, segments, causal):
    case = Case(feature_map="oprf", a_axes=a_axes, segments=segments, causal=causal, length=90, batch=3)
    for dtype in DTYPES:
        assert_op_equals_twin(case, dtype)
    # The values matter: another A gives another output.
    q, k, v, _, projection, options = draw(case, torch.float64)
    out = favor_attention(q, k, v, projection, **options)
    other = favor_attention(q, k, v, projection, **{**options, "oprf_a": options["oprf_a"] - 0.1})
    assert relative_error(other, out) > 1e-3


def test_an_a_of_zero_makes_oprf_positive():
    q, k, v, _, projection, options = draw(Case(feature_map="oprf"), torch.float64)
    positive = favor_attention(q, k, v, projection)
    assert relative_error(favor_attention(q, k, v, projection, **options, oprf_a=torch.zeros(2)), positive) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_short_floats_give_what_float64_gives_for_the_same_values(feature_map, causal, dtype):
    case = Case(head_dim=32, num_features=256, segments=(100, 3, 40), feature_map=feature_map, causal=causal)
    arguments = draw(case, dtype)
    actual = computed_of(arguments)
    assert [tensor.dtype for tensor in actual] == [dtype] * 4
    arguments = (*arguments[:4], _as_the_op_sees_it(arguments[4], feature_map, dtype), arguments[5])
    assert_equal(actual, expected_of(*arguments), TOLERANCE[torch.bfloat16], feature_map=arguments[-1]["feature_map"])


def _as_the_op_sees_it(projection, feature_map, dtype):
    """Returns the rows of `regularised` rescaled and then rounded; rescaled once more they stay, nearly."""
    if feature_map != "regularised":
        return projection
    rows = projection.double()
    return (rows * rows.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True)).to(dtype)


@pytest.mark.parametrize("feature_map", [name for name in MAPS if name != "bare relu"])
def test_a_float32_projection_is_rounded_once_to_the_dtype_of_q(feature_map):
    q, k, v, _, projection, options = draw(Case(feature_map=feature_map), torch.float32)
    q, k, v = (tensor.bfloat16() for tensor in (q, k, v))
    whole = favor_attention(q, k, v, projection, **options)
    rounded = projection.bfloat16()
    if feature_map == "regularised":
        assert relative_error(whole, favor_attention(q, k, v, rounded, **options)) < TOLERANCE[torch.bfloat16]
    else:
        assert torch.equal(whole, favor_attention(q, k, v, rounded, **options))


@pytest.mark.parametrize("feature_map", MAPS)
def test_the_twin_is_the_plain_formula_of_the_features(feature_map):
    case = Case(length=9, feature_map=feature_map, a_axes="heads")
    q, k, v, _, projection, options = draw(case, torch.float64)
    a = options["oprf_a"].double().view(2, 1, 1) if feature_map == "oprf" else None
    q_features, k_features = (
        kernel_features(x, projection, feature_map=options["feature_map"], oprf_a=a) for x in (q, k)
    )
    weights = q_features @ k_features.transpose(-1, -2)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    assert relative_error(reference.favor_attention(q, k, v, projection, **options), expected) < 1e-9
    causal = weights.tril()
    expected = causal @ v / causal.sum(-1, keepdim=True)
    assert relative_error(reference.favor_attention(q, k, v, projection, **options | {"causal": True} | (
        {"oprf_a": options["oprf_a"]} if a is not None else {})), expected) < 1e-9  # fmt: skip


def test_many_features_approach_exact_softmax_attention():
    q, k, v, _, projection, _ = draw(Case(length=20, num_features=20_000, heads=1, batch=1), torch.float64)
    q, k = 0.5 * q, 0.5 * k
    for causal in (False, True):
        exact = reference.softmax_attention(q, k, v, causal=causal)
        # The weights are far from uniform, so that an average of v would not pass for attention.
        counts = torch.arange(1, 21).view(1, 1, 20, 1)
        average = v.cumsum(2) / counts if causal else v.mean(2, keepdim=True).expand_as(v)
        assert relative_error(average, exact) > 0.05
        for feature_map in ("positive", "hyperbolic", "trig"):
            actual = favor_attention(q, k, v, projection, feature_map=feature_map, causal=causal)
            assert relative_error(actual, exact) < 0.03


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_exact_softmax_twin_equals_torch_on_masked_segments(causal):
    q, k, v, _, _, options = draw(
        Case(segments=(5, 0, 1, 30), padding="some", feature_map="bare relu", causal=causal), torch.float64
    )
    del options["feature_map"]
    actual = reference.softmax_attention(q, k, v, **options)
    expected = torch.zeros_like(v)
    real = options["token_mask"][0]
    for start, stop in ((0, 5), (5, 6), (6, 36)):
        chosen = torch.arange(start, stop)[real[start:stop]]
        if len(chosen):
            parts = (x[:, :, chosen] for x in (q, k, v))
            expected[:, :, chosen] = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=causal)
    assert relative_error(actual, expected) < 1e-13


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_results_lie_in_memory_as_the_inputs_do(backend):
    # Tokens before heads, as a model makes them: the results need no copy to go on.
    q, k, v = (torch.randn(1, 50, 2, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    out = favor_attention(q, k, v, draw_projection(8, 8), backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.transpose(1, 2).is_contiguous()
    # Whatever the inputs are like, the numbers of a head are neighbours.
    across = [x.detach().transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert favor_attention(*across, draw_projection(8, 8), backend=backend).stride(-1) == 1
