import math
from collections import defaultdict

import numpy as np
import pytest

from protlm.data.storage.dataset import RecordLabels
from protlm.inference.blosum import compare_with_blosum62
from protlm.inference.metrics import FEWEST_UNITS, Resampled, replicate_weights
from protlm.inference.residue_scores import ResidueScores
from protlm.vocabulary import RESIDUES
from protlm.workflows.evaluate import breakdowns
from protlm.workflows.evaluate.breakdowns import DISTANCE_STARTS, LENGTH_STARTS, OTHER_LABELS, Breakdowns
from protlm.workflows.evaluate.measure import resampling_key
from tests.unit.workflows.evaluate.eval_cases import NO_LABELS, InMemory, random_scores, random_sequences

SEQUENCES = ["M", *random_sequences(12, letters=RESIDUES), "MK" * 60, "ACDEF" * 50]
LABELS = [
    RecordLabels(families=("PF1", "PF2"), clusters=("c1",), taxa=("9606",)),
    RecordLabels(families=("PF1",), clusters=("c1",), taxa=()),
    RecordLabels(families=(), clusters=("c2",), taxa=("10090",)),
    *[NO_LABELS] * 10,
    RecordLabels(families=("PF3",), clusters=("c3",), taxa=("9606",)),
    NO_LABELS,
]

KINDS = {"family": "families", "cluster": "clusters", "taxon": "taxa"}


@pytest.fixture
def split():
    return InMemory(SEQUENCES, LABELS)


def scored(split, seed=0):
    """Returns scores at every residue of a split, in order."""
    records = np.repeat(np.arange(split.num_records), split.lengths)
    positions = np.concatenate([np.arange(length) for length in split.lengths])
    return random_scores(records, positions, np.concatenate(split.proteins), seed)


def resampled_of(split, scores, seed=0):
    records = np.unique(scores.records)
    keys = [resampling_key(split, record) for record in records.tolist()]
    return Resampled(records, keys, replicate_weights(keys, seed))


def report_of(split, *parts):
    result = Breakdowns(split)
    for scores in parts:
        result.add(scores, resampled_of(split, scores))
    return result.report()


def proteins_by_label(report):
    return {kind: {row["name"]: row["num_proteins"] for row in report[kind]["rows"]} for kind in KINDS}


def slow_rows(scores, names_of):
    """The sums of each group, one residue after the other; `names_of` gives the groups of a residue's number."""
    groups = defaultdict(lambda: [0, 0.0, 0])
    for number in range(len(scores)):
        row = scores.log_probabilities[number].astype(np.float64)
        for name in names_of(number):
            group = groups[name]
            group[0] += 1
            group[1] -= row[scores.targets[number]]
            group[2] += int(row.argmax() == scores.targets[number])
    return {
        name: {"num_targets": size, "accuracy": correct / size, "perplexity": math.exp(nll / size)}
        for name, (size, nll, correct) in groups.items()
    }


def check_rows(rows, expected, more=()):
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        of_group = {
            key: value
            for key, value in row.items()
            if key not in ("name", *more) and not key.endswith(("stderr", "low", "high"))
        }
        assert of_group == pytest.approx(expected[row["name"]], rel=1e-9), row
    assert {row["name"] for row in rows} == set(expected)


def bin_of(value, starts):
    start = max(start for start in starts if start <= value)
    following = [other for other in starts if other > start]
    if not following:
        return f"{start}+"
    return str(start) if following[0] == start + 1 else f"{start}-{following[0] - 1}"


def test_every_breakdown_is_the_sum_over_its_residues(split):
    scores = scored(split)
    report = report_of(split, scores)
    records, positions = scores.records.tolist(), scores.positions.tolist()
    lengths = [len(SEQUENCES[record]) for record in records]
    groups = {
        "residues": lambda n: [SEQUENCES[records[n]][positions[n]]],
        "lengths": lambda n: [bin_of(lengths[n], LENGTH_STARTS)],
        "from_n_terminus": lambda n: [bin_of(positions[n], DISTANCE_STARTS)],
        "from_c_terminus": lambda n: [bin_of(lengths[n] - 1 - positions[n], DISTANCE_STARTS)],
    }
    for name, names_of in groups.items():
        check_rows(report[name], slow_rows(scores, names_of))
        assert sum(row["num_targets"] for row in report[name]) == len(scores)
    for kind, attribute in KINDS.items():
        expected = slow_rows(scores, lambda n, attribute=attribute: getattr(LABELS[records[n]], attribute))
        check_rows(report[kind]["rows"], expected, more=("num_proteins",))
        assert report[kind]["num_labels"] == len(expected)
    assert {row["name"]: row["num_proteins"] for row in report["taxon"]["rows"]} == {"9606": 2, "10090": 1}
    assert {row["name"]: row["num_proteins"] for row in report["family"]["rows"]} == {"PF1": 2, "PF2": 1, "PF3": 1}


def test_the_breakdowns_of_rows_are_those_of_the_whole(split):
    scores = scored(split)
    parts = []
    for chosen in np.array_split(np.arange(len(scores)), 9):
        fields = (scores.records, scores.positions, scores.targets, scores.log_probabilities)
        parts.append(ResidueScores(*(column[chosen] for column in fields)))
    whole, rows = report_of(split, scores), report_of(split, *parts)
    for name in ("residues", "lengths", "from_n_terminus", "from_c_terminus"):
        for row, expected in zip(rows[name], whole[name], strict=True):
            assert row.keys() == expected.keys()
            for key, value in row.items():
                is_number = isinstance(value, float)
                assert value == (pytest.approx(expected[key], rel=1e-9) if is_number else expected[key]), (row, key)
    assert rows["confusion"] == whole["confusion"]
    # Proteins that were cut between two rows count once.
    assert proteins_by_label(rows) == proteins_by_label(whole)


def test_a_protein_that_is_scored_with_several_masks_counts_once(split):
    once, twice = report_of(split, scored(split)), report_of(split, scored(split), scored(split, seed=1))
    assert proteins_by_label(twice) == proteins_by_label(once)
    assert sum(row["num_targets"] for row in twice["lengths"]) == 2 * len(scored(split))


def test_the_confusion_is_of_true_residues_by_predicted_ones(split):
    scores = scored(split)
    confusion = report_of(split, scores)["confusion"]
    assert confusion["residues"] == RESIDUES
    probabilities, predictions = np.zeros((25, 25)), np.zeros((25, 25), dtype=int)
    for target, row in zip(scores.targets, scores.log_probabilities, strict=True):
        probabilities[target - 4] += np.exp(row[4:29].astype(np.float64))
        predictions[target - 4, row[4:29].argmax()] += 1
    assert confusion["predictions"] == predictions.tolist()
    sizes = predictions.sum(axis=1, keepdims=True)
    assert sizes.sum() == len(scores)
    assert np.array(confusion["mean_probabilities"]) == pytest.approx(probabilities / np.maximum(sizes, 1), rel=1e-6)


def test_breakdowns_by_label_are_there_only_where_the_dataset_has_labels():
    split = InMemory(SEQUENCES)
    assert set(report_of(split, scored(split))) == {
        "residues", "lengths", "from_n_terminus", "from_c_terminus", "confusion", "substitutions"
    }  # fmt: skip


def test_the_largest_labels_are_listed_first_and_the_last_to_come_are_counted_together(monkeypatch):
    monkeypatch.setattr(breakdowns, "MOST_LABELS", 4)
    monkeypatch.setattr(breakdowns, "LISTED_LABELS", 3)
    sizes = (1, 5, 2, 8, 4, 3)
    labels = [RecordLabels((f"F{number}",), (), ()) for number in range(len(sizes))]
    split = InMemory(["L" * size for size in sizes], labels)
    families = report_of(split, scored(split))["family"]
    # F4 and F5 came when four names were known.
    assert families["num_labels"] == 5
    assert [(row["name"], row["num_targets"], row["num_proteins"]) for row in families["rows"]] == [
        ("F3", 8, 1), (OTHER_LABELS, 7, 2), ("F1", 5, 1)
    ]  # fmt: skip


def test_intervals_are_those_of_proteins_that_are_drawn_again():
    split = InMemory(random_sequences(40, shortest=30))
    scores = scored(split)
    resampled = resampled_of(split, scores)
    nll, correct = -scores.true_log_probabilities().astype(np.float64), scores.ranks() == 0
    for row in report_of(split, scores)["from_n_terminus"][:6]:
        is_in = np.array([bin_of(position, DISTANCE_STARTS) == row["name"] for position in scores.positions])
        drawn = resampled.weights[scores.records[is_in]]
        sizes = drawn.sum(axis=0)
        for metric, values in (
            ("accuracy", (drawn * correct[is_in][:, None]).sum(axis=0) / sizes),
            ("perplexity", np.exp((drawn * nll[is_in][:, None]).sum(axis=0) / sizes)),
        ):
            assert row[f"{metric}_stderr"] == pytest.approx(values.std(ddof=1), rel=1e-9)
            low, high = np.percentile(values, [2.5, 97.5])
            assert (row[f"{metric}_low"], row[f"{metric}_high"]) == pytest.approx((low, high), rel=1e-9)
            assert low < row[metric] < high


def test_a_bin_with_residues_of_few_proteins_or_clusters_has_no_interval():
    def rows(num_long, labels=None):
        split = InMemory(random_sequences(20, longest=40) + long_ones[:num_long], labels)
        return {row["name"]: row for row in report_of(split, scored(split))["lengths"]}

    long_ones = random_sequences(FEWEST_UNITS, shortest=210, longest=390)
    assert rows(FEWEST_UNITS - 1)["200-399"]["perplexity_low"] is None
    assert rows(FEWEST_UNITS)["200-399"]["perplexity_low"] is not None
    one_cluster = [NO_LABELS] * 20 + [RecordLabels((), ("c",), ())] * FEWEST_UNITS
    of_one_cluster = rows(FEWEST_UNITS, one_cluster)
    assert of_one_cluster["200-399"]["accuracy_stderr"] is None
    assert of_one_cluster["1-49"]["accuracy_stderr"] is not None


def test_substitutions_are_the_odds_of_a_prediction_where_another_residue_stands():
    split = InMemory(random_sequences(30))
    report = report_of(split, scored(split))
    found = report["substitutions"]
    letters = found["residues"]
    assert letters == RESIDUES[:20]
    given = np.array(report["confusion"]["mean_probabilities"])[:20, :20]
    sizes = np.array([row["num_targets"] for row in report["residues"]])
    anywhere = [sum(sizes[a] * given[a][b] for a in range(20)) / sizes.sum() for b in range(20)]
    for a, b in ((0, 1), (7, 3), (12, 12)):
        expected = (math.log2(given[a][b] / anywhere[b]) + math.log2(given[b][a] / anywhere[a])) / 2
        assert found["log_odds"][a][b] == pytest.approx(expected, abs=1e-5)
    agreement = compare_with_blosum62(np.array(found["log_odds"]))
    assert found["blosum62"]["num_pairs"] == 190
    assert found["blosum62"]["pearson"] == pytest.approx(agreement.pearson, abs=1e-5)
    assert found["blosum62"]["spearman"] == pytest.approx(agreement.spearman, abs=1e-3)


def test_without_every_standard_residue_there_are_no_substitutions():
    split = InMemory(["ACDEFGHIKLMNPQRSTVW"])
    assert report_of(split, scored(split))["substitutions"] is None
