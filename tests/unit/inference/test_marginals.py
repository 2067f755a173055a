"""Log-probabilities, scores and pseudo-perplexities against loops that pass one protein at a time."""

import math

import numpy as np
import pytest
import torch

from protlm.config import ModelConfig
from protlm.data.mutations import mutated, parse_mutant
from protlm.inference.long_proteins import Cut
from protlm.inference.protein_model import ProteinModel
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.vocabulary import CLS, EOS, MASK, RESIDUES, TOKEN_IDS, encode

PROTEIN = "MKVLAAGHWQEDRSTYPFNICMKVLXAAGU"
KINDS = {
    "positive": {"attention": "positive"},
    "softmax": {"attention": "softmax"},
    # Without the convolution the last layer is computed at the targets only.
    "plain softmax": {"attention": "softmax", "conv_width": 0},
    "local": {"attention": "local"},
}


def protein_model(**options):
    sizes = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "ffn_dim": 48, "num_features": 16}
    performer = Performer(ModelConfig(**{"attention": "positive", **sizes, **options}))
    performer.reset(0)
    with torch.no_grad():
        # Weights as they start leave all probabilities nearly equal.
        for parameter in performer.parameters():
            parameter.mul_(3)
    description = ModelDescription(
        model=performer.config, mask_rate=0.15, redraw_every_steps=0, seed=0, step=1, dataset_hash="",
        residue_counts=dict.fromkeys(RESIDUES, 1),
    )  # fmt: skip
    return ProteinModel(performer, description), performer


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def models(request):
    return protein_model(**request.param)


def naive(performer, protein, hidden=None):
    """Returns the log-probabilities at all positions of one protein in a row of its own, float64 (num_residues, 33)."""
    row = torch.tensor([CLS, *encode(protein.encode()).tolist(), EOS])
    if hidden is not None:
        row[hidden + 1] = MASK
    with torch.no_grad():
        logits = performer(row, torch.tensor([0, len(row)], dtype=torch.int32))
    return torch.log_softmax(logits.double(), -1)[1:-1].numpy()


def naive_masked(performer, protein):
    return np.stack([naive(performer, protein, position)[position] for position in range(len(protein))])


def naive_loss(performer, protein):
    logs = naive_masked(performer, protein)
    return -np.mean([logs[place, TOKEN_IDS[letter]] for place, letter in enumerate(protein)])


@pytest.mark.parametrize("tokens_per_batch", [1, 33, 100, 10_000])
def test_masked_marginals_are_those_of_a_loop_in_any_packing(models, tokens_per_batch):
    model, performer = models
    logs = model.log_probabilities(PROTEIN, tokens_per_batch=tokens_per_batch)
    assert (logs.dtype, logs.shape) == (np.float32, (len(PROTEIN), 33))
    np.testing.assert_allclose(logs, naive_masked(performer, PROTEIN), atol=1e-5, rtol=1e-5)


def test_wild_type_marginals_are_a_plain_pass(models):
    model, performer = models
    logs = model.log_probabilities(PROTEIN, strategy="wild-type")
    np.testing.assert_allclose(logs, naive(performer, PROTEIN), atol=1e-5, rtol=1e-5)
    (logits,) = model.logits([PROTEIN])
    np.testing.assert_allclose(logs, torch.log_softmax(torch.tensor(logits), -1), atol=1e-5, rtol=1e-5)


def test_positions_come_in_the_order_asked_for_and_only_they_are_computed(models, monkeypatch):
    model, _ = models
    expected = model.log_probabilities(PROTEIN)
    passes = []
    forward = Performer.forward

    def counted(self, tokens, bounds, *more):
        passes.append(len(bounds) - 1)
        return forward(self, tokens, bounds, *more)

    monkeypatch.setattr(Performer, "forward", counted)
    logs = model.log_probabilities(PROTEIN, [7, 2, 7])
    np.testing.assert_allclose(logs, expected[[7, 2, 7]], atol=1e-5, rtol=1e-5)
    assert sum(passes) == 2
    passes.clear()
    model.score(PROTEIN, ["M1A", "M1C:V3A", "V3W"])
    assert sum(passes) == 2
    passes.clear()
    model.score(PROTEIN, ["M1A", "M1C:V3A", "V3W"], "wt-marginals")
    assert sum(passes) == 1
    assert model.log_probabilities(PROTEIN, []).shape == (0, 33)
    assert model.score(PROTEIN, []).shape == (0,)


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals"])
def test_the_score_of_a_multiple_mutant_is_the_documented_sum(models, strategy):
    model, performer = models
    logs = naive_masked(performer, PROTEIN) if strategy == "masked-marginals" else naive(performer, PROTEIN)

    def gain(position, wild_type, mutant):
        return logs[position, TOKEN_IDS[mutant]] - logs[position, TOKEN_IDS[wild_type]]

    expected = [gain(0, "M", "A"), gain(0, "M", "W") + gain(2, "V", "L") + gain(29, "U", "C"), 0.0]
    scores = model.score(PROTEIN, ["M1A", "M1W:V3L:U30C", "K2K"], strategy)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)
    shifted = model.score(PROTEIN, ["M24A", "M24W:V26L:U53C", "K25K"], strategy, offset=23)
    np.testing.assert_array_equal(shifted, scores)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_pseudo_perplexity_is_that_of_a_loop(models, tokens_per_batch):
    model, performer = models
    sequences = [PROTEIN, "M", PROTEIN[3:20]]
    expected = [math.exp(naive_loss(performer, sequence)) for sequence in sequences]
    values = list(model.pseudo_perplexity(sequences, tokens_per_batch=tokens_per_batch))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    mutants = ["M1A", "K2W:L4V"]
    scores = model.score(PROTEIN, mutants, "pseudo-perplexity", tokens_per_batch=tokens_per_batch)
    wanted = [
        naive_loss(performer, PROTEIN) - naive_loss(performer, mutated(PROTEIN, parse_mutant(mutant, PROTEIN)))
        for mutant in mutants
    ]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_logits_of_a_masked_sequence_are_those_of_the_hidden_residue(models):
    model, performer = models
    masked = f"{PROTEIN[:4]}<mask>{PROTEIN[5:]}"
    logits = list(model.logits([masked, "<mask>", "<mask>a-<mask>v*", PROTEIN]))
    assert [len(each) for each in logits] == [len(PROTEIN), 1, 4, len(PROTEIN)]
    log_probabilities = torch.log_softmax(torch.tensor(logits[0]), -1)
    np.testing.assert_allclose(log_probabilities, naive(performer, PROTEIN, 4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", ["masked", "wild-type"])
def test_in_windows_a_position_is_computed_in_the_nearest_window(models, context):
    model, performer = models
    logs = model.log_probabilities(PROTEIN, strategy=context, window=11)
    for window in Cut(window=11).windows(0, len(PROTEIN)):
        seen = PROTEIN[window.start : window.stop]
        expected = naive_masked(performer, seen) if context == "masked" else naive(performer, seen)
        core = slice(window.core_start, window.core_stop)
        inside = slice(window.core_start - window.start, window.core_stop - window.start)
        np.testing.assert_allclose(logs[core], expected[inside], atol=1e-5, rtol=1e-5)


def test_a_long_protein_needs_a_window_where_positions_are_learned():
    model, _ = protein_model(positions="learned", max_positions=12)
    for call in (
        lambda: model.log_probabilities(PROTEIN),
        lambda: model.score(PROTEIN, ["M1A"]),
        lambda: model.log_probabilities(PROTEIN, window=11),
    ):
        with pytest.raises(ValueError, match=r"expected at (most 10 residues|least 2, and at most the 10 residues)"):
            call()
    with pytest.raises(ValueError, match=r"^sequences\[1\]: expected at most 10 residues"):
        list(model.pseudo_perplexity(["MK", PROTEIN]))
    assert model.log_probabilities(PROTEIN, window=10).shape == (len(PROTEIN), 33)
    assert len(list(model.pseudo_perplexity([PROTEIN], window=10))) == 1


def test_a_causal_model_hides_nothing():
    model, _ = protein_model(causal=True)
    for call in (
        lambda: model.log_probabilities(PROTEIN),
        lambda: model.score(PROTEIN, ["M1A"], "wt-marginals"),
        lambda: model.pseudo_perplexity([PROTEIN]),
    ):
        with pytest.raises(ValueError, match="model: expected one that was trained on hidden residues, got a causal"):
            call()


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (None, "expected a mutation as str, got None"),
        (7, "expected a mutation as str, got 7"),
        ("", "expected a mutation such as 'A42G' or 'A42G:K51E', got ''"),
        ("42", "expected a mutation such as"),
        ("M1*", "expected a mutation such as"),
        ("M1", "expected a mutation such as"),
        ("M1A;K2L", "expected a mutation such as"),
        ("M" + "1" * 5000 + "A", "expected a mutation such as"),
        ("M0A", "'M0A': position 0 is outside the protein, whose residues have the numbers 1 to 30"),
        ("M31A", "'M31A': position 31 is outside"),
        ("M-1A", "'M-1A': position -1 is outside"),
        ("A1M", "'A1M': the protein has M at position 1, not A"),
        ("M1J", "'M1J': 'J' is no residue"),
        ("M1A:M1C", "'M1A:M1C': expected each position once, got 1 again"),
    ],
)
def test_a_wrong_mutation_is_named_by_its_place_in_the_list(models, mutation, message):
    with pytest.raises(ValueError, match=r"^mutations\[1\]: " + message.replace("*", r"\*")):
        models[0].score(PROTEIN, ["M1A", mutation])


def test_other_wrong_arguments_are_named(models):
    model, _ = models
    for call, message in (
        (lambda: model.log_probabilities(None), "sequence: expected a sequence as str, got None"),
        (lambda: model.log_probabilities("MK<mask>V"), "sequence: expected residues only"),
        (lambda: model.log_probabilities("MKV", [0, 3]), r"positions\[1\]: expected 0 to 2, .* got 3"),
        (lambda: model.log_probabilities("MKV", [-1]), r"positions\[0\]: expected 0 to 2"),
        (lambda: model.log_probabilities("MKV", [0.5]), "positions: expected whole numbers"),
        (lambda: model.log_probabilities("MKV", [[0], [1, 2]]), "positions: expected whole .*, got a nested list"),
        (lambda: model.log_probabilities("MKV", window="9"), "window: expected a whole number, got str"),
        (lambda: model.log_probabilities("MKV", window=9.5), "window: expected a whole number, got 9.5"),
        (lambda: model.log_probabilities("MKV", tokens_per_batch="9"), "tokens_per_batch: expected a whole number"),
        (lambda: model.score("MKV", ["M1A"], offset=None), "offset: expected a whole number, got None"),
        (lambda: model.score("MKV", ["M1A"], offset=True), "offset: expected a whole number"),
        (lambda: model.log_probabilities("MKV", [[1]]), "positions: expected whole numbers in one dimension"),
        (lambda: model.log_probabilities("MKV", strategy="wt"), "strategy: expected 'masked' or 'wild-type', got 'wt'"),
        (lambda: model.log_probabilities("MKV", tokens_per_batch=0), "tokens_per_batch: expected at least 1, got 0"),
        (lambda: model.log_probabilities("MKV", window=1), "window: expected at least 2, got 1"),
        (lambda: model.score("MKV", ["M1A"], "masked"), "strategy: expected 'masked-marginals' or"),
        (lambda: model.score("MKV", "M1A"), "mutations: expected several, .* got a single str; put it into a list"),
        (lambda: model.score("MKV", None), "mutations: expected several, .* got None"),
        (lambda: model.score(["MKV"], ["M1A"]), "sequence: expected a sequence as str, got list"),
        (lambda: list(model.pseudo_perplexity(["MKV", None])), r"sequences\[1\]: expected a sequence as str, got None"),
        (lambda: model.pseudo_perplexity("MKV"), "sequences: expected several"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            call()


TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>")


def test_a_residue_that_the_model_lacks_is_no_mutant_and_is_seen_as_another():
    model, _ = protein_model(vocabulary=TOKENS)
    logs = model.log_probabilities("MKUV", [2])
    assert np.isfinite(logs[0, TOKEN_IDS["U"]])
    assert np.isfinite(model.score("MKUV", ["U3C"])).all()
    with pytest.raises(ValueError, match=r"^mutations\[0\]: 'K2U': this model has no token for U"):
        model.score("MKUV", ["K2U"])
    # In whole sequences it is read, and has the probability of what it is read as.
    (wild_type, mutant) = (math.log(value) for value in model.pseudo_perplexity(["MKUV", "MUUV"]))
    (score,) = model.score("MKUV", ["K2U"], "pseudo-perplexity")
    assert score == pytest.approx(wild_type - mutant, abs=1e-5)
