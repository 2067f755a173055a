"""Times the compiled FASTA parser and its digests against their twins in Python, and against other builds of it.

A build is the shared library of another commit (`protlm/data/parsing/_fasta_parser*.so`) under a name, which compares a
change of the C++ code with the code before. The text is in memory; all take turns within each repeat. Nothing is
reported unless every build and every twin first gives the digests of the installed one.
"""

import argparse
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import xxhash

from protlm.data import compiled
from protlm.data.parsing import compiled_fasta, fasta
from protlm.data.parsing.record_table import RecordTable, table_of
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.records import Record
from scripts.bench import harness
from scripts.bench.harness import Figure, ratio
from scripts.measuring import MEBIBYTE, SAMPLE, SECONDS, Times, take_turns, timed

INSTALLED, TWIN, PACKAGE = "installed", "twin in Python", "xxhash of Python"
PARSE, DIGEST = "parse", "digest"
DIGESTED_BYTES = 256 * MEBIBYTE
"""At least so many bytes are digested in one call that is timed."""


def load(path: Path) -> ctypes.CDLL:
    """Returns a build, its functions declared as those of the installed one."""
    if not path.is_file():
        sys.exit(f"error: --builds: no file {path}; nothing is timed")
    build = ctypes.CDLL(str(path))
    for name in ("protlm_measure_fasta", "protlm_parse_fasta"):
        declared = getattr(compiled.library(), name)
        getattr(build, name).restype, getattr(build, name).argtypes = declared.restype, declared.argtypes
    return build


def parse_by(build: ctypes.CDLL, text: bytes) -> RecordTable:
    """Returns the records that a build makes of a text."""

    def library() -> ctypes.CDLL:
        return build

    with mock.patch.object(compiled, "library", library):
        return compiled_fasta.parse_fasta(text)[0]


def parse_by_twin(text: bytes) -> RecordTable:
    """Returns the records that the parser in Python makes of a text."""
    repairs: Counter[str] = Counter()
    records = [record for record in fasta.parse_fasta("text", text, repairs) if isinstance(record, Record)]
    return table_of(records, repairs)


def digest_by(build: ctypes.CDLL, residues: np.ndarray) -> bytes:
    """Returns the digest that a build gives one long text, as the package xxhash writes it."""
    digest = np.empty(2, dtype=np.uint64)
    pointer, size = ctypes.c_void_p(residues.ctypes.data), ctypes.c_int64(len(residues))
    build.protlm_digest(pointer, size, ctypes.c_void_p(digest.ctypes.data))
    return digest.byteswap().tobytes()


def check_same(results: Mapping[str, Any], kind: str) -> None:
    """Ends the program unless all results are that of the installed build."""
    for name, result in results.items():
        if not np.array_equal(result, results[INSTALLED]):
            sys.exit(f"error: {name}: {kind}: other digests than those of the installed build; nothing is reported")


def measure(text: bytes, builds: Mapping[str, ctypes.CDLL], repeats: int) -> dict[str, Any]:
    """Returns the size of the text, and the times of parsing it and of digesting its residues as one."""
    table = parse_by(builds[INSTALLED], text)
    residues = np.ascontiguousarray(table.tokens)
    parse: dict[str, Callable[[], RecordTable]] = {
        **{name: partial(parse_by, build, text) for name, build in builds.items()},
        TWIN: partial(parse_by_twin, text),
    }
    digest: dict[str, Callable[[], bytes]] = {
        **{name: partial(digest_by, build, residues) for name, build in builds.items()},
        PACKAGE: lambda: xxhash.xxh3_128_digest(residues),
    }
    tables = {name: call() for name, call in parse.items()}
    check_same({name: other.digests for name, other in tables.items()}, "sequences")
    check_same({name: other.id_digests for name, other in tables.items()}, "ids")
    check_same({name: call() for name, call in digest.items()}, "one long text")
    times: dict[str, Times] = {PARSE: take_turns({name: partial(timed, call) for name, call in parse.items()}, repeats)}
    rounds = DIGESTED_BYTES // len(residues) + 1

    def digest_all(call: Callable[[], bytes]) -> None:
        for _ in range(rounds):
            call()

    calls = {name: partial(timed, partial(digest_all, call)) for name, call in digest.items()}
    times[DIGEST] = take_turns(calls, repeats)
    return {"records": len(table), "bytes": len(text), "digested_bytes": rounds * len(residues), "times": times}


def figures(measured: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields the ratios of the times of all others to that of the installed build."""
    for kind, action in ((PARSE, "parse the text"), (DIGEST, "xxh3-128 of all its residues as one text")):
        seconds = {name: times[SECONDS] for name, times in measured["times"][kind].items()}
        for peer in seconds:
            if peer != INSTALLED:
                yield ratio(f"{action}: {peer} / {INSTALLED}", "time", seconds[peer], seconds[INSTALLED])


def named_build(word: str) -> tuple[str, Path]:
    """Returns the name and the path of `NAME=FILE`."""
    name, _, path = word.partition("=")
    if not (name and path) or name in (INSTALLED, TWIN, PACKAGE):
        raise ValueError(word)
    return name, Path(path).resolve()


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--fasta", type=Path, default=SAMPLE, metavar="FASTA", help="the file to parse")
    parser.add_argument(
        "--builds", type=named_build, nargs="+", default=[], metavar="NAME=FILE", help="other builds of the library"
    )
    return harness.parse(parser, words, repeats=7, has_threads=False)


def main(words: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    if reason := compiled.why_not():
        sys.exit(f"error: the compiled FASTA parser: {reason}; nothing is timed")
    text = b"".join(SourceBlocks(str(arguments.fasta)))
    builds = {INSTALLED: compiled.library(), **{name: load(path) for name, path in arguments.builds}}
    measured = measure(text, builds, arguments.repeats)
    harness.Report(
        script="fasta.py", words=words, setup=f"{measured['records']:,} records, {len(text) / 1e6:,.1f} MB in memory",
        figures=list(figures(measured)), environment=harness.environment("xxhash"), measured=measured,
    ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
