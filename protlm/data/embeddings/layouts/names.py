"""Names that a layout gives to proteins: hides how they are made different without a Python object for each.

The rule is that for repeated ids: of equal names the first is kept, and the n-th becomes `name#n`, or gets the next
free number if some protein has that name itself.
"""

import itertools
import re
from array import array
from collections.abc import Callable, Iterable

import numpy as np

from protlm.data.digests import Digests, digests_of, repeats
from protlm.data.numbered_ids import NumberedIds, number_suffix, numbered_id
from protlm.data.strings import Strings, bounds_of
from protlm.errors import ProtlmError

_LINE_BREAKERS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")

Folding = Callable[[str], str]
"""A function that maps names to equal strings if they count as equal."""


def collected(names: Iterable[str]) -> Strings:
    """Returns names as a column, using no more memory than their bytes."""
    text, lengths = bytearray(), array("q")
    for name in names:
        encoded = name.encode()
        text += encoded
        lengths.append(len(encoded))
    return Strings(np.frombuffer(text, dtype=np.uint8), bounds_of(np.frombuffer(lengths, dtype=np.int64)))


def is_repeat(names: Strings, folded: Folding = str, num_at_once: int = 1 << 16) -> np.ndarray:
    """Returns for each name whether an earlier one is equal, bool (names); looks at many names at a time."""
    digests = np.empty((len(names), 2), dtype=np.uint64)
    every = iter(names)
    for start in range(0, len(names), num_at_once):
        some = itertools.islice(every, num_at_once)
        digests[start : start + num_at_once] = digests_of(folded(name).encode() for name in some)
    numbers, _ = repeats(Digests(digests[:, 0], digests[:, 1], np.arange(len(names))))
    repeated = np.zeros(len(names), dtype=bool)
    repeated[numbers] = True
    return repeated


def all_different(names: Strings, folded: Folding = str) -> Strings:
    """Returns the names with `#n` behind those that repeat an earlier one."""
    repeated = is_repeat(names, folded)
    if not repeated.any():
        return names
    numbers = NumberedIds()
    for name in names:
        if (taken := numbered_id(folded(name))) is not None:
            numbers.add(*taken)

    def numbered(name: str) -> str:
        return name + number_suffix(numbers.next_free(folded(name)))

    return collected(numbered(name) if again else name for name, again in zip(names, repeated, strict=True))


def check_one_line_each(names: Strings, layout: str) -> None:
    """Raises ProtlmError for an id with a line end or a tab, which a list of ids cannot hold."""
    for name in names:
        if _LINE_BREAKERS.search(name):
            raise ProtlmError(
                f"id {name[:60]!r}: expected no tab or line end in it, which the list of ids of layout {layout} "
                "cannot hold; rename it, or choose another --layout"
            )
