"""What the attention benchmark tells: hides how times become ratios against a peer, Markdown rows and a plot."""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.attention_implementations import (
    BOTH,
    COMPILED,
    FORWARD,
    GEMM,
    GEMM_SIZE,
    OURS,
    RELU_PEER,
    SOFTMAX_PEER,
    Times,
)
from scripts.bench.attention_measurements import LONG_ROWS, PACKED, UNPACKED
from scripts.report.approximation import log_log_slope
from scripts.report.cost import FEATURES, HEAD_DIM, HEADS
from scripts.report.page import Line, plot

SETUP = f"B1 H{HEADS} d{HEAD_DIM} M{FEATURES} float32"
MEBIBYTE = 2**20
MULTIPLIES = {FORWARD: 4, BOTH: 12}
"""Products of (length, features, head_dim) in each pass, a head; what the backward computes again does not count."""
PEER_OF = {RELU_PEER: "favor relu"}
"""Which of ours a peer is compared with, where it is not `favor`."""
LINES = {
    "favor": (0, 0), "favor relu": (0, 1), "favor causal": (0, 2), "exact (SDPA)": (1, 0), SOFTMAX_PEER: (2, 0),
    RELU_PEER: (2, 1), "plain formula": (3, 0), COMPILED: (3, 1), "chunked torch": (4, 0),
}  # fmt: skip
"""Colour and dash of each line of the plot."""


@dataclass(frozen=True)
class Figure:
    """One number and the range of the repeats.

    Attributes:
        measured: What is compared with what.
        where: Length and pass.
        value: The figure from the medians of all repeats.
        low: The smallest of the figures that single repeats give.
        high: The largest.
        unit: Follows the value.
        note: The medians behind a ratio.
    """

    measured: str
    where: str
    value: float
    low: float
    high: float
    unit: str
    note: str

    @property
    def text(self) -> str:
        """The value with its range."""
        digits = 0 if self.unit == " MiB" else 1 if self.unit == "%" else 2
        spread = f" ({self.low:.{digits}f}–{self.high:.{digits}f})" if self.low < self.high else ""
        return f"{self.value:.{digits}f}{self.unit}{spread}"


def figures(found: Mapping[str, Any]) -> list[Figure]:
    """Returns the figures of all parts that were measured."""
    told: list[Figure] = []
    for length, times in found.get("speed", {}).items():
        told += _against_peers(times, f"L {length}", "")
        told += _shares(times, length)
    if "malloc" in found:
        told += _against_peers(found["malloc"]["times"], f"L {found['malloc']['length']}", ", tuned malloc")
    if "threads" in found:
        one, many = found["threads"]["times"]
        measured = f"favor with H1 for H{HEADS}: {one} thread / {many} threads"
        told += _ratios(measured, f"L {found['threads']['length']}", found["threads"]["times"], one, many)
    if "memory" in found:
        told += _memory(found["memory"]["peak_bytes"], found["memory"]["length"])
    if "slope" in found:
        told += _slopes(found["slope"])
    if "packed" in found:
        measured = "favor: packed proteins / one row of the same length"
        told += _ratios(
            measured, f"rows of {found['packed']['row_tokens']}", found["packed"]["times"], PACKED, UNPACKED
        )
    return told


def markdown_rows(told: Sequence[Figure], environment: Mapping[str, Any], command: str, repeats: int) -> list[str]:
    """Returns a row of RESULTS.md for each thing measured."""
    machine = f"{environment['machine']}, {environment['threads']} threads, torch {environment['torch']}"
    if environment["variables"]:
        machine += f", `{environment['variables']}`"
    today = datetime.date.today().isoformat()
    start = [today, environment["commit"], machine, f"`{command}`"]
    rows = []
    for measured in dict.fromkeys(figure.measured for figure in told):
        group = [figure for figure in told if figure.measured == measured]
        is_repeated = any(figure.low < figure.high for figure in group)
        what = f"{measured}, {SETUP}" + (f"; {repeats} repeats" if is_repeated else "; one call, in a new process")
        result = "; ".join(f"{figure.where}: {figure.text}" for figure in group)
        notes = "; ".join(figure.note for figure in group if figure.note)
        rows.append(f"| {' | '.join([*start, what, result, notes])} |")
        start[2:] = "as above", "as above"
    return rows


def draw(path: Path, speed: Mapping[int, Times]) -> None:
    """Writes a plot of time against length, one line an implementation."""
    lines = []
    for name, (group, style) in LINES.items():
        medians = {length: statistics.median(times[name][BOTH]) for length, times in speed.items() if name in times}
        if medians:
            lines.append(Line(name, list(medians), [seconds * 1e3 for seconds in medians.values()], group, style))
    plot(
        path, lines, x_label="length (tokens)", y_label="time (ms)", title=f"Time of {BOTH} ({SETUP})",
        x_ticks={length: f"{length:,}" for length in speed},
    )  # fmt: skip


def _against_peers(times: Times, where: str, suffix: str) -> list[Figure]:
    told = []
    for name in times:
        ours = PEER_OF.get(name, "favor")
        if name in (GEMM, *LONG_ROWS) or ours not in times:
            continue
        told += _ratios(f"{name} / {ours}{suffix}", where, times, name, ours)
    return told


def _shares(times: Times, length: int) -> list[Figure]:
    told = []
    for name in (name for name in OURS if name in times and name != "favor causal"):
        for what, products in MULTIPLIES.items():
            work = HEADS * products * length * FEATURES * HEAD_DIM / GEMM_SIZE**3
            told.append(
                compare(
                    f"share of the GEMM rate ({GEMM_SIZE}² matrices), {name}", f"L {length} {what}",
                    times[GEMM][FORWARD], times[name][what], 100 * work, "%",
                )
            )  # fmt: skip
    return told


def _memory(peaks: Mapping[str, int], length: int) -> list[Figure]:
    told = []
    for name, peak in peaks.items():
        size = peak / MEBIBYTE
        told.append(
            Figure(f"peak memory above inputs and outputs, {name}", f"L {length} {BOTH}", size, size, size, " MiB", "")
        )
    for name, peak in peaks.items():
        # A peak below one page cannot be seen.
        ratio = peak / max(peaks["favor"], 4096)
        if name != "favor":
            told.append(Figure(f"peak memory of {name} / favor", f"L {length} {BOTH}", ratio, ratio, ratio, "×", ""))
    return told


def _slopes(times: Times) -> list[Figure]:
    lengths = [float(length) for length in times]
    where = f"L {min(lengths):.0f} to {max(lengths):.0f}"
    told = []
    for what in (FORWARD, BOTH):
        by_length = [seconds[what] for seconds in times.values()]
        slope = log_log_slope(lengths, [statistics.median(seconds) for seconds in by_length])
        of_repeats = [log_log_slope(lengths, seconds) for seconds in zip(*by_length, strict=True)]
        measured = "log-log slope of time against length, favor"
        told.append(Figure(measured, f"{where}, {what}", slope, min(of_repeats), max(of_repeats), "", ""))
    return told


def _ratios(measured: str, where: str, times: Times, above: str, below: str) -> list[Figure]:
    """Returns the ratio of two times in each pass."""
    return [
        compare(measured, f"{where} {what}", times[above][what], times[below][what], 1.0, "×")
        for what in (FORWARD, BOTH)
    ]


def compare(
    measured: str, where: str, above: Sequence[float], below: Sequence[float], factor: float, unit: str
) -> Figure:
    """Returns factor · the ratio of two times, with the medians as a note."""
    medians = statistics.median(above), statistics.median(below)
    of_repeats = [factor * a / b for a, b in zip(above, below, strict=True)]
    note = f"medians {medians[0] * 1e3:.4g} and {medians[1] * 1e3:.4g} ms"
    return Figure(measured, where, factor * medians[0] / medians[1], min(of_repeats), max(of_repeats), unit, note)
