"""The attention benchmark, made small: it reports every figure it promises, and none after a wrong result."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from protlm.ops import backends, compiled
from protlm.runtime.devices import has_half_precision_units
from scripts.attention_calls import BOTH, FEATURES, FORWARD, HEADS
from scripts.bench import (
    attention,
    attention_figures,
    attention_implementations,
    attention_measurements,
    local_measurements,
)
from scripts.bench import local as local_bench
from scripts.measuring import can_measure_memory

ROOT = Path(__file__).parents[2]
HAS_PEER = importlib.util.find_spec("performer_pytorch") is not None
TINY = ["--lengths", "128", "256", "--malloc-length", "128", "--thread-length", "256", "--memory-length", "256",
        "--slope-lengths", "128", "256", "--packed-tokens", "512", "--threads", "1"]  # fmt: skip


def expected_figures():
    figures = {
        f"{name} / favor"
        for name in ("chunked torch", "favor causal", "plain formula", "compiled formula", "exact (SDPA)")
    }
    figures |= {f"share of the GEMM rate (2048² matrices), {name}" for name in ("favor", "favor relu", "chunked torch")}
    figures |= {
        "log-log slope of time against length, favor",
        "favor: packed proteins / one row of the same length",
    }
    if has_half_precision_units("bf16"):
        figures |= {f"{name} / favor, bfloat16" for name in ("favor", "exact (SDPA), bfloat16")}
    measured_in_memory = ["chunked torch"]
    if HAS_PEER:
        measured_in_memory.append("performer-pytorch softmax")
        for kind, ours in (("softmax", "favor"), ("relu", "favor relu")):
            figures |= {f"performer-pytorch {kind} / {ours}{suffix}" for suffix in ("", ", tuned malloc")}
    if can_measure_memory():
        figures |= {f"peak memory above inputs and outputs, {name}" for name in ("favor", *measured_in_memory)}
        figures |= {f"peak memory of {name} / favor" for name in measured_in_memory}
    return figures


def test_a_tiny_run_reports_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_implementations, "GEMM_SIZE", 64)
    # Compiling, and new processes, would take longer than all else.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(attention_measurements, "in_a_process", lambda _, function, **arguments: function(**arguments))
    out, picture = tmp_path / "figures.json", tmp_path / "speed.png"
    threads = torch.get_num_threads()
    attention.main([*TINY, "--repeats", "5", "--rows", "--json", str(out), "--plot", str(picture)])
    assert torch.get_num_threads() == threads
    content = json.loads(out.read_text())
    assert {figure["measured"] for figure in content["figures"]} == expected_figures()
    for figure in content["figures"]:
        assert figure["low"] <= figure["high"]
        assert math.isfinite(figure["value"])
    assert content["environment"]["threads"] == 1
    assert content["environment"]["backends"] == backends()
    printed = capsys.readouterr()
    assert "threads: cannot be measured here: it needs --threads of at least 2" in printed.err
    lines = printed.out.splitlines()
    assert all(measured in lines for measured in expected_figures())
    rows = [line for line in lines if line.startswith("| ")]
    header = next(line for line in (ROOT / "scripts/bench/RESULTS.md").read_text().splitlines() if "| date" in line)
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert len(rows) == len(expected_figures())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_threads_are_compared_and_their_number_is_restored():
    # Apart from the tiny run: threads that wait for each other on a busy machine would take minutes for all of it.
    threads = torch.get_num_threads()
    favor = attention_implementations.implementations()["favor"]
    times = attention_measurements.threads(favor, 64, (1, 2), repeats=1)
    assert torch.get_num_threads() == threads
    figures = attention_figures.figures({"threads": {"length": 64, "times": times}})
    assert [(figure.measured, figure.where) for figure in figures] == [
        (f"favor with H1 for H{HEADS}: 1 thread / 2 threads", f"L 64 {work}") for work in (FORWARD, BOTH)
    ]


@pytest.mark.slow
@pytest.mark.skipif(not can_measure_memory(), reason="this system cannot reset the peak of a process")
def test_a_peak_is_measured_in_a_new_process():
    length = 8192
    (peak,) = attention_measurements.peak_bytes(["plain formula"], length).values()
    # The features of queries and keys, at the least.
    assert peak > 2 * 4 * HEADS * length * FEATURES


def test_a_formula_that_does_not_compile_is_left_out_with_a_reason(monkeypatch, capsys):
    def compile_nothing(function, **_):
        def fail(*_):
            raise RuntimeError("No working C++ compiler found\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert attention_implementations.compiled_formula() == {}
    assert capsys.readouterr().err == "torch.compile takes no part: RuntimeError: No working C++ compiler found\n"


@pytest.mark.parametrize("wrong_value", ["output", "dq"])
def test_a_wrong_result_ends_the_run_without_a_figure(wrong_value, monkeypatch, capsys, tmp_path):
    right = attention_implementations.favor_attention

    def wrong(q, k, v, projection, **options):
        # One backend, so that nothing else can be wrong.
        out = right(q, k, v, projection, **{**options, "backend": "torch"})
        if not options.get("causal"):
            return out
        # The second has the right output, and takes a thousandth from its gradients.
        return out * 1.001 if wrong_value == "output" else out * 0.999 + out.detach() * 0.001

    monkeypatch.setattr(attention_implementations, "favor_attention", wrong)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        attention.main([*TINY, "--json", str(tmp_path / "figures.json")])
    # A message as the code is printed, and the status is 1.
    assert str(ended.value.code).startswith(f"error: favor causal: {wrong_value} differs")
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads


def test_figures_are_ratios_of_medians_with_the_range_of_the_repeats():
    half_a_second = {FORWARD: [0.5, 0.5, 0.5], BOTH: [1.0, 1.0, 1.0]}
    times = {
        "GEMM": {FORWARD: [0.1, 0.1, 0.1]},
        "favor": half_a_second,
        "exact (SDPA)": {FORWARD: [1.0, 2.0, 1.5], BOTH: [2.0, 2.0, 2.0]},
    }
    rows = attention_figures.figures({"speed": {2048: times}})
    figures = {(figure.measured, figure.where): figure for figure in rows}
    exact = figures["exact (SDPA) / favor", "L 2048 forward"]
    assert (exact.value, exact.low, exact.high, exact.text) == (3.0, 2.0, 4.0, "3.00× (2.00–4.00)")
    share = figures["share of the GEMM rate (2048² matrices), favor", "L 2048 forward"]
    # 8 heads · 8·L·M·d operations in half a second, against 2·2048³ in a tenth.
    assert share.value == pytest.approx(100 * (64 * 2048 * 256 * 64 / 0.5) / (2 * 2048**3 / 0.1))
    slopes = {str(length): {FORWARD: [length / 1e3] * 2, BOTH: [length**2 / 1e6] * 2} for length in (100, 200, 400)}
    values = [figure.value for figure in attention_figures.figures({"slope": slopes})]
    assert values == pytest.approx([1.0, 2.0])


def test_a_tiny_run_of_the_local_benchmark_reports_every_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(local_bench, "in_a_process", lambda _, function, **arguments: function(**arguments))
    out = tmp_path / "figures.json"
    sizes = ["--lengths", "128", "--slope-lengths", "128", "256", "--memory-length", "256", "--window", "8"]
    local_bench.main([*sizes, "--threads", "1", "--repeats", "2", "--json", str(out)])
    figures = json.loads(out.read_text())["figures"]
    expected = {"exact (SDPA) / local attention", "log-log slope of time against length, local attention"}
    expected |= {"its torch backend / local attention"} if compiled.why_not() is None else set()
    expected |= {"peak memory above inputs and outputs"} if can_measure_memory() else set()
    assert {figure["measured"] for figure in figures} == expected
    assert all(math.isfinite(figure["value"]) for figure in figures)


def test_the_local_benchmark_reports_nothing_after_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(local_measurements, "local_attention", lambda q, k, v, **_: v + 0 * (q + k))
    with pytest.raises(SystemExit, match=r"differs from the float64 twin by .*; nothing is reported"):
        local_bench.main(["--threads", "1", "--repeats", "1"])
    assert capsys.readouterr().out == ""
