import math

import pytest

from protlm.errors import RunError
from protlm.workflows.train.run_tables import (
    ADDED_METRICS,
    HEALTH,
    METRICS,
    SPEED,
    CsvLog,
    read_rows,
    read_thinned,
)

CONTRACT = [
    "step", "epoch", "train/loss", "train/perplexity", "lr", "valid/loss", "valid/accuracy", "valid/perplexity",
]  # fmt: skip
VALID = {"valid/loss": 0.1, "valid/accuracy": 1 / 3, "valid/perplexity": math.e}


def row(step, **more):
    loss = 3 / (step + 1)
    values = {"step": step, "epoch": 0, "train/loss": loss, "train/perplexity": math.exp(loss), "lr": 1e-3 / 3}
    return {**values, "train/accuracy": 0.25, "grad_norm": 0.1 + 0.2, **more}


def write(path, steps, last_step=0):
    log = CsvLog(path, METRICS, last_step=last_step)
    for step in steps:
        log.append(row(step))
    log.close()


def write_health(path, steps, num_layers, last_step=0):
    log = CsvLog(path, HEALTH, last_step=last_step)
    for step in steps:
        for layer in range(1, num_layers + 1):
            log.append({"step": step, "layer": layer, "q_norm": 1.5, "k_norm": 1.5, "effective_features": 7.0 * layer})
    log.close()


def steps_of(path, columns=METRICS):
    return [int(values["step"]) for values in read_rows(path, columns)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_the_contracts_columns_are_there_and_numbers_keep_every_digit(path):
    log = CsvLog(path, METRICS)
    log.append(row(1, **VALID))
    log.append(row(2))
    log.close()
    header = path.read_text().splitlines()[0].split(",")
    assert header == list(METRICS)
    assert [name for name in header if name in CONTRACT] == CONTRACT
    first, second = read_rows(path, METRICS)
    assert (first["step"], first["epoch"]) == ("1", "0")
    assert float(first["train/loss"]) == 1.5
    assert float(first["valid/accuracy"]) == 1 / 3
    assert float(first["grad_norm"]) == 0.1 + 0.2
    assert float(second["lr"]) == 1e-3 / 3
    assert second["valid/loss"] == ""


def test_numbers_that_depend_on_the_machine_have_a_table_of_their_own():
    assert not set(METRICS) & {"seconds", "residues_per_second", "data_wait_fraction", "peak_memory_bytes"}
    assert SPEED[0] == HEALTH[0] == METRICS[0] == "step"


def test_a_row_is_on_disk_before_the_file_is_closed(path):
    log = CsvLog(path, METRICS)
    log.append(row(1))
    assert steps_of(path) == [1]
    log.close()


def test_resuming_drops_rows_past_the_checkpoint_and_goes_on(path):
    write(path, range(1, 8))
    write(path, range(5, 7), last_step=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    whole = path.with_name("whole.csv")
    write(whole, range(1, 7))
    assert path.read_bytes() == whole.read_bytes()


def test_several_rows_of_a_step_stay_or_go_together(path):
    write_health(path, (10, 20, 30), num_layers=3)
    write_health(path, (30,), num_layers=3, last_step=20)
    assert steps_of(path, HEALTH) == [10] * 3 + [20] * 3 + [30] * 3


def test_a_run_that_starts_afresh_drops_every_row(path):
    write(path, range(1, 8))
    write(path, [1])
    assert steps_of(path) == [1]


def test_a_resume_without_a_file_starts_one(path):
    write(path, [5], last_step=4)
    assert steps_of(path) == [5]


@pytest.mark.parametrize("num_lost", [1, 5, 12, 30, 60])
def test_a_row_cut_off_by_a_kill_is_ignored_and_dropped_on_resume(path, num_lost):
    write(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-num_lost])
    assert steps_of(path) == [1, 2]
    assert [values["step"] for values in read_thinned(path, METRICS, 10)] == ["1", "2"]
    write(path, [3], last_step=3)
    whole = path.with_name("whole.csv")
    write(whole, range(1, 4))
    assert path.read_bytes() == whole.read_bytes()


def test_infinite_perplexity_is_written_and_read(path):
    log = CsvLog(path, METRICS)
    log.append(row(1, **{"valid/perplexity": math.inf}))
    log.close()
    assert float(next(read_rows(path, METRICS))["valid/perplexity"]) == math.inf


def test_a_column_that_was_not_measured_is_empty(path):
    log = CsvLog(path, HEALTH)
    log.append({"step": 1, "layer": 2, "q_norm": 0.5, "k_norm": 0.5, "effective_features": None, "dead_features": None})
    log.close()
    assert path.read_text().splitlines()[1] == "1,2,0.5,0.5,,,,"


def test_an_unknown_column_is_an_error(path):
    log = CsvLog(path, METRICS)
    with pytest.raises(ValueError, match="surprise"):
        log.append(row(1, surprise=1.0))
    log.close()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00binary\n",
        b"a,b\n1,2\n",
        b"",
        b"step,epoch,train/loss,train/perplexity,lr,grad_norm,valid/loss,valid/accuracy,valid/perplexity\r\n",
    ],
    ids=["binary", "other", "empty", "of an earlier version"],
)
def test_another_table_is_refused_with_a_remedy_and_stays_as_it_is(path, content):
    path.write_bytes(content)
    for use in (lambda: CsvLog(path, METRICS), lambda: list(read_rows(path, METRICS)), lambda: thinned_steps(path, 5)):
        with pytest.raises(RunError, match=r"metrics\.csv: line 1: expected the columns step, .*move the file"):
            use()
    assert path.read_bytes() == content


@pytest.mark.parametrize("kept", [(), ("tokens", "muon_lr")], ids=["first version", "before stages"])
def test_a_resumed_run_fills_the_columns_that_the_table_of_an_earlier_version_lacks(path, kept):
    earlier = [column for column in METRICS if column not in ADDED_METRICS - set(kept)]
    log = CsvLog(path, earlier)
    for step in (1, 2, 3):
        log.append(row(step, **(VALID if step == 2 else {})))
    log.close()
    before = list(read_rows(path, earlier))
    with pytest.raises(RunError, match=r"metrics\.csv: line 1"):
        CsvLog(path, METRICS, last_step=2)
    log = CsvLog(path, METRICS, last_step=2, added=ADDED_METRICS)
    log.append(row(3, tokens=12, muon_lr=0.5))
    log.close()
    rows = list(read_rows(path, METRICS))
    assert [(values["step"], values["tokens"], values["muon_lr"]) for values in rows] == [
        ("1", "", ""), ("2", "", ""), ("3", "12", "0.5"),
    ]  # fmt: skip
    assert [{column: values[column] for column in earlier} for values in rows[:2]] == before[:2]
    again = CsvLog(path, METRICS, last_step=3, added=ADDED_METRICS)
    again.close()
    assert list(read_rows(path, METRICS)) == rows


def thinned_steps(path, most, **options):
    return [int(values["step"]) for values in read_thinned(path, METRICS, most, **options)]


def test_a_short_table_is_read_whole(path):
    write(path, range(1, 8))
    assert read_thinned(path, METRICS, 7) == list(read_rows(path, METRICS))
    write(path, [])
    assert read_thinned(path, METRICS, 7) == []


def test_a_long_table_is_thinned_evenly_from_its_first_row_to_its_last(path):
    write(path, range(1, 402))
    assert thinned_steps(path, 5) == [1, 101, 201, 301, 401]


@pytest.mark.parametrize("block", [1, 7, 2**24])
def test_thinning_misses_no_measurement_and_does_not_depend_on_how_the_file_is_read(path, block):
    log = CsvLog(path, METRICS)
    for step in range(1, 102):
        log.append(row(step, **(VALID if step in (13, 50, 97) else {})))
    log.close()
    assert thinned_steps(path, 3, block_bytes=block) == [1, 13, 50, 51, 97, 101]


def test_thinning_keeps_all_layers_of_a_step(path):
    write_health(path, range(10, 1010, 10), num_layers=4)
    rows = [(int(values["step"]), int(values["layer"])) for values in read_thinned(path, HEALTH, 3)]
    assert [layer for step, layer in rows if step == 10] == [1, 2, 3, 4]
    assert [layer for step, layer in rows if step == 1000] == [1, 2, 3, 4]
    assert len(rows) == 12
