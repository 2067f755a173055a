"""The attention report, made small: every section is measured, and an earlier report is not replaced unasked."""

import json
import sys
from dataclasses import replace

import pytest

from scripts import attention_report
from scripts.report.settings import quick_settings


def quicker_settings(seed):
    """As quick settings, where fewer draws show the claims with this seed, too."""
    return replace(
        quick_settings(seed), error_draws=4_000, kind_draws=150, uniform_features=(64, 512),
        draws=6, output_length=128, lengths=(256, 512), exact_lengths=(256, 512), formed_lengths=(256, 512),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [quicker_settings, pytest.param(quick_settings, marks=pytest.mark.slow)])
def test_a_report_has_every_section_with_its_verdict_and_plots(settings, tmp_path, monkeypatch):
    out = tmp_path / "report"
    monkeypatch.setattr(attention_report, "quick_settings", settings)
    monkeypatch.setattr(sys, "argv", ["attention_report.py", "--out", str(out), "--quick"])
    attention_report.main()
    content = json.loads((out / "results.json").read_text())
    verdicts = [section["verdict"] for section in content["sections"]]
    assert verdicts == ["pass"] * 7 + ["reported"]
    page = (out / "README.md").read_text()
    for section in content["sections"]:
        assert section["title"] in page
    plots = sorted(path.name for path in out.glob("*.png"))
    assert plots
    assert all(f"({name})" in page for name in plots)
    # Nothing is replaced unasked. A message as the code is printed, and the status is 1.
    with pytest.raises(SystemExit) as ended:
        attention_report.main()
    assert str(ended.value.code).startswith("error: ")
    assert "--force" in str(ended.value.code)
