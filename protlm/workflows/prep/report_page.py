"""The report.html of a dataset: one page made from the manifest alone, without scripts or other files."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from protlm import vocabulary
from protlm.choices import SplitName
from protlm.data.building.containment import MIN_LENGTH
from protlm.data.storage.dataset import LENGTH_BIN_STARTS, Manifest, SplitSummary

SWISS_PROT_RELEASE = "2026_03"
SWISS_PROT_PERCENT = {
    "A": 8.25, "R": 5.52, "N": 4.06, "D": 5.46, "C": 1.38, "Q": 3.93, "E": 6.71, "G": 7.07, "H": 2.27, "I": 5.90,
    "L": 9.64, "K": 5.79, "M": 2.41, "F": 3.86, "P": 4.75, "S": 6.66, "T": 5.36, "W": 1.10, "Y": 2.92, "V": 6.85,
}  # fmt: skip
"""Residue composition of UniProtKB/Swiss-Prot, from the statistics of the release."""

_NUCLEOTIDES = "ACGTUN"
_DNA_SHARE = 0.95
_DNA_RESIDUES = 1_000

_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 790.0, 34.0, 270.0
_TICKS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)

_STYLE = """
:root { --page: #fff; --ink: #1c2430; --soft: #5b6675; --rule: #d8dee6; --warn: #fff4d6; --reference: #aeb8c4;
  --train: #2f5fb3; --valid: #c2571a; --test: #23805a; --ood: #8b45a6; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14181f; --ink: #e4e9f0; --soft: #9aa6b5; --rule: #333c48; --warn: #3d3213; --reference: #5c6877;
    --train: #7fa8f0; --valid: #f0a06a; --test: #66c79d; --ood: #cf95e8; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 52rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; } .soft, caption { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.code { font: .85em monospace; overflow-wrap: anywhere; min-width: 16rem; }
.name { overflow-wrap: break-word; max-width: 24rem; }
.warnings { background: var(--warn); padding: .6rem 1rem .6rem 2.2rem; border-radius: .3rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } .grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; }
.own { fill: var(--train); } .reference { fill: var(--reference); }
.train { stroke: var(--train); } .valid { stroke: var(--valid); stroke-dasharray: 8 3; }
.test { stroke: var(--test); stroke-dasharray: 3 3; } .ood { stroke: var(--ood); stroke-dasharray: 10 3 2 3; }
@media print { body { margin: 0; max-width: none; } section { break-inside: avoid; }
  svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


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
    for name, split in manifest.splits.items():
        if not split.num_records:
            warnings.append(f"split '{name}' is empty")
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


def render_report(manifest: Manifest) -> str:
    """Returns the HTML page of a dataset; it names no folder, so that equal datasets have equal pages."""
    sections = [
        ("Splits", _splits(manifest)),
        ("Lengths", _lengths(manifest.splits)),
        ("Residues", _composition(manifest.splits.values())),
        ("Leakage between splits", _leakage(manifest)),
        ("Left out and repaired", _left_out(manifest)),
        ("Sources", _sources(manifest)),
        ("Options", _options(manifest)),
    ]
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in warnings_of(manifest))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>Protein dataset</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Protein dataset</h1>",
            '<p class="soft">Made by <code>protlm prep</code>.</p>',
            f'<ul class="warnings">{warnings}</ul>' if warnings else "",
            *(f"<section>\n<h2>{heading}</h2>\n{body}\n</section>" for heading, body in sections),
            "</body>\n</html>\n",
        ]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1, last: str = "number") -> str:
    """Returns an HTML table: `texts` columns of text, then numbers; `last` is the class of the last column."""
    classes = ["name"] * texts + ["number"] * (len(header) - texts)
    classes[-1] = last
    lines = ["".join(f'<th class="{kind}">{escape(cell)}</th>' for kind, cell in zip(classes, header, strict=True))]
    lines += [
        "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(classes, row, strict=True))
        for row in rows
    ]
    return '<div class="wide"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def _percent(count: int, total: int) -> str:
    if not total:
        return "–"
    return "< 0.01 %" if 0 < count < total / 10_000 else f"{100 * count / total:.2f} %"


def _splits(manifest: Manifest) -> str:
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
    header = ("split", "records", "share", "residues", "median length", "p99 length", "longest", "shards")
    return _table(header, rows)


def _lengths(splits: Mapping[SplitName, SplitSummary]) -> str:
    """Returns the histogram of lengths on a logarithmic axis; each split as shares of its own records."""
    filled = {name: split for name, split in splits.items() if split.num_records}
    ends = (*LENGTH_BIN_STARTS[1:], round(LENGTH_BIN_STARTS[-1] * 2**0.25))
    used = [place for place in range(len(ends)) if any(split.length_histogram[place] for split in filled.values())]
    if not used:
        return "<p>There are no records.</p>"
    first, last = used[0], used[-1]
    low, high = math.log2(LENGTH_BIN_STARTS[first]), math.log2(ends[last])

    def across(length: float) -> float:
        return _LEFT + (math.log2(length) - low) / (high - low) * (_RIGHT - _LEFT)

    # Lengths are whole numbers, so bins differ in width on the axis; heights are scaled to a quarter of a doubling.
    heights = {
        name: [
            split.length_histogram[place] / split.num_records / (4 * math.log2(ends[place] / LENGTH_BIN_STARTS[place]))
            for place in range(first, last + 1)
        ]
        for name, split in filled.items()
    }
    peak = max(max(values) for values in heights.values())
    ticks = [tick for tick in _TICKS if LENGTH_BIN_STARTS[first] <= tick <= ends[last]]
    elements = _length_axes(ticks, across, peak)
    for number, (name, values) in enumerate(heights.items()):
        path = f"M{_LEFT:.1f} {_BOTTOM:.1f}"
        for place, value in enumerate(values, start=first):
            path += f" V{_BOTTOM - value / peak * (_BOTTOM - _TOP):.1f} H{across(ends[place]):.1f}"
        key = _LEFT + 110 * number
        elements.append(f'<path class="line {name}" d="{path} V{_BOTTOM:.1f}"><title>{name}</title></path>')
        elements.append(
            f'<path class="line {name}" d="M{key:.1f} 12 h30"/><text x="{key + 36:.1f}" y="16">{name}</text>'
        )
    return (
        "<p>How long the proteins are. All curves enclose the same area, whatever the size of their split.</p>\n"
        f'<svg viewBox="0 0 800 310" role="img" aria-label="Histogram of lengths by split">{"".join(elements)}</svg>'
    )


def _length_axes(ticks: Sequence[int], across: Callable[[float], float], peak: float) -> list[str]:
    """Returns the lines and labels of the axes: lengths at the bottom, shares on the left."""
    elements = []
    step = next(step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if peak <= 6 * step)
    for number in range(math.floor(peak / step + 1e-9) + 1):
        height = _BOTTOM - number * step / peak * (_BOTTOM - _TOP)
        elements.append(f'<path class="grid" d="M{_LEFT:.1f} {height:.1f} H{_RIGHT:.1f}"/>')
        label = f"{100 * number * step:g} %"
        elements.append(f'<text class="soft" x="{_LEFT - 6:.1f}" y="{height + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in ticks:
        place = across(tick)
        elements.append(f'<path class="grid" d="M{place:.1f} {_BOTTOM:.1f} v5"/>')
        elements.append(
            f'<text class="soft" x="{place:.1f}" y="{_BOTTOM + 18:.1f}" text-anchor="middle">{tick:,}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    elements.append(
        f'<text class="soft" x="{middle:.1f}" y="{_BOTTOM + 36:.1f}" text-anchor="middle">'
        "residues; height: share of the records of the split, for a quarter of a doubling in length</text>"
    )
    return elements


def _composition(splits: Iterable[SplitSummary]) -> str:
    """Returns the shares of the 20 standard residues beside those in Swiss-Prot, as bars and numbers."""
    filled = [split.residue_counts for split in splits if split.num_residues]
    counts = {letter: sum(split_counts[letter] for split_counts in filled) for letter in vocabulary.RESIDUES}
    total = sum(counts.values())
    if not total:
        return "<p>There are no residues.</p>"
    shares = {letter: 100 * counts[letter] / total for letter in SWISS_PROT_PERCENT}
    widest = max(*shares.values(), *SWISS_PROT_PERCENT.values())
    scale, row = 560 / widest, 26
    elements = [
        '<rect class="own" x="24" y="4" width="12" height="10"/><text x="42" y="13">this dataset, %</text>'
        '<rect class="reference" x="164" y="4" width="12" height="10"/>'
        f'<text x="182" y="13">Swiss-Prot {SWISS_PROT_RELEASE}, %; right: difference</text>'
    ]
    for number, letter in enumerate(sorted(SWISS_PROT_PERCENT, key=lambda letter: -SWISS_PROT_PERCENT[letter])):
        own, reference, y = shares[letter], SWISS_PROT_PERCENT[letter], 26 + row * number
        # No sign on a difference that rounds to zero.
        difference = f"{round(own - reference, 2) or 0.0:+.2f}"
        elements.append(
            f'<text x="4" y="{y + 15}">{letter}</text>'
            f'<rect class="own" x="24" y="{y}" width="{own * scale:.1f}" height="10"/>'
            f'<rect class="reference" x="24" y="{y + 11}" width="{reference * scale:.1f}" height="10"/>'
            f'<text x="{30 + max(own, reference) * scale:.1f}" y="{y + 15}">{own:.2f}'
            f'<tspan class="soft"> / {reference:.2f}</tspan></text>'
            f'<text class="soft" x="790" y="{y + 15}" text-anchor="end">{difference}</text>'
        )
    others = ", ".join(f"{counts[letter]:,} {letter}" for letter in counts if letter not in SWISS_PROT_PERCENT)
    return (
        "<p>All splits together, beside UniProtKB/Swiss-Prot as its release statistics give it "
        f"(release {SWISS_PROT_RELEASE}). Other letters: {others}.</p>\n"
        f'<svg viewBox="0 0 800 {26 + row * len(shares)}" role="img" aria-label="Residue composition">'
        f"{''.join(elements)}</svg>"
    )


def _leakage(manifest: Manifest) -> str:
    """Returns the overlaps between splits, and what they mean for scores."""
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
    paragraphs = [
        "<p>A score on a held-out split means what it says only if training tells nothing of that split. "
        f"Records left out because an earlier split has the same sequence: {leakage.exact_duplicates_removed:,}; "
        "no sequence stands in two splits.</p>"
    ]
    if leakage.substrings is None:
        paragraphs.append("<p>Sequences that are part of longer ones were not looked for.</p>")
    else:
        paragraphs.append(
            "<p>A sequence inside a longer one, such as a fragment, can be recalled instead of predicted. Sequences of "
            f"fewer than {MIN_LENGTH} residues were not looked for.</p>"
        )
    if leakage.clusters is not None:
        paragraphs.append(
            "<p>A cluster on both sides means close relatives of the same protein on both sides: scores there tell how "
            "well a model knows families that it was trained on.</p>"
        )
    if leakage.families is not None:
        paragraphs.append(
            "<p>Families on both sides are to be expected unless they were held out, and also then for proteins with "
            "domains of several families.</p>"
        )
    paragraphs.append(_table(("found", "count", "share"), rows) if rows else "")
    paragraphs.append('<p class="soft">Other likeness between sequences is not looked for.</p>')
    return "\n".join(paragraphs)


def _left_out(manifest: Manifest) -> str:
    removed = manifest.duplicates_removed
    rows = [
        ("records", "sequence already in the same split", removed.within_split),
        ("records", "sequence already in an earlier split", removed.across_splits),
        *(("records", reason.replace("_", " "), count) for reason, count in manifest.rejects.items()),
        *(("letters repaired", rule.replace("_", " "), count) for rule, count in manifest.repairs.items()),
    ]
    return _table(("what", "why", "count"), [(what, why, f"{count:,}") for what, why, count in rows], texts=2)


def _sources(manifest: Manifest) -> str:
    rows = [
        (source.name, source.role, source.format, f"{source.num_records:,}", source.sha256)
        for source in manifest.sources
    ]
    return _table(("file", "part", "format", "records read", "sha256"), rows, texts=3, last="code")


def _options(manifest: Manifest) -> str:
    rows = []
    for option, value in manifest.options.model_dump().items():
        if isinstance(value, dict):
            value = f"{value['name']}, sha256 {value['sha256']}"
        elif isinstance(value, tuple):
            value = ", ".join(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        rows.append((option.replace("_", " "), "–" if value in (None, "") else str(value)))
    return _table(("option", "value"), rows, last="name")
