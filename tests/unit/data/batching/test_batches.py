import numpy as np
import pytest
import torch

from protlm.data.batching.batches import pack_row
from protlm.data.batching.masking import evaluation_generator, mask_residues, training_generator
from protlm.data.batching.rows import pack
from protlm.errors import ShardError
from protlm.vocabulary import CLS, EOS, FIRST_RESIDUE, MASK, NUM_RESIDUES
from tests.unit.data.batching.batch_cases import (
    CAUSAL,
    LENGTHS,
    MASKED,
    InMemory,
    evaluation_batches,
    rows,
    segments,
    training_batches,
)


def proteins_of(batch):
    """Returns for each protein of a masked batch its residues, the places in it that are scored, and what is seen."""
    return [
        (tuple(true[1:-1]), tuple(place - 1 for place in places), tuple(seen[1:-1]))
        for true, seen, places in segments(batch)
    ]


def test_a_row_is_cls_residues_eos_back_to_back():
    tokens, bounds = pack_row([np.array([4, 5], dtype=np.uint8), np.array([6], dtype=np.uint8)])
    assert tokens.tolist() == [CLS, 4, 5, EOS, CLS, 6, EOS]
    assert bounds.tolist() == [0, 4, 7]
    assert tokens.dtype == torch.int64
    assert bounds.dtype == torch.int32


def test_a_training_draw_does_not_depend_on_how_rows_are_packed():
    proteins = InMemory(*LENGTHS)
    narrow, wide = (
        [
            member
            for batch in training_batches(90, proteins, tokens_per_batch=budget, max_length=20)
            for member in proteins_of(batch)
        ][:100]
        for budget in (30, 500)
    )
    assert narrow == wide
    assert len(narrow) == 100


def test_a_batch_hides_targets_only_and_never_a_special():
    proteins = InMemory(*LENGTHS)
    for batch in training_batches(30, proteins, max_length=20):
        starts, stops = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
        assert (batch.tokens[starts] == CLS).all()
        assert (batch.tokens[stops - 1] == EOS).all()
        assert not set(batch.target_positions.tolist()) & {*starts.tolist(), *(stops - 1).tolist()}
        hidden = (batch.tokens == MASK).nonzero().squeeze(1)
        assert set(hidden.tolist()) <= set(batch.target_positions.tolist())
        assert (batch.targets >= FIRST_RESIDUE).all()
        assert (batch.targets < FIRST_RESIDUE + NUM_RESIDUES).all()
        assert all(positions for _, positions, _ in proteins_of(batch)), "a target in every protein"
        assert batch.num_residues == len(batch.tokens) - 2 * len(starts)
        assert (batch.tokens.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
        assert (batch.target_positions.dtype, batch.targets.dtype) == (torch.int64, torch.int64)


def test_a_long_protein_gives_another_window_at_every_draw_and_ends_are_reached():
    proteins = InMemory(30)
    sequence = tuple(proteins.tokens(0).tolist())
    starts = []
    for batch in training_batches(300, proteins, tokens_per_batch=22, max_length=20):
        ((window, _, _),) = proteins_of(batch)
        assert len(window) == 20
        starts.append(next(s for s in range(11) if sequence[s : s + 20] == window))
    counts = np.bincount(starts, minlength=11)
    assert (counts > 300 / 11 / 3).all(), "every window, the first and the last too, comes about equally often"


def test_a_protein_that_fits_is_whole():
    proteins = InMemory(20, 5)
    whole = {tuple(sequence.tolist()) for sequence in proteins.sequences}
    for batch in training_batches(5, proteins, max_length=20):
        assert {window for window, _, _ in proteins_of(batch)} <= whole


def test_evaluation_keeps_order_and_whole_proteins():
    proteins = InMemory(*LENGTHS)
    shown = [member for batch in evaluation_batches(proteins, 64, 0, MASKED) for member in proteins_of(batch)]
    assert [list(sequence) for sequence, _, _ in shown] == [sequence.tolist() for sequence in proteins.sequences]


def test_an_evaluation_draw_depends_on_seed_and_sequence_alone():
    proteins = InMemory(*LENGTHS)
    by_budget = [
        [member for batch in evaluation_batches(proteins, budget, 7, MASKED) for member in proteins_of(batch)]
        for budget in (1, 50, 10_000)
    ]
    assert by_budget[0] == by_budget[1] == by_budget[2]
    other_seed = [member for batch in evaluation_batches(proteins, 50, 8, MASKED) for member in proteins_of(batch)]
    assert other_seed != by_budget[0]
    backwards = InMemory()
    backwards.sequences = proteins.sequences[::-1]
    reversed_order = [member for batch in evaluation_batches(backwards, 50, 7, MASKED) for member in proteins_of(batch)]
    assert reversed_order[::-1] == by_budget[0]
    for sequence, positions, seen in by_budget[0]:
        tokens = np.array(sequence, dtype=np.uint8)
        expected, target_mask = mask_residues(tokens, MASKED.rates, evaluation_generator(7, tokens))
        assert seen == tuple(expected.tolist())
        assert positions == tuple(target_mask.nonzero()[0].tolist())


@pytest.mark.parametrize("token", [CLS, EOS, MASK, FIRST_RESIDUE + NUM_RESIDUES, 255])
def test_a_token_that_is_no_residue_is_a_shard_error(token):
    proteins = InMemory(10, 10)
    proteins.sequences[1][9] = token
    with pytest.raises(ShardError, match="no residue"):
        list(evaluation_batches(proteins, 100, 0, MASKED))
    with pytest.raises(ShardError, match="no residue"):
        training_batches(1, proteins)


def test_the_order_of_an_epoch_shares_no_random_numbers_with_the_masks():
    orders = {}
    for row in rows(30):
        orders.setdefault(row.epoch, []).extend(row.records.tolist())
    for epoch in range(3):
        assert orders[epoch] != training_generator(0, epoch).permutation(len(LENGTHS)).tolist()


def test_a_clipped_protein_is_always_its_first_residues():
    proteins = InMemory(*LENGTHS)
    clipped = {tuple(sequence[:20].tolist()) for sequence in proteins.sequences}
    masks = set()
    for batch in training_batches(60, proteins, mode="clipped", max_length=20):
        assert {residues for residues, _, _ in proteins_of(batch)} <= clipped
        masks |= {places for residues, places, _ in proteins_of(batch) if len(residues) == 20}
    assert len(masks) > 100, "what is hidden differs from draw to draw"


@pytest.mark.parametrize("mode", ["packed", "clipped"])
def test_causal_training_scores_every_residue_and_the_end_where_it_is_the_proteins(mode):
    proteins = InMemory(*LENGTHS)
    whole = [sequence.tolist() for sequence in proteins.sequences]
    num_cut = num_ends = 0
    for batch in training_batches(80, proteins, objective=CAUSAL, mode=mode, max_length=20):
        for tokens, seen, places in segments(batch, CAUSAL):
            assert tokens == seen, "nothing is hidden, and every target is the token after its prediction"
            residues = tokens[1:-1]
            # A stretch of 20 is whole, or cut: then its residues tell whether it reaches the end.
            ends_here = len(residues) < 20 or any(len(s) >= 20 and s[-20:] == residues for s in whole)
            num_cut += not ends_here
            num_ends += ends_here and len(residues) == 20
            assert places == list(range(1, len(tokens) if ends_here else len(tokens) - 1))
    assert num_cut > 20
    assert num_ends > 3 or mode == "clipped"


def test_causal_evaluation_scores_every_residue_and_no_end():
    proteins = InMemory(*LENGTHS)
    shown = [segment for batch in evaluation_batches(proteins, 64, 0, CAUSAL) for segment in segments(batch, CAUSAL)]
    for (tokens, seen, places), sequence in zip(shown, proteins.sequences, strict=True):
        assert tokens == seen == [CLS, *sequence.tolist(), EOS]
        assert places == list(range(1, len(tokens) - 1))


def test_a_causal_prediction_stands_one_token_before_its_target():
    proteins = InMemory()
    proteins.sequences = [np.array([4, 5, 6], dtype=np.uint8), np.array([7], dtype=np.uint8)]
    (batch,) = evaluation_batches(proteins, 100, 0, CAUSAL)
    assert batch.tokens.tolist() == [CLS, 4, 5, 6, EOS, CLS, 7, EOS]
    assert batch.target_positions.tolist() == [0, 1, 2, 5]
    assert batch.targets.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("objective", [MASKED, CAUSAL], ids=["masked", "causal"])
def test_evaluation_cuts_a_protein_only_after_hiding(objective):
    proteins = InMemory(*LENGTHS)
    whole = [s for b in evaluation_batches(proteins, 64, 3, objective) for s in segments(b, objective)]
    batches = list(evaluation_batches(proteins, 64, 3, objective, max_residues=10))
    assert len(batches) == len(list(pack(np.minimum(proteins.lengths, 10), 64))), "rows are planned with what is left"
    for (true, seen, places), (cut_true, cut_seen, cut_places) in zip(
        whole, [s for b in batches for s in segments(b, objective)], strict=True
    ):
        kept = min(len(true) - 2, 10)
        assert cut_true == [*true[: kept + 1], EOS]
        assert cut_seen == [*seen[: kept + 1], EOS]
        assert cut_places == [place for place in places if place <= kept]
    assert sum(batch.num_residues for batch in batches) == np.minimum(proteins.lengths, 10).sum()


def test_a_limit_of_residues_is_refused_for_windows():
    with pytest.raises(ValueError, match="max_residues: expected none with window_tokens"):
        list(evaluation_batches(InMemory(5), 64, 0, MASKED, window_tokens=32, max_residues=10))
