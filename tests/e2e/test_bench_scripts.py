"""The frame that all benchmarks share, and the small benchmarks of prep and of the FASTA parser."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from protlm.data import compiled
from scripts.bench import evaluate as evaluate_bench
from scripts.bench import evaluate_measurements, harness, prep
from scripts.bench import fasta as fasta_bench
from scripts.bench.harness import Report, median, ratio
from scripts.measuring import take_turns
from tests.e2e.conftest import write_fasta

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "bench" / "RESULTS.md"
BOTH_SIDES = (evaluate_measurements.EVAL, evaluate_measurements.FORWARD)
SCRIPTS = ("attention", "cluster", "embed", "evaluate", "fasta", "local", "prep", "score", "train_step")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        *((script, options) for script in SCRIPTS for options in (["--repeats", "0"], ["--json", "--rows"])),
        *((script, ["--repeats", "4", "--rows"]) for script in SCRIPTS),
        *((script, ["--only", "nothing"]) for script in ("attention", "embed", "local", "train_step")),
        ("attention", ["--only", "slope", "--plot", "x.png"]),
        ("attention", ["--slope-lengths", "64", "64"]),
        ("embed", ["--growth", "20", "20"]),
        ("fasta", ["--builds", "no-such-file"]),
        ("train_step", ["--model-dim", "512", "--ffn", "1000"]),
    ],
)
def test_options_that_do_not_fit_are_a_usage_error(script, options, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(f"scripts.bench.{script}").main(options)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


# One process, which imports torch once; each script finds its own packages anew.
RUN_AS_FILES = """
import runpy, sys

paths, scripts = list(sys.path), sys.argv[1:]
for script in scripts:
    sys.path[:] = paths
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        sys.stderr.write(f"{ended.code} ")
"""


def test_every_script_runs_as_a_file_in_any_folder(tmp_path):
    names = [*(f"bench/{script}.py" for script in SCRIPTS), "attention_report.py", "demo.py", "learning.py"]
    command = [sys.executable, "-c", RUN_AS_FILES, *(str(ROOT / "scripts" / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr.split() == ["0"] * len(names)
    assert re.findall(r"^usage: (\S+)", done.stdout, re.MULTILINE) == [Path(name).name for name in names]


def test_the_benchmarks_of_make_bench_are_the_scripts_each_once():
    makefile = (ROOT / "Makefile").read_text()
    words = [word for word in makefile.split() if word.startswith("scripts/bench/")]
    assert sorted(words) == [f"scripts/bench/{script}.py" for script in SCRIPTS]


def test_the_commands_of_the_results_are_understood():
    commands = re.findall(r"`[^`]*python scripts/bench/(\w+)\.py([^`]*)`", RESULTS.read_text())
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, words in dict.fromkeys(commands):
        import_module(f"scripts.bench.{script}").parse(shlex.split(words))


def test_no_row_of_the_results_is_there_twice():
    rows = [line for line in RESULTS.read_text().splitlines() if line.startswith("| 20")]
    assert len(set(rows)) == len(rows)


def test_calls_take_turns_and_the_first_round_only_warms_up():
    calls = []

    def call(name):
        calls.append(name)
        return {"number": len(calls)}

    assert take_turns({"a": lambda: call("a"), "b": lambda: call("b")}, 2) == {
        "a": {"number": [3, 5]}, "b": {"number": [4, 6]},
    }  # fmt: skip
    assert "".join(calls) == "ababab"


def test_a_figure_is_that_of_the_medians_with_the_range_of_the_repeats():
    figure = ratio("a / b", "here", [3.0, 3.0, 3.0], [1.0, 2.0, 4.0])
    assert (figure.value, figure.low, figure.high) == (1.5, 0.75, 3.0)
    assert (figure.text, figure.note) == ("1.50× (0.75–3.00)", "medians 3000 and 2000 ms")
    assert median("reads", "", [1000.0, 3000.0, 2000.0], " records/s").text == "2,000 records/s (1,000–3,000)"


@pytest.fixture
def report():
    figures = [
        ratio("a / b", "short", [3.0, 3.0], [1.0, 2.0]), median("peak", "all", [2.0], " MiB", "in a new process"),
        ratio("a / b", "long", [4.0, 4.0], [2.0, 1.0]),
    ]  # fmt: skip
    about = {"machine": "m", "processor": "p", "threads": 2, "torch": "t", "commit": "c", "variables": "OMP_X=1"}
    return Report(
        script="x.py", words=["--one", "two words"], setup="B1", figures=figures,
        environment=about | {"backends": {"cpp": "AVX2"}}, measured={"raw": 1}, facts={"more": 2}, remarks=["a remark"],
    )  # fmt: skip


def arguments(**options):
    parsed = harness.parse(harness.new_parser(""), ["--repeats", "5"])
    vars(parsed).update(options)
    return parsed


def test_a_report_prints_each_measurement_once_and_rows_that_fit_the_table(report, capsys):
    report.publish(arguments(rows=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "machine m, processor p, threads 2, torch t, commit c, variables OMP_X=1", "backends, cpp: AVX2", "a remark",
        "B1, 5 repeats: figure of medians (range of single repeats), medians", "a / b",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[5:9]] == ["short", "long", "peak", "all"]
    first, second = (line.strip("| ").split(" | ") for line in lines[9:])
    assert first[1:5] == ["c", "m (p), 2 threads, torch t, `OMP_X=1`",
                          "`python scripts/bench/x.py --one 'two words'`", "a / b, B1; 5 repeats"]  # fmt: skip
    assert first[5] == "short: 2.00× (1.50–3.00); long: 2.67× (2.00–4.00)"
    assert second[2:] == ["as above", "as above", "peak, B1", "all: 2 MiB", "in a new process"]
    header = next(line for line in RESULTS.read_text().splitlines() if "| date" in line)
    assert len(header.strip("| ").split(" | ")) == len(first) == len(second)


def test_json_goes_to_a_file_beside_the_table_or_alone_to_the_output(report, tmp_path, capsys):
    out = tmp_path / "figures.json"
    report.publish(arguments(json=str(out)))
    assert "a / b" in capsys.readouterr().out.splitlines()
    report.publish(arguments(json="-"))
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(out.read_text())
    assert shlex.split(content["command"]) == ["python", "scripts/bench/x.py", "--one", "two words"]
    assert [figure["where"] for figure in content["figures"]] == ["short", "all", "long"]
    assert (content["measured"], content["more"]) == ({"raw": 1}, 2)


def test_a_measurement_with_an_obstacle_is_left_out_with_the_first_reason(capsys):
    reasons = {"a": ["", "no dataset", "no peer"], "b": [""], "c": []}
    assert harness.possible("abc", reasons.__getitem__) == ["b", "c"]
    assert capsys.readouterr().err == "a: cannot be measured here: no dataset\n"


def test_figures_of_prep_are_ratios_of_whole_commands():
    seconds = {"prep": 2.0, "prep, no leak check": 1.0, "prep, 2 workers": 0.8, "Biopython": 4.0, "prep, .gz": 3.0,
               "Biopython, .gz": 6.0}  # fmt: skip
    commands = {name: {"seconds": [s, s, s], "peak_megabytes": [10.0, 30.0, 20.0]} for name, s in seconds.items()}
    reads = {name: {"records_per_second": rates} for name, rates in
             (("training reader", [500.0, 600.0, 700.0]), ("h5py slices", [60.0, 60.0, 50.0]))}  # fmt: skip
    figures = list(prep.figures({"bytes": 8_000_000, "commands": commands, "reads": reads}))
    values = {(figure.measured, figure.where): figure.value for figure in figures}
    assert [values[name, "whole commands"] for name, _, _ in prep.RATIOS] == [2.0, 4.0, 2.0, 1.25]
    assert values["training reader / h5py slices", "random reads"] == 10.0
    assert figures[0].note == "4 MB/s, peak memory 30 MB"


needs_compiled_parser = pytest.mark.skipif(
    not compiled.is_available(), reason=f"the compiled FASTA parser: {compiled.why_not()}"
)


@needs_compiled_parser
def test_a_tiny_run_of_fasta_compares_the_twins_and_another_build(fasta, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fasta_bench, "DIGESTED_BYTES", 1)
    out, build = tmp_path / "figures.json", compiled.library()._name
    words = ["--fasta", str(fasta), "--builds", f"same={build}", "--repeats", "1", "--json", str(out)]
    fasta_bench.main(words)
    content = json.loads(out.read_text())
    assert [figure["measured"].split(": ") for figure in content["figures"]] == [
        ["parse the text", "same / installed"], ["parse the text", "twin in Python / installed"],
        ["xxh3-128 of all its residues as one text", "same / installed"],
        ["xxh3-128 of all its residues as one text", "xxhash of Python / installed"],
    ]  # fmt: skip
    assert content["measured"]["records"] == 120


@needs_compiled_parser
@pytest.mark.parametrize("wrong", ["parse_by_twin", "digest_by"])
def test_other_digests_end_the_run_of_fasta_without_a_figure(wrong, fasta, monkeypatch, capsys):
    right = getattr(fasta_bench, wrong)

    def other(*given):
        return right(*given)[:-1] if wrong == "digest_by" else right(given[0] + b"\nM")

    monkeypatch.setattr(fasta_bench, wrong, other)
    with pytest.raises(SystemExit, match="other digests than those of the installed build"):
        fasta_bench.main(["--fasta", str(fasta), "--repeats", "1"])
    assert capsys.readouterr().out == ""


@pytest.fixture
def small_fasta(proteins, tmp_path):
    write_fasta(tmp_path / "small.fasta", sorted(proteins, key=lambda protein: len(protein[1]))[:60])
    return str(tmp_path / "small.fasta")


def test_a_tiny_run_of_evaluate_compares_evaluation_with_forward_passes(small_fasta, capsys):
    evaluate_bench.main(["--fasta", small_fasta, "--repeats", "1", "--test-fraction", "0.3", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["measured"]["proteins"] > 5
    assert content["figures"][0]["value"] > 0
    assert len(content["figures"]) == 1


def test_the_peaks_of_evaluate_are_those_of_a_tenth_and_of_all_proteins(small_fasta, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_measurements, "speed", lambda *_: {name: {"seconds": [1.0]} for name in BOTH_SIDES})
    monkeypatch.setattr(evaluate_measurements, "in_a_process", lambda _, function, **given: function(**given))
    evaluate_bench.main(["--fasta", small_fasta, "--memory", "--repeats", "1", "--test-fraction", "0.8", "--json"])
    few, many = json.loads(capsys.readouterr().out)["figures"][1:]
    assert 0 < int(few["where"].split()[0]) < int(many["where"].split()[0])
    assert all(figure["value"] > 10 and figure["unit"] == " MiB" for figure in (few, many))


def test_other_losses_end_the_run_of_evaluate_without_a_figure(small_fasta, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_measurements, "forward", lambda *_: 1.0)
    with pytest.raises(SystemExit, match="nothing is reported"):
        evaluate_bench.main(["--fasta", small_fasta, "--repeats", "1", "--test-fraction", "0.3"])
    assert capsys.readouterr().out == ""
