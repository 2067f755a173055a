import bz2
import gzip
import hashlib
import random
import tracemalloc
from collections import defaultdict

import numpy as np
import pytest

from protlm.data.digests import digests_of
from protlm.data.labels import labels
from protlm.data.labels import rows as label_rows
from protlm.data.labels.labels import UNLABELLED, Labels, read_clusters, read_families, read_splits
from protlm.data.parsing import record_table as table
from protlm.data.parsing import sources
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.strings import Strings
from protlm.errors import ProtlmError, RecordError

CD_HIT = """\
>Cluster 0
0\t35aa, >A... at 97.14%
1\t120aa, >B|x... *
>Cluster 1
0\t90aa, >C...D... *
>Cluster 2
0\t80aa, >E... at 1:80:1:80/95.00%
1\t80aa, >F... *
"""

UNIREF = """<?xml version="1.0" encoding="ISO-8859-1" ?>
<UniRef50 xmlns="http://uniprot.org/uniref">
<entry id="UniRef50_P1">
<representativeMember><dbReference type="UniProtKB ID" id="P1_X">
<property type="UniProtKB accession" value="P1"/><property type="UniProtKB accession" value="OLD"/>
<property type="UniProtKB accession" value="OLD1"/><property type="UniRef90 ID" value="UniRef90_P1"/>
<property type="UniParc ID" value="UPI1"/></dbReference><sequence length="1">M</sequence></representativeMember>
<member><dbReference type="UniParc ID" id="UPI2"/></member>
</entry>
<entry id="UniRef50_P2">
<representativeMember><dbReference type="UniProtKB ID" id="P2_X">
<property type="UniProtKB accession" value="P2"/><property type="UniProtKB accession" value="OLD"/>
<property type="UniProtKB accession" value="P1"/></dbReference><sequence length="1">M</sequence></representativeMember>
</entry>
</UniRef50>
"""


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.tsv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(params=[1, 5, 64, 1 << 20])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(SourceBlocks, "block_bytes", request.param)
    # Plain text is not put together to look at it as a whole.
    monkeypatch.setattr(sources, "_MAGIC_BYTES", 1)
    monkeypatch.setattr(label_rows, "_HEAD_BYTES", 64)
    monkeypatch.setattr(labels, "_BATCH_ROWS", request.param)
    monkeypatch.setattr(label_rows, "_BATCH_ROWS", request.param)


def labels_of(table: Labels, *ids):
    numbers = table.lookup(Strings.of(ids), digests_of(name.encode() for name in ids))
    assert numbers.dtype == np.int64
    names = table.names(numbers).to_list()
    assert names == ["" if number == UNLABELLED else table.name(number) for number in numbers.tolist()]
    return names


def sizes(table: Labels):
    return dict(zip(table.names(np.arange(len(table))).to_list(), table.sizes.tolist(), strict=True))


def fault(read, path, kind=RecordError):
    with pytest.raises(kind) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.usefixtures("block_bytes")
def test_clusters_of_mmseqs_are_read_whatever_the_blocks_and_line_ends(write, line_end):
    text = "# comment\na\ta\na\tb\n\nc\tç\na\td\n# x\ty\n".replace("\n", line_end)
    clusters = read_clusters(write(text))
    assert labels_of(clusters, "b", "ç", "y", "d", "a", "c") == ["a", "c", "", "a", "a", ""]
    assert sizes(clusters) == {"a": 3, "c": 1}


@pytest.mark.usefixtures("block_bytes")
def test_clusters_of_cd_hit_are_named_by_their_representative(write):
    clusters = read_clusters(write(CD_HIT))
    assert labels_of(clusters, "A", "B|x", "C...D", "E", "F", "C") == ["B|x", "B|x", "C...D", "F", "F", ""]
    assert sizes(clusters) == {"B|x": 2, "C...D": 1, "F": 2}


@pytest.mark.usefixtures("block_bytes")
def test_clusters_of_uniref_xml_are_found_by_every_name_of_a_member(write):
    clusters = read_clusters(write(UNIREF))
    first = ("UniRef50_P1", "P1_X", "P1", "UniRef90_P1", "UPI1", "UPI2", "OLD1")
    assert labels_of(clusters, *first) == ["UniRef50_P1"] * len(first)
    assert labels_of(clusters, "P2", "P2_X") == ["UniRef50_P2"] * 2
    assert sizes(clusters) == {"UniRef50_P1": 2, "UniRef50_P2": 1}


def test_a_secondary_accession_of_two_clusters_names_neither_and_a_first_one_wins(write):
    assert labels_of(read_clusters(write(UNIREF)), "OLD", "P1") == ["", "UniRef50_P1"]


def test_several_families_of_an_id_are_joined_once_each_in_the_order_of_the_file(write):
    families = read_families(write("a\tPF2\nb\tPF1\na\tPF1\nc\tPF2\nc\tPF1\na\tPF2\nd\tPF1\nd\tPF1\n"))
    assert labels_of(families, "a", "b", "c", "d") == ["PF2;PF1", "PF1", "PF2;PF1", "PF1"]
    assert sizes(families) == {"PF2": 0, "PF1": 2, "PF2;PF1": 2}


def test_splits_are_read_and_a_repeated_row_counts_once(write):
    splits = read_splits(write("a\ttrain\nb\tood\na\ttrain\nc\ttest\nd\tvalid\n"))
    assert labels_of(splits, "a", "b", "c", "d") == ["train", "ood", "test", "valid"]
    assert sizes(splits) == {"train": 1, "ood": 1, "test": 1, "valid": 1}


def test_an_id_of_uniprot_is_found_whole_then_by_accession_then_by_entry_name(write):
    clusters = read_clusters(write("c1\tsp|P1|A_X\nc2\tP1\nc3\tA_X\nc4\tB_X\nc5\tP3\nc6\t\xe9|\n"))
    ids = ("sp|P1|A_X", "tr|P1|B_X", "sp|P2|B_X", "P3", "sp|P4|C_X", "pdb|P1|A", "sp|P1", "sp|P1|A_X|z", "é|")
    assert labels_of(clusters, *ids) == ["c1", "c2", "c4", "c5", "", "", "", "", "c6"]


@pytest.fixture(params=[None, 3], ids=["whole", "colliding"])
def digests(request, monkeypatch):
    """Digests whose high halves, in the second case, are almost all the same."""

    def colliding(texts):
        return table.digests_of(texts) % np.array([request.param, 1 << 63], dtype=np.uint64)

    function = colliding if request.param else table.digests_of
    monkeypatch.setattr(labels, "digests_of", function)
    return function


@pytest.mark.usefixtures("block_bytes")
def test_any_order_of_rows_gives_what_a_dictionary_gives_even_where_digests_nearly_collide(write, digests):
    draw = random.Random(5)
    rows = [(f"id{draw.randrange(300)}", f"F{draw.randrange(40)}") for _ in range(600)]
    expected = defaultdict(list)
    for name, family in rows:
        if family not in expected[name]:
            expected[name].append(family)
    families = read_families(write("".join(f"{name}\t{family}\n" for name, family in rows)))
    ids = [f"id{number}" for number in range(310)]
    numbers = families.lookup(Strings.of(ids), digests(name.encode() for name in ids))
    assert families.names(numbers).to_list() == [";".join(expected.get(name, [])) for name in ids]
    assert families.sizes.sum() == len(expected)


def test_a_file_knows_its_name_and_the_hash_of_its_bytes_on_disk(write):
    data = gzip.compress(b"a\tb\n", mtime=0)
    clusters = read_clusters(write(data, "x.tsv.gz"))
    assert (clusters.file_name, clusters.sha256) == ("x.tsv.gz", hashlib.sha256(data).hexdigest())
    assert labels_of(clusters, "b") == ["a"]


@pytest.mark.parametrize(
    ("read", "text", "line", "parts"),
    [
        (read_clusters, "a\tb\n#\nc\td\na\te\nc\tb\nx\td\n", 5, ["cluster 'c'", "by line 1", "cluster 'a'"]),
        (read_splits, "a\ttrain\nb\ttest\na\ttest\n", 3, ["split 'test'", "by line 1", "split 'train'"]),
        (read_clusters, CD_HIT.replace("F...", "A..."), 8, ["cluster 'A'", "by line 2", "cluster 'B|x'"]),
        (read_clusters, UNIREF.replace("P2_X", "UPI2"), 10, ["'UniRef50_P2'", "by line 3", "'UniRef50_P1'"]),
    ],
)
@pytest.mark.usefixtures("block_bytes")
def test_an_id_in_two_clusters_or_splits_is_an_error_that_names_both_and_their_lines(write, read, text, line, parts):
    error = fault(read, write(text))
    assert error.line == line
    assert error.reason == "two_labels"
    assert all(part in error.message for part in parts)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("read", [read_clusters, read_families, read_splits])
@pytest.mark.parametrize("row", ["a", "a\ttest\tx", "\ttest", "test\t", "a test", "\tx\t"])
@pytest.mark.usefixtures("block_bytes")
def test_a_row_of_other_than_two_fields_is_an_error_with_its_line(write, read, row, line_end):
    for above in ("test\ttest\n" * 9 + "\n# x\n", "test\ttest\n" * 9, ""):
        error = fault(read, write(f"{above}{row}\ntest\ttest\n".replace("\n", line_end)))
        assert (error.line, error.reason) == (above.count("\n") + 1, "malformed_row")


def test_the_first_of_several_ids_in_two_clusters_is_reported(write):
    text = "".join(f"c{number}\t{number % 50}\n" for number in range(100))
    assert fault(read_clusters, write(text)).line == 51


def test_an_unknown_split_is_an_error_with_its_line_and_a_header_is_no_exception(write):
    error = fault(read_splits, write("a\ttrain\n#\nb\ttraining\n"))
    assert (error.line, error.message) == (3, "expected one of train, valid, test, ood, got 'training'")
    assert fault(read_splits, write("id\tsplit\na\ttrain\n")).line == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (CD_HIT.replace(" *", " at 90%"), 3),
        (CD_HIT.replace("0\t90aa, >C...D... *", "0\t90aa, C"), 5),
        (CD_HIT[:-30], 7),
    ],
)
def test_a_cluster_file_of_cd_hit_that_is_not_understood_is_an_error_with_its_line(write, text, line):
    assert fault(read_clusters, write(text)).line == line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no rows"),
        (b"# only\n\n# comments", "no rows"),
        (b">Cluster 0\n", "no rows"),
        (b">a\nMKV\n", "FASTA"),
        (b"<uniprot><entry>", "UniProtKB XML"),
        (b"<html>", "<html>"),
        (b"<!DOCTYPE UniRef [<!ENTITY a 'b'>]><UniRef>", "document type definition"),
        (b"a\tb\n\0\0\n", "binary"),
        ("a\tb\n".encode("utf-16"), "UTF-16"),
        (gzip.compress(b"a\tb\n" * 50, mtime=0)[:-9], "end too early"),
        (bz2.compress(b"a\tb\n" * 50)[:-9], "end too early"),
        (UNIREF.replace("UniRef50_P2", "UniRef50_P1").encode(), "twice"),
    ],
)
def test_files_of_another_kind_and_damaged_ones_are_errors(write, data, message):
    assert message in str(fault(read_clusters, write(data), ProtlmError))


@pytest.mark.parametrize("data", [b"a\tb\nc\td\n", b">Cluster 0\n0\t9aa, >b... *\n>Cluster 1\n0\t9aa, >d... *\n"])
def test_byte_order_marks_before_a_file_and_where_files_were_joined_are_no_part_of_a_name(write, data):
    mark, lines = b"\xef\xbb\xbf", data.splitlines(keepends=True)
    joined = mark + b"".join(lines[: len(lines) // 2]) + mark + b"".join(lines[len(lines) // 2 :])
    ids = ["a", "b", "c", "d"]
    plain = labels_of(read_clusters(write(data)), *ids)
    assert plain[1] != plain[3]
    clusters = read_clusters(write(joined))
    assert labels_of(clusters, *ids) == plain
    assert (clusters.num_marks, read_clusters(write(data)).num_marks) == (2, 0)


def test_byte_order_marks_of_every_kind_of_label_file_are_counted(write, monkeypatch):
    mark = b"\xef\xbb\xbf"
    assert read_splits(write(mark + b"a\ttrain\n" + mark + b"b\ttest\n")).num_marks == 2
    assert read_families(write(b"a\tF\r\n" + mark + b"b\tF\r\n")).num_marks == 1
    assert read_clusters(write(mark + UNIREF.encode())).num_marks == 1
    # Wherever the blocks that are read end.
    monkeypatch.setattr(SourceBlocks, "block_bytes", 5)
    monkeypatch.setattr(label_rows, "_HEAD_BYTES", 5)
    assert read_families(write((mark + b"a\tF\n") * 9)).num_marks == 9


def test_xml_that_ends_in_the_middle_of_a_cluster_is_an_error_with_its_line(write):
    assert fault(read_clusters, write(UNIREF[:-60])).line == UNIREF[:-60].count("\n") + 1


def test_text_that_is_not_utf8_is_an_error_with_its_line(write):
    assert fault(read_clusters, write(b"a\tb\n\n\xff\tc\n")).line == 3


def test_a_line_without_end_does_not_fill_the_memory(write):
    assert "a line of more than" in str(
        fault(read_clusters, write(gzip.compress(b"a\tb\n" + bytes([65]) * (40 << 20), mtime=0)))
    )


def test_a_row_takes_few_bytes_once_read_and_while_it_is_read(write):
    path = write("".join(f"c{number // 9}\tmember{number}\n" for number in range(300_000)))
    tracemalloc.start()
    try:
        clusters = read_clusters(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(clusters) == 300_000 // 9 + 1
    assert held < 25 * 300_000
    assert peak < 100 * 300_000


@pytest.mark.parametrize(
    ("name", "num_members", "ids"),
    [
        (
            "made_up_uniref50.xml",
            {"UniRef50_X9ZZA1": 4, "UniRef50_UPI00000000B1": 2},
            {
                "UniRef50_X9ZZA1": (
                    "X9ZZB2",
                    "MADE1_HUMAN",
                    "sp|X9ZZA1|MADE1_HUMAN",
                    "tr|X9ZZH8|other",
                    "UPI00000000A3",
                ),
                "UniRef50_UPI00000000B1": ("UniRef90_UPI00000000B1", "UniRef100_X9ZZD4", "X9ZZD4_ECOLI"),
            },
        ),
        (
            "uniref/50_Q9EPS7_Q95604.xml.gz",
            {"UniRef50_Q9EPS7": 64, "UniRef50_Q95604": 5423},
            {
                "UniRef50_Q95604": ("Q95604", "1C17_HUMAN", "sp|Q95604|1C17_HUMAN", "tr|C9E8W1|other"),
                "UniRef50_Q9EPS7": ("UniRef90_Q9EPS7", "UPI00000244B2"),
            },
        ),
    ],
)
def test_uniref_clusters_are_found_by_accession_and_by_the_header_of_uniprot(protein_file, name, num_members, ids):
    clusters = read_clusters(protein_file(name))
    assert sizes(clusters) == num_members
    for cluster, members in ids.items():
        assert labels_of(clusters, *members) == [cluster] * len(members)
    assert labels_of(clusters, "P99999") == [""]
