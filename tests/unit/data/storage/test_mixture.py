import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from protlm import vocabulary
from protlm.config import DataConfig
from protlm.data.batching.batches import training_batch
from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import MaskRates, Objective
from protlm.data.batching.rows import training_rows
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.mixture import Mixture
from protlm.errors import ConfigError, ShardError
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare

FIRST = ["MKV", "L", "ACDEFGHIKLMNPQRSTVWY", "MMMM", "WW", "KRKRKR", "GGGG"]
SECOND = ["MKV", "HHHHH", "AAAAAA"]
# The cluster of each sequence of FIRST; a name of its own where it has none.
CLUSTERS = ["x", "y", "x", "", "y", "", "x"]


@pytest.fixture
def make(tmp_path):
    """Returns a function that prepares sequences, all for training, and opens them."""

    def prepared(name, sequences, clusters=None, shard_residues=20):
        fasta, table = tmp_path / f"{name}.fasta", tmp_path / f"{name}.tsv"
        fasta.write_text("".join(f">id{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
        if clusters is not None:
            rows = (f"{label}\tid{number}\n" for number, label in enumerate(clusters) if label)
            table.write_text("".join(rows))
        request = PrepRequest(
            inputs=[fasta], out=tmp_path / name, clusters=None if clusters is None else table,
            valid_fraction=0, test_fraction=0, shard_residues=shard_residues, dedupe=False,
        )  # fmt: skip
        prepare(request)
        return open_dataset(tmp_path / name).split("train")

    return prepared


def sequences(proteins):
    return [vocabulary.decode(proteins.tokens(record)) for record in range(len(proteins))]


def test_records_of_all_datasets_have_one_running_number(make):
    mixture = Mixture([make("a", FIRST), make("b", SECOND)])
    assert sequences(mixture) == FIRST + SECOND
    assert mixture.lengths.tolist() == [len(sequence) for sequence in FIRST + SECOND]
    assert mixture.lengths.dtype == np.int64
    assert not mixture.lengths.flags.writeable
    assert (mixture.num_records, mixture.sizes, len(mixture)) == (10, (7, 3), 10)
    assert [mixture.id(np.int64(record)) for record in (0, 6, 7, 9)] == ["id0", "id6", "id0", "id2"]
    counts = Counter("".join(FIRST + SECOND))
    assert mixture.residue_counts == {letter: counts[letter] for letter in vocabulary.RESIDUES}


@pytest.mark.parametrize("record", [-1, 10])
def test_a_number_out_of_range_is_an_index_error(make, record):
    mixture = Mixture([make("a", FIRST), make("b", SECOND)])
    for read in (mixture.tokens, mixture.id):
        with pytest.raises(IndexError, match=f"index: expected 0 to 9, got {record}"):
            read(record)


def test_a_pickled_mixture_is_small_and_opens_its_own_shards(make):
    mixture = Mixture([make("a", FIRST), make("b", SECOND)])
    before = pickle.dumps(mixture)
    assert sequences(mixture) == FIRST + SECOND
    _ = mixture.lengths
    assert len(pickle.dumps(mixture)) == len(before) < 4_000
    assert sequences(pickle.loads(before)) == FIRST + SECOND


def test_a_mixture_of_one_is_its_split(make):
    split = make("a", FIRST)
    mixture = Mixture([split])
    assert mixture.lengths is split.lengths
    assert mixture.residue_counts == split.summary.residue_counts
    config, objective = DataConfig(tokens_per_batch=30, max_length=9), Objective(False, MaskRates(0.15))
    for row in islice(training_rows(Draws.of(mixture, config, 3), mixture.lengths, config), 20):
        alone, mixed = (training_batch(row, proteins, config, 3, objective) for proteins in (split, mixture))
        assert all(np.array_equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_an_epoch_of_a_mixture_takes_every_record_of_every_dataset(make):
    mixture = Mixture([make("a", FIRST), make("b", SECOND)])
    draws = Draws.of(mixture, DataConfig(), 0)
    assert sorted(draws.epoch(0).tolist()) == list(range(10))


def test_weights_draw_from_the_datasets_as_asked(make):
    mixture = Mixture([make("a", FIRST), make("b", SECOND)])
    order = Draws.of(mixture, DataConfig(weights=(1.0, 4.0)), 0).epoch(0)
    assert [int((order < 7).sum()), int((order >= 7).sum())] == [2, 8]
    with pytest.raises(ConfigError, match=r"data\.weights: expected one a dataset, 2, got 1"):
        Draws.of(mixture, DataConfig(weights=(1.0,)), 0)


@pytest.mark.parametrize("shard_residues", [3, 20, 1_000])
def test_records_of_one_cluster_have_one_number_whatever_the_shards(make, shard_residues):
    numbers = Mixture([make("a", FIRST, CLUSTERS, shard_residues)]).cluster_numbers()
    labels = [label or f"no label {record}" for record, label in enumerate(CLUSTERS)]
    assert numbers.dtype == np.int64
    assert sorted(set(numbers.tolist())) == list(range(4))
    for a in range(7):
        for b in range(7):
            assert (numbers[a] == numbers[b]) == (labels[a] == labels[b])


def test_clusters_of_two_datasets_are_different_ones_and_numbered_in_order(make):
    mixture = Mixture([make("a", FIRST, CLUSTERS), make("b", SECOND, ["x", "", "x"])])
    numbers = mixture.cluster_numbers()
    assert set(numbers[:7].tolist()) == {0, 1, 2, 3}
    assert numbers[7:].tolist() == [4, 5, 4]
    draws = Draws.of(mixture, DataConfig(sample="clusters"), 0)
    assert draws.num_draws == 6
    assert all(sorted(numbers[draws.epoch(epoch)]) == [0, 1, 2, 3, 4, 5] for epoch in range(20))
    weighted = Draws.of(mixture, DataConfig(sample="clusters", weights=(1.0, 2.0)), 0)
    assert [int((weighted.epoch(0) < 7).sum()), int((weighted.epoch(0) >= 7).sum())] == [2, 4]


def test_a_dataset_without_clusters_is_named_with_what_to_do(make):
    mixture = Mixture([make("a", FIRST, CLUSTERS), make("b", SECOND)])
    with pytest.raises(ShardError, match=r"/b: .* no clusters.*--clusters.*data\.sample = 'records'"):
        Draws.of(mixture, DataConfig(sample="clusters"), 0)


def test_a_damaged_shard_is_found_when_all_are_opened(make, tmp_path):
    mixture = Mixture([make("a", FIRST), make("b", SECOND)])
    (tmp_path / "b" / "train-00000.h5").write_bytes(b"no shard")
    with pytest.raises(ShardError, match=r"b/train-00000\.h5"):
        mixture.open_shards()


def test_no_split_at_all_is_refused():
    with pytest.raises(ValueError, match="splits: expected at least one"):
        Mixture([])
