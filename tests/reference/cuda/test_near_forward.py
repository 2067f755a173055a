"""`near_forward` against its twin, under Triton's interpreter."""

import pytest

from protlm.ops.cuda import near_forward_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.local_calls import LocalDrawn
from tests.reference.cuda.unit_calls import HEADS, computed, parts


@pytest.mark.parametrize("mode", ["near-far", "causal near-far oprf"])
def test_every_query_beside_a_far_part_equals_the_twin(mode):
    drawn = computed(mode)
    arguments = drawn.of_forward["near_forward"]
    for _, segment, tokens in drawn.units():
        queries, keys, visible = drawn.near(segment, tokens)
        for head in range(HEADS):
            (q,), (k, v) = parts(drawn.q, head=head, tokens=queries), parts(drawn.k, drawn.v, head=head, tokens=keys)
            far, far_sums = parts(arguments["far"], arguments["far_sums"], head=head, tokens=queries)
            out, sums = near_forward_twin.near_forward(q, k, v, visible, far, far_sums)
            assert_close(drawn.out[0, head, queries], out)
            assert_close(drawn.query_sums[0, head, queries], sums)
    assert not drawn.out[0, :, ~drawn.mask[0]].any()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_every_query_with_a_window_equals_the_twin(causal):
    drawn = LocalDrawn(causal)
    for head in range(HEADS):
        q, k, v = parts(drawn.q, drawn.k, drawn.v, head=head, tokens=drawn.real)
        out, sums = near_forward_twin.near_forward(q, k, v, drawn.visible)
        assert_close(drawn.out[0, head, drawn.real], out)
        assert_close(drawn.query_sums[0, head, drawn.real], sums)
    assert not drawn.out[0, :, ~drawn.mask[0]].any()
