"""The benchmark of scoring, made small: its figures come from its own times, and none after a wrong score."""

import json
from statistics import median

import numpy as np
import pytest

from scripts.bench import score as bench
from scripts.bench import score_measurements
from scripts.bench.score_measurements import OURS, PEER

TINY = ["--layers", "2", "--model-dim", "16", "--heads", "2", "--features", "8", "--length", "12", "--threads", "1",
        "--cost-lengths", "10", "40", "--repeats", "3", "--json"]  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_the_peer():
    pytest.importorskip("transformers")


def test_figures_are_those_of_the_times(capsys):
    bench.main(TINY)
    report = json.loads(capsys.readouterr().out)
    seconds = report["measured"]["speed"]
    (speed, *cost) = report["figures"]
    assert speed["value"] == pytest.approx(median(seconds[PEER]) / median(seconds[OURS]))
    rates = [f"{19 * 12 / median(seconds[name]):,.0f}" for name in (OURS, PEER)]
    assert speed["note"] == f"{rates[0]} and {rates[1]} variants/s"
    assert [figure["where"] for figure in cost] == ["L 10", "L 40"]
    assert cost[0]["value"] == pytest.approx(1e3 * median(report["measured"]["cost"]["10"]))


def test_nothing_is_timed_where_the_scores_differ(monkeypatch, capsys):
    right = score_measurements._one_at_a_time

    def wrong(model):
        scorer = right(model)
        return lambda sequence: np.roll(scorer(sequence), 1, axis=0)

    monkeypatch.setattr(score_measurements, "_one_at_a_time", wrong)
    with pytest.raises(SystemExit, match="the scores of both sides differ by"):
        bench.main([*TINY, "--only", "speed"])
    assert capsys.readouterr().out == ""
