"""`short_backward` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import short_backward_twin
from tests.reference.cuda.calls import HEADS, MAPS, Drawn, assert_close


def backward(drawn, launches):
    """Returns the gradients of q, k and v by either way back, from the state of the one kernel."""
    means, references = drawn.empty_states()
    out, query_sums = torch.empty_like(drawn.v), drawn.call.query_sums()
    drawn.call.short_forward(means, references, out, query_sums).run()
    grads = tuple(torch.empty_like(x) for x in (drawn.q, drawn.k, drawn.v))
    for launch in launches(out, means, references, query_sums, grads):
        launch.run()
    return grads


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_segment_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    grads = backward(drawn, lambda *saved: [drawn.call.short_backward(drawn.out_grad, *saved)])
    for start, stop in [(0, 300), (300, 301), (301, 301), (301, 338)]:
        tokens = [t for t in range(start, stop) if drawn.mask[0, t]]
        for head in range(HEADS):
            if not tokens:
                continue
            q, k, v, out_grad = (x[0, head, tokens] for x in (drawn.q, drawn.k, drawn.v, drawn.out_grad))
            expected = short_backward_twin.short_backward(
                q, k, v, out_grad, drawn.rows(head), drawn.constants(head), drawn.is_exponential
            )
            # A lone token has no gradient but that of its value, up to rounding.
            compared = zip(grads, expected, strict=True) if len(tokens) > 1 else [(grads[2], expected[2])]
            for actual, wanted in compared:
                assert_close(actual[0, head, tokens], wanted)
    for grad in grads:
        assert not grad[0, :, ~drawn.mask[0]].any()


@pytest.mark.cuda
@pytest.mark.parametrize("feature_map", MAPS)
def test_the_other_kernels_give_the_same(feature_map):
    drawn = Drawn(feature_map)

    def by_units(out, means, references, query_sums, grads):
        state_grad, actual = drawn.call.empty_state_grad(), drawn.call.query_references(references)
        saved = (out, means, actual, query_sums)
        yield from drawn.call.query_gradients(drawn.out_grad, *saved, grads[0], state_grad)
        yield drawn.call.key_gradients(references, state_grad, *grads[1:])

    short = backward(drawn, lambda *saved: [drawn.call.short_backward(drawn.out_grad, *saved)])
    for actual, expected in zip(short, backward(drawn, by_units), strict=True):
        assert_close(actual, expected)
