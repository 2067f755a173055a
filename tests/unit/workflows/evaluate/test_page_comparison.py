import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from protlm.errors import ProtlmError
from protlm.workflows.evaluate.comparison import comparison_of
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.page_comparison import render_comparison
from protlm.workflows.evaluate.saved_report import SavedReport, read_report
from tests.unit.workflows.evaluate.eval_cases import prepare, random_sequences, request, save_new_model
from tests.unit.workflows.pages.html_page import ReadPage, assert_distinct_ids, assert_self_contained, rows_of

SECTIONS = ["summary", "differences", "lengths", "residues", "calibration", "models"]
BITS = ("bits_per_residue", "bits_per_residue_low", "bits_per_residue_high")
PERPLEXITY = ("perplexity", "perplexity_low", "perplexity_high")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The content of a report.json on two splits of 30 and 12 proteins."""
    folder = tmp_path_factory.mktemp("page")
    splits = {
        name: [(f"{name}{number}", sequence) for number, sequence in
               enumerate(random_sequences(size, seed=seed, longest=150))]
        for seed, (name, size) in enumerate({"train": 20, "test": 30, "ood": 12}.items())
    }  # fmt: skip
    dataset = prepare(folder, splits)
    model = save_new_model(folder / "model")
    evaluate(request(model, dataset, folder / "report", ("test", "ood")))
    return json.loads((folder / "report" / "report.json").read_text())


@pytest.fixture
def made(content):
    """A function that makes the report of a model that needs more bits than that of `content`, with a spread."""

    def make(name, bits=0.0, spread=0.0, seed=0, **changes):
        report = copy.deepcopy(content) | {"model_name": name, "weights_hash": name} | changes
        generator = np.random.default_rng(seed)
        for split in report["splits"].values():
            row, replicates = split["scores"]["model"], split["replicates"]
            row.update({key: row[key] + bits for key in BITS} | {key: row[key] * 2**bits for key in PERPLEXITY})
            noise = generator.normal(bits, spread, len(replicates["bits_per_residue"]))
            replicates["bits_per_residue"] = (np.array(replicates["bits_per_residue"]) + noise).tolist()
            for key in ("lengths", "residues"):
                for group in split["breakdowns"][key]:
                    group["perplexity"] *= 2**bits
        return SavedReport.model_validate(report)

    return make


def compared(*reports):
    return comparison_of([(f"{number}/report.json", report) for number, report in enumerate(reports)])


def page_of(*reports):
    return render_comparison(compared(*reports))


def test_the_page_has_every_section_and_every_figure_its_reading_and_data(made):
    page = page_of(made("first"), made("second", 0.1, 0.01))
    assert ReadPage(page).ids[:1] == ["summary"]
    assert re.findall(r'<section id="([a-z-]+)"', page) == SECTIONS
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    # Perplexity and differences once, lengths, residues and calibration for both splits.
    assert len(figures) == 2 + 3 * 2
    for figure in figures:
        assert 'role="img"' in figure
        assert "<figcaption" in figure
        assert "<details" in figure
    assert_self_contained(page)
    assert_distinct_ids(page)


def test_the_first_screen_answers_which_model_is_better(made):
    first, second = made("first"), made("second", 0.1, 0.01)
    comparison = compared(first, second)
    summary = render_comparison(comparison).partition('<section id="differences"')[0]
    for name in ("test", "ood"):
        assert comparison.verdicts[name] in summary
        assert f"{second.splits[name].model['perplexity']:.2f}" in summary
        assert [name, "empirical baseline"] in [row[:2] for row in rows_of(summary)]
    assert summary.count("<figure") == 1


@pytest.mark.parametrize(
    ("bits", "spread", "verdict"),
    [
        (0.1, 0.01, r"A is better than B by 0\.100 .*interval 0\.0\d+ to 0\.1\d+, which excludes 0"),
        (-0.1, 0.01, r"B is better than A by 0\.100 .*interval 0\.0\d+ to 0\.1\d+, which excludes 0"),
        (0.01, 0.1, r"A and B cannot be told apart: 0\.010 .*in favour of A.*interval -0\.\d+ to 0\.\d+.*includes 0"),
        (-0.01, 0.1, r"B and A cannot be told apart: 0\.010 .*in favour of B"),
        (0.0, 0.0, r"A and B have the same score"),
        (0.002, 0.0001, r"A is better than B by 0\.00200 .*interval 0\.001\d\d to 0\.002\d\d"),
        # The same difference in every replicate.
        (0.1, 0.0, r"A is better than B by 0\.100 .*interval 0\.100 to 0\.100, which excludes 0"),
    ],
)
def test_the_verdict_says_which_model_is_better_and_whether_that_is_beyond_chance(made, bits, spread, verdict):
    verdicts = compared(made("A"), made("B", bits, spread)).verdicts
    for name in ("test", "ood"):
        assert re.match(f"On {name} {verdict}", verdicts[name]), verdicts[name]
    assert re.search(r"perplexity \d+\.\d\d against \d+\.\d\d\.$", verdicts["test"])


def test_of_several_models_the_best_two_decide(made):
    verdict = compared(made("A"), made("B", -0.2, 0.01), made("C", -0.1, 0.01)).verdicts["test"]
    assert verdict.startswith("On test B is better than C, the next of 3 models, by 0.100")
    tied = compared(made("A"), made("B", -0.2, 0.2, seed=1), made("C", -0.19, 0.2, seed=2)).verdicts["test"]
    assert tied.startswith("On test B and C, the best of 3 models, cannot be told apart")


def test_too_few_proteins_decide_nothing(made):
    first, second = made("A"), made("B", 0.1)
    for report in (first, second):
        measured = report.splits["test"]
        measured.scores["model"].update(dict.fromkeys(BITS[1:]))
        measured.replicates["bits_per_residue"] = [None] * 1000
    verdict = compared(first, second).verdicts["test"]
    assert "too few proteins were scored for an interval, so this decides nothing" in verdict
    assert "0.100 bits per residue in favour of A over B" in verdict
    page_of(first, second)


def test_what_qualifies_the_verdict_is_told_with_it(made):
    plain = page_of(made("A", training_dataset_hash="same", dataset_hash="same"), made("B", 0.1, dataset_hash="same"))
    warnings = re.search(r'<ul class="warnings">(.*?)</ul>', plain, re.DOTALL)[1]
    assert "B was trained on another dataset" in warnings
    assert "A was trained" not in warnings
    # An untrained model knows less than the residue frequencies.
    assert "On test no model has a lower perplexity than the baseline “empirical baseline”" in warnings
    better = page_of(made("A", -3.0), made("B", -2.0, 0.01))
    assert "no model has a lower" not in better
    twins = page_of(made("A", weights_hash="w"), made("B", weights_hash="w"), made("C"))
    assert "A and B have the same weights" in twins


def test_what_a_model_was_not_shown_or_lacks_is_told(made):
    first, second = made("A"), made("B", 0.1, 0.01)
    assert compared(first, second).limits() == []
    measured = second.splits["test"]
    second.splits["test"] = measured.model_copy(update={"num_cut": 3, "num_lacked": 1234})
    comparison = compared(first, second)
    cut, lacked = comparison.limits()
    assert cut.startswith("B reaches only the beginning of 3 of the 30 proteins on test")
    assert lacked.startswith("B has no token for 1,234 residues on test")
    page = render_comparison(comparison)
    assert cut in page
    assert lacked in page
    models = comparison.to_json()["models"]
    assert [model["num_cut"] for model in models] == [{"test": 0, "ood": 0}, {"test": 3, "ood": 0}]
    assert [model["num_lacked"]["test"] for model in models] == [0, 1234]


def test_models_that_computed_in_other_numbers_are_told_apart(made):
    first, second = made("A"), made("B", 0.1, 0.01)
    assert [model["precision"] for model in compared(first, second).to_json()["models"]] == ["32", "32"]
    comparison = compared(first, second.model_copy(update={"precision": "bf16"}))
    assert comparison.limits() == ["A computed in float32.", "B computed in bfloat16."]
    assert [model["precision"] for model in comparison.to_json()["models"]] == ["32", "bf16"]


def test_the_better_model_of_a_metric_is_named_only_where_the_interval_excludes_0(made):
    page = page_of(made("A"), made("B", 0.1, 0.01), made("C", 0.01, 0.1))
    section = page.partition('<section id="differences"')[2].partition("<section")[0]
    cells = {(row[0], row[1]): row[-1] for row in rows_of(section) if row[2] == "bits per residue"}
    assert cells[("test", "B")] == "A"
    assert cells[("test", "C")] == "undecided"


def test_names_are_escaped_shortened_in_figures_and_kept_apart(made):
    nasty = '<script>alert("x")</script> & $y$ `a` **b**'
    names = [nasty, "x" * 250 + "1", "x" * 250 + "2", "\x1b[31m\u202ered", "蛋白质"]
    page = page_of(*(made(name, number / 10, 0.01) for number, name in enumerate(names)))
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "�[31m�red" in page
    assert_self_contained(page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "x" * 30 not in drawing
    (labels,) = re.findall(r'<svg[^>]*aria-label="Perplexity of the models.*?</svg>', page, re.DOTALL)
    shown = re.findall(r">(x+…x+\d(?: \(\d\))?)<", labels)
    assert len(set(shown)) == 2


def test_more_models_than_a_figure_can_show_are_all_in_the_tables(made):
    page = page_of(*(made(f"model {letter}", number / 10, 0.01) for number, letter in enumerate("ABCDEF")))
    lengths = page.partition('<section id="lengths"')[2].partition("<section")[0]
    assert "The figures show the first 4 models" in lengths
    drawing, table = re.search(r"(<svg.*?</svg>)(.*?)</figure>", lengths, re.DOTALL).groups()
    assert "model D" in drawing
    assert "model E" not in drawing
    assert "model F, perplexity" in table


def test_equal_comparisons_have_equal_pages_and_the_page_is_a_function_of_the_comparison(made):
    comparison = compared(made("A"), made("B", 0.1, 0.01))
    assert render_comparison(comparison) == render_comparison(comparison)
    assert render_comparison(replace(comparison, splits=["test"])) != render_comparison(comparison)


def damaged(content, tmp_path, *keys, value):
    """Writes the report with one value changed, and returns its path."""
    report = copy.deepcopy(content)
    place = report
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    return path


SPLIT = ("splits", "test")
ROW = (*SPLIT, "scores", "model")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model_name",), "x" * 300),
        (("model_name",), "\ud800"),
        (("weights_hash",), ["x"]),
        (("num_parameters",), -1),
        (("num_parameters",), 10**30),
        (("seed",), 2**64),
        (("mask_rate",), float("nan")),
        (("splits",), {"nonsense": {}}),
        ((*SPLIT, "resampled"), "<b>"),
        ((*SPLIT, "num_targets"), 0),
        ((*ROW, "accuracy"), float("inf")),
        ((*ROW, "accuracy"), 1e200),
        ((*ROW, "perplexity"), 0),
        ((*ROW, "perplexity_low"), 1e9),
        ((*SPLIT, "scores", "markov", "perplexity_low"), -1),
        ((*SPLIT, "replicates", "accuracy"), [float("nan")] * 1000),
        ((*SPLIT, "replicates", "accuracy"), [0.5] * 999),
        ((*SPLIT, "calibration"), [{"low": 0, "num_targets": 1, "confidence": 1, "accuracy": 1}] * 21),
        ((*SPLIT, "calibration"), [{"low": 0, "num_targets": 0, "confidence": 1, "accuracy": 1}]),
        ((*SPLIT, "breakdowns"), {}),
        ((*SPLIT, "breakdowns", "lengths"), [{"name": "1-2", "num_targets": 1, "accuracy": 1, "perplexity": 1}]),
        ((*SPLIT, "breakdowns", "residues"), [{"name": "A", "num_targets": 1, "accuracy": 1, "perplexity": 1}] * 2),
        ((*SPLIT, "breakdowns", "residues"), [{"name": "A", "num_targets": 1, "accuracy": 1, "perplexity": 0}]),
    ],
)
def test_a_value_that_cannot_be_shown_is_one_line(content, tmp_path, keys, value):
    with pytest.raises(ProtlmError, match=r"report\.json: damaged: ") as error:
        read_report(damaged(content, tmp_path, *keys, value=value))
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ((*ROW, "perplexity"), None),
        ((*ROW, "perplexity_high"), 1e100),
        ((*ROW, "bits_per_residue"), 1e100),
        ((*SPLIT, "scores", "uniform", "perplexity"), None),
        ((*SPLIT, "replicates", "bits_per_residue"), [None] * 1000),
        ((*SPLIT, "replicates", "bits_per_residue"), [-1, 1e100] * 500),
        ((*SPLIT, "calibration"), []),
        ((*SPLIT, "breakdowns"), {"residues": [], "lengths": []}),
        ((*SPLIT, "breakdowns", "lengths"), [{"name": "50-99", "num_targets": 20, "accuracy": 1, "perplexity": 1e100}]),
        ((*SPLIT, "breakdowns", "lengths"), [{"name": "50-99", "num_targets": 1, "accuracy": 1, "perplexity": None}]),
    ],
)
def test_every_report_that_is_read_can_be_drawn(content, made, tmp_path, keys, value):
    strange = read_report(damaged(content, tmp_path, *keys, value=value))
    page = render_comparison(replace(compared(strange, made("A")), splits=["test"]))
    assert not re.search(r"\b(nan|inf)\b", page)
