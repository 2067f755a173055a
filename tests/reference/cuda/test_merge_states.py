"""`merge_states` against its twin, under Triton's interpreter."""

import pytest

from protlm.ops.cuda import merge_states_twin
from tests.reference.cuda.calls import FEATURES, HEAD_DIM, HEADS, MAPS, Drawn, assert_close


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_segment_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    means, references = drawn.empty_states()
    folded, merged = drawn.call.fold(means, references)
    folded.run()
    merged.run()
    parts = folded.arguments
    for segment in range(4):
        units = [unit for unit, of, _ in drawn.units() if of == segment]
        for head in range(HEADS):
            if not units:
                assert not means[segment, head].any()
                assert (references[segment, head] == (-1e30 if drawn.is_exponential else 0.0)).all()
                continue
            expected = merge_states_twin.merge_states(
                parts["means"][units, head, :FEATURES, :HEAD_DIM], parts["references"][units, head, :FEATURES],
                drawn.is_exponential,
            )  # fmt: skip
            assert_close(means[segment, head, :FEATURES, :HEAD_DIM], expected[0])
            assert_close(references[segment, head, :FEATURES], expected[1])
