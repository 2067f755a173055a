import math

import numpy as np
import pytest
import torch

from protlm.config import ModelConfig
from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import MaskRates, Objective
from protlm.inference import scoring
from protlm.inference.baselines import empirical
from protlm.inference.metrics import Score
from protlm.inference.scoring import score_model, score_rows
from protlm.model.performer import Performer
from protlm.vocabulary import FIRST_RESIDUE, RESIDUES, encode
from tests import forked, process_groups
from tests.unit.data.batching.batch_cases import evaluation_batches


class InMemory:
    """Proteins that lie in memory."""

    def __init__(self, *sequences):
        self.sequences = sequences

    @property
    def lengths(self):
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int64)

    def tokens(self, record):
        return encode(self.sequences[record].encode())


def masked(rate):
    return Objective(causal=False, rates=MaskRates(rate))


NEXT_TOKEN = Objective(causal=True, rates=MaskRates(0.15))


def random_proteins(num_records=30, seed=0):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 60, num_records)
    return InMemory(*("".join(generator.choice(list(RESIDUES[:20]), size)) for size in sizes))


@pytest.fixture
def model():
    model = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=16, num_heads=2, ffn_dim=16, num_features=8)
    )
    model.reset(0)
    return model.eval()


def scores_of(sums):
    """The score of each name."""
    return {name: kept.score() for name, kept in sums.items()}


def test_the_empirical_baseline_is_add_one_smoothed_frequencies(model):
    # L, A and the 23 letters that were not seen: (7 + 1), (2 + 1) and 1 each of 34.
    score = score_model(model, InMemory("LLLAW"), masked(1.0), {"empirical": empirical({"L": 7, "A": 2})})[
        "empirical"
    ].score()
    assert score.accuracy == 3 / 5
    nll = -(3 * math.log(8 / 34) + math.log(3 / 34) + math.log(1 / 34)) / 5
    assert score.perplexity == pytest.approx(math.exp(nll), rel=1e-14)
    assert score.loss == pytest.approx(nll, rel=1e-14)


def test_a_baseline_of_no_counts_is_uniform_over_25_letters(model):
    sums = score_model(model, InMemory(RESIDUES), masked(1.0), {"empirical": empirical({})})
    assert sums["empirical"].score().perplexity == pytest.approx(25)


def test_a_model_that_knows_nothing_scores_like_chance(model):
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    score = score_model(model, random_proteins(), masked(0.5), {})["model"].score()
    assert score.perplexity == pytest.approx(33, rel=1e-5)
    assert score.accuracy == 0.0


def test_a_model_that_always_says_one_residue_has_the_accuracy_of_its_share(model):
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model.head.bias[FIRST_RESIDUE] = math.log(7)
    proteins = InMemory("LLLA" * 40)
    sums = score_model(model, proteins, masked(1.0), {"empirical": empirical({"L": 10**9})})
    assert sums["model"].num_targets == 160
    assert sums["model"].score().accuracy == sums["empirical"].score().accuracy == 0.75
    nll = math.log(39) - 0.75 * math.log(7)
    assert sums["model"].score().perplexity == pytest.approx(math.exp(nll), rel=1e-5)


def test_the_score_is_the_plain_sum_over_every_target(model):
    proteins = random_proteins()
    sums = score_model(model, proteins, masked(0.3), {}, seed=4)["model"]
    nlls, hits = [], []
    for batch in evaluation_batches(proteins, 1, 4, masked(0.3)):
        log_probabilities = torch.log_softmax(model(batch.tokens, batch.cu_seqlens).double(), -1)[
            batch.target_positions
        ]
        nlls += (-log_probabilities.gather(1, batch.targets.unsqueeze(1)).squeeze(1)).tolist()
        hits += (log_probabilities.argmax(-1) == batch.targets).tolist()
    assert sums.num_targets == len(nlls)
    assert sums.score().accuracy == sum(hits) / len(hits)
    assert sums.score().perplexity == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-5)


def test_the_budget_of_a_row_changes_nothing_and_the_seed_does(model):
    proteins = random_proteins()
    baselines = {"empirical": empirical({})}
    small, large, other = (
        score_model(model, proteins, masked(0.15), baselines, seed=seed, tokens_per_batch=budget)
        for seed, budget in ((0, 20), (0, 10_000), (1, 20))
    )
    few, many = small["model"].values(), large["model"].values()
    assert few["perplexity"] == pytest.approx(many["perplexity"], rel=1e-5)
    assert small["model"].num_targets == large["model"].num_targets
    assert [few[name] for name in ("accuracy", "top5_accuracy")] == [
        many[name] for name in ("accuracy", "top5_accuracy")
    ]
    assert small["empirical"].values() == pytest.approx(large["empirical"].values(), rel=1e-12)
    assert scores_of(other) != scores_of(small)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_restored_and_dropout_is_off(training):
    model = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=16, num_heads=2, num_features=8, dropout=0.5)
    )
    model.reset(0)
    model.train(training)
    first, second = (scores_of(score_model(model, random_proteins(5), masked(0.5), {})) for _ in range(2))
    assert model.training is training
    assert first == second


def test_progress_counts_every_residue(model):
    proteins, counts = random_proteins(), []
    score_model(model, proteins, masked(0.15), {}, tokens_per_batch=100, advance=counts.append)
    assert len(counts) > 1
    assert sum(counts) == proteins.lengths.sum()


def test_a_loss_beyond_what_exp_can_hold_is_an_infinite_perplexity(model):
    with torch.no_grad():
        model.head.bias[0] = 1e6
    score = score_model(model, random_proteins(3), masked(0.5), {})["model"].score()
    assert score == Score(accuracy=0.0, perplexity=math.inf)
    assert score.loss == math.inf


def test_the_next_residue_is_scored_at_every_residue():
    model = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=16, num_heads=2, ffn_dim=16, num_features=8)
    )
    model.reset(0)
    proteins = random_proteins()
    sums = score_model(model, proteins, NEXT_TOKEN, {}, tokens_per_batch=100)["model"]
    assert sums.num_targets == proteins.lengths.sum()


def test_only_what_the_positions_reach_is_scored(model):
    proteins = InMemory("LLLA" * 10, "AA")
    assert score_model(model, proteins, masked(1.0), {}, max_residues=3)["model"].num_targets == 5


def test_windows_score_every_residue_once(model):
    proteins = random_proteins()
    baselines = {"empirical": empirical({})}
    whole = score_model(model, proteins, masked(1.0), baselines)
    joined = score_model(model, proteins, masked(1.0), baselines, window_tokens=17, tokens_per_batch=34)
    assert joined["model"].num_targets == whole["model"].num_targets == proteins.lengths.sum()
    assert joined["empirical"].values() == pytest.approx(whole["empirical"].values(), rel=1e-12)
    assert joined["model"].score().perplexity != whole["model"].score().perplexity


ODD_BUDGET = 120
"""Makes an odd number of rows of the random proteins."""


def score_in_a_process(rank, world_size, folder):
    """Scores in one of several processes, which merge after every second round, and saves the result."""
    scoring._ROUNDS_BETWEEN_MERGES = 2
    process_groups.join(rank, world_size, folder)
    model = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=16, num_heads=2, ffn_dim=16, num_features=8)
    )
    model.reset(0)
    num_passes = []
    model.register_forward_hook(lambda *_: num_passes.append(1))
    counts = []
    sums = score_model(
        model, random_proteins(), masked(0.3), {"empirical": empirical({"L": 3})}, tokens_per_batch=ODD_BUDGET,
        advance=counts.append, rank=rank, world_size=world_size,
    )  # fmt: skip
    totals = {name: kept.total.tolist() for name, kept in sums.items()}
    torch.save((totals, len(num_passes), sum(counts)), f"{folder}/{rank}")
    process_groups.leave()


def test_the_number_of_processes_changes_no_bit_and_all_make_as_many_passes(tmp_path, model):
    proteins = random_proteins()
    baselines = {"empirical": empirical({"L": 3})}
    one = score_model(model, proteins, masked(0.3), baselines, tokens_per_batch=ODD_BUDGET)
    num_rows = len(list(evaluation_batches(proteins, ODD_BUDGET, 0, masked(0.3))))
    assert num_rows % 2 == 1, "one process must run out of rows before the other"
    forked.spawn(score_in_a_process, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        totals, num_passes, num_residues = torch.load(tmp_path / str(rank), weights_only=True)
        assert totals == {name: sums.total.tolist() for name, sums in one.items()}
        assert num_passes == num_rows // 2 + 1
        assert num_residues == proteins.lengths.sum()


def test_a_residue_that_a_model_lacks_is_scored_by_the_token_that_stands_for_it():
    vocabulary = ("<pad>", "<mask>", "<cls>", "<eos>", "<unk>", *RESIDUES[:20], "extra")
    model = Performer(
        ModelConfig(
            attention="positive", num_layers=1, model_dim=16, num_heads=2, num_features=8, vocabulary=vocabulary
        )
    )
    model.reset(0)
    proteins = InMemory("MKBLLX", "ACD")
    (row,) = evaluation_rows(proteins, 64, 0, masked(1.0).hiding_all())
    ((_, scores),) = score_rows(model, iter([row]))
    with torch.no_grad():
        logits = model(row.batch.tokens, row.batch.cu_seqlens, row.batch.target_positions)
    logs = torch.log_softmax(logits, -1).numpy()
    names = ["M", "K", "<unk>", "L", "L", "<unk>", "A", "C", "D"]
    expected = [logs[number, vocabulary.index(name)] for number, name in enumerate(names)]
    assert scores.true_log_probabilities() == pytest.approx(expected, rel=1e-6)
    # Every probability stands in one column, and that of the model's further tokens in none.
    missing = np.exp(logs[:, vocabulary.index("extra")])
    assert np.exp(scores.log_probabilities).sum(1) + missing == pytest.approx(1, rel=1e-5)
    assert scores.log_probabilities.shape == (9, 33)
