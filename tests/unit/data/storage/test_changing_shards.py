"""Shards that are cut short, written to, touched or replaced while a dataset is in use."""

import os
import subprocess
import sys
from functools import partial

import pytest

from protlm import vocabulary
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.shards import ShardReader
from protlm.errors import ShardError
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare


@pytest.fixture
def dataset_of_one_shard(tmp_path):
    """The path of the shard."""
    (tmp_path / "a.fasta").write_text(">UniRef50_A n=2 TaxID=9606\nMKV\n>b\nMKL\n")
    prepare(PrepRequest(inputs=[tmp_path / "a.fasta"], out=tmp_path / "ds", valid_fraction=0, test_fraction=0))
    return tmp_path / "ds" / "train-00000.h5"


def uses_of(path):
    """Returns everything that a split gives of a shard, each as a function to call."""
    split = open_dataset(path.parent).split("train")
    return [partial(function, 0) for function in (split.tokens, split.id, split.labels, split.shard)]


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def write_into(path):
    with path.open("r+b") as file:
        content = file.read()
        file.seek(content.index(b"UniRef50_A"))
        file.write(b"UniRef50_B")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "message"), [(cut_short, "cut short while it was in use"), (write_into, "checksum")]
)
@pytest.mark.parametrize("use", range(4))
def test_a_shard_that_changes_while_it_is_open_is_an_error_at_its_next_use(dataset_of_one_shard, use, change, message):
    path = dataset_of_one_shard
    function = uses_of(path)[use]
    function()
    change(path)
    with pytest.raises(ShardError, match=rf"train-00000\.h5: {message}"):
        function()


def test_a_shard_cut_to_nothing_ends_no_process(dataset_of_one_shard):
    functions = uses_of(dataset_of_one_shard)
    for function in functions:
        function()
    os.truncate(dataset_of_one_shard, 0)
    for function in functions:
        with pytest.raises(ShardError, match="cut short"):
            function()
    with pytest.raises(ShardError, match="cut short"):
        # As `protlm inspect --verify` does it.
        functions[-1].func.__self__._shards[0].verify()


def test_tokens_outlive_a_shard_that_is_cut_to_nothing(dataset_of_one_shard):
    tokens = open_dataset(dataset_of_one_shard.parent).split("train").tokens(0)
    os.truncate(dataset_of_one_shard, 0)
    # A view of the map would end the process here.
    assert vocabulary.decode(tokens) == "MKV"
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 0


def test_a_shard_cut_short_between_the_check_and_the_reading_ends_no_process(dataset_of_one_shard, monkeypatch):
    split = open_dataset(dataset_of_one_shard.parent).split("train")
    split.tokens(0)
    check = ShardReader.check_unchanged
    cuts = [partial(os.truncate, dataset_of_one_shard, 0)]

    def check_and_cut(shard):
        check(shard)
        while cuts:
            cuts.pop()()

    monkeypatch.setattr(ShardReader, "check_unchanged", check_and_cut)
    with pytest.raises(ShardError, match="cut short while it was in use"):
        split.tokens(0)


def test_a_shard_that_has_its_size_again_is_an_error_too(dataset_of_one_shard):
    split = open_dataset(dataset_of_one_shard.parent).split("train")
    shard = split.shard(0)
    state, size = os.stat(dataset_of_one_shard), dataset_of_one_shard.stat().st_size
    os.truncate(dataset_of_one_shard, 0)
    for times in range(2):
        with pytest.raises(ShardError, match=r"cut short|written to while it was in use"):
            shard.record_tokens(0)
        if not times:
            os.truncate(dataset_of_one_shard, size)
            os.utime(dataset_of_one_shard, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_dataset_may_have_more_shards_than_files_are_open_by_default(tmp_path):
    text = "".join(f">p{number}\n{'MKV' * 10}{'A' * (number % 7)}{number * 'L'}\n" for number in range(60))
    (tmp_path / "a.fasta").write_text(text)
    prepare(
        PrepRequest(inputs=[tmp_path / "a.fasta"], out=tmp_path / "ds", valid_fraction=0, test_fraction=0,
                    shard_residues=30)
    )  # fmt: skip
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))\n"
        "from protlm.data.storage.dataset import open_dataset\n"
        "split = open_dataset(sys.argv[1]).split('train')\n"
        "split.open_shards()\n"
        "print(len(split), split.summary.shards[-1].name)\n"
    )
    result = {
        hard: subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "ds"), hard], capture_output=True, text=True, check=False
        )
        for hard in ("1000", "64")
    }
    assert result["1000"].stdout.split() == ["60", "train-00059.h5"]
    assert "too many files are open at a time; raise the limit with `ulimit -n`" in result["64"].stderr


def test_a_shard_may_be_touched_replaced_or_removed_while_it_is_open(dataset_of_one_shard):
    path = dataset_of_one_shard
    content = path.read_bytes()
    tokens = uses_of(path)[0]
    expected = tokens().tolist()

    def put(text):
        path.with_name("other").write_bytes(text)
        os.replace(path.with_name("other"), path)

    for change in (partial(os.utime, path), partial(put, content), partial(put, b"another"), path.unlink):
        change()
        assert tokens().tolist() == expected
