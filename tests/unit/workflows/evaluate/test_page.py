import json
import re
from dataclasses import replace

import pytest

from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.multiqc_row import multiqc_rows
from protlm.workflows.evaluate.page import render_page
from tests.unit.workflows.evaluate.eval_cases import prepare, random_sequences, request, save_new_model

SECTIONS = ["scores", "calibration", "residues", "lengths", "labels", "attention", "approximation", "method"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A small model evaluated with everything that a page can show: the folder of the report, and the report."""
    folder = tmp_path_factory.mktemp("page")
    names = {"train": 20, "valid": 6, "test": 12, "ood": 8}
    splits = {
        name: [(f"{name}|{number}|{name.upper()}_{number}", sequence) for number, sequence in
               enumerate(random_sequences(size, seed=seed, longest=120))]
        for seed, (name, size) in enumerate(names.items())
    }  # fmt: skip
    families = {record_id: f"PF{number % 3}" for number, (record_id, _) in enumerate(splits["test"])}
    dataset = prepare(folder, splits, families=families)
    model = save_new_model(folder / "nice <model>")
    report = evaluate(
        request(
            model, dataset, folder / "report", ("test", "ood"), attention=("TEST_3",), approximation=True,
            as_trained=True, random_weights=True, pseudo_perplexity=2,
        )
    )  # fmt: skip
    return folder / "report", report


def test_the_page_has_every_section_and_every_figure_its_reading_and_data(evaluated):
    folder, _ = evaluated
    page = (folder / "report.html").read_text()
    assert re.findall(r'<section id="([a-z-]+)"', page)[-len(SECTIONS) :] == SECTIONS
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) >= 11
    for figure in figures:
        assert 'role="img"' in figure
        assert "<figcaption" in figure
        assert "<details" in figure


def test_the_first_screen_answers_whether_the_model_is_any_good(evaluated):
    folder, report = evaluated
    summary = (folder / "report.html").read_text().partition('<section id="scores"')[0]
    for split in report.splits.values():
        assert split.verdict in summary
    assert f"{report.model['perplexity']:.2f}" in summary
    assert "Markov baseline" in summary
    assert summary.count("<figure") == 1


def test_names_are_escaped_and_nothing_is_loaded(evaluated):
    page = (evaluated[0] / "report.html").read_text()
    assert "nice &lt;model&gt;" in page
    assert "nice <model>" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "<script" not in page


def test_equal_reports_have_equal_pages_and_the_page_is_a_function_of_the_report(evaluated):
    folder, report = evaluated
    assert render_page(report) == render_page(report) == (folder / "report.html").read_text()
    better = replace(report, model={**report.model, "perplexity": 2.0})
    assert render_page(replace(better, model_name="other")) != render_page(report)


def test_what_was_not_asked_for_is_not_shown(evaluated):
    _, report = evaluated
    page = render_page(replace(report, attention_maps=None, approximation=None))
    sections = re.findall(r'<section id="([a-z-]+)"', page)
    assert "attention" not in sections
    assert "approximation" not in sections


def test_multiqc_has_a_row_for_each_split(evaluated):
    folder, report = evaluated
    content = json.loads((folder / "protlm_eval_mqc.json").read_text())
    assert content == json.loads(multiqc_rows(report))
    assert content["plot_type"] == "generalstats"
    assert set(content["data"]) == {"nice <model> (test)", "nice <model> (ood)"}
    row = content["data"]["nice <model> (test)"]
    assert row["protlm_perplexity"] == report.splits["test"].scores["model"]["perplexity"]
    assert row["protlm_markov_perplexity"] == report.splits["test"].scores["markov"]["perplexity"]


def test_the_maps_of_the_protein_asked_for_are_in_the_report(evaluated):
    folder, report = evaluated
    (protein,) = json.loads((folder / "report.json").read_text())["attention_maps"]["proteins"]
    assert protein["id"] == "test|3|TEST_3"
    assert protein["split"] == "test"
    assert len(protein["heads"]) == 2
    assert len(protein["heads"][0]["picture"]) <= 64
    assert report.approximation["scores"]["saved"]["perplexity"] == pytest.approx(report.model["perplexity"], rel=1e-5)
