"""The whole op on the Triton backend, under the interpreter, against the float64 twin of the op."""

import pytest
import torch

from protlm.ops import draw_projection, favor_attention, favor_torch, favor_triton
from protlm.ops.cuda import call
from protlm.ops.cuda.units import cut_into_units
from protlm.ops.inputs import AttentionInputs
from protlm.ops.operators import backend_of
from tests.conftest import TOLERANCE, relative_error
from tests.reference import cases
from tests.reference.cases import Case, computed_of, draw, expected_of
from tests.reference.cuda import calls

COVERED = cases.maps_on("triton")
SHAPES = {
    "rows with padding": {"length": 70, "padding": "row", "head_dim": 16},
    "segments with padding": {"segments": (37, 0, 1, 62, 300), "padding": "some", "head_dim": 24},
    "many features": {"num_features": 130, "head_dim": 40, "length": 65},
    "one projection, strided": {"per_head": False, "is_strided": True, "head_dim": 32, "length": 33},
    "large heads": {"head_dim": 128, "length": 40, "num_features": 64},
    "one feature and token": {"num_features": 1, "length": 1},
}


def quick(first, *others):
    """Returns feature maps of which all but the first are left to the long checks."""
    return [first, *(pytest.param(name, marks=pytest.mark.cuda) for name in others if name != first)]


@pytest.fixture(params=[True, False], ids=["whole segments", "units"])
def is_short(request, monkeypatch):
    monkeypatch.setattr(call, "_ENOUGH_SHORT_PROGRAMS", 0 if request.param else 10**9)
    return request.param


def assert_equal_twin(case, dtype=torch.float32):
    arguments = draw(case, dtype)
    actual = computed_of(arguments, "triton")
    assert [tensor.dtype for tensor in actual] == [dtype] * 4
    cases.assert_equal(actual, expected_of(*arguments), TOLERANCE[dtype], str(case), arguments[-1]["feature_map"])


@pytest.mark.parametrize("feature_map", quick("positive", *COVERED))
def test_packed_segments_with_padding_equal_the_twin(feature_map, is_short):
    assert_equal_twin(Case(feature_map=feature_map, **SHAPES["segments with padding"]))


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "segments with padding"])
@pytest.mark.parametrize("feature_map", ["oprf", "relu"])
def test_every_shape_equals_the_twin(name, feature_map):
    assert_equal_twin(Case(feature_map=feature_map, **SHAPES[name]))


@pytest.mark.parametrize("feature_map", quick("positive", "positive", "relu"))
def test_short_floats_equal_the_twin_on_the_same_values(feature_map, is_short):
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(feature_map=feature_map, head_dim=32, num_features=64, padding="some", length=90)
        arguments = draw(case, dtype)
        actual = computed_of(arguments, "triton")
        assert [tensor.dtype for tensor in actual] == [dtype] * 4
        cases.assert_equal(actual, expected_of(*arguments), TOLERANCE[torch.bfloat16], feature_map=feature_map)


def test_values_that_are_alike_keep_their_differences_in_bfloat16(is_short):
    case = Case(feature_map="relu", length=300, batch=1, heads=1, head_dim=32, num_features=64)
    q, k, v, out_grad, projection, options = draw(case, torch.bfloat16)
    arguments = (q * 0.5, k * 0.5, v + 3, out_grad, projection, options)
    expected = expected_of(*arguments)
    for actual, of_torch, right in zip(
        computed_of(arguments, "triton"), computed_of(arguments, "torch"), expected, strict=True
    ):
        # The torch backend rounds no feature and no mean. Means rounded as they are would add as much again.
        assert relative_error(actual, right) < 1.2e-2 + 2.5 * relative_error(of_torch, right)


@pytest.mark.cuda
def test_a_long_row_in_float16_overflows_nothing():
    # Sums over queries of gradients this large leave the range of float16.
    case = Case(head_dim=16, num_features=16, length=2000, batch=1, heads=1)
    q, k, v, out_grad, projection, options = draw(case, torch.float16)
    arguments = (q * 0.3, k * 0.3, v, out_grad.abs() * 2000, projection, options)
    actual = computed_of(arguments, "triton")
    cases.assert_equal(actual, expected_of(*arguments), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("feature_map", quick("relu", "positive", "relu"))
def test_norms_without_bound_give_finite_results(feature_map, is_short):
    q, k, v, _, projection, options = draw(Case(head_dim=16, length=50, feature_map=feature_map), torch.float32)
    for factor in (1e3, 1e7):
        arguments = (q * factor, k * factor, v, torch.ones_like(v), projection, options)
        actual = computed_of(arguments, "triton")
        assert all(tensor.isfinite().all() for tensor in actual)
        if feature_map == "relu":
            # In float32 exponents this large are rounded by more than 1; `relu` has none.
            cases.assert_equal(actual, expected_of(*arguments), 1e-3, feature_map="relu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy tells of the infinities, which are thrown away
@pytest.mark.parametrize("feature_map", quick("oprf", "positive", "relu"))
def test_padding_of_any_content_changes_nothing(feature_map, is_short):
    case = Case(feature_map=feature_map, head_dim=16, length=40, padding="some", a_axes="heads")
    q, k, v, out_grad, projection, options = draw(case, torch.float32)
    padding = ~options["token_mask"][:, None, :, None]
    quiet = computed_of((q, k, v, out_grad, projection, options), "triton")
    loud = [tensor.masked_fill(padding, 3e38) for tensor in (q, k, v)]
    pulled = out_grad.masked_fill(padding, torch.nan)
    for a, b in zip(quiet, computed_of((*loud, pulled, projection, options), "triton"), strict=True):
        assert torch.equal(a, b)


LAYOUTS = ("q, k and v in one", "expanded", "head_dim is no last axis")


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("feature_map", ["positive", "relu"])
def test_inputs_and_gradients_may_lie_in_memory_in_any_way(feature_map, layout, is_short):
    *tensors, projection, options = draw(Case(feature_map=feature_map, head_dim=16, length=40), torch.float32)
    if layout == LAYOUTS[0]:
        # As a model with one linear layer for the three makes them: token by token, q, k and v in turn.
        tensors[:3] = (x.transpose(1, 2) for x in torch.stack([x.transpose(1, 2) for x in tensors[:3]], 2).unbind(2))
        assert tensors[0].stride(2) == 3 * tensors[3].shape[1] * 16
    elif layout == LAYOUTS[1]:
        tensors[2:] = (x[:, :, :1, :1].expand_as(x) for x in tensors[2:])
    else:
        tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    q, k, v, out_grad = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = favor_attention(*leaves, projection, **options, backend="triton")
    actual = (out.detach(), *torch.autograd.grad(out, leaves, out_grad))
    expected = expected_of(*(x.contiguous() for x in tensors), projection, options)
    cases.assert_equal(actual, expected, TOLERANCE[torch.float32], layout, feature_map)


def test_nan_in_a_token_reaches_its_segment_and_no_other(is_short):
    q, k, v, _, projection, options = draw(Case(head_dim=16, segments=(40, 40)), torch.float32)
    k[0, :, 3, 5] = torch.nan
    out = favor_attention(q, k, v, projection, **options, backend="triton")
    assert out[:, :, :40].isnan().all()
    assert not out[:, :, 40:].isnan().any()


@pytest.mark.cuda
def test_equal_calls_give_equal_bits():
    arguments = draw(Case(head_dim=16, segments=(600, 20)), torch.bfloat16)
    for a, b in zip(computed_of(arguments, "triton"), computed_of(arguments, "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("feature_map", quick("positive", "bare relu"))
def test_what_torch_is_told_of_results_is_what_they_are(feature_map, is_short):
    *tensors, _, projection, options = draw(Case(head_dim=24, length=20, feature_map=feature_map), torch.bfloat16)
    arguments = (*tensors, projection, None, None, None, options["feature_map"], False, "triton")
    torch.library.opcheck(torch.ops.protlm.favor.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_units_depend_on_no_order_and_cover_every_token_once():
    bounds = torch.tensor([0, 600, 600, 601, 1200], dtype=torch.int32)
    q = torch.empty(1, 2, 1200, 8)
    units = cut_into_units(AttentionInputs(q, q, q, None, None, bounds), 256)
    covered = [(segment, t) for segment, start, stop in units.table.tolist() for t in range(start, stop)]
    assert covered == [(0, t) for t in range(600)] + [(2, 600)] + [(3, t) for t in range(601, 1200)]
    assert units.first.tolist() == [0, 3, 3, 4, 7]


@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": "trig"},
        {"head_dim": 200},
        {"dtype": torch.float64},
        {"length": 0},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_cover_goes_to_torch(options):
    dtype = options.pop("dtype", torch.float32)
    arguments = draw(Case(**{"length": 20, **options}), dtype)
    q, k, v, _, projection, others = arguments
    inputs = AttentionInputs(q, k, v, projection, causal=others["causal"], feature_map=others["feature_map"])
    assert backend_of("triton", inputs) is favor_torch
    for a, b in zip(computed_of(arguments, "triton"), computed_of(arguments, "torch"), strict=True):
        assert torch.equal(a, b)


def test_the_automatic_choice_on_the_cpu_is_not_the_interpreter():
    q = torch.randn(1, 1, 8, 8).bfloat16()
    assert backend_of("auto", AttentionInputs(q, q, q, draw_projection(8, 8))) is not favor_triton


def test_bounds_that_do_not_fit_are_refused():
    q = torch.randn(1, 1, 8, 8)
    for bounds in ([0, 9], [0, 5, 4, 8], [1, 8], [0, 7]):
        with pytest.raises(ValueError, match="cu_seqlens: expected bounds that rise from 0 to the length 8"):
            favor_attention(
                q, q, q, draw_projection(8, 8), cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="triton"
            )


@pytest.mark.parametrize("feature_map", quick("oprf", "relu"))
def test_the_phases_of_two_ranks_equal_one_process(feature_map):
    drawn = calls.Drawn(feature_map)
    whole = computed_of(
        (drawn.q, drawn.k, drawn.v, drawn.out_grad, drawn.projection,
         {"feature_map": feature_map, "token_mask": drawn.mask, "cu_seqlens": drawn.bounds, "oprf_a": drawn.a}),
        "triton",
    )  # fmt: skip
    parts = [_part(drawn, feature_map, 0, 100), _part(drawn, feature_map, 100, 338)]
    folded = [favor_triton.fold(inputs) for inputs, _ in parts]
    references = torch.maximum(folded[0][1], folded[1][1])
    states = sum(sums * torch.exp2(own - references).unsqueeze(-1) for sums, own in folded)
    read = [favor_triton.read(inputs, states, references) for inputs, _ in parts]
    pulled = [
        favor_triton.query_gradients(inputs, grad, out, states, references, sums)
        for (inputs, grad), (out, sums) in zip(parts, read, strict=True)
    ]
    state_grad = pulled[0][1] + pulled[1][1]
    keys = [favor_triton.key_gradients(inputs, states, references, state_grad) for inputs, _ in parts]
    together = (
        torch.cat([out for out, _ in read], 2),
        torch.cat([q_grad for q_grad, _ in pulled], 2),
        torch.cat([k_grad for k_grad, _ in keys], 2),
        torch.cat([v_grad for _, v_grad in keys], 2),
    )
    for actual, expected in zip(together, whole, strict=True):
        calls.assert_close(actual, expected)


def _part(drawn, feature_map, start, stop):
    q, k, v, grad = (x[:, :, start:stop] for x in (drawn.q, drawn.k, drawn.v, drawn.out_grad))
    bounds = drawn.bounds.clamp(start, stop) - start
    mask = drawn.mask[:, start:stop]
    return AttentionInputs(q, k, v, drawn.projection, mask, bounds, drawn.a, feature_map=feature_map), grad
