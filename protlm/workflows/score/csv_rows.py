"""Rows of CSV files, the same bytes from every version of Python."""

import csv
import io
from collections.abc import Iterable


def csv_row(fields: Iterable[object]) -> str:
    """Returns a row, with the line end of Unix; a field that holds a line end of any kind stands in quotes."""
    text = io.StringIO(newline="")
    # Python quotes the characters of the terminator: without the first, a carriage return in a field would end the row.
    csv.writer(text, lineterminator="\r\n").writerow(fields)
    return text.getvalue().removesuffix("\r\n") + "\n"
