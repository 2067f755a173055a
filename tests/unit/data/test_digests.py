import numpy as np

from protlm.data.digests import Digests, digests_of, duplicates, repeats, sequence_digest


def test_the_digest_is_xxh3_128():
    assert sequence_digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert digests_of([b""]).tolist() == [[0x99AA06D3014798D8, 0x6001C324468D497F]]


def gathered(pairs):
    high, low = (np.array(column, dtype=np.uint64) for column in zip(*pairs, strict=True))
    return Digests(high, low, np.arange(len(pairs)) * 10)


def test_the_first_of_equal_digests_stays_and_the_others_go():
    digests = gathered([(7, 1), (3, 1), (7, 1), (7, 2), (3, 1), (7, 1)])
    within, across = duplicates(digests, np.zeros(6, np.uint8), dedupe=True)
    assert (sorted(within.tolist()), across.tolist()) == ([20, 40, 50], [])
    numbers = dict(zip(*(column.tolist() for column in repeats(digests)), strict=True))
    assert numbers == {20: 2, 40: 2, 50: 3}


def test_the_earliest_split_keeps_a_sequence_wherever_it_stands():
    digests = gathered([(7, 1), (7, 1), (7, 1), (7, 1), (7, 1)])
    splits = np.array([2, 0, 1, 0, 2], np.uint8)
    within, across = duplicates(digests, splits, dedupe=True)
    assert (within.tolist(), sorted(across.tolist())) == ([30], [0, 20, 40])
    within, across = duplicates(digests, splits, dedupe=False)
    assert (within.tolist(), sorted(across.tolist())) == ([], [0, 20, 40])


def test_no_digests_have_no_duplicates():
    none = Digests(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64))
    assert [len(left_out) for left_out in duplicates(none, np.zeros(0, np.uint8), dedupe=True)] == [0, 0]
