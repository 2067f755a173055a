import math

import pytest

from protlm.workflows.metrics import COLUMNS, MetricsFile, plot_curves, read_metrics

CONTRACT = [
    "step", "epoch", "train/loss", "train/perplexity", "lr", "valid/loss", "valid/accuracy", "valid/perplexity",
]  # fmt: skip


def row(step, **more):
    loss = 3 / (step + 1)
    values = {"step": step, "epoch": 0, "train/loss": loss, "train/perplexity": math.exp(loss), "lr": 1e-3 / 3}
    return {**values, "grad_norm": 0.1 + 0.2, **more}


def write(path, steps, last_step=0):
    file = MetricsFile(path, last_step=last_step)
    for step in steps:
        file.append(row(step))
    file.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_the_contracts_columns_are_there_and_numbers_keep_every_digit(path):
    file = MetricsFile(path)
    file.append(row(1, **{"valid/loss": 0.1, "valid/accuracy": 1 / 3, "valid/perplexity": math.e}))
    file.append(row(2))
    file.close()
    header = path.read_text().splitlines()[0].split(",")
    assert header == list(COLUMNS)
    assert [name for name in header if name in CONTRACT] == CONTRACT
    first, second = read_metrics(path)
    assert (first["step"], first["epoch"]) == ("1", "0")
    assert float(first["train/loss"]) == 1.5
    assert float(first["valid/accuracy"]) == 1 / 3
    assert float(first["grad_norm"]) == 0.1 + 0.2
    assert float(second["lr"]) == 1e-3 / 3
    assert second["valid/loss"] == ""


def test_a_row_is_on_disk_before_the_file_is_closed(path):
    file = MetricsFile(path)
    file.append(row(1))
    assert [found["step"] for found in read_metrics(path)] == ["1"]
    file.close()


def test_resuming_drops_rows_past_the_checkpoint_and_goes_on(path):
    write(path, range(1, 8))
    write(path, range(5, 7), last_step=4)
    assert [int(found["step"]) for found in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    whole = path.with_name("whole.csv")
    write(whole, range(1, 7))
    assert path.read_bytes() == whole.read_bytes()


def test_a_run_that_starts_afresh_drops_every_row(path):
    write(path, range(1, 8))
    write(path, [1])
    assert [found["step"] for found in read_metrics(path)] == ["1"]


def test_a_resume_without_a_file_starts_one(path):
    write(path, [5], last_step=4)
    assert [found["step"] for found in read_metrics(path)] == ["5"]


@pytest.mark.parametrize("num_lost", [5, 12, 30, 60])
def test_a_row_cut_off_by_a_kill_is_ignored_and_dropped_on_resume(path, num_lost):
    write(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-num_lost])
    assert [found["step"] for found in read_metrics(path)] == ["1", "2"]
    write(path, [3], last_step=3)
    whole = path.with_name("whole.csv")
    write(whole, range(1, 4))
    assert path.read_bytes() == whole.read_bytes()


def test_infinite_perplexity_is_written_and_read(path):
    file = MetricsFile(path)
    file.append(row(1, **{"valid/perplexity": math.inf}))
    file.close()
    assert float(read_metrics(path)[0]["valid/perplexity"]) == math.inf


def test_an_unknown_column_is_an_error(path):
    file = MetricsFile(path)
    with pytest.raises(ValueError, match="surprise"):
        file.append(row(1, surprise=1.0))
    file.close()


@pytest.mark.parametrize("has_valid", [False, True])
def test_curves_are_a_png_whatever_was_measured(path, has_valid):
    file = MetricsFile(path)
    for step in range(1, 4):
        file.append(row(step, **({"valid/perplexity": 5.0} if has_valid else {})))
    file.close()
    picture = path.with_name("curves.png")
    plot_curves(path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(found.name for found in path.parent.iterdir()) == ["curves.png", "metrics.csv"]


def test_a_row_cut_inside_its_last_number_does_not_count(path):
    write(path, [1])
    with path.open("a") as file:
        file.write("2,0,1.0,2.7,0.1,0.3,1.0,0.5,12.")
    assert [found["step"] for found in read_metrics(path)] == ["1"]
