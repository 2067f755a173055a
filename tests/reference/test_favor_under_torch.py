"""The op inside torch's machinery: its registration, compiling, autocast, checkpointing, and where gradients flow."""

import inspect

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from protlm.ops import favor, favor_attention
from tests.reference.cases import MAPS, Case, assert_equal, differentiate, draw, found_of

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
    assert_equal(differentiate(compiled, *arguments), found_of(arguments), 1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_one_compiled_graph_serves_every_length(causal):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=count)
    for length in (9, 20, 33):
        q, k, v, _, projection, options = draw(Case(length=length, causal=causal), torch.float32)
        assert torch.equal(compiled(q, k, v, projection, **options), favor_attention(q, k, v, projection, **options))
    assert len(graphs) == 1


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_autocast_rounds_nothing_inside(feature_map, causal):
    arguments = draw(Case(length=300, batch=1, feature_map=feature_map, causal=causal), torch.float32)
    expected = found_of(arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # A product that autocast rounds shows that it is on.
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        found = found_of(arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_activation_checkpointing_changes_nothing(feature_map, causal):
    arguments = draw(Case(length=40, feature_map=feature_map, causal=causal), torch.float32)

    def checkpointed(q, k, v, projection, **options):
        return checkpoint(lambda *qkv: favor_attention(*qkv, projection, **options), q, k, v, use_reentrant=False)

    for a, b in zip(differentiate(checkpointed, *arguments), found_of(arguments), strict=True):
        assert torch.equal(a, b)


def test_only_q_k_and_v_get_gradients():
    q, k, v, _, projection, options = draw(Case(length=5, feature_map="oprf", a_axes="heads"), torch.float32)
    inputs = [q, k, v, projection, options["oprf_a"]]
    for tensor in inputs:
        tensor.requires_grad_()
    favor_attention(q, k, v, projection, **options).square().sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [True, True, True, False, False]
    q.grad = None
    favor_attention(q, k.detach(), v.detach(), projection, **options).square().sum().backward()
    assert q.grad is not None


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v, _, projection, options = draw(Case(length=5), torch.float64)
    out = favor_attention(q.requires_grad_(), k, v, projection, **options)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), q)
