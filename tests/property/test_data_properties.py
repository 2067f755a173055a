import gzip
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protlm import open_embeddings, read_records, vocabulary
from protlm.config import DataConfig
from protlm.data.batching.batches import training_batch
from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import MaskRates, Objective
from protlm.data.batching.rows import epoch_size, training_rows
from protlm.data.embeddings.layouts import LAYOUTS, Contents
from protlm.data.parsing import judging
from protlm.data.parsing.fasta import ANNOTATION_IDS
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.records import Record
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.protein_store import write_proteins
from protlm.data.strings import Strings
from protlm.errors import ProtlmError
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare
from tests.unit.data.batching.batch_cases import InMemory, evaluation_batches, joined_epoch, segments

sequences = st.text(vocabulary.RESIDUES, min_size=1, max_size=40).filter(
    lambda letters: letters.encode() not in judging.PLACEHOLDERS
)
words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
# A header of these words is an annotation of an alignment and no protein.
record_ids = words.filter(lambda word: word not in ANNOTATION_IDS)
numbers = st.none() | st.integers(0, 999_999_999)
protein_records = st.builds(
    Record, id=record_ids, description=st.just(""), sequence=sequences, cluster_size=numbers, taxon_id=numbers
)


def split_at(text, cuts):
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(record_ids, words, sequences, st.lists(st.integers(0, 99), max_size=4)), min_size=1, max_size=8),
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
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(SourceBlocks, "block_bytes", block_bytes):
        path = Path(folder) / "x"
        path.write_bytes(gzip.compress(content, mtime=0) if is_gzip else content)
        read = [(r.id, r.description, r.sequence, r.line) for r in read_records(path)]
    assert read == expected


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(">\n\rAM1* ", max_size=40).map(str.encode), st.sampled_from(["error", "skip"]))
def test_no_bytes_make_the_reader_fail_other_than_by_its_own_error(content, on_bad_record):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        records, message = [], None
        try:
            records = list(read_records(path, on_bad_record=on_bad_record))
        except ProtlmError as error:
            message = str(error)
        assert message is None or message.startswith(str(path))
        assert all(
            record.id and record.sequence and set(record.sequence) <= set(vocabulary.RESIDUES) for record in records
        )


repeated_ids = st.lists(st.sampled_from(["a", "a#2", "a#3", "b", "a#2#2", "b#02"]), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(repeated_ids, st.sampled_from([3, 1 << 18]))
def test_unique_ids_are_unique_and_keep_first_uses(names, compared_at_once):
    pairs = ((name, vocabulary.encode(b"M")) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        proteins = write_proteins(Path(folder) / "store", pairs, compared_at_once=compared_at_once)
        ids = proteins.ids.to_list()
    assert len(set(ids)) == len(names)
    for number, (result, name) in enumerate(zip(ids, names, strict=True)):
        assert (result == name) == (name not in names[:number])
        assert result == name or result.startswith(f"{name}#")
    assert proteins.num_renamed == len(names) - len(set(names))


@settings(deadline=None, max_examples=20)
@given(repeated_ids)
def test_prep_and_embed_name_a_repeated_id_alike(names):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").write_text("".join(f">{record_id}\nM\n" for record_id in names))
        whole = {"dedupe": False, "valid_fraction": 0, "test_fraction": 0}
        prepare(PrepRequest(inputs=[folder / "in"], out=folder / "out", **whole))
        split = open_dataset(folder / "out").split("train")
        proteins = write_proteins(folder / "store", ((name, vocabulary.encode(b"M")) for name in names))
        assert proteins.ids.to_list() == [split.id(index) for index in range(len(split))]


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
        whole = {"dedupe": False, "valid_fraction": 0, "test_fraction": 0}
        prepare(PrepRequest(inputs=[folder / "in"], out=folder / "out", shard_residues=shard_residues, **whole))
        split = open_dataset(folder / "out").split("train")
        stored, sizes = [], []
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
                stored.append((vocabulary.decode(tokens), *optional))
        assert stored == [(record.sequence, record.cluster_size, record.taxon_id) for record in records]
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
        inputs, test_inputs = [folder / "train"], [folder / "test"]
        report = prepare(PrepRequest(inputs=inputs, out=folder / "out", test_inputs=test_inputs, dedupe=dedupe))
        opened = open_dataset(folder / "out")
        by_split = {}
        for name, split in report.manifest.splits.items():
            records = opened.split(name) if split.num_records else []
            by_split[name] = [vocabulary.decode(records.tokens(index)) for index in range(len(records))]
    kept = [sequence for sequence in test if sequence not in set(train)]
    assert by_split["train"] == (list(dict.fromkeys(train)) if dedupe else train)
    assert by_split["test"] == (list(dict.fromkeys(kept)) if dedupe else kept)
    num_read = len(train) + len(test)
    num_removed = report.manifest.duplicates_removed.within_split + report.manifest.duplicates_removed.across_splits
    assert num_read == num_removed + len(by_split["train"]) + len(by_split["test"])


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
        digests = np.zeros((len(ids), 16), dtype=np.uint8)
        residues = [b"M" * length for length in lengths.values()]
        contents = Contents(
            Strings.of(ids), np.array(list(lengths.values()), dtype=np.int64), digests, residues.__getitem__,
            ("mean", "per-residue"), tuple(layers), 40, dim, "float32", "m",
        )  # fmt: skip
        expected = {}
        with LAYOUTS["protlm"].open(path, contents, resume=False) as writer:
            order = list(range(len(ids)))
            random.shuffle(order)
            for index in order:
                embeddings = {}
                for layer in layers:
                    mean = np.full(dim, random.random(), np.float32)
                    rows = np.arange(lengths[ids[index]] * dim, dtype=np.float32).reshape(-1, dim) + layer + index
                    embeddings |= {("mean", layer): mean, ("per-residue", layer): rows}
                    expected[ids[index], layer] = mean, rows
                writer.write(index, embeddings)
        for layer in layers:
            means, per_residue = open_embeddings(path, "mean", layer), open_embeddings(path, "per-residue", layer)
            assert list(means) == list(per_residue) == ids
            for record_id in ids:
                np.testing.assert_array_equal(means[record_id], expected[record_id, layer][0])
                np.testing.assert_array_equal(per_residue[record_id], expected[record_id, layer][1])


seeds = st.integers(0, 2**63 - 1)
objectives = st.builds(Objective, st.booleans(), st.builds(MaskRates, st.sampled_from([1e-9, 0.15, 1.0])))


@st.composite
def data_settings(draw, whole=False):
    """Draws settings of rows; `whole` ones cut no protein of up to 60 residues."""
    mode = draw(st.sampled_from(["packed", "clipped", "concatenated"]))
    tokens_per_batch = draw(st.integers(62 if whole and mode != "concatenated" else 3, 130))
    if mode == "concatenated":
        window_tokens = draw(st.integers(3, tokens_per_batch))
        return DataConfig(mode=mode, tokens_per_batch=tokens_per_batch, window_tokens=window_tokens)
    longest = None if whole else draw(st.none() | st.integers(1, tokens_per_batch - 2))
    return DataConfig(mode=mode, tokens_per_batch=tokens_per_batch, max_length=longest)


@st.composite
def proteins_and_draws(draw):
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    proteins = InMemory(*lengths, seed=draw(st.integers(0, 9)))
    bound = draw(st.integers(0, len(lengths) - 1))
    num_units = [bound, len(lengths) - bound] if bound else [len(lengths)]
    weights = draw(st.sampled_from([(), (1.0,) * len(num_units)]))
    return proteins, Draws(num_units, draw(seeds), weights=weights)


def batches_from(first_row, last_row, proteins, draws, config, objective):
    stream = training_rows(draws, proteins.lengths, config, first_row)
    rows = itertools.islice(stream, last_row - first_row)
    return [training_batch(row, proteins, config, draws.seed, objective) for row in rows]


def first_epoch(proteins, draws, config, objective):
    num_rows = epoch_size(draws, proteins.lengths, config).num_rows
    batches = batches_from(0, num_rows + 1, proteins, draws, config, objective)
    assert [batch.epoch for batch in batches] == [0] * num_rows + [1]
    return batches[:-1]


@settings(deadline=None)
@given(proteins_and_draws(), data_settings(whole=True), objectives)
def test_an_epoch_shows_every_residue_of_every_drawn_protein_once(drawn, config, objective):
    proteins, draws = drawn
    batches = first_epoch(proteins, draws, config, objective)
    true, seen, places = joined_epoch(batches, objective)
    expected = [proteins.tokens(record) for record in draws.epoch(0)]
    assert true == [token for tokens in expected for token in (*tokens.tolist(), vocabulary.EOS)]
    assert sum(batch.num_residues for batch in batches) == sum(map(len, expected))
    # What is hidden is a function of the draw, not of how draws become rows.
    reference = DataConfig(tokens_per_batch=10_000)
    assert (true, seen, places) == joined_epoch(first_epoch(proteins, draws, reference, objective), objective)


@settings(deadline=None)
@given(proteins_and_draws(), data_settings(), objectives)
def test_no_row_exceeds_its_budget_and_no_target_is_special_hidden_elsewhere_or_in_another_segment(
    drawn, config, objective
):
    proteins, draws = drawn
    for batch in batches_from(0, 30, proteins, draws, config, objective):
        assert len(batch.tokens) <= config.tokens_per_batch
        assert batch.cu_seqlens.diff().max() <= config.longest_segment
        assert len(batch.targets) == len(set(batch.target_positions.tolist()))
        for true, seen, places in segments(batch, objective):
            changed = [place for place in range(len(true)) if true[place] != seen[place]]
            assert set(changed) <= set(places)
            assert not (objective.causal and changed)
            allowed = set(range(4, 29)) | ({vocabulary.EOS} if objective.causal else set())
            assert {true[place] for place in places} <= allowed


@settings(deadline=None)
@given(proteins_and_draws(), data_settings(), objectives, st.integers(0, 20))
def test_a_stream_of_batches_can_start_anywhere(drawn, config, objective, first_row):
    proteins, draws = drawn
    walked = batches_from(0, first_row + 5, proteins, draws, config, objective)[first_row:]
    started = batches_from(first_row, first_row + 5, proteins, draws, config, objective)
    for a, b in zip(walked, started, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12), seeds, objectives, st.integers(1, 200),
    st.none() | st.integers(3, 100),
)  # fmt: skip
def test_evaluation_shows_the_same_whatever_the_budget_and_the_windows(lengths, seed, objective, budget, window_tokens):
    proteins = InMemory(*lengths)
    epoch = joined_epoch(evaluation_batches(proteins, budget, seed, objective, window_tokens=window_tokens), objective)
    assert epoch == joined_epoch(evaluation_batches(proteins, 10_000, seed, objective), objective)
    assert epoch[0] == [token for tokens in proteins.sequences for token in (*tokens.tolist(), vocabulary.EOS)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4), seeds, st.integers(1, 8))
def test_weights_hold_in_every_epoch_and_records_take_turns(datasets, seed, num_epochs):
    num_units, weights = zip(*datasets, strict=True)
    exact = np.array(weights) / sum(weights) * sum(num_units)
    assume((exact >= 1).all())
    draws = Draws(num_units, seed, weights=weights)
    counts = np.zeros(sum(num_units), dtype=np.int64)
    for number in range(num_epochs):
        epoch = np.bincount(draws.epoch(number), minlength=len(counts))
        counts += epoch
        bounds = np.cumsum(num_units)[:-1]
        shares = np.array([inside.sum() for inside in np.split(epoch, bounds)])
        assert (np.abs(shares - exact) < 1).all()
        assert shares.sum() == sum(num_units)
        assert all(inside.max() - inside.min() <= 1 for inside in np.split(counts, bounds))
