"""`read_state` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import read_state_twin
from tests.reference.cuda.calls import FEATURES, HEAD_DIM, HEADS, MAPS, Drawn, assert_close


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_query_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    means, references = drawn.random_states()
    actual = drawn.call.query_references(references)
    out, query_sums = torch.empty_like(drawn.v), drawn.call.query_sums()
    drawn.call.read(means, actual, out, query_sums).run()
    for _, segment, tokens in drawn.units():
        for head in range(HEADS):
            bias = references[segment, head, :FEATURES].double() + drawn.constants(head)
            expected, sums = read_state_twin.read_state(
                drawn.q[0, head, tokens], drawn.rows(head), means[segment, head, :FEATURES, :HEAD_DIM], bias,
                drawn.is_exponential,
            )  # fmt: skip
            assert_close(out[0, head, tokens], expected)
            scale = 1.0 if drawn.is_exponential else bias.max()
            assert_close(query_sums[0, head, tokens], sums / scale)
    assert not out[0, :, ~drawn.mask[0]].any()
