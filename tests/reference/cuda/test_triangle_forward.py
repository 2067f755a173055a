"""`triangle_forward` against its twin, under Triton's interpreter."""

import pytest

from protlm.ops.cuda import triangle_forward_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.unit_calls import HEADS, WITHOUT_NEAR, computed, parts


@pytest.mark.parametrize("mode", WITHOUT_NEAR)
def test_every_query_equals_the_twin(mode):
    drawn = computed(mode)
    arguments = drawn.of_forward["triangle_forward"]
    for _, _, tokens in drawn.units():
        real = drawn.real(tokens)
        for head in range(HEADS):
            q, k, v, far, far_sums = parts(
                drawn.q, drawn.k, drawn.v, arguments["far"], arguments["far_sums"], head=head, tokens=real
            )
            out, sums = triangle_forward_twin.triangle_forward(
                q, k, v, drawn.rows(head), drawn.constants(head), far, far_sums, drawn.is_exponential
            )
            assert_close(drawn.out[0, head, real], out)
            assert_close(drawn.query_sums[0, head, real], sums)
    assert not drawn.out[0, :, ~drawn.mask[0]].any()
