import errno
import itertools
import json
import os
import random
import resource
import subprocess
import sys

import numpy as np
import pytest

from protlm import vocabulary
from protlm.data.digests import sequence_digest
from protlm.data.storage.protein_store import open_proteins, write_proteins
from protlm.errors import ShardError


def proteins_of(*pairs):
    return [(record_id, vocabulary.encode(sequence.encode())) for record_id, sequence in pairs]


@pytest.fixture
def write(tmp_path):
    numbers = itertools.count()
    return lambda *pairs, **options: write_proteins(tmp_path / f"store-{next(numbers)}", proteins_of(*pairs), **options)


def final_ids(write, *ids):
    return write(*((record_id, "MKT") for record_id in ids)).ids.to_list()


def test_every_protein_comes_back_by_its_number_in_any_order(write):
    pairs = [("sp|P1|A", "MKTAYIAK"), ("ünï", "W"), ("c", "XBUZO" * 5_000), ("d", "MKTAYIAK")]
    written = write(*pairs)
    # Another process knows the folder alone.
    for store in (written, open_proteins(written.path)):
        assert len(store) == store.num_records == 4
        for number in (2, 0, 3, 1, 2):
            record_id, sequence = pairs[number]
            assert store.id(number) == record_id
            assert store.residues(number) == sequence.encode()
            assert store.digests[number].tobytes() == sequence_digest(sequence.encode())
            np.testing.assert_array_equal(store.tokens(number), vocabulary.encode(sequence.encode()))
        assert store.lengths.tolist() == [8, 1, 25_000, 8]
        assert store.ids.to_list() == [record_id for record_id, _ in pairs]


@pytest.mark.parametrize("compared_at_once", [1, 7, 1 << 20])
def test_each_protein_knows_the_first_with_its_sequence(write, compared_at_once):
    draw = random.Random(0)
    sequences = ["".join(draw.choices("ACDEF", k=draw.randint(1, 4))) for _ in range(300)]
    pairs = [(f"p{number}", sequence) for number, sequence in enumerate(sequences)]
    store = write(*pairs, compared_at_once=compared_at_once)
    assert store.first.tolist() == [sequences.index(sequence) for sequence in sequences]
    assert store.num_renamed == 0


def test_the_nth_repeat_of_an_id_gets_its_number(write):
    assert final_ids(write, "a", "b", "a", "a", "b") == ["a", "b", "a#2", "a#3", "b#2"]
    assert write(("a", "M"), ("a", "K"), ("b", "M"), ("a", "M")).num_renamed == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", "a", "a#2"], ["a", "a#3", "a#2"]),
        (["a#2", "a", "a", "a"], ["a#2", "a", "a#3", "a#4"]),
        (["a", "a#2", "a", "a", "b", "a#2", "b"], ["a", "a#2", "a#3", "a#4", "b", "a#2#2", "b#2"]),
        (["a", "a", "a#02", "a#1", "a#"], ["a", "a#2", "a#02", "a#1", "a#"]),
        (["a", "a", "a", "a#3"], ["a", "a#2", "a#4", "a#3"]),
        (["#2", "", ""], ["#2", "", "#3"]),
    ],
)
def test_an_id_as_it_was_given_goes_before_one_made_here(write, given, expected):
    assert final_ids(write, *given) == expected


def test_ids_of_any_length_survive_renaming(write):
    # Longer than what is copied at once.
    long = "é" * 600_000
    assert final_ids(write, "x", long, "y", long, "z") == ["x", long, "y", f"{long}#2", "z"]


def test_the_hash_names_ids_and_tokens_in_order(write):
    base = [("a", "MK"), ("b", "TA")]
    same = write(*base).hash
    assert write(*base).hash == same
    others = [
        base[::-1],
        base[:1],
        [("b", "MK"), ("b", "TA")],
        [("a", "MK"), ("b", "TV")],
        # Moved bounds, of sequences and of ids.
        [("a", "M"), ("b", "KTA")],
        [("ab", "MK"), ("", "TA")],
        # The byte of an id may be that of a token.
        [("x", "AG")],
        [("x\x05", "G")],
        [],
    ]
    hashes = {write(*other).hash for other in others}
    assert len(hashes) == len(others)
    assert same not in hashes


def test_the_hash_tells_ids_as_given_and_not_as_they_end(write):
    assert write(("a", "M"), ("a", "K")).hash != write(("a", "M"), ("a#2", "K")).hash


def test_no_proteins_are_a_store_too(write):
    store = open_proteins(write().path)
    assert (len(store), store.ids.to_list(), store.first.tolist()) == (0, [], [])
    assert store.digests.shape == (0, 16)
    assert store.lengths.shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "without residues"), ([5, 0, 5], "no residue"), ([29], "no residue"), ([255], "no residue")],
)
def test_what_is_no_protein_is_named_in_one_line_and_leaves_nothing(tmp_path, tokens, message):
    broken = [*proteins_of(("good", "MK")), ("bad\nid", np.array(tokens, dtype=np.uint8))]
    with pytest.raises(ShardError, match=message) as caught:
        write_proteins(tmp_path / "store", broken)
    assert "bad" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_tokens_of_another_type_are_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_proteins(tmp_path / "store", [("a", np.array([5, 6], dtype=np.int64))])


def test_a_failing_input_and_a_full_disk_leave_nothing(tmp_path, monkeypatch):
    def failing():
        yield from proteins_of(("a", "MK"))
        raise KeyError("stop")

    with pytest.raises(KeyError):
        write_proteins(tmp_path / "store", failing())
    assert not (tmp_path / "store").exists()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_proteins(tmp_path / "store", proteins_of(("a", "MK")))
    assert not (tmp_path / "store").exists()


def test_a_store_that_is_there_is_not_written_over(write):
    store = write(("a", "MK"))
    with pytest.raises(FileExistsError):
        write_proteins(store.path, proteins_of(("b", "W")))
    assert open_proteins(store.path).ids.to_list() == ["a"]


def test_an_incomplete_or_altered_store_is_refused(write, tmp_path):
    with pytest.raises(ShardError, match="no complete store"):
        open_proteins(tmp_path)
    path = write(("a", "MK"), ("b", "MK")).path
    for file in path.glob("*.bin"):
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(ShardError, match=rf"{file.name}: expected \d"):
            open_proteins(path)
        file.unlink()
        with pytest.raises(ShardError, match=rf"{file.name}: expected \d"):
            open_proteins(path)
        file.write_bytes(content)
    about = path / "store.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format_version": 0}))
    with pytest.raises(ShardError, match="another version"):
        open_proteins(path)


def test_only_the_columns_stay_in_the_folder(write):
    names = {file.name for file in write(("a", "MK"), ("a", "MK")).path.iterdir()}
    assert names == {"store.json", "tokens.bin", "offsets.bin", "digests.bin", "first.bin", "ids.bin", "id_offsets.bin"}


_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from protlm.data.storage.protein_store import write_proteins
rng = np.random.default_rng(0)
def proteins(count, length):
    for number in range(count):
        yield f"p{number}", rng.integers(4, 24, length, dtype=np.uint8)
def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
def grown(count, length, name):
    before = peak()
    store = write_proteins(Path(sys.argv[1]) / name, proteins(count, length))
    for number in range(count):
        store.tokens(number).max()
    return peak() - before
grown(2_000, 100, "warm-up")
print(grown(2_000, 50_000, "long"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_residues_written_and_read(tmp_path):
    """100 MB of tokens go in and out."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path)], check=True, capture_output=True, text=True, env=os.environ
    )
    assert int(done.stdout) < 20_000, "KiB"


def test_opened_stores_let_go_of_their_files(write):
    path = write(("a", "MK")).path
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    for _ in range(limit + 10 if limit < 5_000 else 0):
        open_proteins(path).tokens(0)
