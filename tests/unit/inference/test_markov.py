import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import MaskRates, Objective
from protlm.inference import markov
from protlm.inference.markov import MarkovCounts, MarkovModel, TwoSidedMarkovModel, largest_order
from protlm.vocabulary import CLS, EOS, FIRST_RESIDUE, MASK, NUM_RESIDUES, RESIDUES, TOKENS, encode
from tests.unit.workflows.evaluate.eval_cases import InMemory, random_sequences

# Few letters, so that contexts come again; and those that stand for several or unusual residues.
TRAINING = [*random_sequences(40, seed=1, letters="LAGXBZUO"), "L", "AG", "X" * 7, "ACDEFGHIKLMNPQRSTVWY"]
SCORED = [*random_sequences(15, seed=2, letters="LAGXBZUOW"), "M", "LL", "AGX"]
ORDERS = range(4)


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.setattr(markov, "_BLOCK_RESIDUES", 50)
    counts = MarkovCounts(max(ORDERS))
    counts.add(encode(sequence.encode()) for sequence in TRAINING)
    return counts


def slow_counts(sequences):
    """The counts of the residues that followed each context, by its letters."""
    followers = defaultdict(Counter)
    for sequence in sequences:
        for place, letter in enumerate(sequence):
            for k in range(min(place, max(ORDERS)) + 1):
                followers[sequence[place - k : place]][letter] += 1
    return followers


def slow_probability(followers, context, letter):
    """The rule of Witten and Bell as it is written down."""
    shorter = 1 / 25 if context == "" else slow_probability(followers, context[1:], letter)
    seen = followers.get(context, Counter())
    if not seen:
        return shorter
    return (seen[letter] + len(seen) * shorter) / (sum(seen.values()) + len(seen))


def context_in(row, position, order):
    """The residues before a position in a row of tokens, back to whatever is no visible residue."""
    context = ""
    for token in row[max(0, position - order) : position][::-1]:
        if len(TOKENS[token]) > 1 or TOKENS[token] in ".-":
            break
        context = TOKENS[token] + context
    return context


def test_the_counts_are_those_of_every_context(counts):
    slow = slow_counts(TRAINING)
    assert counts.num_residues == sum(map(len, TRAINING))
    assert len(counts.tables) == len(ORDERS)
    for k in ORDERS:
        expected = {context: of for context, of in slow.items() if len(context) == k}
        assert counts.tables[k].sum() == sum(of.total() for of in expected.values())
        for context, of in expected.items():
            # The residue before stands in front; the last one counts single rows.
            code = sum(RESIDUES.index(letter) * 25**place for place, letter in enumerate(context[::-1]))
            assert counts.tables[k][code].tolist() == [of[letter] for letter in RESIDUES]


def test_proteins_are_counted_alike_in_blocks_of_any_size_and_in_several_calls(counts, monkeypatch):
    proteins = [encode(sequence.encode()) for sequence in TRAINING]
    for block in (1, 33, 1 << 20):
        monkeypatch.setattr(markov, "_BLOCK_RESIDUES", block)
        other = MarkovCounts(max(ORDERS))
        other.add(proteins[:10])
        other.add([])
        other.add(proteins[10:])
        assert other.num_residues == counts.num_residues
        for table, expected in zip(other.tables, counts.tables, strict=True):
            assert (table == expected).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_hidden_residues_are_predicted_as_the_formula_says(counts, order, rate):
    check_predictions(counts, order, Objective(False, MaskRates(rate)).hiding_all(), offset=0)


@pytest.mark.parametrize("order", ORDERS)
def test_the_next_residue_is_predicted_as_the_formula_says(counts, order):
    check_predictions(counts, order, Objective(True, MaskRates(0.15)), offset=1)


def check_predictions(counts, order, objective, offset):
    slow, model = slow_counts(TRAINING), MarkovModel(counts, order)
    lengths = Counter()
    for window_tokens in (None, 20):
        for row in evaluation_rows(InMemory(SCORED), 64, 0, objective, window_tokens=window_tokens):
            tokens, positions = row.batch.tokens.numpy(), row.batch.target_positions.numpy() + offset
            predicted = model.log_probabilities(tokens, positions)
            assert predicted.dtype == np.float32
            for position, of_position in zip(positions.tolist(), predicted, strict=True):
                context = context_in(tokens.tolist(), position, order)
                lengths[len(context)] += 1
                expected = [math.log(slow_probability(slow, context, letter)) for letter in RESIDUES]
                assert of_position[FIRST_RESIDUE : FIRST_RESIDUE + NUM_RESIDUES] == pytest.approx(expected, rel=1e-6)
    assert sorted(lengths) == list(range(order + 1)), "contexts of every length are in the rows"


def test_a_context_ends_at_masks_at_specials_and_at_the_beginning_of_the_row(counts):
    model = MarkovModel(counts, 3)
    slow = slow_counts(TRAINING)
    letters = encode(b"LAGX").tolist()
    for before, context in (
        ([], ""),
        (letters[:2], "LA"),
        (letters, "AGX"),
        ([CLS, letters[0]], "L"),
        ([*letters[:2], MASK], ""),
        ([letters[0], MASK, letters[1]], "A"),
        ([*letters, EOS, CLS], ""),
        ([*letters[:1], EOS, letters[2]], "G"),
    ):
        row = np.array([*before, MASK])
        (predicted,) = model.log_probabilities(row, np.array([len(before)]))
        expected = [math.log(slow_probability(slow, context, letter)) for letter in RESIDUES]
        assert predicted[FIRST_RESIDUE : FIRST_RESIDUE + NUM_RESIDUES] == pytest.approx(expected, rel=1e-6)


def test_without_context_it_is_the_frequencies_smoothed_by_the_number_of_kinds(counts):
    model = MarkovModel(counts, 0)
    letters = "".join(TRAINING)
    (predicted,) = model.log_probabilities(np.array([4, 5, 6]), np.array([2]))
    kinds = len(set(letters))
    for letter in RESIDUES:
        expected = (letters.count(letter) + kinds / 25) / (len(letters) + kinds)
        assert math.exp(predicted[TOKENS.index(letter)]) == pytest.approx(expected, rel=1e-6)


def test_without_counts_every_residue_is_as_likely_and_no_special_token_is_predicted():
    predicted = MarkovModel(MarkovCounts(max(ORDERS)), 2).log_probabilities(np.array([4, 5, 6]), np.array([0, 2]))
    assert np.exp(predicted).sum(axis=1) == pytest.approx([1, 1])
    assert predicted[:, FIRST_RESIDUE : FIRST_RESIDUE + NUM_RESIDUES] == pytest.approx(math.log(1 / 25))
    assert np.isneginf(predicted[:, :FIRST_RESIDUE]).all()
    assert np.isneginf(predicted[:, FIRST_RESIDUE + NUM_RESIDUES :]).all()


@pytest.mark.parametrize("order", [-1, max(ORDERS) + 1])
def test_an_order_that_was_not_counted_is_refused(order):
    with pytest.raises(ValueError, match=f"order: expected 0 to 3, got {order}"):
        MarkovModel(MarkovCounts(max(ORDERS)), order)


def test_a_shortened_model_is_that_of_the_lower_order():
    counts = MarkovCounts(max(ORDERS))
    counts.add([encode(b"MKTAYIAKQRQISFVKSHFSRQ"), encode(b"MKTAYI")])
    row = encode(b"AYIAKQMK")
    positions = np.arange(len(row))
    longest = MarkovModel(counts, 3)
    for order in range(4):
        expected = MarkovModel(counts, order).log_probabilities(row, positions)
        np.testing.assert_array_equal(longest.shortened(order).log_probabilities(row, positions), expected)
    with pytest.raises(ValueError, match="expected 0 to 2, got 3"):
        longest.shortened(2).shortened(3)


@pytest.mark.parametrize("order", [-1, markov.MAX_ORDER + 1])
def test_contexts_that_would_need_huge_tables_are_not_counted(order):
    with pytest.raises(ValueError, match=f"order: expected 0 to 4, got {order}"):
        MarkovCounts(order)


@pytest.mark.parametrize("order", ORDERS)
def test_the_counts_of_a_low_order_are_those_of_a_higher_one(counts, order):
    lower = MarkovCounts(order)
    lower.add(encode(sequence.encode()) for sequence in TRAINING)
    assert lower.num_residues == counts.num_residues
    assert len(lower.tables) == order + 1
    for table, expected in zip(lower.tables, counts.tables, strict=False):
        np.testing.assert_array_equal(table, expected)


def test_reversed_counts_are_those_of_the_reversed_proteins(counts):
    backwards = MarkovCounts(max(ORDERS))
    backwards.add(encode(sequence[::-1].encode()) for sequence in TRAINING)
    assert counts.reversed().num_residues == counts.num_residues
    for table, expected in zip(counts.reversed().tables, backwards.tables, strict=True):
        np.testing.assert_array_equal(table, expected)


def test_few_residues_are_no_reason_to_try_long_contexts():
    sizes = (0, 7, 156, 157, 3_906, 3_907, 97_656, 97_657, 10**9)
    assert [largest_order(size) for size in sizes] == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_both_sides_are_the_product_of_two_tables_over_the_frequencies():
    before, after = MarkovCounts(2), MarkovCounts(2)
    proteins = [encode(sequence.encode()) for sequence in TRAINING]
    before.add(proteins)
    after.add([tokens[::-1] for tokens in proteins])
    row = encode(b"LAGXBLAG").copy()
    row[3] = MASK
    model = TwoSidedMarkovModel(MarkovModel(before, 2), MarkovModel(after, 2))
    actual = np.exp(model.log_probabilities(row, np.array([3, 5])).astype(np.float64))
    for place, position in enumerate((3, 5)):
        left = MarkovModel(before, 2).log_probabilities(row, np.array([position]))[0].astype(np.float64)
        right = MarkovModel(after, 2).log_probabilities(row[::-1], np.array([len(row) - 1 - position]))[0]
        alone = MarkovModel(before, 0).log_probabilities(row, np.array([position]))[0]
        is_residue = np.isfinite(left)
        product = np.zeros(len(left))
        product[is_residue] = np.exp(left[is_residue] + right[is_residue] - alone[is_residue])
        np.testing.assert_allclose(actual[place], product / product.sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="order 2"):
        TwoSidedMarkovModel(MarkovModel(before, 2), MarkovModel(after, 1))
