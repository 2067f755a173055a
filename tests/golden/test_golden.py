import json

import pytest

from scripts.make_golden import GOLDEN_PATH, measure


def test_nothing_changed_that_nobody_meant_to_change(tmp_path):
    golden = json.loads(GOLDEN_PATH.read_text())
    found = measure(tmp_path)
    assert found["dataset_hash"] == golden["dataset_hash"]
    # Another processor sums in another order; the difference grows with the steps.
    assert found["losses"] == pytest.approx(golden["losses"], rel=1e-3)
    assert found["valid_perplexity"] == pytest.approx(golden["valid_perplexity"], rel=1e-3)
