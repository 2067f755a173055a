"""Time grows with the text, whatever it holds: the regular expressions and loops of every parser, counted in steps."""

import re
import sys
from types import ModuleType

import pytest

from protlm.data import numbered_ids
from protlm.data.labels import rows
from protlm.data.parsing import compression, fasta, flatfile, judging, marks, reader, sources, xml_text
from tests.unit.data.parsing.entry_cases import ENTRY, parse
from tests.unit.data.parsing.regex_steps import Steps, TooManyStepsError

MODULES = (fasta, flatfile, judging, marks, reader, sources, xml_text, rows, numbered_ids)
SIZES = (60, 240)
MOST_GROWTH = 5.0
"""Four times the text: about four times the steps are linear, sixteen times quadratic."""


def patterns_of(module: ModuleType) -> dict[str, re.Pattern]:
    found = {
        f"{module.__name__}.{name}": value for name, value in vars(module).items() if isinstance(value, re.Pattern)
    }
    if module is sources:
        found |= {f"magic of {kind.name}": kind.magic for kind in compression.COMPRESSIONS}
        found |= {f"unreadable {number}": magic for number, (magic, _) in enumerate(sources._UNREADABLE_KINDS)}
    return found


PATTERNS = {name: pattern for module in MODULES for name, pattern in patterns_of(module).items()}
# What the code asks of each pattern; all others are searched for.
MATCHED = (
    "_FASTA_START",
    "_PROLOG_NODE",
    "_ROOT",
    "_ENCODING",
    "_ABOVE_ROWS",
    "_MARKUP",
    "_PIR_ID",
    "magic",
    "unreadable",
)
FULLY_MATCHED = (
    "_NUMBER",
    "_WORD",
    "_PROPER_NAME",
    "_TITLE",
    "_ALL_OF_A_SEQUENCE",
    "_FASTA_NAME",
    "_TAXON_ID",
    "_CD_HIT_MEMBER",
    "_NUMBERED_ID",
)
# What may stand once before the rest of an attack.
OPENINGS = {"_ENCODING": "<?xml ", "_CD_HIT_MEMBER": "0\t0aa, >", "_ROOT": "<!DOCTYPE"}


def pieces_of(pattern: re.Pattern) -> list[str]:
    """Returns what attacks on a pattern are put together from: its own words, and the letters that it treats apart."""
    text = pattern.pattern.decode("latin-1") if isinstance(pattern.pattern, bytes) else pattern.pattern
    words = re.findall(r"[A-Za-z0-9_<!?:=;#>{}./ -]+", re.sub(r"\\[swbdSx]|\(\?[:!]", "|", text).replace("\\", ""))
    single = [letter for letter in ' \na1#><;={}\t"' if letter in " \na" or letter in text]
    return list(dict.fromkeys([word for word in words if len(word) > 1] + single))


def attacks(name: str, pattern: re.Pattern, size: int) -> list[str]:
    openings = {"", OPENINGS.get(name.rpartition(".")[2], "")}
    pieces = pieces_of(pattern)
    units = pieces + [
        first + second for first in pieces for second in pieces if first != second and len(first + second) > 2
    ]
    return [opening + (unit * (size // len(unit) + 1))[:size] + "~" for opening in sorted(openings) for unit in units]


def steps_of(name: str, pattern: re.Pattern, text: str) -> int:
    steps = Steps(pattern, limit=30_000)
    content = text.encode() if isinstance(pattern.pattern, bytes) else text
    how = "match" if any(word in name for word in MATCHED) else "search"
    if any(name.endswith(word) for word in FULLY_MATCHED):
        how = "fullmatch"
    try:
        getattr(steps, how)(content)
    except TooManyStepsError:
        return 1 << 40
    return steps.count


def growth(name: str, pattern: re.Pattern) -> tuple[float, str]:
    """Returns by how much the steps grow for the worst attack, and that attack."""
    pairs = zip(*(attacks(name, pattern, size) for size in SIZES), strict=True)
    return max(
        (steps_of(name, pattern, large) / max(steps_of(name, pattern, small), SIZES[0]), large[:80])
        for small, large in pairs
    )


@pytest.mark.parametrize("name", PATTERNS)
def test_the_steps_of_every_pattern_grow_with_the_text(name):
    assert growth(name, PATTERNS[name]) < (MOST_GROWTH, "")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:RecName|SubName): Full=(.*?)(?: \{[^{}]*\})?;",
        r"Flags: [^=]*?\b(Fragments?);",
        r"""<\?xml\s[^>]*?\bencoding\s*=\s*["']([^"']*)["']""",
        r"\s+$",
    ],
)
def test_quadratic_patterns_are_seen(pattern):
    assert growth("searched for", re.compile(pattern)) >= (MOST_GROWTH, "")


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "text",
    ["", "a", "AC   P1;", "Fragment;", " n=12 ", "id#2", "0\t9aa, >a... *", "<?xml encoding='a'?>", "\n</uniprot >"],
)
def test_the_counting_matcher_decides_as_re_does(name, text):
    pattern = PATTERNS[name]
    content = text.encode() if isinstance(pattern.pattern, bytes) else text
    for how in ("search", "match", "fullmatch"):
        assert getattr(Steps(pattern, 10**6), how)(content) == bool(getattr(pattern, how)(content)), how


LINES = ("DE   RecName: Full=a", "DE   Flags: b", "DE   Full={ {", "OS   Homo", "DR   Pfam; PF1; x; 1.", "RC\tTISSUE=a",
         "GN\tName=a", "OG\tPlasmid", "RT\ta", "OX   NCBI_TaxID=1")  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_the_lines_that_an_entry_makes_python_run_grow_with_the_entry(line):
    counts = []
    for size in (100, 400):
        text = ENTRY.replace("OS   Homo", "RN   [1]\n" + (line + "\n") * size + "OS   Homo")
        counts.append(_python_lines(lambda text=text: parse("flatfile", text)))
    assert counts[1] < MOST_GROWTH * counts[0]


@pytest.mark.parametrize("line", ["RC\tTISSUE=a", "GN\tName=a", "OG\tPlasmid", "RT\ta", "FT\tCHAIN", "CCx", "KWords"])
def test_biopython_never_sees_the_lines_that_it_joins_in_quadratic_time(line, monkeypatch):
    from Bio import SwissProt

    seen, read = [], SwissProt.read
    monkeypatch.setattr(SwissProt, "read", lambda handle: (seen.append(handle.getvalue()), read(handle))[1])
    record, _ = parse("flatfile", ENTRY.replace("OS   Homo", f"{line}\n" * 3 + "OS   Homo"))
    assert record.sequence == "MVLSPADKTNVKAA"
    assert line not in seen[0]


def _python_lines(function) -> int:
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count
