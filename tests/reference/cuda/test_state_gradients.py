"""`state_gradients` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import state_gradients_twin
from tests.reference.cuda.calls import FEATURES, HEAD_DIM, HEADS, MAPS, Drawn, assert_close


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_unit_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    means, references = drawn.random_states()
    actual = drawn.call.query_references(references)
    out, query_sums = torch.empty_like(drawn.v), drawn.call.query_sums()
    drawn.call.read(means, actual, out, query_sums).run()
    of_queries, launch, _ = drawn.call.query_gradients(
        drawn.out_grad, out, means, actual, query_sums, torch.empty_like(drawn.q), drawn.call.empty_state_grad()
    )
    of_queries.run()
    launch.run()
    for unit, segment, tokens in drawn.units():
        for head in range(HEADS):
            bias = references[segment, head, :FEATURES].double() + drawn.constants(head)
            expected = state_gradients_twin.state_gradients(
                drawn.q[0, head, tokens], drawn.out_grad[0, head, tokens],
                launch.arguments["inner"][0, head, tokens], drawn.rows(head), bias, drawn.is_exponential,
            )  # fmt: skip
            assert_close(launch.arguments["mean_grads"][unit, head, :FEATURES, :HEAD_DIM], expected[0])
            assert_close(launch.arguments["sum_grads"][unit, head, :FEATURES], expected[1])
