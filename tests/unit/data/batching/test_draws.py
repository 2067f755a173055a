import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import training_generator
from protlm.errors import ConfigError

MAX_Z = 5.0
# Records 0 to 9: clusters of 3, 1, 4 and 2 members, which do not lie side by side.
CLUSTERS = np.array([0, 2, 1, 2, 0, 3, 2, 0, 3, 2])


def epochs(draws, num_epochs):
    return [draws.epoch(number).tolist() for number in range(num_epochs)]


def test_an_epoch_draws_every_record_once_in_an_order_of_its_own():
    draws = Draws([30, 20], 0)
    orders = epochs(draws, 20)
    assert draws.num_draws == 50
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20


def test_the_order_of_all_records_is_uniform():
    firsts = Counter(Draws([3], seed).epoch(0)[0].item() for seed in range(3_000))
    assert all(abs(firsts[record] - 1_000) < MAX_Z * math.sqrt(3_000 * 2 / 9) for record in range(3))


@pytest.mark.parametrize(
    "settings", [{}, {"weights": (3, 1)}, {"clusters": CLUSTERS}, {"weights": (1, 5), "clusters": CLUSTERS}]
)
def test_an_epoch_is_a_function_of_the_seed_and_its_number(settings):
    def order(seed, number, *before):
        draws = Draws([3, 1] if "clusters" in settings else [7, 3], seed, **settings)
        for earlier in before:
            draws.epoch(earlier)
        return tuple(draws.epoch(number).tolist())

    assert order(1, 6) == order(1, 6, 0, 9, 3)
    assert len({order(seed, number) for seed in (0, 1, 2**64 - 1) for number in range(20)}) > 20


def test_the_order_shares_no_random_numbers_with_the_masks():
    draws = Draws([50], 0)
    for epoch in range(3):
        assert draws.epoch(epoch).tolist() != training_generator(0, epoch).permutation(50).tolist()


def test_an_epoch_of_clusters_draws_one_member_of_each():
    draws = Draws([4], 0, clusters=CLUSTERS)
    assert draws.num_draws == 4
    for order in epochs(draws, 50):
        assert sorted(CLUSTERS[order]) == [0, 1, 2, 3]
    assert len({tuple(CLUSTERS[order]) for order in epochs(draws, 200)}) == 24, "clusters come in every order"


def test_members_are_drawn_uniformly_and_independently_of_the_order():
    num_epochs = 4_000
    counts, by_place = Counter(), Counter()
    for order in epochs(Draws([4], 3, clusters=CLUSTERS), num_epochs):
        counts.update(order)
        by_place[CLUSTERS[order].tolist().index(0), next(record for record in order if CLUSTERS[record] == 0)] += 1
    for record, cluster in enumerate(CLUSTERS):
        share = 1 / int((cluster == CLUSTERS).sum())
        deviation = abs(counts[record] - num_epochs * share)
        assert deviation <= MAX_Z * math.sqrt(num_epochs * share * (1 - share))
    for place in range(4):
        for record in (0, 4, 7):
            expected = num_epochs / 12
            assert abs(by_place[place, record] - expected) < MAX_Z * math.sqrt(expected)


def test_members_differ_from_epoch_to_epoch():
    orders = epochs(Draws([1], 0, clusters=np.zeros(1_000, dtype=np.int64)), 30)
    assert len({order[0] for order in orders}) > 25


@pytest.mark.parametrize(
    ("num_units", "weights", "shares"),
    [
        ([10], (7.5,), [10]),
        ([10, 10], (1, 1), [10, 10]),
        ([90, 10], (1, 1), [50, 50]),
        ([90, 10], (0.25, 0.75), [25, 75]),
        ([4, 3, 3], (1, 1, 1), [4, 3, 3]),
        ([4, 4, 3], (5, 3, 3), [5, 3, 3]),
        ([1, 99], (1e300, 1.5e300), [40, 60]),
        ([5, 2], (2, 1.5), [4, 3]),
    ],
)
def test_weights_share_out_an_epoch_of_the_same_size(num_units, weights, shares):
    draws = Draws(num_units, 0, weights=weights)
    dataset = np.repeat(np.arange(len(num_units)), num_units)
    assert draws.num_draws == sum(num_units)
    for order in epochs(draws, 5):
        assert np.bincount(dataset[order], minlength=len(num_units)).tolist() == shares


@pytest.mark.parametrize("num_units", [[7, 93], [1, 99], [6_000, 4_000]])
def test_with_weights_no_record_of_a_dataset_repeats_before_all_were_drawn(num_units):
    draws = Draws(num_units, 4, weights=(1, 1))
    counts = np.zeros(sum(num_units), dtype=np.int64)
    for number in range(12):
        counts += np.bincount(draws.epoch(number), minlength=len(counts))
        for inside in np.split(counts, [num_units[0]]):
            assert inside.max() - inside.min() <= 1


def test_a_small_dataset_is_walked_through_in_another_order_every_time():
    draws = Draws([5, 9_995], 0, weights=(1, 1))
    walk = draws._walk(0, 5, 0, 50_000).reshape(-1, 5)
    assert (np.sort(walk, axis=1) == np.arange(5)).all()
    counts = Counter(map(tuple, walk.tolist()))
    assert len(counts) == math.factorial(5)
    expected = len(walk) / math.factorial(5)
    assert all(abs(count - expected) < MAX_Z * math.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize("num_units", [3, 4096, 5_000])
def test_a_walk_is_the_same_however_it_is_cut(num_units):
    draws = Draws([num_units], 0)
    whole = draws._walk(1, num_units, 0, 20_000)
    cuts = [0, 1, 2, 4_095, 4_096, 4_098, 9_999, 10_000, 20_000]
    parts = [draws._walk(1, num_units, start, stop) for start, stop in pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, draws._walk(0, num_units, 0, 20_000)), "each dataset has its own"


def test_an_epoch_mixes_the_datasets():
    order = Draws([500, 500], 0, weights=(1, 1)).epoch(0)
    # The first half of a random order has 250 of each, give or take.
    assert abs(int((order[:500] < 500).sum()) - 250) < MAX_Z * math.sqrt(500 / 4)


def test_weights_and_clusters_go_together():
    clusters = np.concatenate([CLUSTERS, 4 + CLUSTERS])
    draws = Draws([4, 4], 0, weights=(3, 1), clusters=clusters)
    drawn = np.concatenate(epochs(draws, 40))
    counts = np.bincount(clusters[drawn])
    assert counts.tolist() == [60] * 4 + [20] * 4
    assert set(drawn.tolist()) == set(range(20))


def test_weights_that_do_not_fit_are_a_clear_error():
    with pytest.raises(ConfigError, match=r"data\.weights: expected one a dataset, 2, got 3"):
        Draws([5, 5], 0, weights=(1, 1, 1))
    with pytest.raises(ConfigError, match=r"data\.weights: .* got none of the 10 .* from dataset 2 with weight 1e-06"):
        Draws([5, 5], 0, weights=(1, 1e-6))


def test_a_run_without_records_is_refused_rather_than_endless():
    with pytest.raises(ValueError, match="at least one record"):
        Draws([0], 0)
