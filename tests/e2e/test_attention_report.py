"""The attention report, made small: every section is measured, and an earlier report is not replaced unasked."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scripts import attention_report
from scripts.report.plots import SUBJECTS, conditions
from scripts.report.settings import quick_settings


def quicker_settings(seed):
    """As quick settings, where fewer draws show the claims with this seed, too."""
    return replace(
        quick_settings(seed), error_draws=4_000, kind_draws=150, uniform_features=(64, 512),
        draws=6, output_length=128, lengths=(256, 512), exact_lengths=(256, 512), formed_lengths=(256, 512),
    )  # fmt: skip


def check_figures(figures):
    """Every figure can be read by itself, and beside the others: a colour has one meaning in all of them."""
    colors = {}
    for name, figure in figures.items():
        (axes,) = figure.axes
        (foot,) = (text.get_text() for text in figure.texts)
        measured_as = torch.float32 if name.startswith(("time", "memory")) else torch.float64
        assert foot.endswith("closed forms, no measurement" if name == "kinds.png" else conditions(measured_as))
        for text in (axes.title, *figure.texts):
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width, (name, text.get_text())
        assert len([label for label in axes.get_yticklabels() if label.get_text()]) >= 4, name
        handles, labels = axes.get_legend_handles_labels()
        looks = set()
        for handle, label in zip(handles, labels, strict=True):
            # Lines with error bars are containers of several artists.
            line = handle if isinstance(handle, Line2D) else handle.lines[0]
            looks.add((line.get_color(), line.get_linestyle(), str(line._dash_pattern), line.get_linewidth()))
            subject = "reference" if line.get_color() == SUBJECTS["reference"][0] else label.partition(",")[0]
            colors.setdefault(subject, set()).add(line.get_color())
        assert len(looks) == len(labels), name
    assert all(len(of_subject) == 1 for of_subject in colors.values())
    assert colors.pop("FAVOR") == colors["positive"]
    assert len(set.union(*colors.values())) == len(colors)


@pytest.mark.parametrize("settings", [quicker_settings, pytest.param(quick_settings, marks=pytest.mark.slow)])
def test_a_report_has_every_section_with_its_verdict_and_plots(settings, tmp_path, monkeypatch):
    out, figures = tmp_path / "report", {}
    save = Figure.savefig

    def remember(figure, path, **options):
        figures[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    monkeypatch.setattr(attention_report, "quick_settings", settings)
    monkeypatch.setattr(sys, "argv", ["attention_report.py", "--out", str(out), "--quick"])
    attention_report.main()
    content = json.loads((out / "results.json").read_text())
    verdicts = [section["verdict"] for section in content["sections"]]
    assert verdicts == ["pass"] * 8 + ["reported"]
    page = (out / "README.md").read_text()
    for section in content["sections"]:
        assert section["title"] in page
    plots = sorted(path.name for path in out.glob("*.png"))
    assert plots
    assert all(f"({name})" in page for name in plots)
    assert sorted(figures) == plots
    check_figures(figures)
    assert content["environment"]["backend for float32"] in page
    # Nothing is replaced unasked. A message as the code is printed, and the status is 1.
    with pytest.raises(SystemExit) as ended:
        attention_report.main()
    assert str(ended.value.code).startswith("error: ")
    assert "--force" in str(ended.value.code)
