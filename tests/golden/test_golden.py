import json

import torch

from scripts.make_golden import GOLDEN_PATH, TOLERANCE_OF_OTHER_MACHINES, TOLERANCES, measure


def test_nothing_changed_that_nobody_meant_to_change(tmp_path):
    golden, measured = json.loads(GOLDEN_PATH.read_text()), measure(tmp_path)
    assert measured["dataset_hash"] == golden["dataset_hash"]
    for name, tolerance in TOLERANCES.items():
        actual, expected = (torch.tensor(numbers[name], dtype=torch.float64) for numbers in (measured, golden))
        assert actual.shape == expected.shape, name
        scale = expected.abs().amax(-1, keepdim=True) if name == "embeddings" else expected.abs()
        bound = tolerance if measured["machine"] == golden["machine"] else TOLERANCE_OF_OTHER_MACHINES
        assert ((actual - expected).abs() / scale).max() <= bound, name
