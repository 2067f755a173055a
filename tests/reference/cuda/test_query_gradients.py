"""`query_gradients` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import query_gradients_twin
from tests.reference.cuda.calls import FEATURES, HEAD_DIM, HEADS, MAPS, Drawn, assert_close


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_query_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    means, references = drawn.random_states()
    actual = drawn.call.query_references(references)
    out, query_sums = torch.empty_like(drawn.v), drawn.call.query_sums()
    drawn.call.read(means, actual, out, query_sums).run()
    q_grad = torch.empty_like(drawn.q)
    launch = drawn.call.query_gradients(
        drawn.out_grad, out, means, actual, query_sums, q_grad, drawn.call.empty_state_grad()
    )[0]
    launch.run()
    for _, segment, tokens in drawn.units():
        for head in range(HEADS):
            expected, inner = query_gradients_twin.query_gradients(
                drawn.q[0, head, tokens], drawn.out_grad[0, head, tokens], drawn.rows(head),
                means[segment, head, :FEATURES, :HEAD_DIM],
                references[segment, head, :FEATURES].double() + drawn.constants(head), drawn.is_exponential,
            )  # fmt: skip
            assert_close(q_grad[0, head, tokens], expected)
            assert_close(launch.arguments["inner"][0, head, tokens], inner)
    assert not q_grad[0, :, ~drawn.mask[0]].any()
    assert not launch.arguments["inner"][0, :, ~drawn.mask[0]].any()
