import math

import pytest
from matplotlib.figure import Figure

from protlm.errors import CheckpointError
from protlm.workflows.train.curves import plot_curves
from protlm.workflows.train.run_tables import HEALTH, METRICS, CsvLog


def write_metrics(run_dir, num_steps, valid_steps=()):
    log = CsvLog(run_dir / "metrics.csv", METRICS)
    for step in range(1, num_steps + 1):
        loss = 3 / step
        row = {"step": step, "epoch": 0, "train/loss": loss, "train/perplexity": math.exp(loss)}
        log.append({**row, **({"valid/perplexity": 5.0 + step} if step in valid_steps else {})})
    log.close()


def write_health(run_dir, layers, features=3.0):
    log = CsvLog(run_dir / "health.csv", HEALTH)
    for step in (1, 2):
        for layer in layers:
            log.append({"step": step, "layer": layer, "q_norm": 1.0, "k_norm": 1.0, "effective_features": features})
    log.close()


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws the picture of a run, checks that nothing else is written, and returns its panels."""
    figures = []
    save = Figure.savefig

    def remember(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)

    def draw(**options):
        before = {path.name for path in tmp_path.iterdir()}
        plot_curves(tmp_path, **options)
        assert {path.name for path in tmp_path.iterdir()} == before | {"curves.png"}
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        return [axes for axes in figures[-1].axes if axes.get_label() != "<colorbar>"]

    return draw


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_training_is_drawn_smoothed_and_the_valid_split_where_it_was_measured(tmp_path, drawn):
    write_metrics(tmp_path, 10)
    (axes,) = drawn()
    assert labels(axes) == ["train (smoothed)"]
    write_metrics(tmp_path, 10, valid_steps=(4, 8))
    (axes,) = drawn()
    assert labels(axes) == ["train (smoothed)", "valid"]
    valid = axes.get_lines()[-1]
    assert list(zip(*valid.get_data(), strict=True)) == [(4, 9.0), (8, 13.0)]


def test_smoothing_keeps_a_constant_and_dampens_a_jump(tmp_path, drawn):
    log = CsvLog(tmp_path / "metrics.csv", METRICS)
    for step in range(1, 101):
        log.append({"step": step, "train/perplexity": 20.0 if step == 100 else 10.0})
    log.close()
    smooth = drawn()[0].get_lines()[1].get_ydata()
    assert smooth[:99] == pytest.approx([10.0] * 99)
    assert 10.1 < smooth[99] < 11.0


def test_the_axis_names_the_prediction(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    assert drawn()[0].get_ylabel() == "perplexity of hidden residues"
    assert drawn(causal=True)[0].get_ylabel() == "perplexity of the next residue"


def test_features_have_a_panel_with_a_line_a_layer(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1, 2, 3))
    _, axes = drawn()
    assert labels(axes) == ["layer 1", "layer 2", "layer 3"]
    assert all(list(line.get_ydata()) == [3.0, 3.0] for line in axes.get_lines())


def test_many_layers_get_colours_and_no_long_legend(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, range(1, 37))
    _, axes = drawn()
    assert axes.get_legend() is None
    assert len({line.get_color() for line in axes.get_lines()}) == 36


def test_a_single_layer_is_drawn(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1,))
    assert len(drawn()) == 2


def test_attention_without_features_has_no_panel(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1, 2), features=None)
    assert len(drawn()) == 1


@pytest.mark.parametrize("name", ["metrics.csv", "health.csv"])
def test_a_text_instead_of_a_number_is_one_line_that_names_the_file(tmp_path, name):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1, 2))
    path = tmp_path / name
    lines = path.read_text().splitlines()
    lines[1] = "1" + ",x" * lines[0].count(",")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=name):
        plot_curves(tmp_path)
