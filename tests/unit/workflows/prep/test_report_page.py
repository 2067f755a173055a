import json
import re

import numpy as np
import pytest

from protlm import vocabulary
from protlm.data.parsing.reader import read_records
from protlm.data.storage.manifest import (
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
from protlm.workflows.prep.multiqc_row import render_multiqc
from protlm.workflows.prep.report_page import (
    SWISS_PROT_PERCENT,
    length_histogram,
    looks_like_dna,
    render_report,
    warnings_of,
)
from tests.unit.workflows.pages.html_page import ReadPage, assert_distinct_ids, assert_self_contained, rows_of


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
        "sources": (SourceSummary(role="input", name="a.fasta", format="fasta", num_records=9, sha256="ab" * 32),),
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


def test_the_sections_have_their_order(manifest):
    titles = re.findall("<h2>(.*?)</h2>", render_report(manifest))
    assert titles == ["Splits", "Lengths", "Residues", "Leakage between splits", "Left out and repaired", "Sources",
                      "Options"]  # fmt: skip


def test_the_page_shows_all_counts(manifest):
    page = render_report(manifest)
    assert "<dt>residues</dt><dd>5,365</dd>" in page
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
    assert "split &#39;test&#39; is empty" in page


def test_the_page_needs_no_other_file_and_no_script(manifest):
    page = render_report(manifest)
    assert_self_contained(page)
    assert_distinct_ids(page)


def test_names_from_users_are_shown_as_text(manifest):
    evil = "<script>alert('x')</script>&\"'"
    source = SourceSummary(role="input", name=evil, format="fasta", num_records=1, sha256="0" * 64)
    options = manifest.options.model_copy(update={"ood_families": (evil,)})
    changes = {"sources": (source,), "options": options, "rejects": {evil: 1}}
    page = render_report(manifest.model_copy(update=changes))
    assert "<script" not in page
    read = ReadPage(page)
    assert read.words.count(evil) == 3  # source, option and reason
    assert "script" not in {tag for tag, _ in read.tags}


def test_the_same_manifest_gives_the_same_page(manifest):
    again = Manifest.model_validate_json(manifest.model_dump_json(by_alias=True))
    assert render_report(manifest) == render_report(again)


def test_the_curves_of_all_splits_have_the_same_area(manifest):
    histogram = length_histogram(manifest.splits)
    assert histogram.heights.keys() == {"train", "valid"}
    for heights in histogram.heights.values():
        assert np.dot(heights, 4 * np.diff(np.log2(histogram.edges))) == pytest.approx(100)
    assert {name: sum(counts) for name, counts in histogram.counts.items()} == {"train": 4, "valid": 1}
    assert histogram.edges[0] == 1
    assert histogram.edges[-2] <= 5_000 < histogram.edges[-1]


def test_every_split_with_records_is_drawn_and_named(manifest):
    page = render_report(manifest)
    figure = page[page.index("<figure>") : page.index("</figure>")]
    labels = re.findall("<text[^>]*>(.*?)</text>", figure)
    assert {"train", "valid", "1", "10", "100", "1,000", "length, residues (logarithmic)"} <= set(labels)
    assert "test" not in labels
    assert "stroke: var(--valid)" in figure
    assert "Half of the train records have at most 60 residues, and one in a hundred has 5,000 or more" in figure
    assert ["4", "0", "1"] in rows_of(figure)
    assert ["54 to 63", "1", "0"] in rows_of(figure)


@pytest.mark.parametrize(("sequences", "row"), [(("M",), ["1", "1"]), (("M", "W" * 200_000), ["110,218 or more", "1"])])
def test_lengths_at_both_ends_of_the_scale_are_drawn(sequences, row):
    page = render_report(manifest_of({"train": split_of(*sequences)}))
    assert row in rows_of(page)
    view = page[page.index("<svg") : page.index("</svg>")]
    path = re.search(r'<path d="([^"]*)" [^>]*stroke: var\(--train\)', view)[1]
    width, height = map(float, re.search('viewBox="0 0 (.*?) (.*?)"', view).groups())
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-0-9.]+) ([-0-9.]+)", path)]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert max(y for _, y in points) - min(y for _, y in points) > height / 2


def test_composition_stands_beside_that_of_swiss_prot():
    page = render_report(manifest_of({"train": split_of("L" * 30 + "W" * 10 + "X" * 10)}))
    rows = [row for row in rows_of(page) if len(row[0]) == 1 and row[0].isalpha()]
    assert len(rows) == 20
    assert rows[0] == ["L", "60.00", "9.64", "+50.36"]
    assert rows[1] == ["A", "0.00", "8.25", "-8.25"]
    assert "The largest difference from Swiss-Prot is that of L: 60.00 % here, 9.64 % there." in page
    assert "Other letters: 10 X, 0 B, 0 U, 0 Z, 0 O." in page


def test_bars_of_the_composition_are_to_scale():
    page = render_report(manifest_of({"train": split_of("L" * 30 + "W" * 10)}))
    bars = re.findall(
        r'<path d="M ([0-9.]+) ([0-9.]+) L [^ ]+ [^ ]+ L [^ ]+ ([0-9.]+) [^"]*" [^>]*fill: var\(--all\)', page
    )
    heights = [float(bottom) - float(top) for _, bottom, top in bars[:20]]
    assert len(heights) == 20
    assert heights[0] == pytest.approx(3 * heights[19], rel=0.01)
    assert heights[0] > 50
    assert heights[1:19] == [0.0] * 18


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


def test_multiqc_gets_a_row_of_counts_named_after_the_first_source(manifest):
    content = json.loads(render_multiqc(manifest))
    assert content["plot_type"] == "generalstats"
    assert content["data"] == {
        "a": {
            "protlm_records": 5, "protlm_residues": 5_365, "protlm_median_length": 60, "protlm_train": 4,
            "protlm_valid": 1, "protlm_test": 0, "protlm_duplicates": 40, "protlm_rejects": 31,
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "sample"),
    [
        (["uniref50.fasta.gz"], "uniref50"), (["a.b.xml.zst", "c"], "a.b and 1 more"), (["-"], "-"),
        (["x.fa.bz2", "y", "z"], "x and 2 more"), (["plain"], "plain"), (["sp.2024.dat"], "sp.2024"),
    ],
)  # fmt: skip
def test_the_name_for_multiqc_is_that_of_the_source_without_its_endings(manifest, names, sample):
    sources = tuple(
        SourceSummary(role="input", name=name, format="fasta", num_records=1, sha256="0" * 64) for name in names
    )
    content = json.loads(render_multiqc(manifest.model_copy(update={"sources": sources})))
    assert list(content["data"]) == [sample]


def test_a_dataset_without_records_has_a_row_without_a_median():
    content = json.loads(render_multiqc(manifest_of({"train": split_of()})))
    assert "protlm_median_length" not in content["data"]["a"]


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
    manifest = manifest_of({"train": split_of("ACGT" * 300, "ACG"), "valid": split_of()}, leakage=leakage)
    assert warnings_of(manifest) == [
        "split 'train' looks like DNA: 100 % of its letters are A, C, G, T, U or N; protlm takes protein sequences, "
        "so translate it first",
        "split 'valid' is empty: the dataset is too small for its fraction, 0.01; raise --valid-fraction or give more "
        "proteins",
        "3 clusters have records in both train and test; --split cluster keeps clusters whole",
    ]


def test_a_split_of_one_protein_and_empty_ones_of_which_nothing_was_asked_for_are_warned_of():
    manifest = manifest_of({"train": split_of("MKV" * 9, "MKWLL"), "valid": split_of("MKVW"), "test": split_of()})
    of_one = "split 'valid' is a single protein, which says nothing about others"
    assert warnings_of(manifest) == [
        of_one,
        "split 'test' is empty: the dataset is too small for its fraction, 0.01; raise --test-fraction or give more "
        "proteins",
    ]
    for fraction in (None, 0.0):
        changes = {"valid_fraction": fraction, "test_fraction": fraction}
        options = manifest.options.model_copy(update=changes)
        assert warnings_of(manifest.model_copy(update={"options": options})) == [of_one, "split 'test' is empty"]


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
