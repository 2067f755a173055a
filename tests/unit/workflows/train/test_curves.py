import math

import pytest
from matplotlib.figure import Figure

from protlm.config_files import load_config
from protlm.errors import RunError
from protlm.workflows.train.curves import plot_curves
from protlm.workflows.train.run_tables import HEALTH, METRICS, CsvLog

CONFIG = load_config("tiny", ["model.attention=positive", "model.num_layers=36"])
TRAINING = "training, average: 80% hidden, 10% replaced, 10% visible"
UNIFORM = "uniform: a guess among 25 letters (25)"


def write_metrics(run_dir, num_steps, valid=()):
    """Writes a table with a falling loss and perplexities on valid by step."""
    log = CsvLog(run_dir / "metrics.csv", METRICS)
    for step in range(1, num_steps + 1):
        log.append({"step": step, "epoch": 0, "train/loss": 3 / step, "valid/perplexity": dict(valid).get(step)})
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

    def draw(config=CONFIG, **options):
        before = {path.name for path in tmp_path.iterdir()}
        plot_curves(tmp_path, config, **options)
        assert {path.name for path in tmp_path.iterdir()} == before | {"curves.png"}
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        return [axes for axes in figures[-1].axes if axes.get_label() != "<colorbar>"]

    return draw


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_training_is_drawn_averaged_and_the_valid_split_where_it_was_measured(tmp_path, drawn):
    write_metrics(tmp_path, 10)
    (axes,) = drawn()
    assert labels(axes) == [TRAINING, UNIFORM]
    write_metrics(tmp_path, 10, {4: 9.0, 8: 13.0})
    (axes,) = drawn()
    assert labels(axes) == [TRAINING, "valid: hidden residues only", UNIFORM]
    (valid,) = [line for line in axes.get_lines() if line.get_label().startswith("valid")]
    assert list(zip(*valid.get_data(), strict=True)) == [(4, 9.0), (8, 13.0)]


@pytest.mark.parametrize(("num_steps", "share"), [(100, 1 / 5), (400, 1 / 20), (800, 1 / 20), (10, 1)])
def test_the_average_is_one_of_losses_without_the_bias_of_its_start(num_steps, share, tmp_path, drawn):
    log = CsvLog(tmp_path / "metrics.csv", METRICS)
    for step in range(1, num_steps + 1):
        log.append({"step": step, "train/loss": 5.0 if step == num_steps else 2.0})
    log.close()
    averages = drawn()[0].get_lines()[1].get_ydata()
    assert averages[:-1] == pytest.approx([math.exp(2.0)] * (num_steps - 1))
    assert math.log(averages[-1]) == pytest.approx(2.0 + share * 3.0, rel=1e-3)


def test_baselines_are_lines_with_their_names_and_values(tmp_path, drawn):
    write_metrics(tmp_path, 3)
    (axes,) = drawn(baselines={"two_sided": 9.6, "empirical": 17.93, "markov": 11.84})
    assert labels(axes)[1:] == [
        UNIFORM,
        "empirical on valid: residue frequencies (17.9)",
        "Markov on valid: residues before, best order (11.8)",
        "Markov on valid: both sides, best order (9.6)",
    ]
    lines = axes.get_lines()[2:]
    assert [list(line.get_ydata()) for line in lines] == [[25.0] * 2, [17.93] * 2, [11.84] * 2, [9.6] * 2]
    assert len({line.get_color() for line in lines}) == 1


def test_a_causal_model_has_no_baseline_of_both_sides(tmp_path, drawn):
    write_metrics(tmp_path, 3)
    (axes,) = drawn(baselines={"empirical": 17.93, "markov": 11.84})
    assert labels(axes)[-1] == "Markov on valid: residues before, best order (11.8)"


def test_the_panel_names_the_prediction_and_what_training_scores(tmp_path, drawn):
    def titled(*settings):
        (axes,) = drawn(config=load_config("tiny", settings))
        return axes.get_title(), labels(axes)[0], labels(axes)[1]

    write_metrics(tmp_path, 2, {2: 9.0})
    hidden, of_next = "Perplexity of hidden residues", "Perplexity of the next residue; the training line scores ends"
    assert titled() == (f"{hidden}; the training line scores a mixture", TRAINING, "valid: hidden residues only")
    only_hidden = titled("train.mask_share=1.0", "train.random_share=0.0")
    assert only_hidden == (hidden, "training, average: hidden residues only", "valid: hidden residues only")
    assert titled("model.causal=true") == (
        f"{of_next} of proteins too",
        "training, average: next tokens",
        "valid: next residues",
    )


def test_perplexities_have_a_logarithmic_axis_with_several_ticks(tmp_path, drawn):
    write_metrics(tmp_path, 40, {20: 16.0, 40: 15.0})
    (axes,) = drawn()
    assert axes.get_yscale() == "log"
    assert len([label for label in axes.get_yticklabels() if label.get_text()]) >= 4


def test_measurements_that_are_not_finite_are_left_out(tmp_path, drawn):
    write_metrics(tmp_path, 4, {1: math.inf, 2: math.nan, 3: 7.0})
    (axes,) = drawn()
    assert list(axes.get_lines()[2].get_xdata()) == [3]
    write_metrics(tmp_path, 4, {1: math.inf})
    assert labels(drawn()[0]) == [TRAINING, UNIFORM]


def test_features_have_a_panel_with_a_line_a_layer_as_a_share_of_all(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1, 2, 3))
    _, axes = drawn()
    assert labels(axes) == ["layer 1", "layer 2", "layer 3"]
    assert all(list(line.get_ydata()) == [3.0 / 128, 3.0 / 128] for line in axes.get_lines())
    assert axes.get_ylim() == (0, 1)
    assert "128 features" in axes.get_title()


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        (["model.attention=hyperbolic"], 256),
        (["model.attention=relu"], 128),
        (["model.attention=relu", "model.projection=none"], 32),
    ],
)
def test_all_features_are_those_of_the_map_and_its_projection(settings, total, tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1,))
    assert f"the {total} features" in drawn(config=load_config("tiny", settings))[1].get_title()


def test_many_layers_get_colours_and_no_long_legend(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, range(1, 37))
    _, axes = drawn()
    assert axes.get_legend() is None
    assert len({line.get_color() for line in axes.get_lines()}) == 36


def test_layers_without_features_have_no_line_and_cannot_have_one(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (2,))
    _, axes = drawn(config=load_config("tiny"))
    assert [line.get_label() for line in axes.get_lines()] == ["layer 2"]
    for layer in (1, 4):
        (tmp_path / "health.csv").unlink()
        write_health(tmp_path, (layer,))
        with pytest.raises(RunError, match=r"health\.csv: layer: expected one with features, got"):
            plot_curves(tmp_path, load_config("tiny"))


def test_maps_with_other_numbers_of_features_have_shares_of_their_own(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1, 2))
    _, axes = drawn(config=load_config("tiny", ["model.attention=positive,hyperbolic"]))
    assert [line.get_ydata()[0] for line in axes.get_lines()] == [3.0 / 128, 3.0 / 256]
    assert "the 128 or 256 features" in axes.get_title()


def test_a_single_layer_is_drawn(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1,))
    assert len(drawn()) == 2


def test_attention_without_features_has_no_panel(tmp_path, drawn):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1, 2), features=None)
    assert len(drawn()) == 1


@pytest.mark.parametrize("stage", ["transfer", "distill"])
def test_a_stage_has_a_panel_with_its_own_loss(stage, tmp_path, drawn):
    log = CsvLog(tmp_path / "metrics.csv", METRICS)
    for step in range(1, 6):
        loss = {} if stage == "transfer" else {"train/loss": 3.0}
        log.append({"step": step, "epoch": 0, f"train/{stage}_loss": 0.5 / step, **loss})
    log.close()
    write_health(tmp_path, [1])
    perplexity, own, features = drawn(load_config("tiny", [f"train.stage={stage}", "model.attention=positive"]))
    assert own.get_lines()[0].get_ydata() == pytest.approx([0.5 / step for step in range(1, 6)])
    assert stage in own.get_title()
    assert (TRAINING in labels(perplexity)) == (stage == "distill")
    assert features.get_ylim() == (0, 1)


@pytest.mark.parametrize("name", ["metrics.csv", "health.csv"])
def test_a_text_instead_of_a_number_is_one_line_that_names_the_file(tmp_path, name):
    write_metrics(tmp_path, 2)
    write_health(tmp_path, (1, 2))
    path = tmp_path / name
    lines = path.read_text().splitlines()
    lines[1] = "1" + ",x" * lines[0].count(",")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=name):
        plot_curves(tmp_path, CONFIG)
