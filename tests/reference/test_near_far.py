"""Near-far attention, feature biases, learned projections and the log-normaliser against the float64 twin."""

import inspect
import re
import weakref
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from protlm.ops import favor_attention, near_far_blocks, near_far_torch, reference
from protlm.ops.inputs import AttentionInputs
from protlm.ops.torch_states import Saved
from tests.conftest import TOLERANCE, relative_error
from tests.reference.cases import MAPS, MIXED, Case, draw, segments_of

DTYPES = (torch.float32, torch.float64)
JOINING = ("positive", "hyperbolic", "oprf")
EXPONENTIAL = (*JOINING, "regularised")
LENGTHS = (1, 31, 32, 33, 63, 100, 500)
MODES = ("plain", "mask", "packed", "packed mask")


def drawn(case, dtype, *, has_bias=True, bias_axes=2):
    """Returns q, k, v, cotangents of the output and the log-normaliser, projection, bias and options of a case."""
    q, k, v, out_grad, projection, options = draw(case, dtype)
    generator = torch.Generator().manual_seed(1)
    shape = (case.heads, case.rows)[2 - bias_axes :]
    bias = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) if has_bias else None
    log_grad = torch.randn(q.shape[:3], generator=generator, dtype=torch.float64).to(dtype)
    if "token_mask" in options:
        # The twin's logarithm of padding is a constant too.
        log_grad = log_grad.masked_fill(~options["token_mask"].unsqueeze(1), 0.0)
    return q, k, v, out_grad, log_grad, projection, bias, options


def twin(q, k, v, projection, *, return_log_normaliser, **options):
    assert return_log_normaliser
    return reference.favor_attention(q, k, v, projection, **options), reference.log_normaliser(
        q, k, projection, **options
    )


def differentiate(attention, q, k, v, out_grad, log_grad, projection, bias, options, near_block):
    """Returns by name the output, the log-normaliser, and the gradients of all that can have one."""
    leaves = {"q": q, "k": k, "v": v, "projection": projection, "bias": bias}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    out, log_normaliser = attention(
        *(leaves[name] for name in ("q", "k", "v", "projection")),
        feature_bias=leaves.get("bias"),
        near_block=near_block,
        return_log_normaliser=True,
        **options,
    )
    grads = torch.autograd.grad((out, log_normaliser), tuple(leaves.values()), (out_grad, log_grad))
    named = zip(leaves, grads, strict=True)
    return {"out": out.detach(), "log": log_normaliser.detach()} | {f"{name}_grad": grad for name, grad in named}


def assert_equals_twin(case, dtype, near_block, **changes):
    arguments = drawn(case, dtype, **changes)
    doubles = [x if x is None else x.double() for x in arguments[:-1]]
    actual = differentiate(favor_attention, *arguments, near_block)
    expected = differentiate(twin, *doubles, arguments[-1], near_block)
    scale = expected["v_grad"].abs().max().item() if expected["v_grad"].numel() else 0.0
    for name, b in expected.items():
        a = actual[name]
        assert a.dtype == (torch.promote_types(dtype, torch.float32) if name == "log" else dtype)
        told = f"{name} of {case}, {dtype}, near_block {near_block}"
        if b.numel() and b.abs().max() < 1e-12 * scale:
            assert a.abs().max().item() <= TOLERANCE[dtype] * scale, told
        else:
            assert relative_error(a, b) <= TOLERANCE[dtype], told


def case_of(feature_map, mode, causal, length):
    return Case(
        length=length,
        head_dim=(8, 24)[length % 2],
        feature_map=feature_map,
        causal=causal,
        padding="some" if "mask" in mode else "",
        segments=segments_of(length) if "packed" in mode else (),
        batch=1 if length == 500 else 2,
    )


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature_map", JOINING)
def test_output_log_normaliser_and_every_gradient_equal_the_twin(feature_map, mode, causal):
    for dtype, (number, length) in product(DTYPES, enumerate(LENGTHS)):
        near_block = (8, 32, 5)[number % 3] if length < 500 else 8
        assert_equals_twin(case_of(feature_map, mode, causal, length), dtype, near_block)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", EXPONENTIAL)
@pytest.mark.parametrize("segments", [(), MIXED], ids=["rows", "segments"])
def test_without_a_near_field_they_equal_the_twin_too(feature_map, segments, causal):
    for dtype in DTYPES:
        case = Case(feature_map=feature_map, causal=causal, segments=segments, padding="some", a_axes="segments")
        assert_equals_twin(case, dtype, 0)
        assert_equals_twin(case, dtype, 0, has_bias=False)


SHAPES = {
    "one projection and one bias for all heads": ({"per_head": False, "heads": 3}, {"bias_axes": 1}),
    "no bias": ({}, {"has_bias": False}),
    "strided": ({"is_strided": True, "padding": "some", "head_dim": 24, "length": 257}, {}),
    "one feature": ({"num_features": 1}, {}),
    "one head": ({"heads": 1}, {}),
    "a row that is all padding": ({"padding": "row", "batch": 3}, {}),
    "left padding": ({"padding": "left", "length": 257}, {}),
    "no token at all": ({"segments": (0,)}, {}),
    "mixed segments": ({"segments": MIXED, "is_strided": True}, {}),
    "masked segments": ({"segments": MIXED, "padding": "some"}, {}),
}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", JOINING)
@pytest.mark.parametrize(("options", "changes"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("near_block", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_every_layout_equals_the_twin(options, changes, near_block, feature_map, causal, monkeypatch):
    # Spans of two blocks, groups of one head, and later states that are folded once more.
    monkeypatch.setattr(near_far_torch, "_SPAN_BLOCKS", 2)
    monkeypatch.setattr(near_far_torch, "_SPAN_FEATURES", 600)
    monkeypatch.setattr(near_far_torch, "_KEPT_SPANS", 3)
    case = Case(feature_map=feature_map, causal=causal, a_axes="segments", **options)
    for dtype in DTYPES:
        assert_equals_twin(case, dtype, near_block, **changes)


def errors_for_sizes(feature_map, causal):
    """Returns the errors of all results for tokens of very different size, by name."""
    case = Case(feature_map=feature_map, causal=causal, length=150, batch=1, head_dim=16)
    q, k, v, out_grad, log_grad, projection, bias, options = drawn(case, torch.float64)
    sizes = torch.ones(150, 1, dtype=torch.float64)
    # The twin has the range of float64.
    sizes[40:64], sizes[104:112], sizes[128:144] = 9.0, 0.01, 11.0
    arguments = q * sizes.flip(0), k * sizes, v, out_grad, log_grad, projection, bias, options
    actual, expected = (differentiate(op, *arguments, 8) for op in (favor_attention, twin))
    return {name: relative_error(actual[name], wanted) for name, wanted in expected.items()}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", JOINING)
def test_keys_and_queries_of_very_different_size_equal_the_twin(feature_map, causal):
    """Blocks then no longer share references: what one holds may be far below what another holds."""
    for name, error in errors_for_sizes(feature_map, causal).items():
        assert error <= TOLERANCE[torch.float64], name


def keys_along_a_row(size):
    """Returns two near blocks whose keys are along the only row, far ones against it, and the error of the output."""
    head_dim, generator = 256, torch.Generator().manual_seed(0)
    row = torch.randn(1, head_dim, generator=generator)
    row *= 16 / row.norm()
    along = row * head_dim**0.25
    k = torch.cat((0.5 * along.expand(16, -1), size * along.expand(16, -1))).view(1, 1, 32, head_dim)
    q, v = (0.5 * along).expand_as(k), torch.randn(k.shape, generator=generator)
    out = favor_attention(q, k, v, row, near_block=8, backend="torch")
    # Of the first block, which sees them both.
    expected = reference.favor_attention(q, k, v, row, near_block=8)
    return relative_error(out[:, :, :8], expected[:, :, :8])


def test_blocks_share_references_only_where_nothing_is_lost(monkeypatch):
    found, may_share = [], near_far_blocks.FarStates._may_share

    def counted(states):
        found.append(may_share(states))
        return found[-1]

    monkeypatch.setattr(near_far_blocks.FarStates, "_may_share", counted)
    assert_equals_twin(Case(length=500, batch=1), torch.float32, 8)
    assert all(found)
    found.clear()
    # Estimates are larger than exact weights here: what is far counts, though its features nearly vanish.
    assert keys_along_a_row(-0.1) < 1e-4
    assert not any(found)
    monkeypatch.setattr(near_far_blocks.FarStates, "_may_share", lambda _: True)
    assert not keys_along_a_row(-0.1) < 0.1


@pytest.mark.parametrize("near_block", [1, 2, 5])
def test_heads_that_lie_side_by_side_equal_the_twin_one_head_at_a_time(near_block, monkeypatch):
    monkeypatch.setattr(near_far_torch, "_SPAN_FEATURES", 1)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 60, 3, 8, generator=generator, dtype=torch.float64).transpose(1, 2) for _ in range(4)]
    projection = torch.randn(3, 16, 8, generator=generator, dtype=torch.float64)
    results = []
    for attention in (favor_attention, reference.favor_attention):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        out = attention(*leaves, projection, near_block=near_block)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, tensors[3])))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_short_floats_give_what_float64_gives_for_the_same_values(causal, dtype):
    case = Case(head_dim=32, num_features=256, segments=(100, 3, 40), causal=causal)
    q, k, v, out_grad, log_grad, projection, bias, options = drawn(case, dtype)
    arguments = q, k, v, out_grad, log_grad.float(), projection, bias, options
    actual = differentiate(favor_attention, *arguments, 8)
    doubles = [x.double() for x in arguments[:-1]]
    expected = differentiate(twin, *doubles, options, 8)
    for name, b in expected.items():
        assert relative_error(actual[name], b) <= TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("feature_map", [name for name in MAPS if name != "bare relu"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_projection_of_every_map_gets_its_gradient(feature_map, causal):
    for dtype in DTYPES:
        case = Case(length=60, feature_map=feature_map, causal=causal, a_axes="heads", padding="some")
        q, k, v, out_grad, projection, options = draw(case, dtype)
        rows = projection.requires_grad_()
        (actual,) = torch.autograd.grad(favor_attention(q, k, v, rows, **options), rows, out_grad)
        rows = projection.detach().double().requires_grad_()
        out = reference.favor_attention(*(x.double() for x in (q, k, v)), rows, **options)
        (expected,) = torch.autograd.grad(out, rows, out_grad.double())
        looser = {"trig": 10, "relu": 10}.get(feature_map, 1)
        assert relative_error(actual, expected) <= looser * TOLERANCE[dtype]


def test_gradients_through_the_log_normaliser_alone():
    q, k, v, _, log_grad, projection, _, options = drawn(Case(), torch.float64)
    for near_block in (0, 8):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        _, logs = favor_attention(*leaves, v, projection, return_log_normaliser=True, near_block=near_block, **options)
        actual = torch.autograd.grad(logs, leaves, log_grad)
        expected = torch.autograd.grad(
            reference.log_normaliser(*leaves, projection, near_block=near_block, **options), leaves, log_grad
        )
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) <= TOLERANCE[torch.float64]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that operations take and still hold, but for those of given tensors; `peak` is the most."""

    def __init__(self, *given):
        super().__init__()
        self._sizes = {x.untyped_storage()._cdata: 0 for x in given}
        self.live = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self._sizes:
                self._sizes[key] = x.untyped_storage().nbytes()
                self.live += self._sizes[key]
                weakref.finalize(x.untyped_storage(), self._forget, key)
        self.peak = max(self.peak, self.live)
        return results

    def _forget(self, key):
        self.live -= self._sizes.pop(key)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_memory_beside_inputs_and_outputs_does_not_grow_with_the_length(causal, monkeypatch):
    monkeypatch.setattr(near_far_torch, "_KEPT_SPANS", 8)

    def peak(length):
        q = torch.ones(1, 2, length, 8)
        inputs = AttentionInputs(q, q, q, torch.ones(16, 8), causal=causal, near_block=8)
        with LiveBytes(q, inputs.projection) as forward:
            out, logs = near_far_torch.forward(inputs)
        with LiveBytes(q, inputs.projection, out, logs) as backward:
            grads = near_far_torch.backward(inputs, Saved(q, out, logs), learns=False)
        results = (out, logs), grads[:3]
        return [run.peak - sum(x.nbytes for x in made) for run, made in zip((forward, backward), results, strict=True)]

    for short, long in zip(peak(2_000), peak(6_000), strict=True):
        assert 0 < long < 1.1 * short


NEAR_CASES = [
    *(Case(length=40, feature_map=name, causal=causal) for name in JOINING for causal in (False, True)),
    Case(length=40, padding="some"),
    Case(segments=(4, 0, 36), padding="some", causal=True),
    Case(length=40, feature_map="oprf", a_axes="segments"),
]
attention = inspect.unwrap(favor_attention)


@pytest.mark.parametrize("case", NEAR_CASES, ids=str)
def test_the_op_passes_opcheck(case):
    q, k, v, _, _, projection, bias, options = drawn(case, torch.float32)
    tensors = [x.requires_grad_() for x in (q, k, v, projection)]
    masks = (options.get(name) for name in ("token_mask", "cu_seqlens", "oprf_a"))
    settings = (options["feature_map"], case.causal, "torch", "", bias.requires_grad_(), 4)
    torch.library.opcheck(torch.ops.protlm.favor.default, (*tensors, *masks, *settings))


@pytest.mark.parametrize("near_block", [0, 4])
@pytest.mark.parametrize("case", NEAR_CASES, ids=str)
def test_the_op_compiles_as_one_graph_forward_and_backward(case, near_block):
    torch._dynamo.reset()
    arguments = drawn(case, torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    actual = differentiate(compiled, *arguments, near_block)
    for name, expected in differentiate(attention, *arguments, near_block).items():
        assert relative_error(actual[name], expected) <= 1e-6, name


def with_blocks_of_4(q, k, v, projection, *, near_block, **options):
    # A number of the code, not a dynamic one.
    assert near_block == 4
    return attention(2 * q, k + 1, v, projection, near_block=4, **options)


def test_one_graph_gives_output_and_gradients_at_every_length():
    torch._dynamo.reset()
    compiled = torch.compile(with_blocks_of_4, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (19, 40, 33):
            arguments = drawn(Case(length=length), torch.float32)
            actual = differentiate(compiled, *arguments, 4)
            for name, expected in differentiate(with_blocks_of_4, *arguments, 4).items():
                assert relative_error(actual[name], expected) <= 1e-6, name


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_autocast_rounds_nothing_inside(causal):
    arguments = drawn(Case(length=300, batch=1, causal=causal), torch.float32)
    for near_block in (0, 16):
        expected = differentiate(favor_attention, *arguments, near_block)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = differentiate(favor_attention, *arguments, near_block)
        for name, wanted in expected.items():
            assert torch.equal(actual[name], wanted), name


# torch itself scripts its rules of forward mode.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_func_gives_the_gradients_of_backward():
    q, k, v, _, _, projection, bias, options = drawn(Case(length=40), torch.float64)

    def loss(*tensors):
        *others, bias = tensors
        out, logs = favor_attention(*others, feature_bias=bias, near_block=4, return_log_normaliser=True, **options)
        return out.square().sum() + logs.sin().sum()

    tensors = (q, k, v, projection, bias)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match=re.escape("got a tangent of forward mode")):
        torch.func.jvp(loss, tensors, tensors)
