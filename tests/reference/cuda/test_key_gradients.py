"""`key_gradients` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import key_gradients_twin
from tests.reference.cuda.calls import FEATURES, HEAD_DIM, HEADS, MAPS, Drawn, assert_close


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_key_equals_the_twin(feature_map):
    drawn = Drawn(feature_map)
    mean_grads, _ = drawn.random_states(seed=5)
    # Those of the keys themselves: no share of a key in a sum is above 1.
    states, references = drawn.empty_states()
    drawn.call.run(drawn.call.fold(states, references))
    state_grad = drawn.call.empty_state_grad()
    generator = torch.Generator().manual_seed(7)
    state_grad.means.copy_(mean_grads)
    state_grad.sums.copy_(torch.randn(state_grad.sums.shape, generator=generator))
    state_grad.sizes.copy_(torch.rand(state_grad.sizes.shape, generator=generator) + 0.5)
    k_grad, v_grad = torch.empty_like(drawn.k), torch.empty_like(drawn.v)
    drawn.call.key_gradients(references, state_grad, k_grad, v_grad).run()
    for _, segment, tokens in drawn.units():
        for head in range(HEADS):
            sizes = state_grad.sizes[segment, head, :FEATURES, None]
            expected = key_gradients_twin.key_gradients(
                drawn.k[0, head, tokens], drawn.v[0, head, tokens], drawn.rows(head),
                references[segment, head, :FEATURES], mean_grads[segment, head, :FEATURES, :HEAD_DIM] * sizes,
                state_grad.sums[segment, head, :FEATURES], drawn.is_exponential,
            )  # fmt: skip
            assert_close(k_grad[0, head, tokens], expected[0])
            assert_close(v_grad[0, head, tokens], expected[1])
    for grad in (k_grad, v_grad):
        assert not grad[0, :, ~drawn.mask[0]].any()
