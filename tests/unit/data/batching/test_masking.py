import math

import numpy as np
import pytest

from protlm.data.batching.masking import MaskRates, evaluation_generator, mask_residues, training_generator
from protlm.vocabulary import FIRST_RESIDUE, MASK, NUM_RESIDUES, NUM_STANDARD_RESIDUES

MAX_Z = 5.0


def protein(length, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES, length, dtype=np.uint8)


def z_of_share(count, total, share):
    return abs(count - total * share) / math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize(
    "rates", [MaskRates(0.15), MaskRates(0.4), MaskRates(0.02), MaskRates(0.15, 0.1, 0.8), MaskRates(0.3, 0.5, 0.5)]
)
def test_targets_and_their_fates_come_in_the_proportions_asked_for(rates):
    tokens = protein(200_000)
    seen, target_mask = mask_residues(tokens, rates, training_generator(0, 0))
    num_targets = int(target_mask.sum())
    assert z_of_share(num_targets, len(tokens), rates.rate) < MAX_Z
    masked = seen == MASK
    assert z_of_share(int(masked.sum()), num_targets, rates.mask_share) < MAX_Z
    # A random residue of 20 is the true one in a twentieth of the cases, where the true one is a standard one.
    standard, share = tokens < FIRST_RESIDUE + NUM_STANDARD_RESIDUES, rates.random_share
    changed = (seen != tokens) & ~masked
    assert z_of_share(int(changed[standard].sum()), int(target_mask[standard].sum()), share * 19 / 20) < MAX_Z
    assert z_of_share(int(changed[~standard].sum()), int(target_mask[~standard].sum()), share) < MAX_Z


def test_the_usual_shares_are_berts():
    assert MaskRates(0.15) == MaskRates(0.15, 0.8, 0.1)


def test_the_shares_change_no_choice_of_targets():
    tokens = protein(2_000)
    targets = [
        mask_residues(tokens, rates, training_generator(0, 3))[1]
        for rates in (MaskRates(0.15), MaskRates(0.15, 0.1, 0.8), MaskRates(0.15, 1.0, 0.0))
    ]
    assert np.array_equal(targets[0], targets[1])
    assert np.array_equal(targets[0], targets[2])


def test_whole_shares_leave_no_exception():
    tokens = protein(3_000)
    for rates, expected in ((MaskRates(0.5, 1.0, 0.0), MASK), (MaskRates(0.5, 0.0, 0.0), tokens)):
        seen, target_mask = mask_residues(tokens, rates, training_generator(0, 4))
        assert np.array_equal(seen, np.where(target_mask, expected, tokens))


def test_replacements_are_uniform_over_the_20_standard_residues():
    tokens = np.full(400_000, FIRST_RESIDUE + NUM_STANDARD_RESIDUES, dtype=np.uint8)
    seen, _ = mask_residues(tokens, MaskRates(1.0), training_generator(0, 1))
    replaced = seen[(seen != MASK) & (seen != tokens)]
    counts = np.bincount(replaced, minlength=33)
    assert counts[:FIRST_RESIDUE].sum() == counts[FIRST_RESIDUE + NUM_STANDARD_RESIDUES :].sum() == 0
    for count in counts[FIRST_RESIDUE : FIRST_RESIDUE + NUM_STANDARD_RESIDUES]:
        assert z_of_share(int(count), len(replaced), 1 / NUM_STANDARD_RESIDUES) < MAX_Z


def test_only_targets_are_changed_and_the_input_is_left_alone():
    tokens = protein(5_000)
    tokens.setflags(write=False)
    seen, target_mask = mask_residues(tokens, MaskRates(0.15), training_generator(0, 0))
    assert np.array_equal(seen[~target_mask], tokens[~target_mask])
    assert target_mask.dtype == bool
    assert seen.dtype == np.uint8


def test_targets_are_drawn_independently_of_each_other_and_of_their_fate():
    _, target_mask = mask_residues(protein(200_000), MaskRates(0.3), training_generator(0, 2))
    both = int((target_mask[1:] & target_mask[:-1]).sum())
    assert z_of_share(both, len(target_mask) - 1, 0.09) < MAX_Z


@pytest.mark.parametrize("length", [1, 2, 7])
def test_there_is_always_a_target_and_where_none_is_drawn_it_is_uniform(length):
    tokens, counts, num_draws = protein(length), np.zeros(length), 3_000
    for draw in range(num_draws):
        _, target_mask = mask_residues(tokens, MaskRates(1e-12), training_generator(0, draw))
        assert target_mask.sum() == 1
        counts += target_mask
    if length > 1:
        assert all(z_of_share(count, num_draws, 1 / length) < MAX_Z for count in counts)


def test_at_rate_one_everything_is_a_target():
    assert mask_residues(protein(300), MaskRates(1.0), training_generator(0, 0))[1].all()


def test_a_training_draw_is_a_function_of_the_seed_and_its_number():
    def draw(seed, number):
        return training_generator(seed, number).random(8).tolist()

    assert draw(3, 5) == draw(3, 5)
    different = [draw(3, 5), draw(3, 6), draw(4, 5), draw(5, 3), draw(2**64 - 1, 5)]
    assert len({tuple(values) for values in different}) == len(different)


def test_an_evaluation_draw_is_a_function_of_the_seed_and_the_sequence():
    def draw(seed, tokens):
        return tuple(evaluation_generator(seed, tokens).random(8))

    tokens = protein(50)
    changed = tokens.copy()
    changed[-1] = FIRST_RESIDUE + (changed[-1] - FIRST_RESIDUE + 1) % NUM_RESIDUES
    strided = np.repeat(tokens, 2)[::2]
    assert draw(0, tokens) == draw(0, tokens.copy()) == draw(0, strided)
    assert len({draw(0, tokens), draw(1, tokens), draw(0, changed), draw(0, tokens[:-1])}) == 4
