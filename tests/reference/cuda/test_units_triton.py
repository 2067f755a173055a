"""Causal and near-far attention on the Triton backend, under the interpreter, against the float64 twin of the op."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

from protlm.ops import favor_attention, favor_triton, reference, units_triton
from protlm.ops.cuda import unit_call
from protlm.ops.inputs import AttentionInputs
from tests.conftest import TOLERANCE, relative_error
from tests.reference.cases import Case, draw

KINDS = {
    "causal": {"causal": True},
    "near-far": {"near_block": 16},
    "causal near-far": {"near_block": 16, "causal": True},
}
QUICK = ("causal", "near-far")


def quick(first, *others):
    """Returns parameters of which all but the first are left to the long checks."""
    return [first, *(pytest.param(each, marks=pytest.mark.cuda) for each in others)]


@pytest.fixture(autouse=True)
def short_units(monkeypatch):
    """Units of which a short row has several."""
    monkeypatch.setattr(unit_call, "CAUSAL_UNIT_TOKENS", 32)


def drawn(kind, case, dtype=torch.float32, *, has_bias=False):
    """Returns q, k, v, the cotangents of both outputs, the projection and the options of a case."""
    q, k, v, out_grad, projection, options = draw(case, dtype)
    options |= {"near_block": 0, **KINDS[kind]}
    generator = torch.Generator().manual_seed(1)
    if case.feature_map == "oprf":
        options["oprf_a"] = torch.tensor([-0.2, 0.1])
    if has_bias:
        options["feature_bias"] = 0.5 * torch.randn(projection.shape[:2], generator=generator)
    sums_grad = torch.randn(q.shape[:3], generator=generator)
    if "token_mask" in options:
        sums_grad = sums_grad.masked_fill(~options["token_mask"].unsqueeze(1), 0.0)
    return (q, k, v), (out_grad, sums_grad), projection, options


def differentiated(attention, tensors, cotangents, projection, options):
    """Returns the output, with a near field also the log-normaliser, and the gradients of q, k and v."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    if not options["near_block"]:
        out = attention(*leaves, projection, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, cotangents[0])
    results = attention(*leaves, projection, return_log_normaliser=True, **options)
    return *(x.detach() for x in results), *torch.autograd.grad(results, leaves, cotangents)


def computed(*arguments):
    return differentiated(lambda *a, **o: favor_attention(*a, backend="triton", **o), *arguments)


def twin(q, k, v, projection, *, return_log_normaliser=False, **options):
    out = reference.favor_attention(q, k, v, projection, **options)
    return (out, reference.log_normaliser(q, k, projection, **options)) if return_log_normaliser else out


def expected(tensors, cotangents, projection, options):
    doubles = [[x.double() for x in group] for group in (tensors, cotangents)]
    return differentiated(twin, *doubles, projection, options)


def assert_equals_twin(kind, case, dtype=torch.float32, tolerance=None, **changes):
    arguments = drawn(kind, case, dtype, **changes)
    inputs = AttentionInputs(*arguments[0], arguments[2], **arguments[3])
    assert favor_triton.covers(inputs)
    results, twins = computed(*arguments), expected(*arguments)
    # Of a single key or feature dq and dk are zero, up to rounding: then dv gives the scale.
    scale = twins[-1].abs().max().item()
    for number, (actual, right) in enumerate(zip(results, twins, strict=True)):
        bound = tolerance or TOLERANCE[dtype]
        if case.feature_map == "relu" and number in (1, 2):
            bound *= 10
        if right.abs().max() < 1e-12 * scale:
            assert actual.abs().max().item() <= bound * scale, (kind, str(case), number)
        else:
            assert relative_error(actual, right) <= bound, (kind, str(case), number)


SHAPES = {
    "packed, with padding": Case(segments=(70, 1, 0, 17), padding="some", head_dim=16, num_features=20),
    "rows": Case(length=70, head_dim=16, num_features=20, batch=1),
    "one feature, head_dim no power of two": Case(length=40, head_dim=24, num_features=1, batch=1),
    "padding on the left, strides": Case(length=50, padding="left", is_strided=True, head_dim=16, num_features=130),
    "one token": Case(length=1, head_dim=16, num_features=20),
}


@pytest.mark.parametrize("shape", quick(*SHAPES))
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_the_twin(kind, shape):
    assert_equals_twin(kind, SHAPES[shape], has_bias=shape == "rows")


@pytest.mark.parametrize("feature_map", quick("relu", "hyperbolic", "regularised", "oprf"))
def test_causal_maps_equal_the_twin(feature_map):
    case = Case(feature_map=feature_map, segments=(40, 0, 17), padding="some", head_dim=16, num_features=20)
    assert_equals_twin("causal", case)


@pytest.mark.cuda
@pytest.mark.parametrize("feature_map", ["hyperbolic", "oprf"])
@pytest.mark.parametrize("kind", ["near-far", "causal near-far"])
def test_near_far_maps_equal_the_twin(kind, feature_map):
    case = Case(feature_map=feature_map, segments=(70, 0, 17), padding="some", head_dim=16, num_features=20)
    assert_equals_twin(kind, case, has_bias=True)


@pytest.mark.parametrize("kind", quick("near-far", "causal"))
def test_short_floats_equal_the_twin_on_the_same_values(kind):
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(length=70, head_dim=16, num_features=20, padding="some", batch=1, heads=1)
        assert_equals_twin(kind, case, dtype, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kind", quick("causal", "causal near-far"))
@pytest.mark.parametrize("content", [30.0, -1e4, torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_later_tokens_of_any_content_change_no_bit_of_earlier_outputs(kind, content):
    tensors, _, projection, options = drawn(kind, Case(length=60, head_dim=16, num_features=20, batch=1))
    before = favor_attention(*tensors, projection, backend="triton", **options)
    for place in (10, 37):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, :, place:] = content
        after = favor_attention(*changed, projection, backend="triton", **options)
        assert torch.equal(before[:, :, :place], after[:, :, :place])


@pytest.mark.parametrize("kind", quick("near-far", "causal", "causal near-far"))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_padding_of_any_content_changes_nothing(kind):
    tensors, cotangents, projection, options = drawn(kind, Case(length=50, padding="some", head_dim=16))
    padding = ~options["token_mask"][:, None, :, None]
    quiet = computed(tensors, cotangents, projection, options)
    loud = computed(
        [x.masked_fill(padding, 3e38) for x in tensors],
        (cotangents[0].masked_fill(padding, torch.nan), cotangents[1]), projection, options,
    )  # fmt: skip
    for a, b in zip(quiet, loud, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", quick("causal", "near-far", "causal near-far"))
def test_norms_without_bound_give_finite_results(kind):
    tensors, cotangents, projection, options = drawn(kind, Case(length=50, head_dim=16, batch=1))
    for factor in (1e3, 1e7):
        large = (tensors[0] * factor, tensors[1] * factor, tensors[2])
        assert all(x.isfinite().all() for x in computed(large, cotangents, projection, options))


@pytest.mark.parametrize("kind", quick("near-far", "causal"))
def test_heads_in_groups_give_the_same_bits(kind, monkeypatch):
    arguments = drawn(kind, Case(feature_map="oprf", length=50, head_dim=16, padding="some", batch=1), has_bias=True)
    whole = computed(*arguments)
    monkeypatch.setattr(units_triton, "_STATE_BYTES", 1)
    for a, b in zip(whole, computed(*arguments), strict=True):
        assert torch.equal(a, b)


def test_the_gpu_leaves_causal_attention_in_float32_to_torch(monkeypatch):
    (q, k, v), _, projection, options = drawn("causal", Case(length=20))
    monkeypatch.setattr(favor_triton, "is_wide", lambda x: x.dtype == torch.float32)
    for near_block, dtype, covered in ((0, torch.float32, False), (8, torch.float32, True), (0, torch.bfloat16, True)):
        tensors = (x.to(dtype) for x in (q, k, v))
        inputs = AttentionInputs(*tensors, projection, **{**options, "near_block": near_block})
        assert favor_triton.covers(inputs) == covered


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_is_told_of_results_is_what_they_are(kind):
    (q, k, v), _, projection, options = drawn(kind, Case(head_dim=24, length=20), torch.bfloat16)
    arguments = (q, k, v, projection, None, None, None, "positive", options["causal"], "triton", "", None)
    torch.library.opcheck(
        torch.ops.protlm.favor.default, (*arguments, options["near_block"]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
