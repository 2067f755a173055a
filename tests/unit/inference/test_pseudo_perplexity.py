import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from protlm.config import ModelConfig
from protlm.inference.metrics import MetricSums, replicate_weights, sums_by_protein
from protlm.inference.pseudo_perplexity import sample_of, single_residue_rows
from protlm.inference.scoring import score_rows
from protlm.model.performer import Performer
from protlm.vocabulary import CLS, EOS, MASK
from tests.unit.workflows.evaluate.eval_cases import InMemory, random_sequences


@pytest.fixture
def model():
    model = Performer(
        ModelConfig(attention="positive", num_layers=2, model_dim=16, num_heads=2, ffn_dim=16, num_features=8)
    )
    model.reset(0)
    return model.eval()


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_it_is_that_of_a_loop_over_the_residues_one_at_a_time(model, tokens_per_batch):
    proteins = InMemory([*random_sequences(3, longest=25), "M"])
    losses = []
    for tokens in proteins.proteins:
        for place in range(len(tokens)):
            row = torch.tensor([CLS, *tokens.tolist(), EOS])
            row[place + 1] = MASK
            with torch.no_grad():
                logits = model(row, torch.tensor([0, len(row)], dtype=torch.int32))
            losses.append(-torch.log_softmax(logits[place + 1].double(), -1)[tokens[place]].item())
    sums = MetricSums()
    records = range(len(proteins.proteins))
    for _, scores in score_rows(model, single_residue_rows(proteins, records, tokens_per_batch)):
        members, terms = sums_by_protein(scores)
        sums.add(terms, replicate_weights([b"%d" % member for member in members], 0))
    assert sums.num_targets == len(losses) == proteins.lengths.sum()
    assert sums.values()["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 1000])
def test_each_residue_is_hidden_once_alone_in_a_copy_of_its_protein(tokens_per_batch):
    proteins = InMemory(random_sequences(4))
    hidden = []
    for row in single_residue_rows(proteins, [3, 1], tokens_per_batch):
        bounds = row.batch.cu_seqlens.tolist()
        assert bounds[-1] <= tokens_per_batch or len(bounds) == 2
        segments = [row.batch.tokens[start:stop].tolist() for start, stop in pairwise(bounds)]
        assert len(segments) == len(row.records) == len(row.positions)
        for number, (segment, record, position) in enumerate(zip(segments, row.records, row.positions, strict=True)):
            expected = [CLS, *proteins.tokens(record).tolist(), EOS]
            assert row.batch.targets[number] == expected[position + 1]
            assert row.batch.target_positions[number] == bounds[number] + position + 1
            expected[position + 1] = MASK
            assert segment == expected
            hidden.append((record, position))
        assert row.batch.num_residues == row.batch.tokens.numel() - 2 * len(segments)
    lengths = proteins.lengths
    assert hidden == [(record, place) for record in (3, 1) for place in range(lengths[record])]


def test_the_sample_depends_on_sequences_and_seed_and_not_on_their_order():
    sequences = random_sequences(50)
    order = np.random.default_rng(1).permutation(50)
    proteins, shuffled = InMemory(sequences), InMemory([sequences[number] for number in order])
    chosen = sample_of(proteins, 10, 0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert {sequences[number] for number in chosen} == {
        sequences[order[number]] for number in sample_of(shuffled, 10, 0)
    }
    # A larger sample has the smaller one in it.
    assert set(chosen) < set(sample_of(proteins, 11, 0))
    assert chosen != sample_of(proteins, 10, 1)
    assert sample_of(proteins, 1000, 0) == list(range(50))


def test_no_protein_beyond_the_limit_is_in_the_sample_and_others_take_its_place():
    proteins = InMemory(random_sequences(50))
    short = np.flatnonzero(proteins.lengths <= 20).tolist()
    assert 5 < len(short) < 50
    assert sample_of(proteins, 1000, 0, max_residues=20) == short
    assert len(sample_of(proteins, 5, 0, max_residues=20)) == 5
    assert sample_of(proteins, 5, 0, max_residues=4) == []
