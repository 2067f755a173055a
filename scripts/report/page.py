"""The report as a folder: how tables and the page are written."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass
class Section:
    """One claim, how it was tested, and the result.

    Attributes:
        title: Heading.
        text: Paragraphs: the claim with its source, and the test.
        criterion: What had to hold; None for a section that only reports.
        passed: Whether it did.
        tables: In markdown, each with a line that introduces it.
        plots: File names and captions.
        numbers: Everything measured, for results.json.
    """

    title: str
    text: list[str]
    criterion: str | None = None
    passed: bool | None = None
    tables: list[str] = field(default_factory=list)
    plots: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One word for the summary."""
        return "reported" if self.passed is None else "pass" if self.passed else "FAIL"


def filled(text: str, content: Callable[[str], str]) -> str:
    """Returns a page with what stands between its marks `<!-- table: NAME -->` and `<!-- end -->` made anew by name."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{content(match[2])}\n\n", text)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """Returns a markdown table; texts stand left, the rest right."""
    cells = [[str(row[i]).lstrip("+-") for row in rows] for i in range(len(columns))]
    rules = ["---:" if any(cell[:1].isdigit() for cell in column) else "---" for column in cells]
    lines = [columns, rules, *([str(cell) for cell in row] for row in rows)]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{caption}\n\n{drawn}" if caption else drawn


def write(folder: Path, sections: Sequence[Section], environment: Mapping[str, Any], command: str) -> None:
    """Writes README.md and results.json; the plots are there already."""
    (folder / "README.md").write_text(_page(sections, environment, command), encoding="utf-8")
    content = {
        "environment": environment,
        "command": command,
        "sections": [
            {"title": section.title, "criterion": section.criterion, "verdict": section.verdict, **section.numbers}
            for section in sections
        ],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _page(sections: Sequence[Section], environment: Mapping[str, Any], command: str) -> str:
    summary = table(
        ["", "claim", "verdict"],
        [(str(number), section.title, section.verdict) for number, section in enumerate(sections, start=1)],
    )
    blocks = [
        "# What FAVOR attention guarantees, measured",
        f"Made by `{command}`: {', '.join(f'{key} {value}' for key, value in environment.items())}. Every figure on "
        "this page comes from that run; all of them are in results.json.",
        "Throughout, d is head_dim, x = q/d^¼ and y = k/d^¼, so that exact attention has the weights SM = exp(x·y) = "
        "exp(q·k/√d) before it normalises them. FAVOR estimates SM by φ(q)·φ(k), with M rows of a random projection. "
        "Equations, lemmas and theorems are those of arXiv 2009.14794 unless another source is named. ± is one "
        "standard error; z is a distance from the expected value in standard errors.",
        "Unbiasedness and uniform convergence are claims about the weights before normalisation. The output of "
        "attention is a ratio of two unbiased estimates: it converges to the exact one, but is not unbiased.",
        summary,
    ]
    for number, section in enumerate(sections, start=1):
        blocks += [f"## {number}. {section.title}", *section.text]
        if section.criterion is not None:
            blocks.append(f"**{section.verdict}**: {section.criterion}")
        blocks += section.tables
        blocks += [f"![{caption}]({name})" for name, caption in section.plots]
        blocks += section.notes
    return "\n\n".join(blocks) + "\n"
