import tracemalloc
import weakref

import numpy as np
import pytest

from protlm.config import ModelConfig
from protlm.data.batching.masking import MaskRates, Objective
from protlm.data.storage.dataset import RecordLabels
from protlm.inference.baselines import empirical
from protlm.model.performer import Performer
from protlm.workflows.evaluate.measure import Masks, measure_split, resampling_key
from tests.unit.workflows.evaluate.eval_cases import InMemory, random_sequences


@pytest.fixture
def model():
    model = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=8, num_heads=1, ffn_dim=8, num_features=8)
    )
    model.reset(0)
    return model


def masks(rate=0.15, **options):
    settings = {"seed": 0, "num_masks": 1, "tokens_per_batch": 500, "window_tokens": None, "max_residues": None}
    return Masks(objective=Objective(False, MaskRates(rate)).hiding_all(), **{**settings, **options})


def targets_of(model, split, settings):
    """Returns the targets of each mask: a set of (record, position) each."""
    targets = {}
    watch = lambda mask, scores, _: targets.setdefault(mask, []).extend(  # noqa: E731
        zip(scores.records.tolist(), scores.positions.tolist(), strict=True)
    )
    sums = measure_split(model, split, settings, {}, watchers=(watch,))
    assert sums["model"].num_targets == sum(map(len, targets.values()))
    return [set(targets[mask]) for mask in sorted(targets)]


def test_every_mask_draws_other_targets_and_the_first_is_that_of_the_seed(model):
    split = InMemory(random_sequences(30))
    (alone,) = targets_of(model, split, masks())
    several = targets_of(model, split, masks(num_masks=4))
    assert several[0] == alone
    assert len(several) == 4
    for number, first in enumerate(several):
        for second in several[:number]:
            # By chance some 15 % are the same.
            assert len(first & second) < 0.4 * len(first)
    settings = [masks(num_masks=4, seed=seed) for seed in (0, 1)]
    seeds = [of_seed.seed_of(mask) for of_seed in settings for mask in range(4)]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_baselines_and_model_are_measured_on_the_same_targets_with_the_same_weights(model):
    split = InMemory(random_sequences(30))
    sums = measure_split(model, split, masks(num_masks=2), {"empirical": empirical({}), "again": empirical({})})
    assert list(sums) == ["model", "empirical", "again"]
    # The first column is the number of targets.
    assert (sums["model"].replicates[:, 0] == sums["empirical"].replicates[:, 0]).all()
    assert (sums["again"].replicates == sums["empirical"].replicates).all()
    assert sums["model"].num_targets == sums["empirical"].num_targets


def test_relatives_are_resampled_together():
    labels = [RecordLabels((), (cluster,) if cluster else (), ()) for cluster in ("a", "b", "a", "")]
    split = InMemory(["MKV", "LLA", "GGG", "LLA"], labels)
    keys = [resampling_key(split, record) for record in range(4)]
    assert keys[0] == keys[2] != keys[1]
    # Without a cluster the sequence counts.
    assert keys[3] == split.tokens(3).tobytes()


def test_a_split_of_one_cluster_has_no_interval(model):
    sequences = random_sequences(10)
    family = InMemory(sequences, [RecordLabels((), ("c",), ())] * 10)
    assert measure_split(model, family, masks(), {})["model"].estimates()["perplexity"].stderr is None
    assert measure_split(model, InMemory(sequences), masks(), {})["model"].estimates()["perplexity"].stderr > 0


def test_rows_without_targets_are_passed_over(model):
    split = InMemory(["L" * 30, "A" * 30])
    (targets,) = targets_of(model, split, masks(0.01, tokens_per_batch=8, window_tokens=8))
    assert len(targets) == 2


def test_the_predictions_of_a_row_are_let_go_before_the_next_but_one(model):
    predictions, numbers = [], []

    def watch(_mask, scores, _resampled):
        predictions.append(weakref.ref(scores.log_probabilities))
        numbers.append(sum(array() is not None for array in predictions))

    split = InMemory(random_sequences(40))
    measure_split(model, split, masks(num_masks=2), {"empirical": empirical({})}, watchers=(watch,))
    assert len(numbers) > 4
    assert max(numbers) <= 2


def test_what_is_held_does_not_grow_with_the_number_of_proteins(model):
    peaks = []
    # The first call fills caches.
    for num_proteins in (1, 50, 200):
        split = InMemory(random_sequences(num_proteins, shortest=40, longest=41))
        tracemalloc.start()
        try:
            measure_split(model, split, masks(1.0), {"empirical": empirical({})}, watchers=(lambda *_: None,))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # The memory of NumPy: positions and records of 6,000 more residues would take 96 kB, and the weights of 150 more
    # proteins 1.2 MB.
    assert peaks[2] - peaks[1] < 60_000, peaks


def test_progress_counts_the_residues_of_every_pass(model):
    split, steps = InMemory(random_sequences(30)), []
    measure_split(model, split, masks(num_masks=3), {}, advance=steps.append)
    assert sum(steps) == 3 * np.sum(split.lengths)
