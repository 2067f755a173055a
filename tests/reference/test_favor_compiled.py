"""The op between others in a compiled function: gradients under lengths that change, and in generated code."""

import inspect
from dataclasses import replace

import pytest
import torch

from protlm.ops import favor
from tests.reference.cases import Case, assert_equal, differentiate, draw

attention = inspect.unwrap(favor.favor_attention)

CASES = [Case(feature_map="oprf", causal=True), Case(padding="some"), Case(feature_map="trig")]


def around(q, k, v, projection, **options):
    """Returns attention with something to fuse on either side."""
    return attention(2 * q, k + 1, v, projection, **options).sin()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_graph_gives_output_and_gradients_at_every_length(case):
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 20, 33):
            arguments = draw(replace(case, length=length), torch.float32)
            assert_equal(differentiate(compiled, *arguments), differentiate(around, *arguments), 1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler itself imports it
@pytest.mark.parametrize("case", CASES, ids=str)
def test_generated_code_gives_output_and_gradients(case):
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True)
    arguments = draw(replace(case, length=20), torch.float32)
    feature_map = arguments[-1]["feature_map"]
    assert_equal(differentiate(compiled, *arguments), differentiate(around, *arguments), 1e-5, feature_map=feature_map)
