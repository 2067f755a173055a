"""The division of labelled proteins: groups stay whole, and what nothing can learn is an error."""

import dataclasses

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
        name="label",
        labels=list(labels),
        lines=list(range(2, size + 2)),
        splits=splits or [""] * size,
        masks=masks or [""] * size,
        is_of_residues=is_of_residues,
    )


def folds_of(labelled, seed=0, **options):
    request = ProbeRequest(model="m", labels="labels.csv", **options)
    targets = targets_of(request, labelled)
    groups, _ = groups_of(request, labelled)
    folds = Folds(request, labelled, targets, groups)
    return targets, groups, folds, folds.of_seed(seed)


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
    with pytest.raises(ProtlmError, match=r"labels\.csv: class 'c' \(3 proteins\) is in the test split only"):
        folds_of(labelled)
    # Left out, it is no harm.
    targets, _, _, (fold,) = folds_of(labelled, min_class_size=4)
    assert targets.left_out == {"c": 3}
    assert proteins(targets, fold.test) == {23, 24}


def test_a_class_of_one_protein_cannot_be_divided(tmp_path):
    with pytest.raises(ProtlmError, match=r"class 'c' \(1 proteins\) is in one fold only.*--min-class-size"):
        folds_of(labelled_of(tmp_path, "ab" * 20 + "c"))


def test_more_rows_than_wanted_are_sampled_the_same_for_everything(tmp_path):
    splits = ["train"] * 40 + ["test"] * 20
    labelled = labelled_of(tmp_path, "ab" * 30, splits=splits)
    (fold,) = folds_of(labelled, most_rows=20)[3]
    assert (len(fold.train), len(fold.valid), len(fold.test)) == (16, 4, 20)
    assert folds_of(labelled, most_rows=20)[3] == [fold]


def test_too_few_groups_are_an_error(tmp_path):
    with pytest.raises(ProtlmError, match=r"expected at least 5 different proteins or clusters to divide, got 4"):
        folds_of(labelled_of(tmp_path, "abab"))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("aaaaaaaaaaaa", {}, r"labels\.csv: every label is 'a', so there is nothing to learn"),
        (["2.5"] * 12, {}, r"every label is 2\.5"),
        ("aaaaaaaaaaab", {"min_class_size": 2}, r"expected two classes or more of at least 2 proteins, got 1"),
        (["1", "2", "x"] * 4, {"task": "regression"}, r"labels\.csv:4: --task regression: expected a number"),
        (["1", "2", "1e999"] * 4, {"task": "regression"}, r"expected a number as label, got '1e999'"),
    ],
)
def test_labels_from_which_nothing_can_be_learned(tmp_path, labels, options, message):
    with pytest.raises(ProtlmError, match=message):
        folds_of(labelled_of(tmp_path, labels), **options)


def test_numbers_are_values_but_for_0_and_1(tmp_path):
    request = ProbeRequest(model="m", labels="labels.csv")
    tasks = []
    for number, labels in enumerate((["1", "2.5", "-3"], ["0", "1", "1"], ["1", "2", "x"], ["nope", "yes", "nan"])):
        labelled = labelled_of(tmp_path / str(number), labels)
        tasks.append(targets_of(request, labelled).task)
        if number == 0:
            assert targets_of(request, labelled).values.tolist() == [1, 2.5, -3]
            as_classes = targets_of(dataclasses.replace(request, task="classification"), labelled)
            assert as_classes.classes == ("-3", "1", "2.5")
    assert tasks == ["regression", "classification", "classification", "classification"]


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
