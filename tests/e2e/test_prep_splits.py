"""Splits by cluster, by family and by a file, and what is told of leaks between them."""

import gzip
import math
from collections import Counter

import numpy as np
import pytest

from protlm import vocabulary
from protlm.cli.app import main
from protlm.data.splits import PFAM_20
from protlm.data.storage.dataset import open_dataset
from protlm.errors import UsageError
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare
from tests.e2e.prep_tools import error_line, ids, run_json

LETTERS = vocabulary.RESIDUES[:20]
FRACTIONS = {"valid_fraction": 0.2, "test_fraction": 0.2}


def random_sequences(number, length=60, seed=0):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(LETTERS), length)) for _ in range(number)]


def write_fasta(path, names, sequences):
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in zip(names, sequences, strict=True)))
    return path


@pytest.fixture
def clustered(tmp_path):
    """300 proteins in 100 clusters of three, and the clusters as MMseqs2 writes them."""
    names = [f"p{number}" for number in range(300)]
    table = tmp_path / "clusters.tsv"
    table.write_text("".join(f"c{number % 100}\tp{number}\n" for number in range(300)))
    return write_fasta(tmp_path / "proteins.fasta", names, random_sequences(300)), table


def split_of_ids(out):
    manifest = open_dataset(out).manifest
    return {
        name: split for split, summary in manifest.splits.items() if summary.num_records for name in ids(out, split)
    }


def test_whole_clusters_go_to_one_split_each(clustered, tmp_path):
    fasta, table = clustered
    report = prepare(PrepRequest(inputs=[fasta], out=tmp_path / "out", split="cluster", clusters=table, **FRACTIONS))
    splits = split_of_ids(tmp_path / "out")
    assert len(splits) == 300
    for number in range(100):
        assert len({splits[f"p{number + step}"] for step in (0, 100, 200)}) == 1
    sizes = Counter(splits.values())
    for split in ("valid", "test"):
        assert abs(sizes[split] / 3 - 20) < 5 * math.sqrt(100 * 0.2 * 0.8)
    assert [pair.num_labels for pair in report.manifest.leakage.clusters] == [0, 0, 0]
    assert report.num_unclustered == 0
    shard = open_dataset(tmp_path / "out").split("train").shard(0)
    assert (shard.cluster_size == 3).all()
    assert all(f"c{int(shard.ids[index][1:]) % 100}" == shard.cluster_id[index] for index in range(shard.num_records))


def test_a_random_split_of_clustered_proteins_is_told_as_a_leak(clustered, tmp_path, capsys):
    fasta, table = clustered
    arguments = ("prep", fasta, "--out", tmp_path / "out", "--clusters", table, "--valid-fraction", "0.3")
    report = run_json(capsys, *arguments)
    pairs = {(pair["first"], pair["second"]): pair["num_labels"] for pair in report["leakage"]["clusters"]}
    assert pairs["train", "valid"] > 20


def test_records_in_no_cluster_are_told_and_drawn_for_themselves(clustered, tmp_path, capsys):
    fasta, table = clustered
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:200]))
    arguments = ["prep", str(fasta), "--out", str(tmp_path / "out"), "--split", "cluster", "--clusters", str(table)]
    message = error_line(capsys, *arguments)
    assert "100 of 300 records are in no cluster, such as 'p200'" in message
    assert "--unclustered random (each drawn for itself) or train" in message
    assert main([*arguments, "--unclustered", "random", "--valid-fraction", "0.3"]) == 0
    told = capsys.readouterr().err
    assert "warning: 100 records are in no cluster; each was drawn for itself" in told
    assert "clusters.tsv: 100 of 300 records have no cluster: the record 'p200' is not in it" in told
    splits = split_of_ids(tmp_path / "out")
    assert 10 < sum(splits[f"p{number}"] == "valid" for number in range(200, 300)) < 60
    assert main([*arguments, "--unclustered", "train", "--valid-fraction", "0.3", "--force"]) == 0
    assert "warning: 100 records are in no cluster; they are in train" in capsys.readouterr().err
    splits = split_of_ids(tmp_path / "out")
    assert {splits[f"p{number}"] for number in range(200, 300)} == {"train"}
    assert "valid" in splits.values()


def test_a_split_by_cluster_wants_clusters(clustered, tmp_path, capsys):
    message = error_line(capsys, "prep", clustered[0], "--out", tmp_path / "out", "--split", "cluster")
    assert "no record is in a cluster; give --clusters" in message


def test_the_split_of_a_cluster_depends_on_its_name_and_the_seed_alone(clustered, tmp_path):
    fasta, table = clustered
    prepare(PrepRequest(inputs=[fasta], out=tmp_path / "whole", split="cluster", clusters=table, **FRACTIONS))
    records = fasta.read_text().split(">")[1:]
    fasta.write_text("".join(f">{record}" for record in records[::-2]))
    prepare(PrepRequest(inputs=[fasta], out=tmp_path / "part", split="cluster", clusters=table, **FRACTIONS))
    prepare(PrepRequest(inputs=[fasta], out=tmp_path / "other", split="cluster", clusters=table, seed=1, **FRACTIONS))
    whole, part, other = (split_of_ids(tmp_path / name) for name in ("whole", "part", "other"))
    assert part.items() <= whole.items()
    assert not other.items() <= whole.items()


@pytest.mark.parametrize(
    ("name", "clusters"),
    [
        ("made_up_uniref50.xml", {"UniRef50_X9ZZA1": 4, "UniRef50_UPI00000000B1": 2}),
        ("uniref/50_Q9EPS7_Q95604.xml.gz", {"UniRef50_Q9EPS7": 64, "UniRef50_Q95604": 5423}),
    ],
)
def test_uniref_xml_brings_its_clusters(protein_file, name, clusters, tmp_path):
    request = PrepRequest(inputs=[protein_file(name)], out=tmp_path / "out", valid_fraction=0, test_fraction=0)
    prepare(request)
    shard = open_dataset(tmp_path / "out").split("train").shard(0)
    assert shard.ids.to_list() == shard.cluster_id.to_list() == list(clusters)
    assert shard.cluster_size.tolist() == list(clusters.values())


def test_the_entries_of_uniref_are_clusters_by_their_ids(tmp_path):
    sequences = random_sequences(40)
    fasta = write_fasta(tmp_path / "a.fasta", [f"UniRef50_A{number}" for number in range(40)], sequences)
    report = prepare(PrepRequest(inputs=[fasta], out=tmp_path / "one", split="cluster", **FRACTIONS))
    assert report.num_unclustered == 0
    # The name decides, not the sequence.
    write_fasta(fasta, [f"UniRef50_A{number}" for number in range(40)], sequences[::-1])
    prepare(PrepRequest(inputs=[fasta], out=tmp_path / "two", split="cluster", **FRACTIONS))
    assert split_of_ids(tmp_path / "one") == split_of_ids(tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "members", "cluster", "size"),
    [
        ("made_up_uniref50.xml", ["UniRef90_X9ZZA1", "tr|X9ZZI9|X9ZZI9_RAT"], "UniRef50_X9ZZA1", 4),
        ("uniref/50_Q9EPS7_Q95604.xml.gz", ["UniRef90_Q9EPS7", "tr|F6MB06|F6MB06_MOUSE"], "UniRef50_Q9EPS7", 64),
    ],
)
def test_members_are_found_in_the_clusters_of_uniref_xml(protein_file, name, members, cluster, size, tmp_path):
    fasta = write_fasta(tmp_path / "a.fasta", [*members, "elsewhere"], random_sequences(3))
    clusters = protein_file(name)
    prepare(PrepRequest(inputs=[fasta], out=tmp_path / "out", clusters=clusters, valid_fraction=0, test_fraction=0))
    shard = open_dataset(tmp_path / "out").split("train").shard(0)
    assert shard.cluster_id.to_list() == [cluster, cluster, ""]
    assert shard.cluster_size.tolist() == [size, size, -1]


@pytest.mark.parametrize("name", ["made_up.dat", "flatfile/uniprot_sample.dat.gz"])
def test_held_out_families_are_the_ood_split(protein_file, name, tmp_path, capsys):
    options = ("--split", "family", "--ood-family", "PF00069.25", "--on-bad-record", "skip")
    fractions = ("--valid-fraction", "0.1", "--test-fraction", "0")
    report = run_json(capsys, "prep", protein_file(name), "--out", tmp_path / "out", *options, *fractions)
    out = open_dataset(tmp_path / "out")
    assert report["options"]["ood_families"] == ["PF00069"]
    assert report["splits"]["ood"]["num_records"] > 0
    for name, summary in out.manifest.splits.items():
        for number in range(len(summary.shards)):
            families = out.split(name).shard(number).family.to_list()
            assert all(("PF00069" in family.split(";")) == (name == "ood") for family in families)
    pairs = {(pair["first"], pair["second"]): pair["num_labels"] for pair in report["leakage"]["families"]}
    # Other families of the kinases, such as InterPro's, do stand on both sides: that is what the table is for.
    assert ("train", "ood") in pairs


def test_families_from_a_file_and_the_paper_s_preset(tmp_path):
    fasta = write_fasta(tmp_path / "a.fasta", ["a", "b", "c", "d"], random_sequences(4))
    table = tmp_path / "families.tsv"
    table.write_text(f"# id\tfamily\na\t{PFAM_20[3]}.7\nb\tPF00001\nb\t{PFAM_20[0]}\nc\tPF00001\n")
    request = PrepRequest(
        inputs=[fasta], out=tmp_path / "out", split="family", families=table, ood_families=["paper-pfam-20"],
        valid_fraction=0, test_fraction=0,
    )  # fmt: skip
    report = prepare(request)
    assert ids(tmp_path / "out", "ood") == ["a", "b"]
    assert ids(tmp_path / "out", "train") == ["c", "d"]
    assert [(pair.first, pair.second, pair.num_labels) for pair in report.manifest.leakage.families] == [
        ("train", "ood", 1)
    ]


def test_a_copy_of_a_held_out_sequence_that_names_no_family_is_not_trained_on(tmp_path):
    (held, other) = random_sequences(2)
    fasta = write_fasta(tmp_path / "a.fasta", ["copy", "held", "other", "again"], [held, held, other, other])
    table = tmp_path / "families.tsv"
    table.write_text("held\tPF00001\n")
    request = PrepRequest(
        inputs=[fasta], out=tmp_path / "out", split="family", families=table, ood_families=["PF00001"],
        valid_fraction=0, test_fraction=0,
    )  # fmt: skip
    prepare(request)
    assert split_of_ids(tmp_path / "out") == {"held": "ood", "other": "train"}


def test_a_file_gives_each_record_its_split_and_others_are_left_out(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fasta", ["a", "sp|P1|B_X", "c", "d", "e"], random_sequences(5))
    table = tmp_path / "splits.tsv"
    table.write_text("a\ttrain\nP1\tvalid\nc\tood\nd\ttest\n")
    report = run_json(capsys, "prep", fasta, "--out", tmp_path / "out", "--split", "file", "--split-file", table)
    assert split_of_ids(tmp_path / "out") == {"a": "train", "sp|P1|B_X": "valid", "c": "ood", "d": "test"}
    assert report["rejects"] == {"not_in_split_file": 1}
    assert (tmp_path / "out" / "rejects.tsv").read_text().splitlines()[1:] == ["a.fasta\t9\te\tnot_in_split_file"]
    table.write_text("a\ttrain\nP1\tvalidation\n")
    assert f"{table}:2:" in error_line(
        capsys, "prep", fasta, "--out", tmp_path / "out2", "--split", "file", "--split-file", table
    )


def test_a_dataset_may_be_for_testing_only(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fasta", ["a", "b"], random_sequences(2))
    table = tmp_path / "splits.tsv"
    table.write_text("a\ttest\nb\ttest\n")
    arguments = ("prep", fasta, "--out", tmp_path / "out", "--split", "file", "--split-file", table)
    assert main([*map(str, arguments)]) == 0
    assert "warning: split 'train' is empty" in capsys.readouterr().err
    assert split_of_ids(tmp_path / "out") == {"a": "test", "b": "test"}
    assert "no records in split 'train'; it has test" in error_line(
        capsys, "train", tmp_path / "out", "--out", tmp_path / "run", "--config", "tiny"
    )


def test_equal_sequences_that_a_file_gives_to_two_splits_stay_in_the_earlier_one(tmp_path):
    fasta = write_fasta(tmp_path / "a.fasta", ["a", "b", "c"], ["MKVLAAGIV", "MKVLAAGIV", "WWWWW"])
    table = tmp_path / "splits.tsv"
    table.write_text("a\ttest\nb\ttrain\nc\ttest\n")
    report = prepare(PrepRequest(inputs=[fasta], out=tmp_path / "out", split="file", split_file=table))
    assert split_of_ids(tmp_path / "out") == {"b": "train", "c": "test"}
    assert report.manifest.leakage.exact_duplicates_removed == 1


def test_a_fragment_in_another_split_is_found(tmp_path, capsys):
    (whole, other) = random_sequences(2, 200)
    train = write_fasta(tmp_path / "train.fasta", ["a", "b"], [whole, other[50:90]])
    valid = write_fasta(tmp_path / "valid.fasta", ["c", "d"], [whole[20:70], other])
    report = run_json(capsys, "prep", train, "--valid-input", valid, "--out", tmp_path / "out")
    pairs = {(pair["inner"], pair["outer"]): pair["num_records"] for pair in report["leakage"]["substrings"]}
    assert pairs == {("train", "valid"): 1, ("valid", "train"): 1}
    assert (
        main(["prep", str(train), "--valid-input", str(valid), "--out", str(tmp_path / "o2"), "--no-check-leaks"]) == 0
    )
    assert open_dataset(tmp_path / "o2").manifest.leakage.substrings is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "family"}, "ood_families: wanted with split 'family'"),
        ({"ood_families": ["PF1"]}, "ood_families: wanted with split 'family', and only with it"),
        ({"split": "file"}, "split_file: wanted with split 'file'"),
        ({"split": "cluster", "valid_inputs": ["{fasta}"]}, "split: 'cluster' only without ready-made splits"),
        ({"valid_fraction": 0.1, "valid_inputs": ["{fasta}"]}, "valid_fraction: only without valid_inputs"),
        ({"unclustered": "train"}, "unclustered: only with split 'cluster'"),
    ],
)
def test_ways_to_split_that_contradict_each_other_are_wrong_usage(clustered, tmp_path, options, message):
    given = {name: [text.format(fasta=clustered[0]) for text in value] if name == "valid_inputs" else value
             for name, value in options.items()}  # fmt: skip
    with pytest.raises(UsageError, match=message):
        prepare(PrepRequest(inputs=[clustered[0]], out=tmp_path / "out", **given))


def test_clusters_may_be_compressed(clustered, tmp_path):
    fasta, table = clustered
    packed = tmp_path / "clusters.tsv.gz"
    packed.write_bytes(gzip.compress(table.read_bytes(), mtime=0))
    for name, path in (("plain", table), ("packed", packed)):
        prepare(PrepRequest(inputs=[fasta], out=tmp_path / name, split="cluster", clusters=path, **FRACTIONS))
    assert split_of_ids(tmp_path / "plain") == split_of_ids(tmp_path / "packed")


@pytest.mark.parametrize(
    ("ready_made", "options", "drawn"),
    [
        ("--test-input", ("--valid-fraction", "0.3"), {"valid"}),
        ("--valid-input", ("--test-fraction", "0.3"), {"test"}),
        ("--ood-input", ("--valid-fraction", "0.3", "--test-fraction", "0.3"), {"valid", "test"}),
        ("--ood-input", ("--test-fraction", "0.3"), {"test"}),
        ("--ood-input", (), set()),
    ],
)
def test_what_is_not_given_ready_made_is_drawn_from_the_input(tmp_path, capsys, ready_made, options, drawn):
    sequences = random_sequences(110)
    inputs = write_fasta(tmp_path / "a.fasta", [f"p{number}" for number in range(100)], sequences[:100])
    given = write_fasta(tmp_path / "b.fasta", [f"g{number}" for number in range(10)], sequences[100:])
    run_json(capsys, "prep", inputs, ready_made, given, "--out", tmp_path / "out", *options)
    splits = split_of_ids(tmp_path / "out")
    assert {splits[f"g{number}"] for number in range(10)} == {ready_made[2:].partition("-")[0]}
    sizes = Counter(splits[f"p{number}"] for number in range(100))
    assert set(sizes) == {"train"} | drawn
    assert all(10 < sizes[split] < 50 for split in drawn)
    # The draw is that of the same INPUT alone.
    run_json(capsys, "prep", inputs, "--out", tmp_path / "alone", "--valid-fraction", "0", "--test-fraction", "0",
             *options)  # fmt: skip
    assert split_of_ids(tmp_path / "alone").items() <= splits.items()


def test_a_family_that_no_record_has_cannot_be_held_out(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fasta", ["a", "b"], random_sequences(2))
    table = tmp_path / "families.tsv"
    table.write_text("a\tPF00001.3\nb\tPF00002\n")
    arguments = ["prep", fasta, "--out", tmp_path / "out", "--split", "family", "--families", table]
    message = error_line(capsys, *arguments, "--ood-family", "PF00001", "--ood-family", "PF00003")
    assert "no record has the family 'PF00003'; there are such as 'PF00001.3'" in message
    message = error_line(capsys, *arguments, "--ood-family", "PF00001", "--ood-family", "paper-pfam-20")
    assert "no record has the family 'paper-pfam-20'" in message
    message = error_line(capsys, *arguments[:6], "--ood-family", "PF00001")
    assert "no record has the family 'PF00001'; no record has a family: give --families" in message


@pytest.mark.parametrize(
    ("method", "option", "rows"),
    [
        ("cluster", "--clusters", "c\tHomo\nc\tx\n"),
        ("family", "--families", "Homo\tPF00001\n"),
        ("file", "--split-file", "Homo\ttrain\nx\ttest\n"),
    ],
)
def test_an_id_of_several_proteins_cannot_decide_their_split(tmp_path, capsys, method, option, rows):
    fasta = write_fasta(tmp_path / "a.fasta", ["Homo sapiens 1", "x", "Homo sapiens 2"], random_sequences(3))
    table = tmp_path / "labels.tsv"
    table.write_text(rows)
    arguments = ["prep", fasta, "--out", tmp_path / "out", "--split", method, option, table]
    arguments += ["--ood-family", "PF00001"] if method == "family" else []
    message = error_line(capsys, *arguments)
    assert f"{fasta}:5: another protein has the id 'Homo' too, and labels.tsv tells them apart by id" in message
    # A copy is the same protein.
    records = fasta.read_text().split(">")
    fasta.write_text(">".join([*records[:3], records[1]]))
    for options in ((), ("--no-dedupe", "--force")):
        assert main([*map(str, arguments), *options]) == 0


def test_an_id_of_several_proteins_whose_label_decides_nothing_is_told(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fasta", ["Homo sapiens 1", "x", "Homo sapiens 2"], random_sequences(3))
    table = tmp_path / "families.tsv"
    table.write_text("Homo\tPF00001\nx\tPF00002\n")
    assert main(["prep", str(fasta), "--out", str(tmp_path / "out"), "--families", str(table)]) == 0
    told = capsys.readouterr().err
    assert f"warning: {fasta}:5: another protein has the id 'Homo' too, and families.tsv gives both the same" in told
