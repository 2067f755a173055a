"""The attention report, made small: every section is measured, and an earlier report is not replaced unasked."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_report(folder, *options):
    command = [sys.executable, str(ROOT / "scripts" / "attention_report.py"), "--out", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)


def test_a_quick_report_has_every_section_with_its_verdict_and_plots(tmp_path):
    done = make_report(tmp_path / "report", "--quick")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "report" / "results.json").read_text())
    verdicts = [section["verdict"] for section in content["sections"]]
    assert verdicts == ["pass"] * 7 + ["reported"]
    page = (tmp_path / "report" / "README.md").read_text()
    for section in content["sections"]:
        assert section["title"] in page
    plots = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert plots
    assert all(f"({name})" in page for name in plots)
    again = make_report(tmp_path / "report", "--quick")
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "--force" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1
