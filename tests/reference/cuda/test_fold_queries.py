"""`fold_queries` against its twin, under Triton's interpreter."""

import pytest

from protlm.ops.cuda import fold_queries_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.unit_calls import FEATURES, HEAD_DIM, HEADS, MODES, computed, parts


@pytest.mark.parametrize("mode", MODES)
def test_every_unit_equals_the_twin(mode):
    drawn = computed(mode)
    arguments = drawn.of_backward["fold_queries"]
    empty = -1e30 if drawn.is_exponential else 0.0
    for unit, _, tokens in drawn.units():
        real = drawn.real(tokens)
        for head in range(HEADS):
            means, references, inners = (arguments[name][unit, head] for name in ("means", "references", "inners"))
            assert (references[FEATURES:] == empty).all()
            assert not means[FEATURES:].any()
            assert not inners[FEATURES:].any()
            if not real:
                assert (references == empty).all()
                continue
            q, out_grad, inner, sums = parts(
                drawn.q, drawn.out_grad, arguments["inner"], drawn.query_sums, head=head, tokens=real
            )
            if drawn.near_block:
                # An absolute normaliser has ‖q‖² in it.
                sums = sums.double() + q.double().square().sum(-1) * 0.5 * HEAD_DIM**-0.5 / 0.6931471805599453
            expected = fold_queries_twin.fold_queries(
                q, out_grad, inner, sums, drawn.rows(head), drawn.constants(head), drawn.is_exponential
            )
            for actual, twin in zip((means[:, :HEAD_DIM], references, inners), expected, strict=True):
                assert_close(actual[:FEATURES], twin)
