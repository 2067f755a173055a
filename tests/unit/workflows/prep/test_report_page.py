import re
from html.parser import HTMLParser

import numpy as np
import pytest

from protlm import vocabulary
from protlm.data.parsing.reader import read_records
from protlm.data.storage.dataset import (
    LENGTH_BIN_STARTS,
    LENGTH_QUANTILES,
    Contained,
    DuplicatesRemoved,
    Leakage,
    Manifest,
    PrepOptions,
    ShardSummary,
    Shared,
    SourceSummary,
    SplitSummary,
)
from protlm.workflows.prep.report_page import SWISS_PROT_PERCENT, looks_like_dna, render_report, warnings_of


def split_of(*sequences):
    """Returns the summary of a split with these sequences."""
    lengths = np.array([len(text) for text in sequences], dtype=np.int64)
    histogram = np.zeros(len(LENGTH_BIN_STARTS), dtype=np.int64)
    np.add.at(histogram, np.searchsorted(LENGTH_BIN_STARTS, lengths, side="right") - 1, 1)
    shard = ShardSummary(
        name="train-00000.h5", num_records=max(1, len(lengths)), num_residues=max(1, int(lengths.sum())),
        checksum="0" * 32,
    )  # fmt: skip
    text = "".join(sequences)
    return SplitSummary(
        num_records=len(lengths),
        num_residues=len(text),
        residue_counts={letter: text.count(letter) for letter in vocabulary.RESIDUES},
        length_quantiles={
            name: int(np.quantile(lengths, q, method="inverted_cdf")) for name, q in LENGTH_QUANTILES.items()
        }
        if len(lengths)
        else {},
        length_histogram=tuple(histogram.tolist()),
        shards=(shard,) if len(lengths) else (),
    )


def manifest_of(splits, **changes):
    content = {
        "format": "protlm-dataset",
        "format_version": 2,
        "vocabulary": vocabulary.TOKENS,
        "sources": (SourceSummary(part="input", name="a.fasta", format="fasta", num_records=9, sha256="ab" * 32),),
        "options": PrepOptions(
            split="random", seed=1, valid_fraction=0.01, test_fraction=0.01, min_length=1, max_length=None,
            dedupe=True, on_bad_record="skip", shard_residues=100,
        ),
        "splits": splits,
        "duplicates_removed": DuplicatesRemoved(within_split=17, across_splits=23),
        "leakage": Leakage(exact_duplicates_removed=23, substrings=None, clusters=None, families=None),
        "rejects": {"illegal_character": 31},
        "repairs": {"lower_case": 1_234_567},
    }  # fmt: skip
    return Manifest(**(content | changes))


@pytest.fixture
def manifest():
    train = split_of("MKV" * 100, "ACDEFGHIKLMNPQRSTVWY" * 3, "M", "W" * 5_000)
    return manifest_of({"train": train, "valid": split_of("MKVW"), "test": split_of()})


class Page(HTMLParser):
    """The text and the tags of a page, all of which must be closed in order."""

    def __init__(self, page):
        super().__init__()
        self.words, self.tags, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text.strip())


def rows_of(page):
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page) if "<td" in row]


def test_the_page_shows_all_counts(manifest):
    page = render_report(manifest)
    rows = rows_of(page)
    assert ["train", "4", "80.00 %", "5,361", "60", "5,000", "5,000", "1"] in rows
    assert ["valid", "1", "20.00 %", "4", "4", "4", "4", "1"] in rows
    assert ["test", "0", "0.00 %", "0", "–", "–", "–", "0"] in rows
    assert ["records", "sequence already in the same split", "17"] in rows
    assert ["records", "sequence already in an earlier split", "23"] in rows
    assert ["records", "illegal character", "31"] in rows
    assert ["letters repaired", "lower case", "1,234,567"] in rows
    assert ["a.fasta", "input", "fasta", "9", "ab" * 32] in rows
    assert ["on bad record", "skip"] in rows
    assert ["max length", "–"] in rows
    assert "split &#x27;test&#x27; is empty" in page


def test_the_page_needs_no_other_file_and_no_script(manifest):
    page = render_report(manifest)
    tags = {tag for tag, _ in Page(page).tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use", "base"}
    assert not re.search(r"https?:|url\(|@import|\son\w+=", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_names_from_users_are_shown_as_text(manifest):
    evil = "<script>alert('x')</script>&\"'"
    source = SourceSummary(part="input", name=evil, format="fasta", num_records=1, sha256="0" * 64)
    options = manifest.options.model_copy(update={"ood_families": (evil,)})
    changes = {"sources": (source,), "options": options, "rejects": {evil: 1}}
    page = render_report(manifest.model_copy(update=changes))
    assert "<script" not in page
    read = Page(page)
    assert read.words.count(evil) == 3  # source, option and reason
    assert "script" not in {tag for tag, _ in read.tags}


def test_the_same_manifest_gives_the_same_page(manifest):
    again = Manifest.model_validate_json(manifest.model_dump_json(by_alias=True))
    assert render_report(manifest) == render_report(again)


def path_of(page, split):
    match = re.search(rf'<path class="line {split}" d="M([0-9.]+) ([0-9.]+)((?: [VH][0-9.]+)+)"><title>', page)
    assert match is not None
    x, bottom, area, top = float(match[1]), float(match[2]), 0.0, None
    for step, value in re.findall(r"([VH])([0-9.]+)", match[3]):
        if step == "H":
            area += (float(value) - x) * (bottom - top)
            x = float(value)
        else:
            top = float(value)
            assert top <= bottom
    return x, area


def test_every_split_has_a_curve_of_the_same_area_within_the_picture(manifest):
    page = render_report(manifest)
    assert 'class="line test"' not in page
    (train_end, train), (valid_end, valid) = path_of(page, "train"), path_of(page, "valid")
    assert train_end == valid_end == 790.0
    assert train == pytest.approx(valid, rel=0.02)
    assert train > 100


@pytest.mark.parametrize("sequences", [("M",), ("M", "W" * 200_000)])
def test_lengths_at_both_ends_of_the_scale_are_drawn(sequences):
    page = render_report(manifest_of({"train": split_of(*sequences)}))
    assert path_of(page, "train")[1] > 0
    assert all(-1 <= float(x) <= 800 for x in re.findall(r' x="([^"]*)"', page))


def test_composition_is_drawn_to_scale_beside_swiss_prot(manifest):
    page = render_report(manifest_of({"train": split_of("L" * 30 + "W" * 10 + "X" * 10)}))
    bars = re.findall(r'<text x="4" y="\d+">(\w)</text><rect class="own" x="24" y="\d+" width="([0-9.]+)"', page)
    widths = {letter: float(width) for letter, width in bars}
    assert len(widths) == 20
    assert widths["L"] == pytest.approx(3 * widths["W"], rel=0.01)
    assert widths["A"] == 0
    assert '60.00<tspan class="soft"> / 9.64</tspan>' in page
    assert "+50.36</text>" in page
    assert "Other letters: 10 X, 0 B, 0 U, 0 Z, 0 O." in page


def test_a_dataset_without_any_record_still_has_a_page():
    page = render_report(manifest_of({"train": split_of()}))
    assert "There are no records." in page
    assert "There are no residues." in page


def test_leaks_are_shown_with_their_share(manifest):
    leakage = Leakage(
        exact_duplicates_removed=23,
        substrings=(
            Contained(inner="valid", outer="train", num_records=1),
            Contained(inner="train", outer="valid", num_records=0),
        ),
        clusters=(Shared(first="train", second="valid", num_labels=1_041),),
        families=(Shared(first="train", second="valid", num_labels=5),),
    )
    page = render_report(manifest.model_copy(update={"leakage": leakage}))
    rows = rows_of(page)
    assert ["valid sequences inside longer ones of train", "1", "100.00 % of valid"] in rows
    assert ["train sequences inside longer ones of valid", "0", "0.00 % of train"] in rows
    assert ["clusters in both train and valid", "1,041", ""] in rows
    assert ["families in both train and valid", "5", ""] in rows
    assert "fewer than 12 residues were not looked for" in page
    assert "1,041 clusters have records in both train and valid" in page
    without = render_report(manifest)
    assert "Sequences that are part of longer ones were not looked for." in without
    assert "clusters in both" not in without


def test_a_share_that_rounds_to_zero_is_not_shown_as_zero():
    train = split_of(*["MKV"] * 20_001)
    leakage = Leakage(
        exact_duplicates_removed=0, clusters=None, families=None,
        substrings=(Contained(inner="train", outer="valid", num_records=1),),
    )  # fmt: skip
    page = render_report(manifest_of({"train": train, "valid": split_of("MKVA")}, leakage=leakage))
    assert ["train sequences inside longer ones of valid", "1", "&lt; 0.01 % of train"] in rows_of(page)


def counts_of(text):
    return {letter: text.count(letter) for letter in vocabulary.RESIDUES}


def test_nucleotides_look_like_dna_and_proteins_do_not():
    assert looks_like_dna(counts_of("ACGT" * 250))
    assert looks_like_dna(counts_of("ACGU" * 240 + "N" * 40))
    assert looks_like_dna(counts_of("ACGT" * 240 + "RYKM" * 10))
    assert not looks_like_dna(counts_of("ACGT" * 230 + "RYKM" * 20))
    assert not looks_like_dna(counts_of("ACGT" * 249))
    assert not looks_like_dna(counts_of(""))
    assert not looks_like_dna(counts_of("ACDEFGHIKLMNPQRSTVWY" * 100))


def test_warnings_name_dna_empty_splits_and_clusters_on_both_sides():
    leakage = Leakage(
        exact_duplicates_removed=0, substrings=None, families=None,
        clusters=(
            Shared(first="train", second="valid", num_labels=0), Shared(first="train", second="test", num_labels=3),
        ),
    )  # fmt: skip
    manifest = manifest_of({"train": split_of("ACGT" * 300), "valid": split_of()}, leakage=leakage)
    assert warnings_of(manifest) == [
        "split 'train' looks like DNA: 100 % of its letters are A, C, G, T, U or N; protlm takes protein sequences, "
        "so translate it first",
        "split 'valid' is empty",
        "3 clusters have records in both train and test; --split cluster keeps clusters whole",
    ]


def counts_of_file(path):
    return counts_of("".join(record.sequence for record in read_records(path)))


def test_no_file_of_proteins_looks_like_dna(protein_file):
    for name in ("swissprot_sample.fasta.gz", "pfam_sample.fasta.gz", "families/held.fasta.gz"):
        assert not looks_like_dna(counts_of_file(protein_file(name))), name


def test_no_real_protein_file_looks_like_dna_and_swiss_prot_has_its_published_composition(shared_data):
    swiss_prot = counts_of("")
    for path in sorted(shared_data.glob("*/*.fasta.gz")):
        counts = counts_of_file(path)
        assert not looks_like_dna(counts), path
        if path.parent.name == "swissprot":
            swiss_prot = {letter: swiss_prot[letter] + counts[letter] for letter in counts}
    total = sum(swiss_prot.values())
    for letter, percent in SWISS_PROT_PERCENT.items():
        assert 100 * swiss_prot[letter] / total == pytest.approx(percent, abs=0.3), letter
