"""The figures of the training-step benchmark: how steps become ratios against a peer, shares and sizes."""

from collections.abc import Mapping
from typing import Any

from scripts.bench.harness import Figure, ratio, ratio_of_rates
from scripts.bench.train_step_measurements import STEP
from scripts.bench.train_step_models import CYCLE, HALF, NO_ATTENTION, PERFORMER_PEER, PROTLM, PROTLM_CONVOLVED
from scripts.measuring import MEBIBYTE

OURS = (PROTLM, PROTLM_CONVOLVED)


def figures(measured: Mapping[str, Any]) -> list[Figure]:
    """Returns the figures of all that was measured."""
    rows: list[Figure] = []
    for name, suffix in (("performer", ""), ("malloc", ", tuned malloc"), ("esm", "")):
        for timed in measured.get(name, ()):
            rows += _against_peer(timed, suffix)
    rows += [_share_of_ceiling(timed) for timed in measured.get("ceiling", ())]
    rows += [_of_cycle(timed) for timed in measured.get("cycle", ())]
    for timed in measured.get("half", ()):
        rows += _of_half_precision(timed)
    if "memory" in measured:
        rows += _memory(measured["memory"])
    if "data" in measured:
        rows += _data(measured["data"])
    return rows


def _steps(timed: Mapping[str, Any]) -> tuple[str, dict[str, list[float]]]:
    """Returns the size of a step, and its seconds by model."""
    return f"B{timed['batch']} L{timed['length']}", {name: times[STEP] for name, times in timed["times"].items()}


def _against_peer(timed: Mapping[str, Any], suffix: str) -> list[Figure]:
    where, seconds = _steps(timed)
    tokens = timed["batch"] * timed["length"]
    return [
        ratio_of_rates(where, ours, peer, seconds, tokens, "tokens/s", suffix)
        for peer in seconds if peer not in OURS
        for ours in OURS if ours in seconds
    ]  # fmt: skip


def _share_of_ceiling(timed: Mapping[str, Any]) -> Figure:
    where, seconds = _steps(timed)
    measured = f"share of the speed with {NO_ATTENTION}, {PROTLM}"
    return ratio(measured, where, seconds[NO_ATTENTION], seconds[PROTLM], factor=100, unit="%")


def _of_cycle(timed: Mapping[str, Any]) -> Figure:
    where, seconds = _steps(timed)
    return ratio(f"time of {CYCLE} / {PROTLM}", where, seconds[CYCLE], seconds[PROTLM])


def _of_half_precision(timed: Mapping[str, Any]) -> list[Figure]:
    where, seconds = _steps(timed)
    return [
        ratio(f"{name}: time in float32 / bf16-mixed", where, seconds[name], seconds[half])
        for name, half in HALF.items()
    ]


def _memory(measured: Mapping[str, Any]) -> list[Figure]:
    where, peaks = f"B1 L{measured['length']}", measured["peak_bytes"]
    note = "one step, in a new process"
    rows = []
    for key, base in (("whole", "with weights and optimizer"), ("above", "above weights and optimizer")):
        for name, peak in peaks.items():
            size = peak[key] / MEBIBYTE
            rows.append(Figure(f"peak memory {base}, {name}", where, size, size, size, " MiB", note))
        if PERFORMER_PEER in peaks:
            times_peer = peaks[PROTLM][key] / peaks[PERFORMER_PEER][key]
            name = f"peak memory {base}, {PROTLM} / {PERFORMER_PEER}"
            rows.append(Figure(name, where, times_peer, times_peer, times_peer, "×", note))
    return rows


def _data(measured: Mapping[str, Any]) -> list[Figure]:
    budget, row_tokens, residues = (measured[key] for key in ("tokens_per_batch", "row_tokens", "residues"))
    where = f"tokens_per_batch {budget}"
    shares = (
        ("residues among the slots of tokens_per_batch", residues, [budget] * len(row_tokens)),
        ("residues among the tokens of the rows", residues, row_tokens),
        ("time that a step waits for its row", measured["waited"], measured["seconds"]),
    )
    rows = []
    for name, numerators, denominators in shares:
        value = 100 * sum(numerators) / sum(denominators)
        single = [100 * above / below for above, below in zip(numerators, denominators, strict=True)]
        note = f"{len(row_tokens)} rows of training, each {min(single):.1f}–{max(single):.1f} %"
        rows.append(Figure(name, where, value, value, value, "%", note))
    return rows
