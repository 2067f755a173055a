import numpy as np
import pyarrow.parquet as pq
import pytest

from protlm.errors import ProtlmError
from protlm.vocabulary import RESIDUES
from protlm.workflows.evaluate import residue_table
from protlm.workflows.evaluate.residue_table import check_pyarrow, open_residue_table
from tests.unit.workflows.evaluate.eval_cases import InMemory, random_scores, random_sequences

SPLIT = InMemory(random_sequences(20, letters=RESIDUES))


def all_scores(records, seed):
    """Scores at every residue of some proteins."""
    positions = [np.arange(len(SPLIT.tokens(record))) for record in records]
    return random_scores(
        np.repeat(records, [len(places) for places in positions]), np.concatenate(positions),
        np.concatenate([SPLIT.tokens(record) for record in records]), seed,
    )  # fmt: skip


def test_the_table_holds_the_stream(tmp_path):
    parts = [(0, all_scores([3, 4, 7], 0)), (0, all_scores([9], 1)), (1, all_scores([3], 2))]
    with open_residue_table(tmp_path / "r.parquet") as table:
        for mask, scores in parts:
            table.add(SPLIT, mask, scores)
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    metadata = pq.read_schema(tmp_path / "r.parquet").metadata
    assert RESIDUES in metadata[b"probabilities"].decode()
    assert len(rows) == sum(len(scores) for _, scores in parts)
    expected = [(mask, scores, number) for mask, scores in parts for number in range(len(scores))]
    for row, (mask, scores, number) in zip(rows, expected, strict=True):
        record, position, target = scores.records[number], scores.positions[number], scores.targets[number]
        assert (row["split"], row["mask"], row["id"]) == ("test", mask, f"protein-{record}")
        assert (row["position"], row["residue"]) == (position + 1, RESIDUES[target - 4])
        log_probabilities = scores.log_probabilities[number]
        assert row["log_probability"] == log_probabilities[target]
        assert row["rank"] == 1 + (log_probabilities > log_probabilities[target]).sum()
        assert row["probabilities"] == pytest.approx(np.exp(log_probabilities[4:29]).tolist(), rel=1e-6)


def test_rows_are_written_in_groups_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr(residue_table, "_ROWS_PER_GROUP", 100)
    with open_residue_table(tmp_path / "r.parquet") as table:
        for record in range(20):
            table.add(SPLIT, 0, all_scores([record], record))
    metadata = pq.read_metadata(tmp_path / "r.parquet")
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert sum(sizes) == SPLIT.lengths.sum()
    assert min(sizes[:-1]) >= 100
    assert max(sizes) < 100 + SPLIT.lengths.max()


def test_a_table_without_rows_is_one(tmp_path):
    with open_residue_table(tmp_path / "r.parquet"):
        pass
    assert pq.read_table(tmp_path / "r.parquet").num_rows == 0


def write_and_fail(path):
    with open_residue_table(path) as table:
        table.add(SPLIT, 0, all_scores([0], 0))
        raise RuntimeError("stop")


def test_a_table_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(tmp_path / "r.parquet")
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ProtlmError, match=r"--residues needs pyarrow: pip install 'protlm\[parquet\]'"):
        check_pyarrow()
