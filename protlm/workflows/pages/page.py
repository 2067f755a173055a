"""Self-contained HTML pages: hides their markup, style and navigation behind a page of sections of blocks.

A page loads nothing, runs no script and names no time, so that equal content has equal bytes. All text is escaped;
only the figures of `figures.draw` are taken as they are.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from protlm.workflows.pages.figures import Svg
from protlm.workflows.pages.palette import DARK, LIGHT

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

ColumnKind = Literal["text", "number", "code"]
"""How a column of a table is set: `number` to the right in figures of one width, `code` for hashes and commands."""

_ID = re.compile(r"[a-z][a-z0-9-]*")
_MARKS = re.compile(r"(`[^`]+`|\*\*[^*]+\*\*)")


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, in which `` `code` `` and `**strong**` are marked.

    Attributes:
        content: The text.
        soft: Whether it is a side note.
    """

    content: str
    soft: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True, slots=True)
class Table:
    """A table; one that is too wide is scrolled inside its own box.

    Attributes:
        header: The names of the columns, with their units.
        rows: The cells, as they are shown.
        kinds: The kind of each column; by default text, then numbers.
        caption: The line above the table, if any.
        strong_rows: The numbers of the rows that are set in bold.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: Sequence[ColumnKind] = ()
    caption: str = ""
    strong_rows: Sequence[int] = ()
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        """Refuses rows of different lengths."""
        if not self.kinds:
            object.__setattr__(self, "kinds", ("text", *["number"] * (len(self.header) - 1)))
        lengths = {len(self.header), len(self.kinds), *map(len, self.rows)}
        if len(lengths) > 1:
            raise ValueError(f"a table's header, kinds and rows: expected one length, got {sorted(lengths)}")


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing, its reading and its numbers.

    Attributes:
        svg: The drawing, by `figures.draw`.
        reading: One sentence that says what the figure shows here; it may have the marks of `Text`.
        data: The numbers that are drawn, which the reader can unfold below the figure.
    """

    svg: Svg
    reading: str
    data: Table | None = None
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Names with their values, in which the values stand out: the numbers of a summary."""

    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "key_values"


@dataclass(frozen=True, slots=True)
class Warnings:
    """Lines that a reader should not miss; without any, nothing is shown."""

    lines: Sequence[str]
    kind: ClassVar[str] = "warnings"


Block = Text | Table | Figure | KeyValues | Warnings


@dataclass(frozen=True, slots=True)
class Section:
    """A section with a heading and an entry in the navigation.

    Attributes:
        id: Its name in links: lower-case letters, digits and hyphens.
        title: Its heading.
        blocks: Its content.
    """

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """A page.

    Attributes:
        title: Its heading, and the title of the browser's window.
        subtitle: The line below; it may have the marks of `Text`.
        summary: The blocks of the first screen, before any section.
        sections: The sections, in order.
    """

    title: str
    subtitle: str
    summary: Sequence[Block]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Returns the HTML of a page.

    Raises:
        ValueError: Two sections have the same id, or one that does not fit into a link.
    """
    ids = ["summary", *(section.id for section in page.sections)]
    for id_ in ids:
        if ids.count(id_) > 1 or not _ID.fullmatch(id_):
            raise ValueError(f"section id: expected a-z, 0-9 and -, each id once and not 'summary', got {id_!r}")
    return _template().render(page=page, light=LIGHT, dark=DARK)


@cache
def _template() -> "Template":
    # Only who makes a page waits for its import.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["marked"] = _marked
    return environment.get_template("page.html.jinja")


def _marked(text: str) -> "Markup":
    """Returns text as markup: escaped, with `code` and **strong** as elements."""
    from markupsafe import Markup

    return Markup().join(_pieces(_MARKS.split(text)))


def _pieces(texts: Iterable[str]) -> "Iterable[Markup]":
    from markupsafe import Markup, escape

    for text in texts:
        if not _MARKS.fullmatch(text):
            yield escape(text)
        elif text.startswith("`"):
            yield Markup("<code>{}</code>").format(text[1:-1])
        else:
            yield Markup("<strong>{}</strong>").format(text[2:-2])
