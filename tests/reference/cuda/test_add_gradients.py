"""`add_gradients` against its twin, under Triton's interpreter."""

import torch

from protlm.ops.cuda import add_gradients_twin
from tests.reference.cuda.calls import HEADS, Drawn, assert_close


def test_every_segment_equals_the_twin_and_keeps_its_size_apart():
    drawn = Drawn("positive")
    means, references = drawn.random_states()
    out, query_sums = torch.empty_like(drawn.v), drawn.call.query_sums()
    state_grad = drawn.call.empty_state_grad()
    *_, launch = drawn.call.query_gradients(
        drawn.out_grad, out, means, references, query_sums, torch.empty_like(drawn.q), state_grad
    )
    generator = torch.Generator().manual_seed(3)
    parts = [launch.arguments[name] for name in ("unit_mean_grads", "unit_sum_grads")]
    for part in parts:
        # As large as float16 could not hold.
        part.copy_(torch.randn(part.shape, generator=generator) * 1e6)
    launch.run()
    for segment in range(4):
        units = [unit for unit, of, _ in drawn.units() if of == segment]
        for head in range(HEADS):
            expected = add_gradients_twin.add_gradients(*(part[units, head] for part in parts))
            sizes = state_grad.sizes[segment, head]
            assert_close(state_grad.means[segment, head] * sizes[:, None], expected[0])
            assert_close(state_grad.sums[segment, head], expected[1])
            assert state_grad.means[segment, head].abs().max() <= 1
