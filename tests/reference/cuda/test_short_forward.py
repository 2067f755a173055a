"""`short_forward` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import short_forward_twin
from tests.reference.cuda.calls import FEATURES, HEAD_DIM, HEADS, MAPS, Drawn, assert_close


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_segment_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    means, references = drawn.empty_states()
    out, query_sums = torch.empty_like(drawn.v), drawn.call.query_sums()
    drawn.call.short_forward(means, references, out, query_sums).run()
    for segment, (start, stop) in enumerate([(0, 300), (300, 301), (301, 301), (301, 338)]):
        tokens = [t for t in range(start, stop) if drawn.mask[0, t]]
        for head in range(HEADS):
            if not tokens:
                assert not means[segment, head].any()
                continue
            q, k, v = (x[0, head, tokens] for x in (drawn.q, drawn.k, drawn.v))
            expected = short_forward_twin.short_forward(
                q, k, v, drawn.rows(head), drawn.constants(head), drawn.is_exponential
            )
            assert_close(out[0, head, tokens], expected[0])
            assert_close(means[segment, head, :FEATURES, :HEAD_DIM], expected[1])
            assert_close(references[segment, head, :FEATURES], expected[2])
    assert not out[0, :, ~drawn.mask[0]].any()


def test_the_backward_takes_its_state_as_that_of_the_other_kernels():
    drawn = Drawn("relu")
    actual = []
    for is_short in (True, False):
        means, references = drawn.empty_states()
        out, query_sums = torch.empty_like(drawn.v), drawn.call.query_sums()
        if is_short:
            drawn.call.short_forward(means, references, out, query_sums).run()
        else:
            drawn.call.run(drawn.call.fold(means, references))
            drawn.call.read(means, drawn.call.query_references(references), out, query_sums).run()
        actual.append((out, means, references, query_sums[0][:, drawn.mask[0]]))
    for short, other in zip(*actual, strict=True):
        assert_close(short, other)
