"""Labels become targets: which rows there are, the number of each class, and what cannot be learned from."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from protlm.data.labels.index import UNLABELLED
from protlm.data.labels.labels import read_clusters
from protlm.data.records import shown
from protlm.data.strings import Strings, bounds_of
from protlm.errors import ProtlmError
from protlm.workflows.probe.labels import LabelledProteins, numbers_of
from protlm.workflows.probe.request import ProbeRequest


@dataclass(frozen=True)
class Targets:
    """The target of every row; a row is a protein, or a residue that has a label.

    Attributes:
        task: `classification`, `regression` or `per-residue`.
        classes: The names of the classes, sorted; empty for regression.
        values: The number of the class of each row, int64, or its value, float64.
        proteins: The protein of each row, int64, rising.
        places: The number of each row among all proteins, or all residues of all of them: where its features are.
        left_out: Number of classes that were left out, with their proteins, by name.
    """

    task: str
    classes: tuple[str, ...]
    values: np.ndarray
    proteins: np.ndarray
    places: np.ndarray
    left_out: dict[str, int]

    @property
    def is_regression(self) -> bool:
        """Whether labels are values."""
        return self.task == "regression"

    def rows_of(self, proteins: np.ndarray) -> np.ndarray:
        """Returns the numbers of the rows of some proteins, rising, int64."""
        is_wanted = np.zeros(int(self.proteins.max()) + 1, dtype=bool)
        is_wanted[proteins[proteins < len(is_wanted)]] = True
        rows: np.ndarray = np.flatnonzero(is_wanted[self.proteins])
        return rows


def targets_of(request: ProbeRequest, labelled: LabelledProteins) -> Targets:
    """Returns the targets of labelled proteins.

    Raises:
        ProtlmError: Constant labels, or none that is left.
    """
    if labelled.is_of_residues:
        return _of_residues(request, labelled)
    values = numbers_of(request, labelled)
    proteins = np.arange(len(labelled.labels))
    if values is not None:
        if not np.ptp(values):
            raise _constant(request, labelled, f"{values[0]:g}")
        return Targets("regression", (), values, proteins, proteins, {})
    counts = Counter(labelled.labels)
    left_out = {name: count for name, count in counts.items() if count < request.min_class_size}
    kept = np.array([label not in left_out for label in labelled.labels])
    classes = tuple(sorted(set(counts) - set(left_out)))
    if len(classes) < 2:
        if left_out:
            raise ProtlmError(
                f"{request.labels}: expected two classes or more of at least {request.min_class_size:,} proteins, got "
                f"{len(classes)}; lower --min-class-size"
            )
        raise _constant(request, labelled, shown(classes[0]))
    numbers = {name: number for number, name in enumerate(classes)}
    codes = np.array([numbers.get(label, -1) for label in labelled.labels], dtype=np.int64)
    return Targets("classification", classes, codes[kept], proteins[kept], proteins[kept], left_out)


def groups_of(request: ProbeRequest, labelled: LabelledProteins) -> tuple[np.ndarray, list[bytes]]:
    """Returns the group of each protein, int64, and the name of each group: its cluster, or else its sequence.

    Equal sequences are in one group. A protein without cluster is a group of its own sequence.

    Raises:
        ProtlmError: Clusters that cannot be read, or that know none of the proteins.
    """
    proteins = labelled.proteins
    first = np.asarray(proteins.first)
    names = [bytes(digest) for digest in np.asarray(proteins.digests)]
    if request.clusters is not None:
        clusters = read_clusters(request.clusters)
        ids = Strings.of(proteins.ids)
        numbers = clusters.lookup(ids, _digests(ids))
        if (numbers == UNLABELLED).all():
            raise ProtlmError(
                f"{request.clusters}: has none of the proteins of {request.labels}, such as {shown(proteins.id(0))}"
            )
        # The cluster of the first of equal sequences is that of all.
        of_first = numbers[first]
        for record in np.flatnonzero(of_first != UNLABELLED).tolist():
            names[record] = b"cluster " + clusters.name(int(of_first[record])).encode()
    keys = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([keys[name] for name in names], dtype=np.int64), list(keys)


def _digests(ids: Strings) -> np.ndarray:
    from protlm.data.digests import digests_of

    return digests_of(list(ids.encoded()))


def _of_residues(request: ProbeRequest, labelled: LabelledProteins) -> Targets:
    lengths = np.asarray(labelled.proteins.lengths)
    offsets = bounds_of(lengths)
    letters = np.concatenate([np.frombuffer(text.encode("utf-32-le"), dtype="<u4") for text in labelled.labels])
    is_kept = ~np.isin(letters, [ord(letter) for letter in request.ignore])
    for place, mask in enumerate(labelled.masks):
        if mask:
            is_kept[offsets[place] : offsets[place + 1]] &= np.frombuffer(mask.encode(), dtype=np.uint8) == ord("1")
    places = np.flatnonzero(is_kept)
    if not len(places):
        raise ProtlmError(f"{request.labels}: no residue is left; see --mask and --ignore")
    found, codes = np.unique(letters[places], return_inverse=True)
    if len(found) < 2:
        raise _constant(request, labelled, shown(chr(int(found[0]))))
    proteins = np.repeat(np.arange(len(lengths)), lengths)[places]
    return Targets("per-residue", tuple(map(chr, found.tolist())), codes.astype(np.int64), proteins, places, {})


def _constant(request: ProbeRequest, labelled: LabelledProteins, value: str) -> ProtlmError:
    return ProtlmError(
        f"{request.labels}: every {labelled.name} is {value}, so there is nothing to learn; choose another with --label"
    )
