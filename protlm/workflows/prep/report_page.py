"""The report.html of a dataset, made from its manifest alone: hides which numbers and figures it shows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from protlm import vocabulary
from protlm.choices import SplitName
from protlm.data.building.kmer_search import MIN_LENGTH
from protlm.data.storage.manifest import LENGTH_BIN_STARTS, Manifest, PrepOptions, SplitSummary
from protlm.workflows.pages.figures import draw
from protlm.workflows.pages.page import Block, Figure, KeyValues, Page, Section, Table, Text, Warnings, render
from protlm.workflows.pages.palette import ALL_MARK, BASELINE_MARKS, SPLIT_MARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SWISS_PROT_RELEASE = "2026_03"
SWISS_PROT_PERCENT = {
    "A": 8.25, "R": 5.52, "N": 4.06, "D": 5.46, "C": 1.38, "Q": 3.93, "E": 6.71, "G": 7.07, "H": 2.27, "I": 5.90,
    "L": 9.64, "K": 5.79, "M": 2.41, "F": 3.86, "P": 4.75, "S": 6.66, "T": 5.36, "W": 1.10, "Y": 2.92, "V": 6.85,
}  # fmt: skip
"""Residue composition of UniProtKB/Swiss-Prot, from the statistics of the release."""

_NUCLEOTIDES = "ACGTUN"
_DNA_SHARE = 0.95
_DNA_RESIDUES = 1_000

_TICKS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)


def looks_like_dna(residue_counts: Mapping[str, int]) -> bool:
    """Returns whether letters are probably nucleotides: there are many, and nearly all are A, C, G, T, U or N.

    In proteins these letters are a quarter of the residues.
    """
    total = sum(residue_counts.values())
    return total >= _DNA_RESIDUES and _nucleotide_share(residue_counts) >= _DNA_SHARE


def _nucleotide_share(residue_counts: Mapping[str, int]) -> float:
    return sum(residue_counts.get(letter, 0) for letter in _NUCLEOTIDES) / sum(residue_counts.values())


def warnings_of(manifest: Manifest) -> list[str]:
    """Returns one line for each property of a dataset that its user may not have intended."""
    warnings = []
    if manifest.nucleic_acids:
        warnings.append(
            f"{manifest.nucleic_acids:,} records are nucleic acids, and their letters were read as residues; leave "
            "them out with --nucleotides skip"
        )
    for name, split in manifest.splits.items():
        if not split.num_records:
            warnings.append(f"split '{name}' is empty{_asked_in_vain(manifest.options, name)}")
        elif split.num_records == 1:
            warnings.append(f"split '{name}' is a single protein, which says nothing about others")
        if looks_like_dna(split.residue_counts):
            share = math.floor(100 * _nucleotide_share(split.residue_counts))
            warnings.append(
                f"split '{name}' looks like DNA: {share} % of its letters are A, C, G, T, U or N; "
                "protlm takes protein sequences, so translate it first"
            )
    for pair in manifest.leakage.clusters or ():
        if pair.num_labels:
            warnings.append(
                f"{pair.num_labels:,} clusters have records in both {pair.first} and {pair.second}; "
                "--split cluster keeps clusters whole"
            )
    return warnings


def _asked_in_vain(options: PrepOptions, split: str) -> str:
    """Returns the end of the warning of an empty split of which a fraction of the records was asked for."""
    fraction = {"valid": options.valid_fraction, "test": options.test_fraction}.get(split)
    if not fraction:
        return ""
    return f": the dataset is too small for its fraction, {fraction:g}; raise --{split}-fraction or give more proteins"


def render_report(manifest: Manifest) -> str:
    """Returns the HTML page of a dataset; it names no folder, so that equal datasets have equal pages."""
    splits = manifest.splits
    totals = [
        ("records", f"{sum(split.num_records for split in splits.values()):,}"),
        ("residues", f"{sum(split.num_residues for split in splits.values()):,}"),
    ]
    sections = [
        Section("splits", "Splits", [_splits(manifest)]),
        Section("lengths", "Lengths", [_lengths(splits)]),
        Section("residues", "Residues", _composition(splits.values())),
        Section("leakage", "Leakage between splits", _leakage(manifest)),
        Section("left-out", "Left out and repaired", [_left_out(manifest)]),
        Section("sources", "Sources", [_sources(manifest)]),
        Section("options", "Options", [_options(manifest)]),
    ]
    summary = (Warnings(warnings_of(manifest)), KeyValues(totals))
    return render(Page("Protein dataset", "Made by `protlm prep`.", summary, sections))


def _percent(count: int, total: int) -> str:
    if not total:
        return "–"
    return "< 0.01 %" if 0 < count < total / 10_000 else f"{100 * count / total:.2f} %"


def _splits(manifest: Manifest) -> Table:
    total = sum(split.num_records for split in manifest.splits.values())
    rows = [
        (
            name,
            f"{split.num_records:,}",
            _percent(split.num_records, total),
            f"{split.num_residues:,}",
            *(f"{split.length_quantiles[key]:,}" if split.num_records else "–" for key in ("median", "p99", "max")),
            f"{len(split.shards):,}",
        )
        for name, split in manifest.splits.items()
    ]
    return Table(("split", "records", "share", "residues", "median length", "p99 length", "longest", "shards"), rows)


@dataclass(frozen=True, slots=True)
class LengthHistogram:
    """The histogram of lengths on a logarithmic axis, from the first to the last bin that is not empty.

    Attributes:
        edges: The bounds of the bins, one more than there are bins.
        counts: The records of each split in each bin.
        heights: The same in percent of the records of the split for a quarter of a doubling in length. Lengths are
            whole numbers, so bins differ in width on the axis; at this scale all splits enclose the same area.
    """

    edges: Sequence[int]
    counts: Mapping[SplitName, Sequence[int]]
    heights: Mapping[SplitName, Sequence[float]]


def length_histogram(splits: Mapping[SplitName, SplitSummary]) -> LengthHistogram | None:
    """Returns the histogram of lengths of the splits that have records, or None where there are none."""
    filled = {name: split for name, split in splits.items() if split.num_records}
    bounds = (*LENGTH_BIN_STARTS, round(LENGTH_BIN_STARTS[-1] * 2**0.25))
    used = [
        place for place in range(len(bounds) - 1) if any(split.length_histogram[place] for split in filled.values())
    ]
    if not used:
        return None
    first, end = used[0], used[-1] + 1
    edges = bounds[first : end + 1]
    counts = {name: split.length_histogram[first:end] for name, split in filled.items()}
    heights = {
        name: [
            100 * count / filled[name].num_records / (4 * math.log2(edges[place + 1] / edges[place]))
            for place, count in enumerate(bins)
        ]
        for name, bins in counts.items()
    }
    return LengthHistogram(edges, counts, heights)


def _lengths(splits: Mapping[SplitName, SplitSummary]) -> Block:
    histogram = length_histogram(splits)
    if histogram is None:
        return Text("There are no records.")
    edges = histogram.edges

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        for name, heights in histogram.heights.items():
            axes.stairs(heights, edges, label=name, linewidth=1.6, **SPLIT_MARKS[name].line)
        axes.set_xscale("log", base=2)
        ticks = [tick for tick in _TICKS if edges[0] <= tick <= edges[-1]]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.set_xlabel("length, residues (logarithmic)")
        axes.set_ylabel("share of the split's records\nper quarter of a doubling")
        axes.legend()

    name, split = max(
        ((name, split) for name, split in splits.items() if split.num_records), key=lambda pair: pair[1].num_records
    )
    quantiles = split.length_quantiles
    reading = (
        f"Half of the {name} records have at most {quantiles['median']:,} residues, and one in a hundred has "
        f"{quantiles['p99']:,} or more; all curves enclose the same area, whatever the size of their split."
    )
    rows = [
        (_bin_name(first, end), *(f"{bins[place]:,}" for bins in histogram.counts.values()))
        for place, (first, end) in enumerate(pairwise(edges))
    ]
    data = Table(("length, residues", *(f"{name}, records" for name in histogram.counts)), rows)
    return Figure(draw(plot, "Histogram of lengths by split"), reading, data)


def _bin_name(first: int, end: int) -> str:
    if first == LENGTH_BIN_STARTS[-1]:
        return f"{first:,} or more"
    return f"{first:,}" if end == first + 1 else f"{first:,} to {end - 1:,}"


def _composition(splits: Iterable[SplitSummary]) -> list[Block]:
    """Returns the shares of the 20 standard residues beside those in Swiss-Prot, drawn and as numbers."""
    filled = [split.residue_counts for split in splits if split.num_residues]
    counts = {letter: sum(split_counts[letter] for split_counts in filled) for letter in vocabulary.RESIDUES}
    total = sum(counts.values())
    if not total:
        return [Text("There are no residues.")]
    letters = sorted(SWISS_PROT_PERCENT, key=lambda letter: -SWISS_PROT_PERCENT[letter])
    own = [100 * counts[letter] / total for letter in letters]
    reference = [SWISS_PROT_PERCENT[letter] for letter in letters]

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        places = range(len(letters))
        axes.bar([place - 0.2 for place in places], own, 0.38, label="this dataset", **ALL_MARK.bars)
        label = f"Swiss-Prot {SWISS_PROT_RELEASE}"
        axes.bar([place + 0.2 for place in places], reference, 0.38, label=label, **BASELINE_MARKS[0].bars)
        axes.set_xticks(places, letters)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.set_xlabel("residue, by frequency in Swiss-Prot")
        axes.set_ylabel("share of all residues")
        axes.legend()

    # No sign on a difference that rounds to zero.
    differences = [round(a - b, 2) or 0.0 for a, b in zip(own, reference, strict=True)]
    largest = max(range(len(letters)), key=lambda place: abs(differences[place]))
    reading = (
        f"The largest difference from Swiss-Prot is that of {letters[largest]}: {own[largest]:.2f} % here, "
        f"{reference[largest]:.2f} % there."
    )
    rows = [
        (letter, f"{a:.2f}", f"{b:.2f}", f"{difference:+.2f}")
        for letter, a, b, difference in zip(letters, own, reference, differences, strict=True)
    ]
    others = ", ".join(f"{counts[letter]:,} {letter}" for letter in counts if letter not in SWISS_PROT_PERCENT)
    return [
        Text(
            "All splits together, beside UniProtKB/Swiss-Prot as in its release statistics "
            f"(release {SWISS_PROT_RELEASE}). Other letters: {others}."
        ),
        Figure(
            draw(plot, "Residue composition beside Swiss-Prot"),
            reading,
            Table(("residue", "this dataset, %", f"Swiss-Prot {SWISS_PROT_RELEASE}, %", "difference, points"), rows),
        ),
    ]


def _leakage(manifest: Manifest) -> list[Block]:
    """Returns the overlaps between splits, and their meaning for scores."""
    leakage, sizes = manifest.leakage, {name: split.num_records for name, split in manifest.splits.items()}
    rows = [
        (f"{pair.inner} sequences inside longer ones of {pair.outer}", f"{pair.num_records:,}",
         f"{_percent(pair.num_records, sizes.get(pair.inner, 0))} of {pair.inner}")
        for pair in leakage.substrings or ()
    ]  # fmt: skip
    for label, pairs in (("clusters", leakage.clusters), ("families", leakage.families)):
        rows += [
            (f"{label} in both {pair.first} and {pair.second}", f"{pair.num_labels:,}", "") for pair in pairs or ()
        ]
    blocks: list[Block] = [
        Text(
            "A score on a held-out split is only as good as its separation from training. Records left out because an "
            f"earlier split has the same sequence: {leakage.exact_duplicates_removed:,}; no sequence is in two splits."
        )
    ]
    if leakage.substrings is None:
        blocks.append(Text("Sequences that are part of longer ones were not looked for."))
    else:
        blocks.append(
            Text(
                "A sequence inside a longer one, such as a fragment, can be recalled instead of predicted. Sequences "
                f"of fewer than {MIN_LENGTH} residues were not looked for."
            )
        )
    if leakage.clusters is not None:
        blocks.append(
            Text(
                "A cluster in two splits puts close relatives of the same protein into both: scores there show how "
                "well a model knows families that it was trained on."
            )
        )
    if leakage.families is not None:
        blocks.append(
            Text(
                "Families in two splits are to be expected unless they were held out, and even then for proteins with "
                "domains of several families."
            )
        )
    if rows:
        blocks.append(Table(("overlap", "count", "share"), rows))
    blocks.append(Text("Other likeness between sequences is not looked for.", soft=True))
    return blocks


def _left_out(manifest: Manifest) -> Table:
    removed = manifest.duplicates_removed
    rows = [
        ("records", "sequence already in the same split", removed.within_split),
        ("records", "sequence already in an earlier split", removed.across_splits),
        *(("records", reason.replace("_", " "), count) for reason, count in manifest.rejects.items()),
        *(("letters repaired", rule.replace("_", " "), count) for rule, count in manifest.repairs.items()),
    ]
    cells = [(what, reason, f"{count:,}") for what, reason, count in rows]
    return Table(("what", "why", "count"), cells, ("text", "text", "number"))


def _sources(manifest: Manifest) -> Table:
    rows = [
        (source.name, source.role, source.format, f"{source.num_records:,}", source.sha256)
        for source in manifest.sources
    ]
    header = ("file", "role", "format", "records read", "sha256")
    return Table(header, rows, ("text", "text", "text", "number", "code"))


def _options(manifest: Manifest) -> Table:
    rows = []
    for option, value in manifest.options.model_dump().items():
        if isinstance(value, dict):
            value = f"{value['name']}, sha256 {value['sha256']}"
        elif isinstance(value, tuple):
            value = ", ".join(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        rows.append((option.replace("_", " "), "–" if value in (None, "") else str(value)))
    return Table(("option", "value"), rows, ("text", "text"))
