import dataclasses
import gzip
import hashlib
import inspect
import json
import os
from pathlib import Path

import pytest

from protlm import files
from protlm.cli import prep as cli_prep
from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset
from protlm.errors import ProtlmError, UsageError
from protlm.workflows.prep import prepare as prep_workflow
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare
from tests.e2e.prep_tools import SAMPLE, digests, run_json, sequences


@pytest.fixture
def write(tmp_path):
    def write(name, *sequences, content=None):
        path = tmp_path / name
        text = "".join(f">{name}{number} n=2 TaxID=9606\n{sequence}\n" for number, sequence in enumerate(sequences))
        path.write_bytes(text.encode() if content is None else content)
        return str(path)

    return write


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "dataset")


def assert_fails(capsys, tmp_path, arguments, message):
    """Exit 1, one line on stderr that begins with error:, nothing on stdout, and nothing new on disk."""
    before = sorted(os.listdir(tmp_path))
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("error: ")
    assert message in told.err
    assert sorted(os.listdir(tmp_path)) == before


def test_the_sample_is_prepared_and_told_as_a_table(out, capsys):
    assert main(["prep", str(SAMPLE), "--out", out, "--valid-fraction", "0.1", "--test-fraction", "0.1"]) == 0
    told = capsys.readouterr()
    table = [line.split() for line in told.out.splitlines()]
    assert [row[0] for row in table[:4]] == ["split", "train", "valid", "test"]
    manifest = open_dataset(out).manifest
    counts = {name: split.num_records for name, split in manifest.splits.items()}
    assert [int(row[1].replace(",", "")) for row in table[1:4]] == list(counts.values())
    assert sum(counts.values()) == 2500
    assert 200 < counts["valid"] < 300
    assert told.err == ""
    assert manifest.sources[0].sha256 == hashlib.sha256(SAMPLE.read_bytes()).hexdigest()
    assert open_dataset(out).split("train").id(0).startswith("tr|")


@pytest.mark.parametrize("name", ["made_up_uniref.fasta", "uniref/uniref100_sample14k.fasta.gz"])
def test_uniref_headers_give_cluster_sizes_and_taxa(protein_file, name, out):
    assert main(["prep", str(protein_file(name)), "--out", out, "--max-length", "5000"]) == 0
    shard = open_dataset(out).split("train").shard(0)
    assert (shard.cluster_size > 0).all()
    assert (shard.taxon_id > 0).mean() > 0.9


def test_the_report_counts_what_is_in_the_manifest(write, out, capsys):
    path = write("a", "MKV*", "mkv", "MKVLAAGIV", "M", "MK1", "LLLLJ")
    arguments = ("--min-length", "2", "--max-length", "8", "--on-bad-record", "skip", "--valid-fraction", "0")
    report = run_json(capsys, "prep", path, "--out", out, *arguments, "--test-fraction", "0")
    assert report["path"] == out
    assert report["hash"] == open_dataset(out).hash
    assert report["splits"] == {
        "train": {"num_records": 2, "num_residues": 8, "median_length": 3, "p99_length": 5, "num_shards": 1}
    }
    assert (report["duplicates_within_split"], report["duplicates_across_splits"]) == (1, 0)
    assert report["repairs"] == {"j_to_x": 1, "lower_case": 3, "trailing_stop": 1}
    assert report["rejects"] == {"illegal_character": 1, "too_long": 1, "too_short": 1}
    assert report["leakage"] == {
        "exact_duplicates_removed": 0, "substrings": [], "clusters": None, "families": None,
    }  # fmt: skip
    assert report["sources"] == [
        {"part": "input", "name": "a", "format": "fasta", "num_records": 5,
         "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    ]  # fmt: skip
    manifest = open_dataset(out).manifest
    assert (manifest.rejects, manifest.repairs) == (report["rejects"], report["repairs"])
    assert manifest.duplicates_removed.within_split == 1
    assert manifest.splits["train"].residue_counts["L"] == 4
    assert manifest.options.model_dump() == {
        "split": "random",
        "seed": 0,
        "valid_fraction": 0.0,
        "test_fraction": 0.0,
        "min_length": 2,
        "max_length": 8,
        "dedupe": True,
        "on_bad_record": "skip",
        "shard_residues": 67_108_864,
        "ood_families": (),
        "clusters": None,
        "families": None,
        "split_file": None,
        "unclustered": None,
        "nucleotides": "keep",
    }


def test_repairs_rejects_and_duplicates_are_told(write, out, capsys):
    path = write("a", "MKV", "mkv", "MK1", "A", "MKW")
    fractions = ("--valid-fraction", "0", "--test-fraction", "0")
    assert main(["prep", path, "--out", out, "--on-bad-record", "skip", "--min-length", "2", *fractions]) == 0
    told = capsys.readouterr()
    for line in ("duplicates removed, within a split 1", "repaired letters, lower_case 3", "illegal_character 1"):
        assert line in " ".join(told.out.split())
    assert told.err == "warning: 2 records rejected: 1 illegal_character, 1 too_short\n"


def test_an_empty_split_that_was_asked_for_is_warned_of(write, out, capsys):
    assert main(["prep", write("a", "MKV", "MKW"), "--out", out, "--valid-input", write("v", "MKV")]) == 0
    told = capsys.readouterr()
    assert told.err == "warning: split 'valid' is empty\n"
    assert told.out.splitlines()[2].split() == ["valid", "0", "0", "-", "-"]
    assert sorted(os.listdir(out)) == ["manifest.json", "protlm_prep_mqc.json", "report.html", "train-00000.h5"]


def test_the_same_command_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        assert main(["prep", str(SAMPLE), "--out", str(tmp_path / name), "--shard-residues", "300000"]) == 0
    assert len(digests(tmp_path / "one")) > 5
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_split_depends_on_the_seed_and_the_sequence_alone(write, tmp_path):
    with gzip.open(SAMPLE) as file:
        records = file.read().removeprefix(b">").rstrip(b"\n").split(b"\n>")
    reordered = write("r", content=b"".join(b">" + record + b"\n" for record in records[::-1] if len(record) < 900))
    prepared = {}
    for name, path, seed in (("whole", str(SAMPLE), "0"), ("part", reordered, "0"), ("other", str(SAMPLE), "1")):
        out = str(tmp_path / name)
        assert main(["prep", path, "--out", out, "--valid-fraction", "0.2", "--seed", seed]) == 0
        prepared[name] = {split: set(sequences(out, split)) for split in ("train", "valid", "test")}
    for split in ("train", "valid", "test"):
        assert prepared["part"][split] <= prepared["whole"][split]
    assert not prepared["other"]["valid"] <= prepared["whole"]["valid"]


def test_a_sequence_stays_in_the_earliest_split_only(write, out, capsys):
    report = run_json(
        capsys,
        *("prep", write("a", "AAA", "CCC", "aaa"), "--out", out),
        *(
            "--ood-input",
            write("o", "AAA", "CCC", "DDD", "EEE", "FFF"),
            "--test-input",
            write("t", "CCC", "DDD", "EEE"),
        ),
        *("--valid-input", write("v", "AAA", "DDD"), "--valid-input", write("w", "DDD", "GGG")),
    )
    assert sequences(out, "train") == ["AAA", "CCC"]
    assert sequences(out, "valid") == ["DDD", "GGG"]
    assert sequences(out, "test") == ["EEE"]
    assert sequences(out, "ood") == ["FFF"]
    assert (report["duplicates_within_split"], report["duplicates_across_splits"]) == (2, 7)
    sources = [(source.role, source.name) for source in open_dataset(out).manifest.sources]
    assert sources == [("input", "a"), ("valid", "v"), ("valid", "w"), ("test", "t"), ("ood", "o")]


def test_no_dedupe_keeps_repeats_within_a_split_only(write, out, capsys):
    arguments = ("prep", write("a", "AAA", "AAA"), "--test-input", write("t", "AAA", "CCC", "CCC"), "--no-dedupe")
    report = run_json(capsys, *arguments, "--out", out)
    assert sequences(out, "train") == ["AAA", "AAA"]
    assert sequences(out, "test") == ["CCC", "CCC"]
    assert (report["duplicates_within_split"], report["duplicates_across_splits"]) == (0, 1)


def test_repeated_ids_are_numbered_over_all_files(write, out):
    first, second = write("1", content=b">a\nM\n>a\nMK\n"), write("2", content=b">a\nMKV\n>b\nMKW\n")
    assert main(["prep", first, second, "--out", out, "--valid-fraction", "0", "--test-fraction", "0"]) == 0
    split = open_dataset(out).split("train")
    assert [split.id(index) for index in range(4)] == ["a", "a#2", "a#3", "b"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", ":1: no records"),
        (b"MKV\n", ":1: expected FASTA"),
        (b">a\nMKV\n>b\n", ":3: record 'b' has no sequence"),
        (b">a\nMKV\nM7K\n", ":3: record 'a': illegal character '7' in column 2"),
        (b">a\nMKV\n>\nM\n", ":3: expected an id"),
        (gzip.compress(b">a\nMKV\n", mtime=0)[:-9], ": the gzip data end too early"),
        (b">x\n\x00\n", ":2: record 'x': illegal character"),
    ],
)
def test_a_bad_file_is_one_error_line_and_no_dataset(write, out, tmp_path, capsys, content, place):
    good, bad = write("good", "MKV"), write("bad", content=content)
    assert_fails(capsys, tmp_path, ["prep", good, bad, "--out", out], f"{bad}{place}")


def test_a_failed_force_leaves_the_old_dataset(write, out, tmp_path, capsys):
    assert main(["prep", write("a", "MKV"), "--out", out]) == 0
    before = digests(out)
    capsys.readouterr()
    assert_fails(capsys, tmp_path, ["prep", write("b", "M1"), "--out", out, "--force"], ":2: record")
    assert digests(out) == before


def test_an_interrupted_run_leaves_nothing(write, out, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    path = write("a", "MKV")
    monkeypatch.setattr(prep_workflow, "build_dataset", interrupt)
    assert main(["prep", path, "--out", out]) == 130
    assert os.listdir(tmp_path) == ["a"]


def test_missing_files_and_folders_are_told_before_anything_is_read(write, out, tmp_path, capsys):
    good = write("a", "MKV")
    assert_fails(capsys, tmp_path, ["prep", good, str(tmp_path / "absent"), "--out", out], "absent: no such file")
    (tmp_path / "folder").mkdir()
    assert_fails(capsys, tmp_path, ["prep", str(tmp_path / "folder"), "--out", out], "an empty folder")


def test_records_that_all_go_elsewhere_leave_no_dataset(write, out, tmp_path, capsys):
    path = write("a", "MKV", "MK")
    arguments = ["prep", path, "--out", out, "--min-length", "9"]
    assert_fails(capsys, tmp_path, arguments, "no record is left; rejected: 2 too_short")


def test_the_output_may_not_lie_in_an_input_nor_the_other_way_round(write, tmp_path, capsys):
    path = write("a", "MKV")
    for out in (path, f"{path}/dataset", str(tmp_path), f"{tmp_path}/x/.."):
        assert_fails(capsys, tmp_path, ["prep", path, "--out", out, "--force"], "lie inside each other")


def test_an_existing_dataset_is_replaced_only_by_force(write, out, tmp_path, capsys):
    first, second = write("a", "MKV"), write("b", "MKW")
    assert main(["prep", first, "--out", out]) == 0
    capsys.readouterr()
    assert_fails(capsys, tmp_path, ["prep", second, "--out", out], "exists already")
    assert main(["prep", second, "--out", out, "--force"]) == 0
    assert sequences(out, "train") == ["MKW"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "dataset"]


def test_force_replaces_an_empty_folder_and_follows_a_link(write, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert main(["prep", write("a", "MKV"), "--out", str(tmp_path / "link"), "--force"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert sequences(tmp_path / "real", "train") == ["MKV"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"thesis.doc": "precious"}, "not a protlm dataset"),
        ({"manifest.json": "{}"}, "not a protlm dataset"),
        ({"manifest.json": '{"format": "protlm-dataset"}', "thesis.doc": "precious"}, "holds 'thesis.doc'"),
    ],
)
def test_force_never_replaces_what_is_no_dataset(write, tmp_path, capsys, files, message):
    path, folder = write("a", "MKV"), tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    assert_fails(capsys, tmp_path, ["prep", path, "--out", str(folder), "--force"], message)
    assert {file.name: file.read_text() for file in folder.iterdir()} == files


def test_force_never_replaces_a_file(write, tmp_path, capsys):
    other = write("b", "MKW")
    assert_fails(capsys, tmp_path, ["prep", write("a", "MKV"), "--out", other, "--force"], "got a file")
    assert Path(other).read_text().endswith("MKW\n")


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_dataset(write, out, tmp_path, monkeypatch):
    prepare(PrepRequest(inputs=[write("a", "MKV")], out=out))
    before = digests(out)
    publish = files.publish

    def fail_once(source, target):
        if not fail_once.has_failed:
            fail_once.has_failed = True
            raise OSError("no")
        publish(source, target)

    fail_once.has_failed = False
    path = write("b", "MKW")
    monkeypatch.setattr(files, "publish", fail_once)
    with pytest.raises(ProtlmError, match="no; what is finished is kept in"):
        prepare(PrepRequest(inputs=[path], out=out, force=True))
    assert fail_once.has_failed
    assert digests(out) == before
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "dataset", "dataset.partial"]
    prepare(PrepRequest(inputs=[path], out=out, force=True, resume=True))
    assert sequences(out, "train") == ["MKW"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "dataset"]


@pytest.mark.parametrize(
    "options",
    [
        ["--valid-fraction", "0.6", "--test-fraction", "0.4"],
        ["--valid-fraction", "1"],
        ["--valid-fraction", "nan"],
        ["--test-fraction", "-0.1"],
        ["--min-length", "0"],
        ["--min-length", "5", "--max-length", "4"],
        ["--shard-residues", "0"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--split", "taxonomy"],
        ["--on-bad-record", "ignore"],
        ["--workers", "0"],
        ["--split", "family"],
    ],
)
def test_wrong_usage_exits_2_and_makes_nothing(write, out, capsys, options):
    assert main(["prep", write("a", "MKV"), "--out", out, *options]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not os.path.exists(out)


def test_a_fraction_of_a_ready_made_split_is_wrong_usage(write, out, capsys):
    for split in ("valid", "test"):
        arguments = ["prep", write("a", "MKV"), "--out", out, f"--{split}-input", write("o", "MKW")]
        assert main([*arguments, f"--{split}-fraction", "0.1"]) == 2
        assert f"{split}_fraction: only without {split}_inputs" in capsys.readouterr().err
    assert main(["prep", "--out", out]) == 2
    with pytest.raises(UsageError, match="inputs: expected at least one file"):
        prepare(PrepRequest(inputs=[], out=out))


def test_the_command_and_the_workflow_have_the_same_defaults():
    workflow = {field.name: field.default for field in dataclasses.fields(PrepRequest)}
    command = inspect.signature(cli_prep.prep_command).parameters
    shared = workflow.keys() & command.keys() - {"inputs", "out"}
    assert len(shared) == 24
    assert {name: command[name].default for name in shared} == {name: workflow[name] for name in shared}


def test_the_examples_in_the_help_keep_their_lines(capsys):
    assert main(["prep", "--help"]) == 0
    assert "    protlm prep proteins.fasta.gz --out dataset\n" in capsys.readouterr().out


def test_a_file_name_that_is_no_text_is_kept_readable(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.fasta"
    with open(path, "wb") as file:
        file.write(b">a\nMKTAYIAK\n")
    assert main(["prep", os.fsdecode(path), "--out", str(tmp_path / "d"), "--valid-fraction", "0", "--test-fraction",
                 "0"]) == 0  # fmt: skip
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["sources"][0]["name"] == "\\xff.fasta"
