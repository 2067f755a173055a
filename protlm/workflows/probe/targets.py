"""Labels become targets: the kind of the labels, the rows to predict, and the errors for labels that teach nothing."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protlm.data.digests import digests_of
from protlm.data.labels.index import UNLABELLED
from protlm.data.labels.labels import read_clusters
from protlm.data.records import shown
from protlm.data.strings import Strings, bounds_of
from protlm.errors import ProtlmError, RecordError
from protlm.workflows.probe.labels import LabelledProteins
from protlm.workflows.probe.request import ProbeRequest

# Narrower than Python's float, which also takes 1_0, nan and digits of other scripts.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_LARGEST_VALUE = 1e100
_MOST = 0.9
"""Where so many labels are of one kind, the others are taken for mistakes."""
_SHORTEST_DIGITS = 5
"""Labels of digits alone that are all as long as their proteins are a digit for each residue from this length on; below
it they are numbers."""


@dataclass(frozen=True)
class Targets:
    """The target of every row; a row is a protein, or a residue that has a label.

    Attributes:
        task: `classification`, `regression` or `per-residue`.
        classes: The names of the classes, sorted; empty for regression.
        values: The number of the class of each row, int64, or its value, float64.
        proteins: The protein of each row, int64, rising.
        places: The number of each row among all proteins, or all residues of all of them: where its features are.
        left_out: Number of proteins of each class that was left out, by its name.
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


@dataclass(frozen=True)
class Groups:
    """The proteins that are never divided between those to fit and those to test.

    Attributes:
        numbers: The group of each protein, int64.
        keys: The name of each group, by which the bootstrap draws it.
        num_unclustered: Proteins that the file of the clusters does not know; None without such a file.
    """

    numbers: np.ndarray
    keys: Sequence[bytes]
    num_unclustered: int | None


def targets_of(request: ProbeRequest, labelled: LabelledProteins) -> Targets:
    """Returns the targets of labelled proteins.

    Raises:
        ProtlmError: Constant labels, labels of two kinds, or none that is left.
    """
    if _is_of_residues(request, labelled):
        return _of_residues(request, labelled)
    values = numbers_of(request, labelled)
    proteins = np.arange(len(labelled.labels))
    if values is not None:
        if not np.ptp(values):
            raise _constant(request, labelled, f"{values[0]:g}")
        return Targets("regression", (), values, proteins, proteins, {})
    labels = [label.strip() for label in labelled.labels]
    counts = Counter(labels)
    left_out = {name: count for name, count in counts.items() if count < request.min_class_size}
    classes = tuple(sorted(set(counts) - set(left_out)))
    if len(classes) < 2:
        if left_out:
            raise ProtlmError(
                f"{request.labels}: expected two classes or more of at least {request.min_class_size:,} proteins, got "
                f"{len(classes)}; lower --min-class-size"
            )
        raise _constant(request, labelled, shown(classes[0]))
    if len(classes) == len(labels):
        hint = "write numbers with a point" if _DECIMAL_COMMA.fullmatch(labels[0]) else "choose another with --label"
        raise ProtlmError(
            f"{request.labels}: every {labelled.name} is another one, such as {shown(labels[0])}, so there are no "
            f"classes; {hint}"
        )
    kept = np.array([label not in left_out for label in labels])
    numbers = {name: number for number, name in enumerate(classes)}
    codes = np.array([numbers.get(label, -1) for label in labels], dtype=np.int64)
    return Targets("classification", classes, codes[kept], proteins[kept], proteins[kept], left_out)


def numbers_of(request: ProbeRequest, labelled: LabelledProteins) -> np.ndarray | None:
    """Returns the labels as numbers, float64; None where they are classes.

    With `--task auto` labels are values if all of them are numbers, but for 0 and 1 alone.

    Raises:
        RecordError: A label that is no number where most are, or `--task regression` wants them to be.
    """
    if request.task == "classification":
        return None
    is_number = [_is_number(label) for label in labelled.labels]
    share = sum(is_number) / len(is_number)
    if request.task == "auto" and share < _MOST:
        return None
    if share < 1:
        place = is_number.index(False)
        other = "" if request.task == "regression" else ", as most others are; mend it, or take --task classification"
        message = f"expected a number as {labelled.name}, got {shown(labelled.labels[place])}{other}"
        raise RecordError(request.labels, labelled.lines[place], message)
    values = np.array([float(label) for label in labelled.labels])
    return None if request.task == "auto" and set(np.unique(values)) <= {0.0, 1.0} else values


def groups_of(request: ProbeRequest, labelled: LabelledProteins) -> Groups:
    """Returns the groups of proteins: those of one cluster, and those of equal sequence, belong together.

    Raises:
        ProtlmError: Clusters that cannot be read, or that know none of the proteins.
    """
    proteins = labelled.proteins
    digests = np.asarray(proteins.digests)
    names = [bytes(digest) for digest in digests]
    leaders = np.asarray(proteins.first).copy()
    num_unclustered = None
    if request.clusters is not None:
        clusters = read_clusters(request.clusters)
        numbers = clusters.lookup(Strings.of(labelled.ids), digests_of([name.encode() for name in labelled.ids]))
        num_unclustered = int((numbers == UNLABELLED).sum())
        if num_unclustered == len(numbers):
            raise ProtlmError(
                f"{request.clusters}: has none of the proteins of {request.labels}, such as {shown(labelled.ids[0])}"
            )
        leaders = _joined(leaders, numbers)
        for record in np.flatnonzero(numbers != UNLABELLED).tolist():
            names[record] = b"cluster " + clusters.name(int(numbers[record])).encode()
    found, groups = np.unique(leaders, return_inverse=True)
    return Groups(groups.astype(np.int64), [names[leader] for leader in found.tolist()], num_unclustered)


def _joined(first: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Returns the smallest protein that each is joined with, by equal sequences and by clusters, over any steps."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Proteins and, behind them, clusters are the nodes of a graph.
    size = len(first)
    clustered = np.flatnonzero(clusters != UNLABELLED)
    ends = np.concatenate([first, size + clusters[clustered]])
    starts = np.concatenate([np.arange(size), clustered])
    num_nodes = size + int(clusters.max()) + 1
    graph = coo_array((np.ones(len(starts), dtype=np.int8), (starts, ends)), shape=(num_nodes, num_nodes))
    _, components = connected_components(graph, directed=False)
    _, leaders, numbers = np.unique(components[:size], return_index=True, return_inverse=True)
    joined: np.ndarray = leaders[numbers]
    return joined


def _is_number(label: str) -> bool:
    return bool(_NUMBER.fullmatch(label.strip())) and abs(float(label)) <= _LARGEST_VALUE


def _is_of_residues(request: ProbeRequest, labelled: LabelledProteins) -> bool:
    """Returns whether labels are strings of a letter for each residue.

    Raises:
        RecordError: They should be, or most are, and one has another length than its protein.
    """
    if request.task in ("classification", "regression"):
        return False
    lengths = np.asarray(labelled.proteins.lengths)
    is_as_long = np.array([len(label) for label in labelled.labels]) == lengths
    is_certain = request.task == "per-residue" or labelled.is_of_strings or any(labelled.masks) or bool(request.ignore)
    # A word that happens to be as long as its protein is one, and so are short numbers.
    is_likely = is_as_long.mean() >= _MOST and lengths.max() > 1
    if not is_certain and (not is_likely or _are_short_numbers(labelled.labels)):
        return False
    wrong = np.flatnonzero(~is_as_long)
    if len(wrong):
        place = int(wrong[0])
        raise RecordError(
            request.labels, labelled.lines[place],
            f"the labels of {shown(labelled.ids[place])}: expected {int(lengths[place]):,} letters, one for each "
            f"residue, got {len(labelled.labels[place]):,}; --task classification takes whole strings as classes",
        )  # fmt: skip
    return True


def _are_short_numbers(labels: Sequence[str]) -> bool:
    if not all(map(_is_number, labels)):
        return False
    return min(map(len, labels)) < _SHORTEST_DIGITS or not all(label.isdigit() for label in labels)


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
    classes, codes = np.unique(letters[places], return_inverse=True)
    if len(classes) < 2:
        raise _constant(request, labelled, shown(chr(int(classes[0]))))
    proteins = np.repeat(np.arange(len(lengths)), lengths)[places]
    return Targets("per-residue", tuple(map(chr, classes.tolist())), codes.astype(np.int64), proteins, places, {})


def _constant(request: ProbeRequest, labelled: LabelledProteins, value: str) -> ProtlmError:
    others = f" but for {labelled.num_unlabelled:,} without one" if labelled.num_unlabelled else ""
    return ProtlmError(
        f"{request.labels}: every {labelled.name} is {value}{others}, so there is nothing to learn; choose another "
        "with --label"
    )
