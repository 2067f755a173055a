import pytest

from protlm.data.building import leakage
from protlm.data.records import Record
from protlm.data.storage.manifest import Contained, Shared
from protlm.runtime.local_workers import LocalWorkers
from tests.unit.data.building.leak_cases import PROTEIN, shards, write


def look_for_leaks(splits, exact_duplicates_removed, *, substrings):
    with LocalWorkers(1, None) as workers:
        return leakage.look_for_leaks(splits, exact_duplicates_removed, workers, substrings=substrings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def test_labels_on_both_sides_are_counted_once_and_families_one_by_one(folder):
    def labelled(*labels):
        return write(folder, [Record(f"r{n}", "", "MKV", cluster_id=c, families=f) for n, (c, f) in enumerate(labels)])

    first = [labelled(("c1", ("PF1", "PF2")), ("c1", ()), ("", ("PF3",))), labelled(("c2", ()), ("", ()))]
    second = [labelled(("c2", ("PF2", "PF3", "PF4")), ("", ())), labelled(("c2", ("PF3",)), ("PF1", ()))]
    splits = {"train": first, "valid": second, "test": shards(folder, ["MKV"])}
    leaks = look_for_leaks(splits, 0, substrings=False)
    assert [shared.num_labels for shared in leaks.clusters] == [1, 0, 0]
    assert [shared.num_labels for shared in leaks.families] == [2, 0, 0]


def test_all_pairs_of_filled_splits_are_compared_both_ways(folder):
    part, short = PROTEIN[:50], PROTEIN[3:20]
    leaks = look_for_leaks(
        {
            "train": shards(folder, [PROTEIN, "MKVMKVMKVMKVMKVW"], [short]),
            "valid": shards(folder, [part, PROTEIN[60:80]]),
            "test": [],
            "ood": shards(folder, [PROTEIN[40:60]], ["AMKVMKVMKVMKVMKVWA" * 9]),
        },
        4,
        substrings=True,
    )
    assert leaks.exact_duplicates_removed == 4
    assert leaks.substrings == tuple(
        Contained(inner=inner, outer=outer, num_records=count)
        for inner, outer, count in [
            ("train", "valid", 1), ("train", "ood", 1), ("valid", "train", 2), ("valid", "ood", 0),
            ("ood", "train", 1), ("ood", "valid", 0),
        ]
    )  # fmt: skip
    assert leaks.clusters is None
    assert leaks.families is None


def test_labels_are_compared_where_any_shard_tells_them(folder):
    splits = {
        "train": [write(folder, [Record("a", "", "MKV", cluster_id="c")])],
        "valid": [write(folder, [Record("a", "", "MKW", cluster_id="c")])],
        "test": shards(folder, ["MKL"]),
    }
    leaks = look_for_leaks(splits, 0, substrings=False)
    assert leaks.substrings is None
    assert leaks.families is None
    assert leaks.clusters == (
        Shared(first="train", second="valid", num_labels=1),
        Shared(first="train", second="test", num_labels=0),
        Shared(first="valid", second="test", num_labels=0),
    )
