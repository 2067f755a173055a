"""The figures of the attention benchmark: how times become ratios against a peer, shares, slopes and a plot."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scripts.attention_calls import BOTH, FEATURES, FORWARD, HEAD_DIM, HEADS
from scripts.bench.attention_implementations import COMPILED, GEMM, GEMM_SIZE, OURS, RELU_PEER, SOFTMAX_PEER
from scripts.bench.attention_measurements import EXACT_HALF, FAVOR, FAVOR_HALF, LONG_ROWS, PACKED, UNPACKED
from scripts.bench.harness import Figure, ratio
from scripts.measuring import MEBIBYTE, PAGE_BYTES, Times
from scripts.report.approximation import log_log_slope
from scripts.report.plots import Line, conditions, plot

SETUP = f"B1 H{HEADS} d{HEAD_DIM} M{FEATURES} float32"
MULTIPLIES = {FORWARD: 4, BOTH: 12}
"""Products of (length, features, head_dim) per head in each pass, without those that the backward computes again."""
PEER_OF = {RELU_PEER: "favor relu"}
"""Which of ours a peer is compared with, where it is not `favor`."""
LINES = {
    "favor": ("positive", "bidirectional"), "favor causal": ("positive", "causal"),
    "chunked torch": ("positive", "torch"), "plain formula": ("positive", "formula"),
    COMPILED: ("positive", "compiled formula"), "favor relu": ("relu", "bidirectional"),
    "exact (SDPA)": ("exact", "bidirectional"), SOFTMAX_PEER: ("peer", "bidirectional"),
    RELU_PEER: ("relu peer", "bidirectional"),
}  # fmt: skip
"""Subject and kind of each line of the plot."""


def figures(measured: Mapping[str, Any]) -> list[Figure]:
    """Returns the figures of all that was measured."""
    rows: list[Figure] = []
    for length, times in measured.get("speed", {}).items():
        rows += _against_peers(times, f"L {length}", "")
        rows += _shares(times, length)
    for length, times in measured.get("half", {}).items():
        for name, above in ((f"{FAVOR} / {FAVOR_HALF}", FAVOR), (f"{EXACT_HALF} / {FAVOR_HALF}", EXACT_HALF)):
            rows += _ratios(name, f"L {length}", times, above, FAVOR_HALF)
    if malloc := measured.get("malloc"):
        rows += _against_peers(malloc["times"], f"L {malloc['length']}", ", tuned malloc")
    if threads := measured.get("threads"):
        one, many = threads["times"]
        name = f"favor with H1 for H{HEADS}: {one} thread / {many} threads"
        rows += _ratios(name, f"L {threads['length']}", threads["times"], one, many)
    if memory := measured.get("memory"):
        rows += _memory(memory["peak_bytes"], memory["length"])
    if "slope" in measured:
        rows += _slopes(measured["slope"])
    if packed := measured.get("packed"):
        name = "favor: packed proteins / one row of the same length"
        rows += _ratios(name, f"rows of {packed['row_tokens']}", packed["times"], PACKED, UNPACKED)
    return rows


def draw(path: Path, speed: Mapping[int, Times]) -> None:
    """Writes a plot of time against length, one line per implementation."""
    lines = []
    for name, (subject, kind) in LINES.items():
        medians = {length: statistics.median(times[name][BOTH]) for length, times in speed.items() if name in times}
        if medians:
            lines.append(Line(name, list(medians), [seconds * 1e3 for seconds in medians.values()], subject, kind))
    plot(
        path, lines, x_label="length (tokens)", y_label="time (ms)", title=f"Time of {BOTH} ({SETUP})",
        foot=conditions(torch.float32), x_ticks={length: f"{length:,}" for length in speed},
    )  # fmt: skip


def _against_peers(times: Times, where: str, suffix: str) -> list[Figure]:
    rows = []
    for name in times:
        ours = PEER_OF.get(name, "favor")
        if name in (GEMM, *LONG_ROWS) or ours not in times:
            continue
        rows += _ratios(f"{name} / {ours}{suffix}", where, times, name, ours)
    return rows


def _shares(times: Times, length: int) -> list[Figure]:
    rows = []
    for name in (name for name in OURS if name in times and name != "favor causal"):
        for work, products in MULTIPLIES.items():
            size = HEADS * products * length * FEATURES * HEAD_DIM / GEMM_SIZE**3
            measured, where = f"share of the GEMM rate ({GEMM_SIZE}² matrices), {name}", f"L {length} {work}"
            above, below = times[GEMM][FORWARD], times[name][work]
            rows.append(ratio(measured, where, above, below, factor=100 * size, unit="%"))
    return rows


def _memory(peaks: Mapping[str, int], length: int) -> list[Figure]:
    where, note = f"L {length} {BOTH}", "one call, in a new process"
    rows = []
    for name, peak in peaks.items():
        size = peak / MEBIBYTE
        rows.append(Figure(f"peak memory above inputs and outputs, {name}", where, size, size, size, " MiB", note))
    for name, peak in peaks.items():
        if name != "favor":
            times_ours = peak / max(peaks["favor"], PAGE_BYTES)
            measured = f"peak memory of {name} / favor"
            rows.append(Figure(measured, where, times_ours, times_ours, times_ours, "×", note))
    return rows


def _slopes(times: Times) -> list[Figure]:
    lengths = [float(length) for length in times]
    where = f"L {min(lengths):.0f} to {max(lengths):.0f}"
    rows = []
    for work in (FORWARD, BOTH):
        by_length = [seconds[work] for seconds in times.values()]
        slope = log_log_slope(lengths, [statistics.median(seconds) for seconds in by_length])
        of_repeats = [log_log_slope(lengths, seconds) for seconds in zip(*by_length, strict=True)]
        measured = "log-log slope of time against length, favor"
        rows.append(Figure(measured, f"{where}, {work}", slope, min(of_repeats), max(of_repeats), "", ""))
    return rows


def _ratios(measured: str, where: str, times: Times, above: str, below: str) -> list[Figure]:
    """Returns the ratio of two times in each pass."""
    return [ratio(measured, f"{where} {work}", times[above][work], times[below][work]) for work in (FORWARD, BOTH)]
