"""Counts the steps of a regular expression, for tests that its time grows with the text and not with its square.

A plain backtracking matcher of the expressions that the parsers use, by the rules of Python's own one but without its
short cuts: it never takes fewer steps than that, and counts the same on every machine.
"""

import re
from collections.abc import Iterator
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]


class TooManyStepsError(Exception):
    """A search was given up."""


class Steps:
    """The matcher of one pattern; `count` is the number of steps of all its searches."""

    def __init__(self, pattern: re.Pattern, limit: int) -> None:
        self._pattern = pattern
        self._nodes = tuple(_parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE | _text_flag(pattern)))
        self._limit = limit
        self.count = 0

    def search(self, text: str | bytes) -> bool:
        """Returns whether the pattern occurs in a text, trying every start as `re.search` does."""
        return any(self._match_at(text, start) for start in range(len(text) + 1))

    def match(self, text: str | bytes) -> bool:
        """Returns whether a text begins with the pattern."""
        return self._match_at(text, 0)

    def fullmatch(self, text: str | bytes) -> bool:
        """Returns whether the pattern is a whole text."""
        return any(end == len(text) for end in self._ends(text, 0, self._nodes))

    def _match_at(self, text: str | bytes, start: int) -> bool:
        return next(self._ends(text, start, self._nodes), None) is not None

    def _step(self) -> None:
        self.count += 1
        if self.count > self._limit:
            raise TooManyStepsError

    def _ends(self, text: str | bytes, at: int, nodes: tuple) -> Iterator[int]:
        """Yields where a match of these nodes may end, in the order in which `re` tries them."""
        # A stack of generators in place of recursion, which a long text would exhaust.
        stack = [iter((at,))]
        while stack:
            if (place := next(stack[-1], None)) is None:
                stack.pop()
            elif len(stack) > len(nodes):
                yield place
            else:
                self._step()
                stack.append(self._ends_of_node(text, place, nodes[len(stack) - 1]))

    def _ends_of_node(self, text: str | bytes, at: int, node: tuple) -> Iterator[int]:
        kind, what = node
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return iter((at + 1,)) if at < len(text) and self._is_letter(text[at : at + 1], node) else iter(())
        if kind is op.SUBPATTERN:
            return self._ends(text, at, tuple(what[3]))
        if kind is op.BRANCH:
            return (end for branch in what[1] for end in self._ends(text, at, tuple(branch)))
        if kind is op.AT:
            return iter((at,)) if self._is_at(text, at, what) else iter(())
        if kind is op.ASSERT_NOT:
            return iter(()) if next(self._ends(text, at, tuple(what[1])), None) is not None else iter((at,))
        if kind is op.POSSESSIVE_REPEAT:
            end = next(self._repeats(text, at, what, is_greedy=True), None)
            return iter(()) if end is None else iter((end,))
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeats(text, at, what, is_greedy=kind is op.MAX_REPEAT)
        raise NotImplementedError(f"{kind} in {self._pattern.pattern!r}")

    def _repeats(self, text: str | bytes, at: int, what: tuple, *, is_greedy: bool) -> Iterator[int]:
        least, most, inner = what
        nodes = tuple(inner)
        places, further = [at], [self._ends(text, at, nodes)]
        if not is_greedy and least == 0:
            yield at
        while places:
            self._step()
            place = next(further[-1], None) if len(places) <= most else None
            if place is not None:
                places.append(place)
                further.append(self._ends(text, place, nodes))
                if not is_greedy and len(places) > least:
                    yield place
                continue
            if is_greedy and len(places) > least:
                yield places[-1]
            places.pop()
            further.pop()

    def _is_letter(self, letter: str | bytes, node: tuple) -> bool:
        return bool(_letters(node, self._pattern.flags, isinstance(letter, bytes))[ord(letter)])

    def _is_at(self, text: str | bytes, at: int, what: object) -> bool:
        is_multiline, newline = self._pattern.flags & re.MULTILINE, b"\n" if isinstance(text, bytes) else "\n"
        if what is op.AT_BEGINNING:
            return at == 0 or bool(is_multiline and text[at - 1 : at] == newline)
        if what is op.AT_END:
            return at == len(text) or text[at:] == newline
        if what is op.AT_BOUNDARY:
            before, after = text[at - 1 : at] if at else text[:0], text[at : at + 1]
            return (before.isalnum() or before in (b"_", "_")) != (after.isalnum() or after in (b"_", "_"))
        raise NotImplementedError(str(what))


_TABLES: dict[object, list[bool]] = {}


def _letters(node: tuple, flags: int, is_bytes: bool) -> list[bool]:
    """Returns for each of the first 256 letters whether it matches a node that stands for one letter."""
    key = (str(node), flags, is_bytes)
    if key not in _TABLES:
        _TABLES[key] = [_matches(node, code, flags) for code in range(256)]
    return _TABLES[key]


def _matches(node: tuple, code: int, flags: int) -> bool:
    kind, what = node
    if kind is op.LITERAL:
        return code == what
    if kind is op.NOT_LITERAL:
        return code != what
    if kind is op.ANY:
        return code != ord("\n") or bool(flags & re.DOTALL)
    if kind is op.RANGE:
        return what[0] <= code <= what[1]
    if kind is op.CATEGORY:
        letter = chr(code)
        return {
            op.CATEGORY_SPACE: letter in " \t\n\r\f\v",
            op.CATEGORY_NOT_SPACE: letter not in " \t\n\r\f\v",
            op.CATEGORY_DIGIT: letter in "0123456789",
        }[what]
    assert kind is op.IN
    negated = what[0][0] is op.NEGATE
    return any(_matches(item, code, flags) for item in what[negated:]) != negated


def _text_flag(pattern: re.Pattern) -> int:
    return re.UNICODE if isinstance(pattern.pattern, str) else 0
