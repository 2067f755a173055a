"""What a swap costs, against plain formulas on the whole of the rows."""

import numpy as np
import pytest
import torch

from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import MaskRates, Objective
from protlm.inference.attention_swap import measure_moments, swap_attention
from protlm.inference.scoring import score_row
from protlm.inference.swap_scores import EXACT, FAR_ONLY, NEAR_ONLY, SWAPPED, Candidate, measure_swaps
from protlm.vocabulary import VOCABULARY_SIZE
from tests.unit.inference.test_attention_swap import exact, settings, some_proteins
from tests.unit.model.small_models import build


class Proteins:
    def __init__(self, residues):
        self.residues = residues
        self.lengths = np.array([len(tokens) for tokens in residues])

    def tokens(self, record):
        return self.residues[record]

    def key(self, record):
        return self.residues[record].tobytes()


PROTEINS = Proteins(some_proteins(12, 30) + some_proteins(3, 64, seed=1))
OBJECTIVE = Objective(causal=False, rates=MaskRates(0.3, 1.0, 0.0))


def rows():
    return evaluation_rows(PROTEINS, 200, 0, OBJECTIVE)


def measured(model, candidates):
    return measure_swaps(model, candidates, rows(), PROTEINS.key)


def test_a_swap_that_estimates_nothing_costs_nothing():
    model = exact()
    same = swap_attention(model, settings(near_block=80), measure_moments(model, some_proteins()))
    first, second = measured(model, [Candidate(SWAPPED, same, 48, 80)])
    assert first.name == EXACT
    assert first.layer_errors == [0, 0]
    assert (first.kept.value, first.agreement, first.kl, first.cosine) == (1, 1, 0, 1)
    assert second.kept.value == second.agreement == 1
    assert second.kl == pytest.approx(0, abs=1e-6)
    assert second.cosine == pytest.approx(1, abs=1e-6)
    assert max(second.layer_errors) < 1e-5
    assert second.accuracy == first.accuracy


def test_numbers_are_those_of_plain_formulas():
    model = exact()
    swapped = swap_attention(model, settings(near_block=4, balance="none"), None)
    names = (SWAPPED, NEAR_ONLY, FAR_ONLY)
    _, *others = measured(model, [Candidate(name, swapped, 48, 4) for name in names])
    assert [each.name for each in others] == list(names)
    reference, own, targets, cosines, errors, energies = [], [], [], [], np.zeros(2), np.zeros(2)
    for row in rows():
        first, second = score_row(model, row), score_row(swapped, row)
        reference.append(first.log_probabilities)
        own.append(second.log_probabilities)
        targets.append(first.targets)
        tokens, ends = row.batch.tokens, row.batch.cu_seqlens
        with torch.no_grad():
            states = [each.hidden_states(tokens, ends, (0, 1, 2)) for each in (model, swapped)]
        cosines.append(torch.cosine_similarity(states[0][2], states[1][2], dim=-1))
        inputs = {}
        hooks = [
            layer.attention.register_forward_hook(
                lambda _, arguments, out, number=number, inputs=inputs: inputs.update({number: (arguments, out)})
            )
            for number, layer in enumerate(model.layers)
        ]
        with torch.no_grad():
            model.hidden_states(tokens, ends, (2,))
            for hook in hooks:
                hook.remove()
            for number, (arguments, out) in inputs.items():
                errors[number] += float((swapped.layers[number].attention(*arguments) - out).square().sum())
                energies[number] += float(out.square().sum())
    reference, own, targets = (np.concatenate(each) for each in (reference, own, targets))
    shares = np.exp(reference.astype(np.float64))
    assert reference.shape[1] == VOCABULARY_SIZE
    assert others[0].kl == pytest.approx((shares * (reference - own)).sum(1).mean(), rel=1e-4)
    assert others[0].agreement == pytest.approx((reference.argmax(1) == own.argmax(1)).mean())
    accuracy = (own.argmax(1) == targets).mean()
    assert others[0].accuracy.value == pytest.approx(accuracy)
    assert others[0].kept.value == pytest.approx(accuracy / (reference.argmax(1) == targets).mean())
    loss = -own[np.arange(len(own)), targets].mean()
    assert others[0].perplexity.value == pytest.approx(np.exp(loss), rel=1e-4)
    assert others[0].cosine == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-4)
    np.testing.assert_allclose(others[0].layer_errors, np.sqrt(errors / energies), rtol=1e-3)
    # The parts are others, and the whole is again as it was.
    assert len({each.kl for each in others}) == 3
    again = measured(model, [Candidate(SWAPPED, swapped, 48, 4)])[1]
    assert again == others[0]


def test_of_a_model_that_lacks_tokens_only_its_own_count():
    tokens = ("<cls>", "<pad>", "<eos>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>")
    model = build(attention="softmax", vocabulary=tokens)
    swapped = swap_attention(model, settings(balance="none", near_block=0), None)
    _, own = measured(model, [Candidate(SWAPPED, swapped, 48, 0)])
    assert 0 < own.kl < np.inf


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="rows: expected hidden residues, got none"):
        measure_swaps(exact(), [], iter(()), PROTEINS.key)
