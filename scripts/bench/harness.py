"""The frame of every benchmark: the options, figures, table, JSON and rows of RESULTS.md that all of them share.

A figure is a median with the range of the single repeats, mostly a ratio against a named peer. No torch is imported
before the report: a benchmark that starts commands passes its own peak of memory on to them.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NEEDS_LINUX = "it needs a system with /proc/self/clear_refs"
REPORT_REPEATS = 5
"""The fewest repeats of a row in RESULTS.md."""
_MEASURED_VARIABLES = ("OMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD")
"""Beginnings of the environment variables that change figures."""
_DIGITS = {"%": 1, " MiB": 0, " MB": 0, " MB/s": 0, " records/s": 0}
"""Digits after the point by unit, where not two."""


@dataclass(frozen=True)
class Figure:
    """One number and the range of the repeats.

    Attributes:
        measured: The quantity, or the two sides of a ratio.
        where: A length, a pass, the proteins.
        value: The figure from the medians of all repeats.
        low: The smallest of the figures that single repeats give.
        high: The largest.
        unit: Follows the value.
        note: The medians behind a ratio, and how they were measured.
    """

    measured: str
    where: str
    value: float
    low: float
    high: float
    unit: str
    note: str

    @property
    def text(self) -> str:
        """The value with its range."""
        digits = _DIGITS.get(self.unit, 2)
        spread = f" ({self.low:,.{digits}f}–{self.high:,.{digits}f})" if self.low < self.high else ""
        return f"{self.value:,.{digits}f}{self.unit}{spread}"


def median(measured: str, where: str, values: Sequence[float], unit: str, note: str = "") -> Figure:
    """Returns the median of the repeats."""
    return Figure(measured, where, statistics.median(values), min(values), max(values), unit, note)


def ratio(
    measured: str, where: str, above: Sequence[float], below: Sequence[float], *, factor: float = 1.0, unit: str = "×",
    note: str | None = None,
) -> Figure:  # fmt: skip
    """Returns factor · above / below, of medians; without a note, the medians as milliseconds are the note."""
    medians = statistics.median(above), statistics.median(below)
    of_repeats = [factor * a / b for a, b in zip(above, below, strict=True)]
    if note is None:
        note = f"medians {medians[0] * 1e3:.4g} and {medians[1] * 1e3:.4g} ms"
    return Figure(measured, where, factor * medians[0] / medians[1], min(of_repeats), max(of_repeats), unit, note)


def ratio_of_rates(
    where: str, ours: str, peer: str, seconds: Mapping[str, Sequence[float]], amount: float, unit: str, suffix: str = ""
) -> Figure:
    """Returns how many times the rate of a peer ours is, from the seconds in which each does the same amount."""
    rates = [amount / statistics.median(seconds[name]) for name in (ours, peer)]
    note = f"{rates[0]:,.0f} and {rates[1]:,.0f} {unit}"
    return ratio(f"{unit} of {ours} / {peer}{suffix}", where, seconds[peer], seconds[ours], note=note)


def new_parser(description: str | None, measurements: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Returns a parser that has the choice of measurements; a benchmark with only one has no choice."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if names := list(measurements):
        parser.add_argument("--only", choices=names, nargs="+", default=names, help="measurements; by default all")
    return parser


def parse(
    parser: argparse.ArgumentParser, words: Sequence[str], *, repeats: int = REPORT_REPEATS, has_threads: bool = True
) -> argparse.Namespace:
    """Returns the options, with those that all benchmarks share; ends the program where these contradict each other."""
    parser.add_argument("--repeats", type=int, default=repeats, help=f"at least {REPORT_REPEATS} for --rows")
    if has_threads:
        parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", action="store_true", help="also print rows for RESULTS.md")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="also write JSON; without FILE print nothing else"
    )
    arguments = parser.parse_args(words)
    if arguments.repeats < 1 or (arguments.rows and arguments.repeats < REPORT_REPEATS):
        parser.error(f"--repeats: expected at least 1, and {REPORT_REPEATS} with --rows, got {arguments.repeats}")
    if arguments.rows and arguments.json == "-":
        parser.error("--rows and --json without FILE both print: give --json a file")
    return arguments


def possible(measurements: Iterable[str], obstacles: Callable[[str], Iterable[str]]) -> list[str]:
    """Returns the measurements that can be made here; the others are listed on standard error with a reason.

    Args:
        measurements: Names.
        obstacles: Returns the reasons why a measurement cannot be made; empty ones do not count.
    """
    remaining = []
    for name in measurements:
        if reason := next(filter(None, obstacles(name)), ""):
            print(f"{name}: cannot be measured here: {reason}", file=sys.stderr)
        else:
            remaining.append(name)
    return remaining


def environment(*packages: str) -> dict[str, Any]:
    """Returns the machine, the variables that are set, and the versions that figures depend on."""
    from scripts.environment import environment as machine_and_versions

    names = sorted(name for name in os.environ if name.startswith(_MEASURED_VARIABLES))
    variables = " ".join(f"{name}={os.environ[name]}" for name in names)
    return machine_and_versions() | {"variables": variables} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one run.

    Attributes:
        script: File name of the benchmark in this folder.
        words: Its command line.
        setup: The settings that all figures share, as text.
        environment: Machine, versions and variables; the items of a mapping in it are printed as lines of their own.
        figures: The figures.
        measured: The values behind the figures, for the JSON.
        facts: More for the JSON, by key.
        remarks: Lines to print before the figures.
    """

    script: str
    words: Sequence[str]
    setup: str
    environment: Mapping[str, Any]
    figures: Sequence[Figure]
    measured: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @property
    def command(self) -> str:
        """The command, to be typed at the root of the repository."""
        return shlex.join(["python", f"scripts/bench/{self.script}", *self.words])

    def publish(self, arguments: argparse.Namespace) -> None:
        """Prints and writes the report as the options ask."""
        if arguments.json:
            text = json.dumps(self._content(arguments.repeats), indent=1) + "\n"
            if arguments.json == "-":
                print(text, end="")
                return
            Path(arguments.json).write_text(text, encoding="utf-8")
        print(*self._table(arguments.repeats), sep="\n")
        if arguments.rows:
            print(*self._rows(arguments.repeats), sep="\n")

    def _content(self, repeats: int) -> dict[str, Any]:
        return {
            "environment": self.environment, "command": self.command, "setup": self.setup, "repeats": repeats,
            **self.facts, "figures": [asdict(figure) for figure in self.figures], "measured": self.measured,
        }  # fmt: skip

    def _table(self, repeats: int) -> Iterable[str]:
        single = {key: value for key, value in self.environment.items() if not isinstance(value, Mapping)}
        yield ", ".join(f"{key} {value}" for key, value in single.items() if value)
        for key in self.environment.keys() - single.keys():
            yield from (f"{key}, {name}: {line}" for name, line in self.environment[key].items())
        yield from self.remarks
        yield f"{self.setup}, {repeats} repeats: figure of medians (range of single repeats), medians"
        where, text = (
            max((len(getattr(figure, of)) for figure in self.figures), default=0) for of in ("where", "text")
        )
        for measured, figures in self._by_measurement():
            yield measured
            for figure in figures:
                yield f"  {figure.where:{where}}  {figure.text:{text}}  {figure.note}".rstrip()

    def _rows(self, repeats: int) -> Iterable[str]:
        """Yields a row of RESULTS.md for each thing measured."""
        machine = "{machine} ({processor}), {threads} threads, torch {torch}".format_map(self.environment)
        if self.environment["variables"]:
            machine += f", `{self.environment['variables']}`"
        start = [datetime.date.today().isoformat(), self.environment["commit"], machine, f"`{self.command}`"]
        for measured, figures in self._by_measurement():
            how = f"; {repeats} repeats" if any(figure.low < figure.high for figure in figures) else ""
            result = "; ".join(f"{figure.where}: {figure.text}" for figure in figures)
            notes = "; ".join(figure.note for figure in figures if figure.note)
            yield f"| {' | '.join([*start, f'{measured}, {self.setup}{how}', result, notes])} |"
            start[2:] = "as above", "as above"

    def _by_measurement(self) -> Iterable[tuple[str, list[Figure]]]:
        for measured in dict.fromkeys(figure.measured for figure in self.figures):
            yield measured, [figure for figure in self.figures if figure.measured == measured]
