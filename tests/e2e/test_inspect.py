import json
import shutil

import pytest

from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset
from protlm.errors import ShardError
from protlm.workflows.inspect import inspect_dataset
from tests.e2e.conftest import write_fasta


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture
def many_shards(fasta, tmp_path):
    out = tmp_path / "many"
    assert main(["prep", str(fasta), "--out", str(out), "--shard-residues", "5000"]) == 0
    return out


def flip(path, place=-1):
    """Changes one bit in the last column of a shard, or at a place in its file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flip_token(path):
    content = path.read_bytes()
    tokens = open_dataset(path.parent).split("train").shard(0).tokens.tobytes()
    flip(path, content.index(tokens[:40]) + 20)


def told_by(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    told = capsys.readouterr()
    return told.out, told.err


def test_inspect_tells_what_prep_told(proteins, tmp_path, capsys):
    lines = [(name, text.lower()) if number == 3 else (name, text) for number, (name, text) in enumerate(proteins)]
    lines += [("part", proteins[0][1][10:-10]), ("short", "MK"), ("again", proteins[1][1])]
    out = tmp_path / "out"
    arguments = ("--valid-fraction", "0.3", "--test-fraction", "0.3", "--min-length", "5")
    prepared, warned = told_by(capsys, "prep", write_fasta(tmp_path / "a.fasta", lines), "--out", out, *arguments)
    inspected, silent = told_by(capsys, "inspect", out)
    table, _, _ = prepared.partition("\ndataset ")
    assert inspected == f"{table}\ndataset     {out}\nhash        {open_dataset(out).hash}\n"
    assert "rejected records, too_short" in inspected
    assert "repaired letters, lower_case" in inspected
    assert "duplicates removed, within a split" in inspected
    assert "1 too_short" in warned
    assert silent == ""


def test_json_is_the_report_of_prep_with_what_verify_found(fasta, tmp_path, capsys):
    out = tmp_path / "out"
    prepared = json.loads(told_by(capsys, "prep", fasta, "--out", out, "--json")[0])
    assert prepared == json.loads(told_by(capsys, "inspect", out, "--json")[0])
    assert prepared["verified"] is False
    verified = json.loads(told_by(capsys, "inspect", out, "--verify", "--json")[0])
    assert verified == prepared | {"verified": True}
    manifest = open_dataset(out).manifest
    assert verified["path"] == str(out)
    assert verified["hash"] == open_dataset(out).hash
    assert verified["sources"] == [manifest.sources[0].model_dump(by_alias=True)]
    assert verified["options"] == json.loads(manifest.options.model_dump_json())
    assert verified["leakage"] == json.loads(manifest.leakage.model_dump_json())
    train = manifest.splits["train"]
    assert verified["splits"]["train"] == {
        "num_records": train.num_records,
        "num_residues": train.num_residues,
        "median_length": train.length_quantiles["median"],
        "p99_length": train.length_quantiles["p99"],
        "num_shards": 1,
    }


def test_a_whole_dataset_is_verified(dataset, capsys):
    told, _ = told_by(capsys, "inspect", dataset, "--verify")
    assert told.endswith("verified    the shards hold what was written\n")
    assert "verified" not in told_by(capsys, "inspect", dataset)[0]


def test_a_flipped_bit_is_found_by_verify_only(copy, failure, capsys):
    shard = copy / "train-00000.h5"
    flip_token(shard)
    told_by(capsys, "inspect", copy)
    message = failure("inspect", copy, "--verify")
    assert message.startswith(f"error: {shard}: checksum: expected ")
    assert message.endswith("; restore from a copy, or prepare the dataset again")


def test_all_damaged_shards_are_counted_and_the_first_is_named(many_shards, failure):
    shards = sorted(many_shards.glob("train-*.h5"))
    assert len(shards) > 4
    flip_token(shards[0])
    for damage, others in (
        (lambda: None, ""),
        (shards[2].unlink, "; 1 more shard is damaged"),
        (lambda: shards[3].write_bytes(shards[4].read_bytes()), "; 2 more shards are damaged"),
    ):
        damage()
        message = failure("inspect", many_shards, "--verify")
        assert message.startswith(f"error: {shards[0]}: checksum: expected ")
        assert message.endswith(f"; the file is damaged{others}; restore from a copy, or prepare the dataset again")


@pytest.mark.parametrize("verify", [False, True])
def test_what_is_no_dataset_is_one_error_line(tmp_path, failure, verify):
    arguments = ["--verify"] if verify else []
    assert "expected a dataset folder, got nothing" in failure("inspect", tmp_path / "absent", *arguments)
    assert "not a protlm dataset" in failure("inspect", tmp_path, *arguments)


def test_progress_reaches_all_residues_even_of_damaged_shards(many_shards):
    stages, steps = [], []

    def start(stage, size):
        stages.append((stage, size))
        return steps.append

    inspect_dataset(many_shards, verify=False, start_progress=start)
    assert stages == []
    flip_token(many_shards / "train-00000.h5")
    with pytest.raises(ShardError):
        inspect_dataset(many_shards, verify=True, start_progress=start)
    manifest = open_dataset(many_shards).manifest
    num_residues = sum(split.num_residues for split in manifest.splits.values())
    assert stages == [("verify", num_residues)]
    assert sum(steps) == num_residues


def test_wrong_usage_exits_2(dataset, capsys):
    assert main(["inspect"]) == 2
    assert main(["inspect", str(dataset), "--check"]) == 2
    assert "protlm inspect dataset --verify" in told_by(capsys, "inspect", "--help")[0]
