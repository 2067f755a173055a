"""`fold_keys` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import fold_keys_twin
from tests.reference.cuda.calls import FEATURES, HEAD_DIM, HEADS, MAPS, Drawn, assert_close


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_unit_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    launch = drawn.call.fold(*drawn.empty_states())[0]
    launch.run()
    means, references = launch.arguments["means"], launch.arguments["references"]
    assert len(drawn.units()) == 4
    empty = -1e30 if drawn.is_exponential else 0.0
    for unit, _, tokens in drawn.units():
        for head in range(HEADS):
            assert torch.equal(references[unit, head, FEATURES:], torch.full((24,), empty))
            assert not means[unit, head, FEATURES:].any()
            if not tokens:
                assert (references[unit, head] == empty).all()
                continue
            expected = fold_keys_twin.fold_keys(
                drawn.k[0, head, tokens], drawn.v[0, head, tokens], drawn.rows(head), drawn.is_exponential
            )
            assert_close(means[unit, head, :FEATURES, :HEAD_DIM], expected[0])
            assert_close(references[unit, head, :FEATURES], expected[1])
