"""The op inside torch's machinery: its registration, compiling, autocast, checkpointing, and where gradients flow."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from protlm.ops import favor, favor_attention
from tests.reference.cases import MAPS, Case, assert_equal, computed_of, differentiate, draw

attention = inspect.unwrap(favor.favor_attention)

CASES = [
    *(Case(length=7, feature_map=feature_map, causal=causal) for feature_map in MAPS for causal in (False, True)),
    Case(length=7, padding="some"),
    Case(segments=(4, 0, 3)),
    Case(segments=(4, 0, 3), padding="some", causal=True),
    Case(length=7, feature_map="oprf", a_axes="segments"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_op_passes_opcheck(case):
    q, k, v, _, projection, options = draw(case, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    masks = (options.get(name) for name in ("token_mask", "cu_seqlens", "oprf_a"))
    arguments = (*tensors, projection, *masks, options["feature_map"], case.causal, "torch")
    torch.library.opcheck(torch.ops.protlm.favor.default, arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_op_compiles_as_one_graph_forward_and_backward(case):
    torch._dynamo.reset()
    arguments = draw(case, torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_equal(differentiate(compiled, *arguments), computed_of(arguments), 1e-7)


FUSED_CASES = [Case(causal=True), Case(feature_map="oprf", causal=True), Case(padding="some"), Case(feature_map="trig")]


def around(q, k, v, projection, **options):
    """Returns attention with something to fuse on either side."""
    return attention(2 * q, k + 1, v, projection, **options).sin()


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_one_graph_gives_output_and_gradients_at_every_length(case):
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 20, 33):
            arguments = draw(replace(case, length=length), torch.float32)
            assert_equal(differentiate(compiled, *arguments), differentiate(around, *arguments), 1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler itself imports it
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_generated_code_gives_output_and_gradients(case):
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True)
    arguments = draw(replace(case, length=20), torch.float32)
    feature_map = arguments[-1]["feature_map"]
    assert_equal(differentiate(compiled, *arguments), differentiate(around, *arguments), 1e-5, feature_map=feature_map)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_autocast_rounds_nothing_inside(feature_map, causal):
    arguments = draw(Case(length=300, batch=1, feature_map=feature_map, causal=causal), torch.float32)
    expected = computed_of(arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # A product that autocast rounds shows that it is on.
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        actual = computed_of(arguments)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_activation_checkpointing_changes_nothing(feature_map, causal):
    arguments = draw(Case(length=40, feature_map=feature_map, causal=causal), torch.float32)

    def checkpointed(q, k, v, projection, **options):
        return checkpoint(lambda *qkv: favor_attention(*qkv, projection, **options), q, k, v, use_reentrant=False)

    for a, b in zip(differentiate(checkpointed, *arguments), computed_of(arguments), strict=True):
        assert torch.equal(a, b)
