"""`near_query_gradients` against its twin, under Triton's interpreter."""

import pytest

from protlm.ops.cuda import near_query_gradients_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.local_calls import LocalDrawn
from tests.reference.cuda.unit_calls import HEADS, computed, parts


@pytest.mark.parametrize("mode", ["near-far", "causal near-far oprf"])
def test_every_query_beside_a_far_part_equals_the_twin(mode):
    drawn = computed(mode)
    arguments = drawn.of_backward["near_query_gradients"]
    for _, segment, tokens in drawn.units():
        queries, keys, visible = drawn.near(segment, tokens)
        for head in range(HEADS):
            q, out_grad, inner, sums, far_grad = parts(
                drawn.q, drawn.out_grad, arguments["inner"], drawn.query_sums, arguments["far_grad"],
                head=head, tokens=queries,
            )  # fmt: skip
            k, v = parts(drawn.k, drawn.v, head=head, tokens=keys)
            expected = near_query_gradients_twin.near_query_gradients(q, k, v, out_grad, inner, sums, visible)
            assert_close(drawn.grads[0][0, head, queries], expected + far_grad)
    assert not drawn.grads[0][0, :, ~drawn.mask[0]].any()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_every_query_with_a_window_equals_the_twin(causal):
    drawn = LocalDrawn(causal)
    q_grad = drawn.backward()[0]
    for head in range(HEADS):
        q, k, v, out_grad, inner, sums = parts(
            drawn.q, drawn.k, drawn.v, drawn.out_grad, drawn.inner, drawn.query_sums, head=head, tokens=drawn.real
        )
        expected = near_query_gradients_twin.near_query_gradients(q, k, v, out_grad, inner, sums, drawn.visible)
        assert_close(q_grad[0, head, drawn.real], expected)
    assert not q_grad[0, :, ~drawn.mask[0]].any()
