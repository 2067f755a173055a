"""What the embedding benchmark tells: hides how seconds become ratios against a peer, overheads and sizes."""

import statistics
from collections.abc import Mapping
from typing import Any

from scripts.bench.attention_figures import MEBIBYTE, Figure, compare
from scripts.bench.attention_implementations import Times
from scripts.bench.embed_measurements import BARE, COMMAND, LONG_EXACT_LAYER, LONG_FAVOR, LONG_REST, SECONDS
from scripts.bench.embed_models import EXACT, FAVOR
from scripts.bench.train_step_models import Sizes


def setup(sizes: Sizes) -> str:
    """Returns what all models share, as text."""
    return (
        f"{sizes.num_layers} layers, model_dim {sizes.model_dim}, {sizes.num_heads} heads, ffn {sizes.ffn_dim}, "
        f"{sizes.num_features} features, float32, random weights"
    )


def figures(found: Mapping[str, Any], sizes: Sizes) -> list[Figure]:
    """Returns the figures of all parts that were measured."""
    told: list[Figure] = []
    for part in ("exact", "extract", "favor"):
        if part in found:
            told += _against_peer(found[part])
    if "long" in found:
        told.append(_long(found["long"], sizes.num_layers))
    if "memory" in found:
        told.append(_size("peak memory above the model", found["memory"]["where"], found["memory"]["peak_bytes"]))
    if "pipeline" in found:
        told.append(_overhead(found["pipeline"]))
    if "growth" in found:
        told += _growth(found["growth"])
    return told


def _against_peer(measured: Mapping[str, Any]) -> list[Figure]:
    times: Times = measured["times"]
    ours = next(name for name in (EXACT, FAVOR) if name in times)
    told = []
    for peer in (name for name in times if name != ours):
        rates = [measured["residues"] / statistics.median(times[name][SECONDS]) for name in (ours, peer)]
        note = f"{rates[0]:,.0f} and {rates[1]:,.0f} residues/s"
        told.append(_ratio(f"residues/s of {ours} / {peer}", measured["where"], times, peer, ours, note))
    return told


def _long(measured: Mapping[str, Any], num_layers: int) -> Figure:
    """Returns how many times faster FAVOR is than the same model with exact attention, each layer of which is alike."""
    times: Times = measured["times"]
    exact = [
        rest + num_layers * layer
        for rest, layer in zip(times[LONG_REST][SECONDS], times[LONG_EXACT_LAYER][SECONDS], strict=True)
    ]
    favor = times[LONG_FAVOR][SECONDS]
    of_repeats = [a / b for a, b in zip(exact, favor, strict=True)]
    value = statistics.median(exact) / statistics.median(favor)
    note = f"{statistics.median(favor):.1f} s against {statistics.median(exact):.0f} s, extrapolated from one layer"
    name = "time with exact SDPA / with FAVOR"
    return Figure(name, measured["where"], value, min(of_repeats), max(of_repeats), "×", note)


def _overhead(measured: Mapping[str, Any]) -> Figure:
    times: Times = measured["times"]
    ratio = compare("", "", times[COMMAND][SECONDS], times[BARE][SECONDS], 100.0, "%")
    name = f"time of {COMMAND} over that of {BARE}, float16 for each residue"
    return Figure(name, measured["where"], ratio.value - 100, ratio.low - 100, ratio.high - 100, "%", ratio.note)


def _growth(measured: Mapping[str, Any]) -> list[Figure]:
    (few, least), (many, most) = measured["peak_bytes"].items()
    name = "peak memory of protlm embed, mean only, a tiny model"
    grown = [above - below for below, above in zip(least, most, strict=True)]
    value = int(statistics.median(most) - statistics.median(least))
    return [
        *(_size(name, f"{int(count):,} proteins", *peaks) for count, peaks in ((few, least), (many, most))),
        _size(f"{name}: growth", f"from {int(few):,} to {int(many):,} proteins", *grown, value=value),
    ]


def _size(measured: str, where: str, *sizes_bytes: int, value: int | None = None) -> Figure:
    """Returns the median of sizes, or the value, with the range of the sizes."""
    sizes = [size / MEBIBYTE for size in sizes_bytes]
    middle = statistics.median(sizes) if value is None else value / MEBIBYTE
    return Figure(measured, where, middle, min(sizes), max(sizes), " MiB", "in a new process")


def _ratio(measured: str, where: str, times: Times, above: str, below: str, note: str) -> Figure:
    ratio = compare(measured, where, times[above][SECONDS], times[below][SECONDS], 1.0, "×")
    return Figure(measured, where, ratio.value, ratio.low, ratio.high, "×", note)
