"""Figures of a page: hides matplotlib, and how its SVG becomes part of a page that is read in light, dark and print."""

import atexit
import contextlib
import gc
import io
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NewType
from xml.etree import ElementTree

import numpy as np
import xxhash

from protlm import files
from protlm.workflows.pages.palette import LIGHT, NUM_LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

Svg = NewType("Svg", str)
"""An SVG element of `draw`, the only markup that a page takes as it is."""

WIDTH_INCHES = 5.2
"""The usual width of a figure. On a small screen a figure is scrolled in its own box: its letters keep 10 pixels."""

# Text is measured in the font that comes with matplotlib, so that the layout is the same on every machine; the page
# shows it in a font of the reader's system, most of which are narrower.
_STYLE = {
    "svg.hashsalt": "protlm", "svg.fonttype": "none", "svg.image_inline": True,
    "text.parse_math": False,  # a name with a $ is a name
    "font.family": ["DejaVu Sans"], "font.size": 9.0, "axes.titlesize": 9.0, "axes.titleweight": "normal",
    "axes.labelsize": 9.0, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5,
    "legend.facecolor": LIGHT["page"], "legend.edgecolor": "none", "legend.framealpha": 1.0, "legend.handlelength": 2.8,
    "figure.facecolor": "none", "savefig.facecolor": "none", "axes.facecolor": "none",
    "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["ink"], "axes.edgecolor": LIGHT["soft"],
    "xtick.color": LIGHT["soft"], "ytick.color": LIGHT["soft"], "grid.color": LIGHT["rule"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.linewidth": 0.6, "axes.linewidth": 0.8, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "errorbar.capsize": 2.5, "hatch.linewidth": 0.8,
}  # fmt: skip

_ROLES = {color: role for role, color in LIGHT.items()}
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"(?<=url\(#)[^)]+")
# Older matplotlib writes the font in one property.
_FONT = re.compile(r"\bfont: (?:(bold|\d{3}) )?([\d.]+px)[^;]*")
_FONT_FAMILY = re.compile(r" *font-family: [^;]*;?")


def draw(plot: Callable[["Figure"], None], label: str, *, height: float = 2.8, width: float = WIDTH_INCHES) -> Svg:
    """Returns a drawing as an SVG element that takes the colours of the page around it.

    Colours of `palette` become those of the reader's mode; any other colour stays the same in light and dark. Equal
    drawings have equal bytes.

    Args:
        plot: Draws on the empty figure; fonts, ticks and the colours of axes are set by the style of the pages. Text is
            shown as it is, so that a logarithmic axis needs a formatter of its own, such as "{x:,g}".
        label: What the figure shows, for readers who do not see it.
        height: Height in inches; a line of text is an eighth of an inch.
        width: Width in inches, at most 7.2.
    """
    with _matplotlib_style(), warnings.catch_warnings():
        from matplotlib.figure import Figure

        # The page shows the letter in a font of the reader's system.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        plot(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _page_svg(buffer.getvalue(), label)


_early: list[threading.Thread] = []
"""The thread that loads matplotlib, until somebody draws."""


def load_early() -> None:
    """Begins to load what `draw` needs, beside other work; not where processes may be forked meanwhile."""
    if not _early:
        _early.append(threading.Thread(target=_load_svg, name="load matplotlib"))
        _early[0].start()


def _load_svg() -> None:
    # What cannot be loaded is told by whoever draws.
    with contextlib.suppress(Exception), quiet_matplotlib():
        _import_matplotlib()
        import matplotlib.backends.backend_svg  # noqa: F401


PICTURE_MARK = "protlm"
"""The program that made a picture, as it stands in the picture's metadata."""


def save(
    plot: Callable[["Figure"], None], path: Path, *, height: float, width: float, dots_per_inch: int = 120
) -> None:
    """Writes a drawing into a file of its own, on white, which appears whole or not at all.

    Args:
        plot: Draws on the empty figure, as for `draw`.
        path: The file; its suffix is the format, `.png` or `.svg`.
        height: Height in inches.
        width: Width in inches.
        dots_per_inch: Resolution of pixels.
    """
    with _matplotlib_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained", facecolor=LIGHT["page"])
        plot(figure)
        kind = path.suffix.lower().removeprefix(".")
        # By the mark a command knows a picture that it may replace.
        metadata = {"Date": None, "Creator": PICTURE_MARK} if kind == "svg" else {"Software": PICTURE_MARK}
        with files.written_whole(path) as partial:
            figure.savefig(partial, format=kind, dpi=dots_per_inch, facecolor=LIGHT["page"], metadata=metadata)


def heat_map(*, diverging: bool = False) -> "ListedColormap":
    """Returns the colour map of matrices, for `pcolormesh` or `imshow`, inside the `plot` of `draw`.

    Its colours change with the reader's mode with `pcolormesh`; `imshow` makes pixels, which a page inverts instead.
    On every level the page's ink can be read.

    Args:
        diverging: Whether the middle is a value of its own, such as 0 between gains and losses.
    """
    from matplotlib.colors import ListedColormap

    name = "balance" if diverging else "heat"
    return ListedColormap([LIGHT[f"{name}-{level}"] for level in range(NUM_LEVELS)], name)


def matrix(
    axes: "Axes",
    values: np.ndarray[Any, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    diverging: bool = False,
) -> None:
    """Draws a matrix with its colour bar, the first row at the top; inside the `plot` of `draw`.

    Args:
        axes: Where it is drawn.
        values: A row for each of `rows`; NaN leaves a cell empty.
        rows: The names of the rows.
        columns: The names of the columns.
        label: The name of the values, with their unit.
        diverging: Whether 0 is the middle of the colours.
    """
    high = float(np.nanmax(np.abs(values))) if diverging else None
    # A cell's own colour around it closes the seams that browsers leave between cells.
    mesh = axes.pcolormesh(
        values, cmap=heat_map(diverging=diverging), vmin=None if high is None else -high, vmax=high,
        edgecolors="face", linewidth=0.8,
    )  # fmt: skip
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    axes.set_ylim(len(rows), 0)
    axes.set_xlim(0, len(columns))
    axes.grid(visible=False)
    bar = axes.figure.colorbar(mesh, ax=axes, label=label)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")


@contextlib.contextmanager
def quiet_matplotlib() -> Iterator[None]:
    """Silences the warning of matplotlib that it has no folder for its font cache, which matters to nobody here."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _matplotlib_style() -> Iterator[None]:
    """Sets the style, and nothing that a user's matplotlibrc says."""
    while _early:
        _early.pop().join()
    with quiet_matplotlib():
        _import_matplotlib()
        import matplotlib as mpl

        with mpl.rc_context():
            # The backend belongs to the program around this one, and figures need none.
            defaults = {name: mpl.rcParamsDefault[name] for name in mpl.rcParamsDefault if name != "backend"}
            settings: Any = defaults | _STYLE
            mpl.rcParams.update(settings)
            yield


@cache
def _import_matplotlib() -> None:
    """Imports matplotlib in two thirds of the time: without a search for garbage now, and none at the end of Python."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import matplotlib.figure  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
    atexit.register(gc.freeze)


def _page_svg(svg: str, label: str) -> Svg:
    """Returns matplotlib's SVG as an element of an HTML page: no names that another figure has, no fixed colours."""
    root = ElementTree.fromstring(svg)
    # Equal ids in two figures of a page would be one to the browser.
    prefix = f"f{xxhash.xxh3_64_hexdigest((label + svg).encode())[:8]}-"
    _remove(root, ("metadata", "style"))
    view_box, width = root.attrib["viewBox"], float(root.attrib["width"].removesuffix("pt")) / 72
    used = {name for element in root.iter() for pair in element.items() for name in _references(*pair)}
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = dict(element.attrib)
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({_local(name): _page_value(name, value, prefix) for name, value in attributes.items()})
        element.text = (element.text or "").strip() or None
        element.tail = None
    root.attrib.clear()
    root.attrib.update({"viewBox": view_box, "style": f"--inches: {width:g}", "role": "img", "aria-label": label})
    return Svg(ElementTree.tostring(root, encoding="unicode"))


def _remove(element: ElementTree.Element, tags: tuple[str, ...]) -> None:
    for child in list(element):
        if _local(child.tag) in tags:
            element.remove(child)
        else:
            _remove(child, tags)


def _local(name: str) -> str:
    """Returns a name without its namespace, which HTML knows by itself."""
    return name.rpartition("}")[2]


def _references(name: str, value: str) -> list[str]:
    """Returns the ids that an attribute refers to."""
    if _local(name) == "href":
        return [value.removeprefix("#")] if value.startswith("#") else []
    return _REFERENCE.findall(value)


def _page_value(name: str, value: str, prefix: str) -> str:
    """Returns the value of an attribute with the page's font, colours and ids."""
    name = _local(name)
    if name == "href":
        return re.sub("^#", f"#{prefix}", value)
    if name == "id":
        return prefix + value
    value = _REFERENCE.sub(lambda match: prefix + match[0], " ".join(value.split()))
    if name in ("d", "x", "y", "width", "height"):
        return _DECIMALS.sub(lambda match: f"{float(match[0]):.2f}", value)
    if name == "style":
        value = _FONT.sub(lambda match: f"font-weight: {match[1] or 'normal'}; font-size: {match[2]}", value)
        value = _FONT_FAMILY.sub("", value)
    if name in ("style", "fill", "stroke"):
        value = _COLOR.sub(lambda match: _page_color(match[0]), value)
    return value


def _page_color(color: str) -> str:
    return f"var(--{_ROLES[color]})" if color in _ROLES else color
