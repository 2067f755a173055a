"""`near_key_gradients` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import near_key_gradients_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.local_calls import LocalDrawn
from tests.reference.cuda.unit_calls import HEADS, computed, parts


@pytest.mark.parametrize("mode", ["near-far", "causal near-far oprf"])
def test_every_key_beside_a_far_part_equals_the_twin(mode):
    drawn = computed(mode)
    arguments = drawn.of_backward["near_key_gradients"]
    expected = [arguments["far_k_grad"].double().clone(), arguments["far_v_grad"].double().clone()]
    for _, segment, tokens in drawn.units():
        queries, keys, visible = drawn.near(segment, tokens)
        for head in range(HEADS):
            q, out_grad, inner, sums = parts(
                drawn.q, drawn.out_grad, arguments["inner"], drawn.query_sums, head=head, tokens=queries
            )
            k, v = parts(drawn.k, drawn.v, head=head, tokens=keys)
            grads = near_key_gradients_twin.near_key_gradients(q, k, v, out_grad, inner, sums, visible)
            for total, grad in zip(expected, grads, strict=True):
                total[0, head, keys] += grad
    for actual, total in zip(drawn.grads[1:], expected, strict=True):
        assert_close(actual[0, :, drawn.mask[0]], total[0, :, drawn.mask[0]])
        assert not actual[0, :, ~drawn.mask[0]].any()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_every_key_with_a_window_equals_the_twin(causal):
    drawn = LocalDrawn(causal)
    actual = torch.stack(drawn.backward()[1:])
    for head in range(HEADS):
        given = parts(
            drawn.q, drawn.k, drawn.v, drawn.out_grad, drawn.inner, drawn.query_sums, head=head, tokens=drawn.real
        )
        expected = near_key_gradients_twin.near_key_gradients(*given, drawn.visible)
        for grad, twin in zip(actual[:, 0, head, drawn.real], expected, strict=True):
            assert_close(grad, twin)
    assert not actual[:, 0, :, ~drawn.mask[0]].any()
