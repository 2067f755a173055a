"""`triangle_query_gradients` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import triangle_query_gradients_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.unit_calls import HEADS, WITHOUT_NEAR, computed, parts


@pytest.mark.parametrize("mode", WITHOUT_NEAR)
def test_every_query_equals_the_twin(mode):
    drawn = computed(mode)
    arguments = drawn.of_backward["triangle_query_gradients"]
    expected = torch.zeros_like(drawn.q, dtype=torch.float64)
    for _, _, tokens in drawn.units():
        real = drawn.real(tokens)
        for head in range(HEADS):
            *given, far_grad = parts(
                drawn.q, drawn.k, drawn.v, drawn.out_grad, arguments["inner"], drawn.query_sums, arguments["far_grad"],
                head=head, tokens=real,
            )  # fmt: skip
            expected[0, head, real] = far_grad + triangle_query_gradients_twin.triangle_query_gradients(
                *given, drawn.rows(head), drawn.constants(head), drawn.is_exponential
            )
    assert_close(drawn.grads[0], expected)
    assert not drawn.grads[0][0, :, ~drawn.mask[0]].any()
