"""`triangle_key_gradients` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import triangle_key_gradients_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.unit_calls import HEADS, WITHOUT_NEAR, computed, parts


@pytest.mark.parametrize("mode", WITHOUT_NEAR)
def test_every_key_equals_the_twin(mode):
    drawn = computed(mode)
    arguments = drawn.of_backward["triangle_key_gradients"]
    expected = [torch.zeros_like(drawn.k, dtype=torch.float64) for _ in range(2)]
    for _, _, tokens in drawn.units():
        real = drawn.real(tokens)
        for head in range(HEADS):
            *given, far_k_grad, far_v_grad = parts(
                drawn.q, drawn.k, drawn.v, drawn.out_grad, arguments["inner"], drawn.query_sums,
                arguments["far_k_grad"], arguments["far_v_grad"], head=head, tokens=real,
            )  # fmt: skip
            grads = triangle_key_gradients_twin.triangle_key_gradients(
                *given, drawn.rows(head), drawn.constants(head), drawn.is_exponential
            )
            for whole, grad, far in zip(expected, grads, (far_k_grad, far_v_grad), strict=True):
                whole[0, head, real] = grad + far
    for grad, whole in zip(drawn.grads[1:], expected, strict=True):
        assert_close(grad, whole)
        assert not grad[0, :, ~drawn.mask[0]].any()
