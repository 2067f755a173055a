"""What may reach a terminal: hides how letters that would steer it, or that it cannot show, are escaped.

Names, ids and messages come from files that anyone may have written. A value is put on one line by `on_one_line`,
before it is laid out; behind all commands stands `filtered_output`, so that nothing else gets through either.
"""

import codecs
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_LAYOUT = "\n\r\t"
"""What lays out our own output, the bars among it."""
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_BYTES = range(0xDC80, 0xDD00)
"""The surrogates by which Python keeps the bytes of a name that are no UTF-8."""
_NOT_SHARED = ("buffer", "detach")


def on_one_line(value: object) -> str:
    r"""Returns the text of a value in letters that can be shown; `\n`, `\x1b`, `\u202e` and the like are escapes."""
    return _escaped(str(value), "")


def json_text(content: Any, default: Any) -> str:
    """Returns a value as indented JSON; what cannot be shown is escaped in its way, so that the value is the same."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=default)
    lines = (
        line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        for line in text.split("\n")
    )
    return "\n".join(lines)


@contextlib.contextmanager
def filtered_output() -> Iterator[None]:
    """Lets the standard output and error pass only what can be shown and is layout, while in the `with` block."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(_Filtered(sys.stdout)))
        if sys.stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(_Filtered(sys.stderr)))
        yield


class _Filtered:
    """A text stream that escapes; all but writing is that of the stream behind it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._encoding = _narrow_encoding(stream)

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_SHARED:
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        shown = _escaped(text, _LAYOUT)
        if self._encoding is not None:
            shown = shown.encode(self._encoding, "backslashreplace").decode(self._encoding)
        self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def _narrow_encoding(stream: Any) -> str | None:
    """Returns the encoding of a stream that cannot take every letter, None for one that can."""
    name = getattr(stream, "encoding", None)
    return name if name and not codecs.lookup(name).name.startswith("utf") else None


def _escaped(text: str, layout: str) -> str:
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in layout else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    code = ord(letter)
    if code in _BYTES:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return _SHORT.get(letter, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
