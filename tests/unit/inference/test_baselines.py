import gzip
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from protlm.cli.app import main
from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import MaskRates, Objective
from protlm.data.storage.dataset import open_dataset
from protlm.inference import baselines, markov
from protlm.inference.baselines import (
    UNIFORM,
    copies_of_the_visible,
    empirical,
    fit_markov,
    markov_predictions,
    mean_losses,
)
from protlm.inference.metrics import METRICS, MetricSums, sums_by_protein
from protlm.inference.residue_scores import ResidueScores
from protlm.vocabulary import MASK, RESIDUES, decode
from protlm.workflows.evaluate.evaluate import evaluate
from tests.unit.workflows.evaluate.eval_cases import (
    InMemory,
    predict_always,
    prepare,
    random_sequences,
    request,
    save_new_model,
    smoothed_frequencies,
)

TREMBL = Path(__file__).parents[3] / "data" / "trembl_sample.fasta.gz"
SWISS_PROT = Path(__file__).parents[2] / "data" / "swissprot_sample.fasta.gz"
HIDDEN = Objective(causal=False, rates=MaskRates(0.15)).hiding_all()
COUNTS = dict(zip(RESIDUES, range(1000, 1025), strict=True))


def measured(predict, rows):
    """Returns the metrics of a baseline on some rows."""
    sums = MetricSums(1)
    for row in rows:
        scores = ResidueScores(row.records, row.positions, row.batch.targets.numpy(), predict(row))
        terms = sums_by_protein(scores)[1]
        sums.add(terms, np.ones((len(terms), 1)))
    return sums.values()


def letters_of_fasta(path):
    return ["".join(lines.split("\n")[1:]) for lines in gzip.open(path, "rt").read().split(">")[1:]]


def independent_empirical(training, test):
    """The empirical baseline from the letters alone: (perplexity, accuracy) of add-one smoothed frequencies."""
    counts = Counter("".join(training))
    logs = {letter: math.log((counts[letter] + 1) / (counts.total() + 25)) for letter in RESIDUES}
    best = max(logs, key=logs.get)
    targets = []
    for sequence in test:
        tokens = bytes(RESIDUES.index(letter) + 4 for letter in sequence)
        key = np.frombuffer(xxhash.xxh3_128_digest(tokens, seed=0), np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        hidden = np.flatnonzero(generator.random(len(sequence)) < 0.15)
        targets += [sequence[place] for place in (hidden if len(hidden) else [generator.integers(len(sequence))])]
    nll = math.fsum(-logs[letter] for letter in targets) / len(targets)
    return math.exp(nll), targets.count(best) / len(targets), len(targets)


def check_the_empirical_baseline(training_file, test_file, folder):
    """Holds the report of a model that always predicts the training frequencies against the letters of the files."""
    dataset = folder / "dataset"
    arguments = ["prep", str(training_file), "--test-input", str(test_file), "--no-dedupe", "--no-check-leaks"]
    assert main([*arguments, "--out", str(dataset)]) == 0
    training, test = (letters_of_fasta(path) for path in (training_file, test_file))
    counts = open_dataset(dataset).manifest.splits["train"].residue_counts
    assert sum(counts.values()) == sum(map(len, training))
    model = save_new_model(
        folder / "model", counts, lambda model: predict_always(model, smoothed_frequencies(counts)),
        model_dim=4, num_heads=1, ffn_dim=4, num_features=4,
    )  # fmt: skip
    split = evaluate(request(model, dataset, folder / "report", tokens_per_batch=16_384)).splits["test"]
    perplexity, accuracy, num_targets = independent_empirical(training, test)
    assert split.num_targets == num_targets
    assert split.scores["empirical"]["perplexity"] == pytest.approx(perplexity, rel=1e-9)
    assert split.scores["empirical"]["accuracy"] == accuracy
    for key, value in split.scores["empirical"].items():
        assert split.scores["model"][key] == pytest.approx(value, rel=1e-6, abs=1e-6), key


@pytest.fixture
def short_contexts(monkeypatch):
    # Tables of contexts of four residues take a second for every dataset.
    monkeypatch.setattr(markov, "MAX_ORDER", 2)


def test_a_model_of_the_training_frequencies_is_the_empirical_baseline_which_is_that_of_the_letters(
    tmp_path, short_contexts
):
    check_the_empirical_baseline(TREMBL, SWISS_PROT, tmp_path)


@pytest.mark.slow
def test_the_empirical_baseline_of_swiss_prot_is_that_of_its_letters(shared_data, tmp_path, short_contexts):
    folder = shared_data / "swissprot"
    check_the_empirical_baseline(folder / "valid_cluster_5k.fasta.gz", folder / "test_random_5k.fasta.gz", tmp_path)


def test_uniform_is_what_equal_probabilities_score():
    # Every residue once: 25 targets, of which the first is correct and the first five are among five.
    rows = list(evaluation_rows(InMemory([RESIDUES]), 100, 0, Objective(False, MaskRates(1.0)).hiding_all()))
    assert measured(empirical({}), rows) == pytest.approx(UNIFORM, abs=1e-12)
    assert set(UNIFORM) == set(METRICS)


def test_the_copier_repeats_what_it_sees_and_guesses_what_it_does_not():
    objective = Objective(False, MaskRates(0.5, mask_share=0.6, random_share=0.1))
    frequencies = smoothed_frequencies(COUNTS)
    predict = copies_of_the_visible(COUNTS, objective)
    num_visible = 0
    for row in evaluation_rows(InMemory(random_sequences(20, letters=RESIDUES)), 100, 0, objective):
        seen = row.batch.tokens[row.batch.target_positions].tolist()
        for token, predicted in zip(seen, np.exp(predict(row)), strict=True):
            # Of ten targets six are hidden, one is replaced and three stay: three of four visible ones are true.
            share = 0 if token == MASK else 3 / 4
            for letter in RESIDUES:
                expected = (1 - share) * frequencies[letter]
                if token != MASK and decode(np.array([token])) == letter:
                    expected += share
                assert predicted[4 + RESIDUES.index(letter)] == pytest.approx(expected, rel=1e-9)
            assert predicted.sum() == pytest.approx(1)
            num_visible += token != MASK
    assert num_visible > 50


def test_where_all_is_hidden_the_copier_is_the_empirical_baseline_and_where_nothing_is_it_is_perfect():
    proteins = InMemory(random_sequences(20))
    rows = list(evaluation_rows(proteins, 100, 0, HIDDEN))
    assert measured(copies_of_the_visible(COUNTS, HIDDEN), rows) == pytest.approx(measured(empirical(COUNTS), rows))
    visible = Objective(False, MaskRates(0.5, mask_share=0.0, random_share=0.0))
    scores = measured(copies_of_the_visible(COUNTS, visible), evaluation_rows(proteins, 100, 0, visible))
    assert (scores["accuracy"], scores["perplexity"]) == (1, 1)


def test_the_order_is_that_of_the_lowest_perplexity_on_valid(tmp_path):
    # Most residues follow from the two before them, and little from the last one alone.
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(60):
        letters = list(generator.integers(0, 10, 2))
        while len(letters) < 100:
            follows = generator.random() < 0.9
            letters.append((letters[-1] + 3 * letters[-2]) % 10 if follows else generator.integers(10))
        sequences.append("".join("LAGVSERTID"[place] for place in letters))
    splits = {"train": sequences[:50], "valid": sequences[50:], "test": ["LAGVS"]}
    named = {name: [(f"{name}{n}", seq) for n, seq in enumerate(of)] for name, of in splits.items()}
    dataset = open_dataset(prepare(tmp_path, named))
    fitted = fit_markov(dataset.split("train"), dataset.split("valid"), HIDDEN, 0)
    assert (fitted.chosen_on, fitted.num_residues) == ("valid", 5000)
    rows = list(evaluation_rows(dataset.split("valid"), 1000, 0, HIDDEN))
    counts = markov.MarkovCounts(4)
    counts.add(map(dataset.split("train").tokens, range(50)))
    perplexities = [
        measured(markov_predictions(markov.MarkovModel(counts, order), HIDDEN), rows)["perplexity"]
        for order in range(5)
    ]
    assert fitted.model.order == int(np.argmin(perplexities)) == 2
    assert perplexities[2] < 0.7 * perplexities[0]
    assert measured(markov_predictions(fitted.model, HIDDEN), rows)["perplexity"] == perplexities[2]


def test_without_a_valid_split_the_order_is_the_default():
    fitted = fit_markov(InMemory(random_sequences(6)), None, HIDDEN, 0)
    assert (fitted.model.order, fitted.two_sided.order, fitted.chosen_on) == (2, 2, None)


def test_without_training_there_is_no_markov_baseline(tmp_path):
    proteins = [(f"p{n}", sequence) for n, sequence in enumerate(random_sequences(6))]
    dataset = prepare(tmp_path, {"test": proteins})
    model = save_new_model(tmp_path / "model")
    report = evaluate(request(model, dataset, tmp_path / "report"))
    assert report.markov is None
    assert not {"markov", "two_sided"} & set(report.splits["test"].scores)


@pytest.mark.parametrize(("limit", "num_counted"), [(90, 100), (100, 100), (101, 120), (10_000, 400)])
def test_a_huge_training_set_is_counted_up_to_a_limit(limit, num_counted, monkeypatch):
    training = InMemory(random_sequences(20, shortest=20, longest=21))
    monkeypatch.setattr(baselines, "_MOST_COUNTED_RESIDUES", limit)
    assert fit_markov(training, None, HIDDEN, 0).num_residues == num_counted


def test_the_order_is_chosen_on_the_beginning_of_a_huge_valid_split(monkeypatch):
    training, valid = InMemory(["LA" * 20, "LAGVS"]), InMemory(["LA" * 20, *["GGGG"] * 50])
    monkeypatch.setattr(baselines, "_MOST_VALID_RECORDS", 1)
    alone = InMemory(["LA" * 20])
    assert fit_markov(training, valid, HIDDEN, 0).model.order == fit_markov(training, alone, HIDDEN, 0).model.order == 2


def test_the_table_of_both_sides_is_that_of_proteins_read_from_both_ends():
    training, scored = InMemory(random_sequences(30, letters="LAG")), InMemory(random_sequences(9, letters="LAG"))
    tables = []
    for step in (1, -1):
        counts = markov.MarkovCounts(2)
        counts.add([tokens[::step] for tokens in training.proteins])
        tables.append(markov.MarkovModel(counts, 2))
    fitted = fit_markov(training, None, HIDDEN, 0)
    for row in evaluation_rows(scored, 100, 0, HIDDEN):
        expected = markov_predictions(markov.TwoSidedMarkovModel(*tables), HIDDEN)(row)
        np.testing.assert_array_equal(markov_predictions(fitted.two_sided, HIDDEN)(row), expected)


def test_losses_are_the_mean_over_all_targets():
    rows = list(evaluation_rows(InMemory(random_sequences(20)), 100, 0, HIDDEN))
    uniform, of_counts = mean_losses([empirical({}), empirical(COUNTS)], rows)
    assert uniform == pytest.approx(math.log(25))
    assert math.exp(of_counts) == pytest.approx(measured(empirical(COUNTS), rows)["perplexity"], rel=1e-12)


def test_the_markov_baseline_of_a_causal_model_sees_all_residues_before_the_target():
    counts = markov.MarkovCounts(2)
    counts.add(InMemory(["LAGLAGLAGLAG"]).proteins)
    predict = markov_predictions(markov.MarkovModel(counts, 2), Objective(True, MaskRates(0.15)))
    (row,) = evaluation_rows(InMemory(["LAGLAG"]), 100, 0, Objective(True, MaskRates(0.15)))
    assert predict(row)[2:].argmax(axis=1).tolist() == row.batch.targets[2:].tolist()
