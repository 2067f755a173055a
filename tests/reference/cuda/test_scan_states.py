"""`scan_states` against its twin, under Triton's interpreter."""

import pytest
import torch

from protlm.ops.cuda import scan_states_twin
from tests.reference.cuda.calls import assert_close
from tests.reference.cuda.unit_calls import FEATURES, HEAD_DIM, HEADS, MODES, computed


@pytest.mark.parametrize("of_queries", [False, True], ids=["of keys", "of queries"])
@pytest.mark.parametrize("mode", MODES)
def test_every_unit_equals_the_twin(mode, of_queries):
    drawn = computed(mode)
    arguments = (drawn.of_backward if of_queries else drawn.of_forward)["scan_states"]
    gap = 1 if drawn.near_block else 0
    before, after = (not (drawn.causal and of_queries)), (of_queries or not drawn.causal)
    seen = 0
    for segment in range(4):
        units = [unit for unit, of, _ in drawn.units() if of == segment]
        for head in range(HEADS):
            given = [arguments[f"unit_{name}"][units, head, :FEATURES] for name in ("means", "references", "inners")]
            given[0] = given[0][..., :HEAD_DIM]
            if not of_queries:
                given[2] = torch.zeros_like(given[2])
            expected = scan_states_twin.scan_states(*given, gap, before, after, drawn.is_exponential)
            for unit, state in zip(units, expected, strict=True):
                actual = {name: arguments[name][unit, head] for name in ("means", "references", "inners", "sizes")}
                assert not actual["means"][FEATURES:].any()
                assert not actual["means"][:, HEAD_DIM:].any()
                assert_state(actual, state, of_queries, drawn.is_exponential, arguments["log_size"])
                seen += state is not None
    assert seen


def assert_state(actual, state, of_queries, is_exponential, log_size):
    means, references = actual["means"][:FEATURES, :HEAD_DIM], actual["references"][:FEATURES]
    if of_queries:
        sizes, inners = actual["sizes"][:FEATURES], actual["inners"][:FEATURES]
        # As key_gradients reads them.
        references = log_size - references if is_exponential else sizes
        inners = inners / torch.where(sizes == 0, 1.0, sizes)
    if state is None:
        assert not means.any()
        assert (references == (-1e30 if is_exponential else 0.0)).all()
        return
    assert_close(means, state[0])
    assert_close(references, state[1])
    if of_queries:
        assert_close(inners, state[2])
        if is_exponential:
            assert (sizes == 2.0**log_size).all()
