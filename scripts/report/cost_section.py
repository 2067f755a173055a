"""Section 9: time and memory against length."""

import statistics
from pathlib import Path
from typing import Any

import torch

from scripts.attention_calls import FEATURES, HEAD_DIM, HEADS
from scripts.measuring import MEBIBYTE, PAGE_BYTES, can_measure_memory
from scripts.report.approximation import log_log_slope
from scripts.report.cost import CASES, NEAR_BLOCK, Case, peak_bytes, seconds
from scripts.report.page import Section, table
from scripts.report.plots import Line, conditions, plot
from scripts.report.settings import Settings

TIME_SLOPE, MEMORY_SLOPE = 1.05, 0.3
TARGET_LENGTH = 65_536
"""The slopes are promised up to this length: over a few hundred tokens constant costs still count."""


def cost(settings: Settings, folder: Path) -> Section:
    """Measures all cases and fits their slopes."""
    lengths = {
        "favor": settings.lengths,
        "near-far": settings.lengths,
        "exact": settings.exact_lengths,
        "formed": settings.formed_lengths,
    }
    times: dict[Case, dict[int, list[float]]] = {case: {} for case in CASES}
    for length in settings.lengths:
        due = [case for case in CASES if length in lengths[case.implementation]]
        for case, measured in seconds(due, length, settings.repeats).items():
            times[case][length] = measured
    peaks: dict[Case, dict[int, int]] = {case: {} for case in CASES}
    if can_measure_memory():
        calls = [(case, length) for case in CASES for length in times[case]]
        for (case, length), peak in zip(calls, peak_bytes(calls), strict=True):
            peaks[case][length] = peak
    rows, numbers = [], []
    for case in CASES:
        row, number = _row(case, times[case], peaks[case])
        rows.append(row)
        numbers.append(number)
    columns = ["", "work", "shortest … longest", "time, ms", "slope of time", "peak above inputs and outputs, MiB",
               "slope of memory"]  # fmt: skip
    notes = [_targets(numbers)] if settings.lengths[-1] >= TARGET_LENGTH else ["Too short for the targets of FAVOR."]
    if not can_measure_memory():
        notes.append("Memory is not measured: this system has no /proc/self/clear_refs.")
    return Section(
        "Time grows linearly with length, and memory no faster",
        [
            "Section 3.1: O(L·M·d) time, where exact attention takes O(L²·d). Memory above inputs and outputs: FAVOR "
            "keeps one state of M × (d + 1) numbers a head and a stretch of features; the causal backward keeps M "
            "numbers a head for every stretch. `exact (SDPA)` is torch's fused attention, which forms no matrix of "
            "pairs; `matrix formed` is the formula as it is written. (The paper's Figure 3.) `near-far` is FAVOR with "
            f"exact weights in blocks of {NEAR_BLOCK} tokens.",
            f"B 1, H {HEADS}, d {HEAD_DIM}, M {FEATURES}, `positive`. {conditions(torch.float32)}. Medians of "
            f"{settings.repeats} calls, taken in turns. A peak is that of the process's resident memory during one "
            "call in a process apart, less what was resident before and less the outputs. Slopes are those of a line "
            "through all points in logarithms: 1 is linear, 2 quadratic.",
        ],
        tables=[table(columns, rows)],
        plots=_plots(folder, times, peaks),
        notes=notes,
        numbers={"cases": numbers},
    )


def _row(case: Case, times: dict[int, list[float]], peaks: dict[int, int]) -> tuple[tuple[object, ...], dict[str, Any]]:
    lengths = list(times)
    medians = [statistics.median(values) for values in times.values()]
    memory_slope = log_log_slope(lengths, [max(value, PAGE_BYTES) for value in peaks.values()]) if peaks else None
    number = {
        "implementation": case.implementation, "causal": case.causal, "work": case.work, "lengths": lengths,
        "seconds": list(times.values()), "median_seconds": medians, "time_slope": log_log_slope(lengths, medians),
        "peak_bytes": list(peaks.values()) or None, "memory_slope": memory_slope,
    }  # fmt: skip
    sizes = " … ".join(f"{value / MEBIBYTE:.1f}" for value in peaks.values()) or "–"
    cells = (
        case.name, case.work, f"{lengths[0]:,} … {lengths[-1]:,}", " … ".join(f"{m * 1e3:.0f}" for m in medians),
        f"{number['time_slope']:.2f}", sizes, "–" if memory_slope is None else f"{memory_slope:.2f}",
    )  # fmt: skip
    return cells, number


def _targets(numbers: list[dict[str, Any]]) -> str:
    """Returns a sentence on the targets. A missed one is no failure: a busy machine misses them."""
    ours = [number for number in numbers if number["implementation"] == "favor"]
    forward = max(number["time_slope"] for number in ours if number["work"] == "forward")
    memory = [number["memory_slope"] for number in ours if number["memory_slope"] is not None]
    sentence = f"Targets for FAVOR up to {TARGET_LENGTH:,} tokens: "
    sentence += f"slope of forward time ≤ {TIME_SLOPE}: {_met(forward, TIME_SLOPE)} ({forward:.2f})"
    if memory:
        sentence += f"; slope of memory ≤ {MEMORY_SLOPE}: {_met(max(memory), MEMORY_SLOPE)} ({max(memory):.2f} at most)"
    return sentence + "."


def _met(slope: float, target: float) -> str:
    return "met" if slope <= target else "**missed**"


def _plots(
    folder: Path, times: dict[Case, dict[int, list[float]]], peaks: dict[Case, dict[int, int]]
) -> list[tuple[str, str]]:
    made = []
    foot = f"{HEADS} heads of {HEAD_DIM}, {FEATURES} features; {conditions(torch.float32)}"
    subjects = {"favor": "positive", "near-far": "near-far", "exact": "exact", "formed": "formed"}
    for backward in (False, True):
        cases = [case for case in CASES if case.backward == backward]
        work = cases[0].work
        ticks = {length: f"{length:,}" for length in times[cases[0]]}
        for quantity, label, unit in (("time", "time (ms)", 1e3), ("memory", "peak memory (MiB)", 1 / MEBIBYTE)):
            lines = []
            for case in cases:
                values = (
                    {length: statistics.median(samples) for length, samples in times[case].items()}
                    if quantity == "time"
                    else {length: max(value, PAGE_BYTES) for length, value in peaks[case].items()}
                )
                if values:
                    y = [value * unit for value in values.values()]
                    kind = "causal" if case.causal else "bidirectional"
                    lines.append(Line(case.name, list(values), y, subjects[case.implementation], kind))
            if not lines:
                continue
            name = f"{quantity}_{'training' if backward else 'forward'}.png"
            title = f"{'Peak memory above inputs and outputs' if quantity == 'memory' else 'Time'}, {work}"
            plot(folder / name, lines, x_label="length (tokens)", y_label=label, title=title, foot=foot, x_ticks=ticks)
            made.append((name, f"{title} against length"))
    return made
