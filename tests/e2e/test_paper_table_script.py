"""`scripts/paper_table.py`, made small: a run by the product's own workflows, in a process of its own."""

import gzip
import json

import pytest

from scripts import paper_table
from scripts.paper import runs


@pytest.fixture
def data(tmp_path, proteins):
    """Proteins of the sample under the names of Swiss-Prot's splits."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("train_100k", "valid_cluster_5k", "test_random_5k", "ood_pfam24")):
        records = proteins[30 * number : 30 * number + 30]
        text = "".join(f">{record_id} pfam=PF{len(sequence) % 2}|x\n{sequence}\n" for record_id, sequence in records)
        (folder / f"{name}.fasta.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_a_run_is_scored_at_equal_updates_and_at_the_end_of_its_time(data, tmp_path, monkeypatch, capfd):
    # The valid split leaves something to score.
    monkeypatch.setattr("scripts.paper.proteins.NUM_VALID", 10)
    words = ["--only", "single.BID.relu.0", "--data", str(data), "--out", str(tmp_path / "runs"), "--work",
             str(tmp_path / "work"), "--minutes", "0.2", "--steps", "2", "--proteins", "12"]  # fmt: skip
    paper_table.main(["one", *words])
    assert capfd.readouterr().out.rpartition("single.BID.relu.0 ")[1]
    content = json.loads((tmp_path / "runs" / "single.BID.relu.0.json").read_text())
    steps, time = content["scores"]["steps"], content["scores"]["time"]
    assert steps["step"] == 2 < time["step"]
    assert [point["step"] for point in content["curve"]][:2] == [1, 2]
    assert content["curve"][-1]["step"] == time["step"]
    for scored in (steps, time):
        assert set(scored["splits"]) == set(runs.SPLITS)
        for split in scored["splits"].values():
            assert split["num_records"] == 12
            assert {"model", "empirical", "markov", "two_sided"} < set(split)
            assert len(split["replicates"]["accuracy"]) == 200
    assert content["num_parameters"] == pytest.approx(2e6, rel=0.1)
    assert content["environment"]["threads"] == 1
    # It is there: nothing is done again.
    paper_table.main(["run", *words])
    assert capfd.readouterr().out == ""
