"""The first run on a GPU, as a dry run of all its parts on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.gpu.part import PARTS

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 600


def run(*words, out):
    # Without Triton's interpreter, whose times nobody wants.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "scripts/gpu/first_run.sh"), "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_dry_run_of_all_parts_leaves_a_small_json_of_each(tmp_path):
    ended = run("--device", "cpu", "--tiny", out=tmp_path)
    told = ended.stdout + ended.stderr
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert ended.returncode == 0, told + logs
    assert [line.split(":")[0] for line in ended.stdout.splitlines()] == list(PARTS)
    for part in PARTS:
        path = tmp_path / f"{part}.json"
        content = json.loads(path.read_text())
        assert content["is_complete"], logs
        assert content["rows"]
        assert path.stat().st_size < 16 << 20
        faults = [row.get("fault") for row in content["rows"] if row.get("fault")]
        # What is not installed, or needs a GPU, is told in its row; nothing else is wrong.
        assert all(told_of_a_missing_peer(fault) for fault in faults), faults
    rows = {row["command"]: row for row in json.loads((tmp_path / "model.json").read_text())["rows"]}
    assert rows["train"]["metrics"]["step"] == "2"
    assert rows["eval"]["report"]["splits"]["valid"]["scores"]["markov"]


def told_of_a_missing_peer(fault):
    return "transformers" in fault or "triton" in fault.lower()


@pytest.mark.slow
def test_a_part_that_is_out_of_time_keeps_its_rows_and_says_so(tmp_path):
    out = tmp_path / "times.json"
    command = [sys.executable, str(ROOT / "scripts/gpu/part.py"), "times", "--device", "cpu", "--tiny"]
    ended = subprocess.run([*command, "--seconds", "0", "--out", str(out)], check=False)
    assert ended.returncode == 0
    content = json.loads(out.read_text())
    assert (content["is_complete"], len(content["rows"])) == (False, 1)


def test_all_parts_together_take_at_most_ten_minutes():
    script = (ROOT / "scripts/gpu/first_run.sh").read_text()
    parts = [line.split() for line in script.splitlines() if line.startswith("part ") and "{" not in line]
    assert [part[1] for part in parts] == list(PARTS)
    # Interrupted 15 seconds after its time, and killed 10 seconds after that.
    assert sum(int(part[2]) + 15 + 10 for part in parts) <= MOST_SECONDS


def test_what_the_script_does_not_know_is_one_line(tmp_path):
    ended = run("--fast", out=tmp_path / "none")
    assert (ended.returncode, ended.stderr) == (
        2, "error: --fast: expected --out, --device, --dataset or --tiny\n",
    )  # fmt: skip
    assert not (tmp_path / "none").exists()
