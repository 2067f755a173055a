"""The figures of the embedding benchmark: how seconds become ratios against a peer, overheads and sizes."""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from scripts.bench.embed_measurements import (
    BARE,
    COMMAND,
    COMPARED,
    EARLIER,
    LOAD,
    LOAD_PEER,
    LONG_EXACT_LAYER,
    LONG_FAVOR,
    LONG_REST,
    MODEL_BYTES,
    PEAK_BYTES,
)
from scripts.bench.embed_models import OURS
from scripts.bench.harness import Figure, median, ratio, ratio_of_rates
from scripts.bench.models import Sizes
from scripts.measuring import MEBIBYTE, SECONDS

IN_A_PROCESS = "in a new process"


def figures(measured: Mapping[str, Any], sizes: Sizes) -> list[Figure]:
    """Returns the figures of all that was measured."""
    rows: list[Figure] = []
    for name in ("exact", "half", "padded", "extract", "favor"):
        if name in measured:
            rows += _against_peer(measured[name])
    if timed := measured.get("earlier"):
        rows += [
            ratio_of_rates(timed["where"], name, name + EARLIER, _seconds(timed), timed["residues"], "residues/s")
            for name in COMPARED
        ]
    if "long" in measured:
        rows.append(_long(measured["long"], sizes.num_layers))
    if memory := measured.get("memory"):
        sizes_mib = _in_mebibytes([memory["peak_bytes"]])
        rows.append(median("peak memory above the model", memory["where"], sizes_mib, " MiB", IN_A_PROCESS))
    if "pipeline" in measured:
        rows.append(_overhead(measured["pipeline"]))
    if "growth" in measured:
        rows += _growth(measured["growth"])
    if "load" in measured:
        rows += _load(measured["load"])
    return rows


def _seconds(timed: Mapping[str, Any]) -> dict[str, list[float]]:
    return {name: times[SECONDS] for name, times in timed["times"].items()}


def _against_peer(timed: Mapping[str, Any]) -> list[Figure]:
    seconds = _seconds(timed)
    ours = next(name for name in OURS if name in seconds)
    return [
        ratio_of_rates(timed["where"], ours, peer, seconds, timed["residues"], "residues/s")
        for peer in seconds if peer != ours
    ]  # fmt: skip


def _long(timed: Mapping[str, Any], num_layers: int) -> Figure:
    """Returns how many times faster FAVOR is than the same model with exact attention, each layer of which is alike."""
    seconds = _seconds(timed)
    favor = seconds[LONG_FAVOR]
    pairs = zip(seconds[LONG_REST], seconds[LONG_EXACT_LAYER], strict=True)
    exact = [rest + num_layers * layer for rest, layer in pairs]
    note = f"{statistics.median(favor):.1f} s against {statistics.median(exact):.0f} s, extrapolated from one layer"
    return ratio("time with exact SDPA / with FAVOR", timed["where"], exact, favor, note=note)


def _overhead(timed: Mapping[str, Any]) -> Figure:
    seconds = _seconds(timed)
    name = f"time of {COMMAND} over that of {BARE}, float16 for each residue"
    share = ratio(name, timed["where"], seconds[COMMAND], seconds[BARE], factor=100, unit="%")
    return replace(share, value=share.value - 100, low=share.low - 100, high=share.high - 100)


def _load(measured: Mapping[str, Any]) -> list[Figure]:
    ours, peer = (measured["figures"][name] for name in (LOAD, LOAD_PEER))
    what = "reading a checkpoint of transformers and embedding a first protein"
    note = f"medians {statistics.median(ours[SECONDS]):.2f} and {statistics.median(peer[SECONDS]):.2f} s"
    seconds = ratio(
        f"{what}: time of protlm / of transformers", measured["where"], ours[SECONDS], peer[SECONDS], note=note
    )
    above = [100 * (peak / size - 1) for peak, size in zip(ours[PEAK_BYTES], ours[MODEL_BYTES], strict=True)]
    return [seconds, median(f"{what}: peak memory above the weights", measured["where"], above, " %", IN_A_PROCESS)]


def _growth(measured: Mapping[str, Any]) -> list[Figure]:
    name = "peak memory of protlm embed, mean only, a tiny model"
    (few, least), (many, most) = ((int(count), _in_mebibytes(peaks)) for count, peaks in measured["peak_bytes"].items())
    pairs = ((few, least), (many, most))
    rows = [median(name, f"{count:,} proteins", peaks, " MiB", IN_A_PROCESS) for count, peaks in pairs]
    grown = [above - below for below, above in zip(least, most, strict=True)]
    growth = median(f"{name}: growth", f"from {few:,} to {many:,} proteins", grown, " MiB", IN_A_PROCESS)
    return [*rows, replace(growth, value=statistics.median(most) - statistics.median(least))]


def _in_mebibytes(sizes_bytes: list[int]) -> list[float]:
    return [size / MEBIBYTE for size in sizes_bytes]
