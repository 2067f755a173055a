import gzip
import itertools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from protlm import open_embeddings, read_records, vocabulary
from protlm.data import sources
from protlm.data.dataset import open_dataset
from protlm.data.duplicates import sequence_digest
from protlm.data.embeddings import EmbeddingsWriter
from protlm.data.records import Record, UniqueIds
from protlm.errors import ProtlmError
from protlm.workflows.prep import prepare

sequences = st.text(vocabulary.RESIDUES, min_size=1, max_size=40)
words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
numbers = st.none() | st.integers(0, 999_999_999)
protein_records = st.builds(
    Record, id=words, description=st.just(""), sequence=sequences, cluster_size=numbers, taxon_id=numbers
)


def split_at(text, cuts):
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(words, words, sequences, st.lists(st.integers(0, 99), max_size=4)), min_size=1, max_size=8),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.integers(2, 50),
)
def test_fasta_however_written_gives_back_its_records(entries, line_end, is_gzip, block_bytes):
    lines, expected = [], []
    for record_id, description, sequence, cuts in entries:
        expected.append((record_id, description, sequence, len(lines) + 1))
        lines += [f">{record_id} {description}", *split_at(sequence, cuts)]
    content = (line_end.join(lines) + line_end).encode()
    before = sources._RAW_BLOCK_BYTES
    sources._RAW_BLOCK_BYTES = block_bytes
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            path.write_bytes(gzip.compress(content) if is_gzip else content)
            found = [(r.id, r.description, r.sequence, r.line) for r in read_records(path)]
    finally:
        sources._RAW_BLOCK_BYTES = before
    assert found == expected


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(">\n\rAM1* ", max_size=40).map(str.encode), st.sampled_from(["error", "skip"]))
def test_no_bytes_make_the_reader_fail_other_than_by_its_own_error(content, on_bad_record):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        found, message = [], None
        try:
            found = list(read_records(path, on_bad_record=on_bad_record))
        except ProtlmError as error:
            message = str(error)
        assert message is None or message.startswith(str(path))
        assert all(
            record.id and record.sequence and set(record.sequence) <= set(vocabulary.RESIDUES) for record in found
        )


@given(st.lists(st.sampled_from(["a", "a#2", "a#3", "b", "a#2#2"]), max_size=30))
def test_unique_ids_are_unique_and_keep_first_uses(names):
    unique = UniqueIds()
    found = [unique(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(result == name or result.startswith(f"{name}#") for name, result in zip(names, found, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.lists(protein_records, min_size=1, max_size=12), st.integers(1, 100))
def test_prep_keeps_every_record_in_order_in_shards_that_are_as_full_as_they_may_be(records, shard_residues):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "in").open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                numbers = {"n": record.cluster_size, "OX": record.taxon_id}
                told = " ".join(f"{key}={value}" for key, value in numbers.items() if value is not None)
                file.write(f">{record.id} {told}\n{record.sequence}\n")
        prepare([folder / "in"], folder / "out", shard_residues=shard_residues, dedupe=False, valid_fraction=0,
                test_fraction=0)  # fmt: skip
        split = open_dataset(folder / "out").split("train")
        found, sizes = [], []
        for number in range(len(split.summary.shards)):
            shard = split.shard(number)
            shard.verify()
            sizes.append(np.diff(shard.offsets).tolist())
            for index in range(shard.num_records):
                optional = (
                    None if column is None or column[index] == -1 else int(column[index])
                    for column in (shard.cluster_size, shard.taxon_id)
                )
                tokens = shard.tokens[shard.offsets[index] : shard.offsets[index + 1]]
                found.append((vocabulary.decode(tokens), *optional))
        assert found == [(record.sequence, record.cluster_size, record.taxon_id) for record in records]
        for lengths, following in itertools.zip_longest(sizes, sizes[1:]):
            assert len(lengths) == 1 or sum(lengths) <= shard_residues
            assert following is None or sum(lengths) + following[0] > shard_residues
        assert len({split.id(index) for index in range(len(split))}) == len(records)
        counts = split.summary.residue_counts
        assert +Counter(counts) == Counter("".join(record.sequence for record in records))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text("AC", min_size=1, max_size=4), min_size=1, max_size=12),
    st.lists(st.text("AC", min_size=1, max_size=4), min_size=1, max_size=12),
    st.booleans(),
)
def test_no_sequence_is_ever_in_two_splits(train, test, dedupe):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in (("train", train), ("test", test)):
            (folder / file).write_text("".join(f">x\n{sequence}\n" for sequence in content))
        report = prepare([folder / "train"], folder / "out", test_inputs=[folder / "test"], dedupe=dedupe)
        opened = open_dataset(folder / "out")
        found = {}
        for name, split in report.manifest.splits.items():
            records = opened.split(name) if split.num_records else []
            found[name] = [vocabulary.decode(records.tokens(index)) for index in range(len(records))]
    kept = [sequence for sequence in test if sequence not in set(train)]
    assert found["train"] == (list(dict.fromkeys(train)) if dedupe else train)
    assert found["test"] == (list(dict.fromkeys(kept)) if dedupe else kept)
    num_read = len(train) + len(test)
    num_removed = report.manifest.duplicates_removed.within_split + report.manifest.duplicates_removed.across_splits
    assert num_read == num_removed + len(found["train"]) + len(found["test"])


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(words, st.integers(1, 9), max_size=6),
    st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_embeddings_give_back_what_was_written_in_any_order(lengths, layers, dim, random):
    ids = list(lengths)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "e.h5"
        hashes = [sequence_digest(record_id.encode()) for record_id in ids]
        dims = [dim + number for number in range(len(layers))]
        expected = {}
        with EmbeddingsWriter.create(
            path, ids, list(lengths.values()), hashes, ["mean", "per-residue"], layers, dims, "float32", "m"
        ) as writer:
            order = [(index, layer) for index in range(len(ids)) for layer in layers]
            random.shuffle(order)
            for index, layer in order:
                size = dims[layers.index(layer)]
                mean = np.full(size, random.random(), np.float32)
                rows = np.arange(lengths[ids[index]] * size, dtype=np.float32).reshape(-1, size) + layer
                writer.write("mean", layer, index, mean)
                writer.write("per-residue", layer, index, rows)
                expected[ids[index], layer] = mean, rows
        for layer in layers:
            means, per_residue = open_embeddings(path, "mean", layer), open_embeddings(path, "per-residue", layer)
            assert list(means) == list(per_residue) == ids
            for record_id in ids:
                np.testing.assert_array_equal(means[record_id], expected[record_id, layer][0])
                np.testing.assert_array_equal(per_residue[record_id], expected[record_id, layer][1])
