"""Files that MultiQC finds by itself: hides its custom-content form, in which every number needs a described column."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of MultiQC's general statistics.

    Attributes:
        key: Its name in the data; prefix it, because all tools of a MultiQC report share one table.
        title: Its short heading.
        description: What it is, shown at the heading; with its unit.
        format: The format of its numbers, in Python's form.
        suffix: The unit after each number.
        scale: The name of a ColorBrewer scale, whose dark end is the high end unless the name ends in `-rev`.
        low: The lower end of the bar behind the number; by default the smallest value.
        high: The upper end, by default the largest value.
        hidden: Whether the reader has to switch it on.
    """

    key: str
    title: str
    description: str
    format: str = "{:,.0f}"
    suffix: str = ""
    scale: str = "Blues"
    low: float | None = None
    high: float | None = None
    hidden: bool = False


def general_statistics(
    id_: str, name: str, description: str, columns: Sequence[Column], rows: Mapping[str, Mapping[str, float]]
) -> str:
    """Returns the content of a file `…_mqc.json` whose rows MultiQC puts into its general statistics.

    Files with the same `id_` are one set of columns, with the rows of all.

    Args:
        id_: The name of this kind of file, such as "protlm_prep".
        name: The tool that made it, shown with each column.
        description: What the numbers are.
        columns: The columns, in order.
        rows: By sample the value of each column; a missing one is shown as empty.

    Raises:
        ValueError: A row has a value without a column.
    """
    keys = {column.key for column in columns}
    for sample, values in rows.items():
        if not values.keys() <= keys:
            raise ValueError(f"{sample}: expected the columns {sorted(keys)}, got {sorted(values)}")
    content = {
        "id": id_,
        "section_name": name,
        "description": description,
        "plot_type": "generalstats",
        "pconfig": [{column.key: _column(column, name)} for column in columns],
        "data": rows,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _column(column: Column, name: str) -> dict[str, object]:
    settings = {
        "title": column.title,
        "description": column.description,
        "namespace": name,
        "format": column.format,
        "suffix": column.suffix,
        "scale": column.scale,
        "min": column.low,
        "max": column.high,
        "hidden": column.hidden,
    }
    return {key: value for key, value in settings.items() if value is not None and value != ""}
