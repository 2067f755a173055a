"""The division of labelled proteins: groups stay whole, and what nothing can learn is an error."""

import numpy as np
import pytest

from protlm import vocabulary
from protlm.data.storage.protein_store import write_proteins
from protlm.errors import ProtlmError
from protlm.workflows.probe.folds import Folds
from protlm.workflows.probe.labels import LabelledProteins
from protlm.workflows.probe.request import ProbeRequest
from protlm.workflows.probe.targets import groups_of, targets_of

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def labelled_of(tmp_path, labels, *, splits=None, sequences=None, is_of_residues=False, masks=None):
    size = len(labels)
    random = np.random.default_rng(0)
    sequences = sequences or ["".join(random.choice(list(LETTERS), 12)) for _ in range(size)]
    pairs = ((f"p{number}", vocabulary.encode(text.encode())) for number, text in enumerate(sequences))
    return LabelledProteins(
        proteins=write_proteins(tmp_path / "store", pairs),
        ids=[f"p{number}" for number in range(size)],
        name="label",
        labels=list(labels),
        lines=list(range(2, size + 2)),
        splits=splits or [""] * size,
        masks=masks or [""] * size,
        is_of_strings=is_of_residues,
    )


def folds_of(labelled, seed=0, **options):
    request = ProbeRequest(model="m", labels="labels.csv", **options)
    targets = targets_of(request, labelled)
    groups = groups_of(request, labelled)
    folds = Folds(request, labelled, targets, groups)
    return targets, groups.numbers, folds, folds.of_seed(seed)


def proteins(targets, rows):
    return set(targets.proteins[rows].tolist())


def test_each_protein_is_tested_once_and_never_in_two_parts(tmp_path):
    targets, _, _, folds = folds_of(labelled_of(tmp_path, "ab" * 30), num_folds=4)
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested.tolist()) == list(range(60))
    for fold in folds:
        parts = [proteins(targets, rows) for rows in (fold.train, fold.valid, fold.test)]
        assert set.union(*parts) == set(range(60))
        assert sum(map(len, parts)) == 60


def test_classes_are_spread_evenly(tmp_path):
    targets, _, _, folds = folds_of(labelled_of(tmp_path, "a" * 40 + "b" * 10), num_folds=5)
    assert [int(targets.values[fold.test].sum()) for fold in folds] == [2] * 5


def test_other_seeds_draw_other_folds_and_equal_seeds_the_same(tmp_path):
    labelled = labelled_of(tmp_path, "ab" * 30)
    first, same, other = (folds_of(labelled, seed)[3] for seed in (0, 0, 1))
    assert first == same
    assert first != other


def test_equal_sequences_are_never_divided(tmp_path):
    sequences = [LETTERS[number % 20] * 9 for number in range(60)]
    targets, groups, _, folds = folds_of(labelled_of(tmp_path, "ab" * 30, sequences=sequences))
    assert len(set(groups.tolist())) == 20
    for fold in folds:
        fitted, tested = (set(groups[list(proteins(targets, rows))]) for rows in
                          (np.concatenate([fold.train, fold.valid]), fold.test))  # fmt: skip
        assert not fitted & tested


def test_clusters_are_never_divided_and_a_protein_without_one_is_alone(tmp_path):
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("".join(f"c{number % 7}\tp{number}\n" for number in range(50)))
    labelled = labelled_of(tmp_path, "ab" * 30)
    targets, groups, _, folds = folds_of(labelled, clusters=clusters)
    assert len(set(groups.tolist())) == 7 + 10
    assert len(set(groups[:50:7].tolist())) == 1
    for fold in folds:
        assert not set(groups[list(proteins(targets, fold.test))]) & set(groups[list(proteins(targets, fold.train))])


def test_a_cluster_stays_whole_whatever_equal_sequences_say(tmp_path):
    clusters = tmp_path / "clusters.tsv"
    # p0 has the sequence of p1, and no cluster; p2 that of p3, of another cluster.
    clusters.write_text("a\tp1\na\tp4\nb\tp2\nb\tp5\nc\tp3\nc\tp6\n")
    sequences = ["MKV", "MKV", "MKL", "MKL", "MA", "MC", "MD", "ME"]
    labelled = labelled_of(tmp_path, "abababab", sequences=sequences)
    groups = groups_of(ProbeRequest(model="m", labels="l", clusters=clusters), labelled)
    assert groups.numbers.tolist() == [0, 0, 1, 1, 0, 1, 1, 2]
    assert groups.num_unclustered == 2
    assert len(groups.keys) == len(set(groups.keys)) == 3


def test_repeated_ids_find_their_cluster(tmp_path):
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("a\tx\nb\tp1\n")
    labelled = labelled_of(tmp_path, "abab")
    labelled.ids = ["x", "p1", "x", "x"]
    groups = groups_of(ProbeRequest(model="m", labels="l", clusters=clusters), labelled)
    assert groups.numbers.tolist() == [0, 1, 0, 0]
    assert groups.num_unclustered == 0


def test_members_of_a_cluster_on_both_sides_of_a_given_split_are_counted(tmp_path):
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("".join(f"c{number // 2}\tp{number}\n" for number in range(20)))
    labelled = labelled_of(tmp_path, "aabb" * 5, splits=["train", "test"] * 5 + ["train"] * 10)
    *_, folds, _ = folds_of(labelled, clusters=clusters)
    assert (folds.num_shared, folds.num_related) == (0, 5)


def test_clusters_of_other_proteins_are_refused(tmp_path):
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("c\tx\n")
    with pytest.raises(ProtlmError, match=r"clusters\.tsv: has none of the proteins of labels\.csv, such as 'p0'"):
        folds_of(labelled_of(tmp_path, "ab" * 30), clusters=clusters)


def test_a_given_split_is_kept_and_a_part_of_train_selects(tmp_path):
    splits = ["train"] * 40 + ["test"] * 20
    targets, _, folds, (fold,) = folds_of(labelled_of(tmp_path, "ab" * 30, splits=splits))
    assert folds.is_given
    assert proteins(targets, fold.test) == set(range(40, 60))
    assert proteins(targets, fold.train) | proteins(targets, fold.valid) == set(range(40))
    assert len(fold.valid) == 8


def test_given_proteins_to_choose_by_are_those(tmp_path):
    splits = ["train"] * 30 + ["valid"] * 10 + ["test"] * 20
    labelled = labelled_of(tmp_path, "ab" * 30, splits=splits)
    targets, _, _, first = folds_of(labelled, 0)
    assert proteins(targets, first[0].valid) == set(range(30, 40))
    assert folds_of(labelled, 5)[3] == first


def test_sequences_of_test_that_are_fitted_are_counted(tmp_path):
    sequences = [LETTERS[number % 20] * 9 for number in range(30)]
    splits = ["train"] * 15 + ["test"] * 15
    *_, folds, _ = folds_of(labelled_of(tmp_path, "ab" * 15, splits=splits, sequences=sequences))
    # 20 to 29 repeat 0 to 9.
    assert folds.num_shared == 10


def test_a_class_that_only_test_has_is_an_error(tmp_path):
    labelled = labelled_of(tmp_path, "ab" * 10 + "c" * 3 + "ab", splits=["train"] * 20 + ["test"] * 5)
    with pytest.raises(ProtlmError, match=r"labels\.csv: class 'c' occurs only in the test split \(3 times\)"):
        folds_of(labelled)
    # Left out, it is no harm.
    targets, _, _, (fold,) = folds_of(labelled, min_class_size=4)
    assert targets.left_out == {"c": 3}
    assert proteins(targets, fold.test) == {23, 24}


def test_a_class_of_one_protein_cannot_be_divided(tmp_path):
    with pytest.raises(ProtlmError, match=r"class 'c' occurs only in one fold \(1 times\).*--min-class-size"):
        folds_of(labelled_of(tmp_path, "ab" * 20 + "c"))


def test_more_rows_than_wanted_are_sampled_the_same_for_everything(tmp_path):
    splits = ["train"] * 40 + ["test"] * 20
    labelled = labelled_of(tmp_path, "ab" * 30, splits=splits)
    (fold,) = folds_of(labelled, most_rows=20)[3]
    assert (len(fold.train), len(fold.valid), len(fold.test)) == (16, 4, 20)
    assert folds_of(labelled, most_rows=20)[3] == [fold]


def test_a_sample_has_some_of_each_class(tmp_path):
    splits = ["train"] * 200 + ["test"] * 4
    labelled = labelled_of(tmp_path, ["a"] * 194 + ["b"] * 6 + ["a", "b"] * 2, splits=splits)
    targets, _, _, (fold,) = folds_of(labelled, most_rows=10)
    assert np.bincount(targets.values[fold.train]).tolist() == [6, 2]
    assert np.bincount(targets.values[fold.valid]).min() >= 1


@pytest.mark.parametrize("num_folds", [3, 5, 20])
def test_classes_may_be_smaller_than_the_number_of_folds(tmp_path, num_folds):
    labelled = labelled_of(tmp_path, [f"c{number // 4}" for number in range(60)])
    *_, folds = folds_of(labelled, num_folds=num_folds)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(60))
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 60 / num_folds


def test_classes_of_mixed_clusters_are_spread_too(tmp_path):
    """As many as scikit-learn does: 40 clusters of ten, three classes of three members in clusters of their own."""
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("".join(f"c{number // 10}\tp{number}\n" for number in range(400)))
    labels = ["a" if number % 10 else "b" for number in range(400)]
    for number, cluster in enumerate((3, 11, 20, 5, 17, 33, 8, 25, 39)):
        labels[10 * cluster + 4] = f"rare{number // 3}"
    labelled = labelled_of(tmp_path, labels)
    for seed in range(5):
        targets, _, _, folds = folds_of(labelled, seed, clusters=clusters)
        in_folds = np.array([np.bincount(targets.values[fold.test], minlength=5) for fold in folds])
        assert in_folds.max(axis=0)[2:].max() == 1
        assert np.ptp(in_folds[:, 1]) <= 2


def test_one_giant_cluster_is_told(tmp_path):
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("".join(f"{'big' if number < 40 else number}\tp{number}\n" for number in range(60)))
    *_, folds, _ = folds_of(labelled_of(tmp_path, "ab" * 30), clusters=clusters)
    assert folds.largest == 40
    *_, folds, _ = folds_of(labelled_of(tmp_path / "other", "ab" * 30))
    assert folds.largest == 0


def test_a_class_of_one_cluster_is_named_as_such(tmp_path):
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("".join(f"{'big' if number < 10 else number}\tp{number}\n" for number in range(60)))
    with pytest.raises(ProtlmError, match=r"class 'c' occurs only in one fold \(10 times\).*all are of one cluster"):
        folds_of(labelled_of(tmp_path, "c" * 10 + "ab" * 25), clusters=clusters)


def test_a_class_of_two_is_divided_whole_groups_or_refused(tmp_path):
    labelled = labelled_of(tmp_path, [f"c{number // 2}" for number in range(40)])
    targets, _, _, folds = folds_of(labelled)
    for fold in folds:
        assert set(targets.values[fold.test]) <= set(targets.values[np.concatenate([fold.train, fold.valid])])


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        ("aaaaaaab", ["train"] * 6 + ["test"] * 2, "expected different labels to fit, got 'a' alone"),
        ("abababbb", ["train"] * 6 + ["test"] * 2, "expected different labels to test, got 'b' alone"),
        (["1", "2"] * 3 + ["3", "3"], ["train"] * 6 + ["test"] * 2, "expected different labels to test, got 3 alone"),
        ("abababab", ["train"] * 4 + ["test"] * 4, "at least 5 different proteins or clusters in train"),
    ],
)
def test_a_split_from_which_nothing_can_be_learned(tmp_path, labels, splits, message):
    with pytest.raises(ProtlmError, match=message):
        folds_of(labelled_of(tmp_path, labels, splits=splits))


def test_too_few_groups_are_an_error(tmp_path):
    with pytest.raises(ProtlmError, match=r"expected at least 5 different proteins or clusters to divide, got 4"):
        folds_of(labelled_of(tmp_path, "abab"))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("aaaaaaaaaaaa", {}, r"labels\.csv: every label is 'a', so there is nothing to learn"),
        (["2.5"] * 12, {}, r"every label is 2\.5"),
        ("aaaaaaaaaaab", {"min_class_size": 2}, r"expected two classes or more of at least 2 proteins, got 1"),
        (["1", "2", "x"] * 4, {"task": "regression"}, r"labels\.csv:4: expected a number as label, got 'x'$"),
        ([*"123456789", ">9", *"12"], {}, r"labels\.csv:11: expected a number as label, got '>9', as most others are"),
        ([f"id{number}" for number in range(12)], {}, r"every label is another one, such as 'id0'.*--label"),
        ([f"0,{number}" for number in range(12)], {}, r"every label is another one.*write numbers with a point"),
        (
            ["AAAAAAAAAAAA", "CCCCCCCCCCCC"] * 6 + ["AC"],
            {},
            r"labels\.csv:14: the labels of 'p12': expected 12 letters",
        ),
        (["1", "2", "1e999"] * 4, {"task": "regression"}, r"expected a number as label, got '1e999'"),
    ],
)
def test_labels_from_which_nothing_can_be_learned(tmp_path, labels, options, message):
    with pytest.raises(ProtlmError, match=message):
        folds_of(labelled_of(tmp_path, labels), **options)


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["1", "2.5", "-3e-2", ".5", "+7."], "regression"),
        (["0", "1", "1"], "classification"),
        (["1", "2", "x", "x"], "classification"),
        # What Python takes for numbers, and nobody else.
        (["1_0", "1_1", "1_0"], "classification"),
        (["１", "２", "１"], "classification"),
        (["yes", "no", " yes"], "classification"),
    ],
)
def test_numbers_are_values_but_for_0_and_1(tmp_path, labels, task):
    targets = targets_of(ProbeRequest(model="m", labels="labels.csv"), labelled_of(tmp_path, labels))
    assert targets.task == task
    if task == "regression":
        assert targets.values.tolist() == [1, 2.5, -0.03, 0.5, 7]


def test_the_task_may_be_said(tmp_path):
    request = ProbeRequest(model="m", labels="labels.csv", task="classification")
    assert targets_of(request, labelled_of(tmp_path, ["1", "2.5", "-3", "1"])).classes == ("-3", "1", "2.5")


@pytest.mark.parametrize(
    ("labels", "sequences", "task"),
    [
        (["HHC", "CHHC"], ["MKV", "MKVL"], "per-residue"),
        (["00100", "011001"], ["MKVLA", "MKVLAG"], "per-residue"),
        # Numbers of short peptides, and words.
        (["0.12", "0.13", "1.14"], ["MKVL", "MKVA", "MKVC"], "regression"),
        (["12", "13", "15"], ["MK", "MA", "MC"], "regression"),
        (["a", "b", "a"], ["M", "K", "V"], "classification"),
        (["yes", "no", "yes", "no"], ["MKV", "MK", "MKVL", "MKVLA"], "classification"),
    ],
)
def test_strings_of_the_length_of_their_proteins_are_labels_of_residues(tmp_path, labels, sequences, task):
    labelled = labelled_of(tmp_path, labels, sequences=sequences)
    assert targets_of(ProbeRequest(model="m", labels="labels.csv"), labelled).task == task


def test_residues_have_rows_of_their_own_without_those_that_are_left_out(tmp_path):
    labelled = labelled_of(
        tmp_path, ["HE?C", "CCH", "HHHHH"], sequences=["MKVL", "MKV", "MKVLA"], is_of_residues=True,
        masks=["", "101", ""],
    )  # fmt: skip
    targets = targets_of(ProbeRequest(model="m", labels="l", ignore="?"), labelled)
    assert targets.task == "per-residue"
    assert "".join(targets.classes[value] for value in targets.values) == "HECCHHHHHH"
    assert targets.places.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert targets.proteins.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert targets.rows_of(np.array([1])).tolist() == [3, 4]
    with pytest.raises(ProtlmError, match="no residue is left"):
        targets_of(ProbeRequest(model="m", labels="l", ignore="?HEC"), labelled)
