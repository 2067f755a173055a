"""How a command speaks: results on stdout as a table or as JSON, warnings on stderr."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_json(report: Any) -> None:
    """Prints a report dataclass as one JSON object on stdout."""
    print(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    """Returns what JSON has for a value that a report may hold."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump()
    raise TypeError(f"a report holds {type(value).__name__}, which JSON does not know")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints an aligned table on stdout: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *others)).rstrip())


def warn(message: str) -> None:
    """Prints one warning line on stderr."""
    print(f"warning: {message}", file=sys.stderr)
