"""How a command speaks: results on stdout as pairs, as a table or as JSON, warnings on stderr."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from protlm.cli.terminal import json_text, on_one_line
from protlm.errors import ProtlmError

_MIN_NAME_WIDTH = 10
"""Pairs of names as short as most are aligned alike in all commands."""


_DISK_NAME = "disk bytes while at work, about"
_ESTIMATE_WIDTH = len(_DISK_NAME)
"""The longest name in an estimate, so that the pairs of both its parts are aligned."""


def print_json(report: Any) -> None:
    """Prints a report, a dataclass or a dictionary, as one JSON object on stdout."""
    content = dataclasses.asdict(report) if dataclasses.is_dataclass(report) else report  # type: ignore[arg-type]
    print(json_text(content, _plain))


def _plain(value: Any) -> Any:
    """Returns the JSON form of a value that JSON does not know."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(by_alias=True)
    raise TypeError(f"a report holds {type(value).__name__}, which JSON does not know")


def print_pairs(pairs: Iterable[tuple[str, object]], *, width: int = _MIN_NAME_WIDTH) -> None:
    """Prints lines `name  value` on stdout, the values aligned, behind names of at least a width."""
    pairs = [(on_one_line(name), on_one_line(value)) for name, value in pairs]
    width = max([width, *(len(name) for name, _ in pairs)])
    for name, value in pairs:
        print(f"{name.ljust(width)}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints an aligned table on stdout: the first column to the left, the others to the right."""
    cells = [[on_one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *others)).rstrip())


def print_scores(split: str, *, model: tuple[float, float], baseline: tuple[float, float]) -> None:
    """Prints (accuracy, perplexity) of a model and of the empirical baseline on a split."""
    rows = [
        (name, f"{accuracy:.4f}", f"{perplexity:.3f}")
        for name, (accuracy, perplexity) in (("model", model), ("empirical baseline", baseline))
    ]
    print_table((f"{split} split", "accuracy", "perplexity"), rows)


def print_counts(pairs: Iterable[tuple[str, object]], *, as_json: bool) -> None:
    """Prints the counts of a dry run as soon as they are known; JSON is printed once, at the end."""
    if as_json:
        return
    print("dry run")
    print_pairs(pairs, width=_ESTIMATE_WIDTH)
    sys.stdout.flush()


def print_time_and_disk(estimate: Any, rate: tuple[str, object], *, as_json: bool) -> None:
    """Prints the rest of the estimate of a dry run, below its counts.

    Args:
        estimate: Has `out_bytes`, `peak_bytes`, `free_bytes` and `seconds`.
        rate: The pace, as a pair.
        as_json: Whether to print the whole estimate as JSON.

    Raises:
        ProtlmError: As `print_estimate`.
    """
    pairs = [
        ("output bytes, about", f"{estimate.out_bytes:,}"),
        (_DISK_NAME, f"{estimate.peak_bytes:,}"),
        ("free disk bytes", f"{estimate.free_bytes:,}"),
        rate,
        ("seconds, about", f"{estimate.seconds:,.0f}"),
    ]
    print_estimate(estimate, pairs, as_json=as_json, title=None)


def print_estimate(
    estimate: Any, pairs: Iterable[tuple[str, object]], *, as_json: bool, title: str | None = "dry run"
) -> None:
    """Prints the estimate of a dry run, as JSON or as pairs below a title.

    Raises:
        ProtlmError: The estimated `peak_bytes` are more than the `free_bytes` of the disk.
    """
    if as_json:
        print_json(estimate)
    else:
        if title is not None:
            print(title)
        print_pairs(pairs)
    if estimate.peak_bytes > estimate.free_bytes:
        raise ProtlmError(f"not enough disk: about {estimate.peak_bytes:,} bytes wanted, {estimate.free_bytes:,} free")


def warn_if_kept(work_folder: Path) -> None:
    """Prints, where an interrupted command left its work folder, that `--resume` continues from it."""
    if work_folder.is_dir():
        warn(f"what is finished is kept in {work_folder}; go on with the same command and --resume")


def tell(line: str) -> None:
    """Prints a line on stderr that is neither a result nor a warning."""
    print(on_one_line(line), file=sys.stderr)


def warn(message: str) -> None:
    """Prints one warning line on stderr."""
    print(f"warning: {on_one_line(message)}", file=sys.stderr)
