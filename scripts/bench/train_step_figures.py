"""What the training-step benchmark tells: hides how steps become ratios against a peer, and Markdown rows."""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.bench.attention_figures import MEBIBYTE, Figure
from scripts.bench.attention_implementations import Times
from scripts.bench.train_step_measurements import STEP
from scripts.bench.train_step_models import (
    NO_ATTENTION,
    PERFORMER_PEER,
    PROTLM,
    PROTLM_CONVOLVED,
    Sizes,
)

OURS = (PROTLM, PROTLM_CONVOLVED)


def setup(sizes: Sizes) -> str:
    """Returns what all models share, as text."""
    return (
        f"{sizes.num_layers} layers, model_dim {sizes.model_dim}, {sizes.num_heads} heads, ffn {sizes.ffn_dim}, "
        f"{sizes.num_features} features, AdamW, float32"
    )


def figures(found: Mapping[str, Any]) -> list[Figure]:
    """Returns the figures of all parts that were measured."""
    told: list[Figure] = []
    for part, suffix in (("performer", ""), ("malloc", ", tuned malloc"), ("esm", "")):
        for measured in found.get(part, ()):
            told += _against_peer(measured, suffix)
    told += [_share_of_ceiling(measured) for measured in found.get("ceiling", ())]
    if "memory" in found:
        told += _memory(found["memory"])
    if "data" in found:
        told += _data(found["data"])
    return told


def markdown_rows(
    told: Sequence[Figure], environment: Mapping[str, Any], command: str, setup: str, repeats: int
) -> list[str]:
    """Returns a row of RESULTS.md for each thing measured."""
    machine = f"{environment['machine']}, {environment['threads']} threads, torch {environment['torch']}"
    machine += f", `{environment['variables']}`" if environment["variables"] else ""
    start = [datetime.date.today().isoformat(), environment["commit"], machine, f"`{command}`"]
    rows = []
    for measured in dict.fromkeys(figure.measured for figure in told):
        group = [figure for figure in told if figure.measured == measured]
        how = f"; {repeats} repeats" if any(figure.low < figure.high for figure in group) else ""
        result = "; ".join(f"{figure.where}: {figure.text}" for figure in group)
        notes = "; ".join(figure.note for figure in group if figure.note)
        rows.append(f"| {' | '.join([*start, f'{measured}, {setup}{how}', result, notes])} |")
        start[2:] = "as above", "as above"
    return rows


def _against_peer(measured: Mapping[str, Any], suffix: str) -> list[Figure]:
    times, tokens = measured["times"], measured["batch"] * measured["length"]
    where = f"B{measured['batch']} L{measured['length']}"
    told = []
    for peer in (name for name in times if name not in OURS):
        for ours in (name for name in OURS if name in times):
            rates = [tokens / statistics.median(times[name][STEP]) for name in (ours, peer)]
            note = f"{rates[0]:,.0f} and {rates[1]:,.0f} tokens/s"
            told.append(_quotient(f"tokens/s of {ours} / {peer}{suffix}", where, times, peer, ours, 1.0, "×", note))
    return told


def _share_of_ceiling(measured: Mapping[str, Any]) -> Figure:
    times, where = measured["times"], f"B{measured['batch']} L{measured['length']}"
    medians = [statistics.median(times[name][STEP]) * 1e3 for name in (NO_ATTENTION, PROTLM)]
    note = f"medians {medians[0]:.4g} and {medians[1]:.4g} ms"
    name = f"share of the speed with {NO_ATTENTION}, {PROTLM}"
    return _quotient(name, where, times, NO_ATTENTION, PROTLM, 100.0, "%", note)


def _memory(measured: Mapping[str, Any]) -> list[Figure]:
    where, peaks = f"B1 L{measured['length']}", measured["peak_bytes"]
    note = "one step, in a new process"
    told = []
    for key, what in (("whole", "with weights and optimizer"), ("above", "above weights and optimizer")):
        for name, peak in peaks.items():
            size = peak[key] / MEBIBYTE
            told.append(Figure(f"peak memory {what}, {name}", where, size, size, size, " MiB", note))
        if PERFORMER_PEER in peaks:
            ratio = peaks[PROTLM][key] / peaks[PERFORMER_PEER][key]
            name = f"peak memory {what}, {PROTLM} / {PERFORMER_PEER}"
            told.append(Figure(name, where, ratio, ratio, ratio, "×", note))
    return told


def _data(measured: Mapping[str, Any]) -> list[Figure]:
    budget, rows, residues = (measured[key] for key in ("tokens_per_batch", "row_tokens", "residues"))
    where = f"tokens_per_batch {budget}"
    parts = (
        ("residues among the slots of tokens_per_batch", residues, [budget] * len(rows)),
        ("residues among the tokens of the rows", residues, rows),
        ("time that a step waits for its row", measured["waited"], measured["seconds"]),
    )
    told = []
    for name, some, of_all in parts:
        value = 100 * sum(some) / sum(of_all)
        single = [100 * part / whole for part, whole in zip(some, of_all, strict=True)]
        note = f"{len(rows)} rows of training, each {min(single):.1f}–{max(single):.1f} %"
        told.append(Figure(name, where, value, value, value, "%", note))
    return told


def _quotient(
    measured: str, where: str, times: Times, above: str, below: str, factor: float, unit: str, note: str
) -> Figure:
    """Returns factor · the ratio of two times."""
    pairs = list(zip(times[above][STEP], times[below][STEP], strict=True))
    value = statistics.median(times[above][STEP]) / statistics.median(times[below][STEP])
    of_repeats = [factor * a / b for a, b in pairs]
    return Figure(measured, where, factor * value, min(of_repeats), max(of_repeats), unit, note)
