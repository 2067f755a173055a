"""The names of repeated ids: the n-th record with an id is called `id#n`, or gets the next number that is free."""

import re
from collections import defaultdict

# A number as `number_suffix` writes it, with no more digits than a count of records can have.
_NUMBERED_ID = re.compile(r"(.*)#([1-9][0-9]{0,17})", re.DOTALL)


class NumberedIds:
    """The numbers that no repeat of an id may get, because the input has `id#n` itself; some 200 bytes each."""

    def __init__(self) -> None:
        self._taken: defaultdict[str, set[int]] = defaultdict(set)
        self._next: dict[str, int] = {}

    def __contains__(self, record_id: object) -> bool:
        """Returns whether any number of this id is taken."""
        return record_id in self._taken

    def add(self, record_id: str, number: int) -> None:
        """Marks a number of an id as taken."""
        self._taken[record_id].add(number)

    def next_free(self, record_id: str) -> int:
        """Returns the number of the next repeat of an id, from 2."""
        number = self._next.get(record_id, 2)
        while number in self._taken.get(record_id, ()):
            number += 1
        self._next[record_id] = number + 1
        return number


def number_suffix(number: int) -> str:
    """Returns the suffix that makes an id the id of its n-th repeat."""
    return f"#{number}"


def numbered_id(text: str) -> tuple[str, int] | None:
    """Returns the id and the number in `id#n` if a repeat could get that name, else None."""
    match = _NUMBERED_ID.fullmatch(text)
    return None if match is None else (match[1], int(match[2]))
