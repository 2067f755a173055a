"""How repeated ids are told apart: the n-th repeat of an id is called `id#n`, or by the next number that is free."""

import re
from collections import defaultdict

# As repeats are numbered, and no longer than they ever will be.
_NUMBERED_ID = re.compile(r"(.*)#([1-9][0-9]{0,17})", re.DOTALL)


class NumberedIds:
    """The numbers that no repeat of an id may get, since `id#n` is an id of its own; some 200 bytes each."""

    def __init__(self) -> None:
        self._taken: defaultdict[str, set[int]] = defaultdict(set)
        self._next: dict[str, int] = {}

    def __contains__(self, record_id: object) -> bool:
        """Says whether a number of this id is taken."""
        return record_id in self._taken

    def add(self, record_id: str, number: int) -> None:
        """Takes a number of an id."""
        self._taken[record_id].add(number)

    def next_free(self, record_id: str) -> int:
        """Returns the number of the next repeat of an id, from 2."""
        number = self._next.get(record_id, 2)
        while number in self._taken.get(record_id, ()):
            number += 1
        self._next[record_id] = number + 1
        return number


def number_suffix(number: int) -> str:
    """Returns the letters behind an id that make it the id of its n-th repeat."""
    return f"#{number}"


def numbered_id(text: str) -> tuple[str, int] | None:
    """Returns the id and the number if a repeat of that id could be called so, else None."""
    found = _NUMBERED_ID.fullmatch(text)
    return None if found is None else (found[1], int(found[2]))
