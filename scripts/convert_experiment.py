"""Swaps the attention of pretrained models, lets them recover in several ways, and draws the figures of convert.md.

`run` makes the runs that are not there yet, a file each; `long` measures long proteins and the cost of a pass; `page`
needs their files alone. The real models and sequences
are no part of the project: docs/convert.md says where they come from.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protlm import files
from protlm.errors import ProtlmError
from scripts.conversion.plan import ARMS, SEEDS, SUBJECTS, planned_runs

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "convert.md"
RUNS = PAGE.with_suffix("") / "runs"
LONG = PAGE.with_suffix("") / "long.json"
DATA = ROOT.parent / "shared" / "data"
WORK = Path(tempfile.gettempdir()) / "protlm-conversion"


def make_runs(arguments: argparse.Namespace) -> None:
    """Makes the runs that are asked for and not there."""
    # Lightning takes seconds to import: after all that can be wrong with the command line.
    from scripts.conversion.runs import perform, prepare, write_result

    for run in planned_runs():
        wanted = ((arguments.subject, run.subject), (arguments.arm, run.arm), (arguments.seed, run.seed))
        path = arguments.out / f"{run.name}.json"
        if path.exists() or not all(not choices or value in choices for choices, value in wanted):
            continue
        subject = prepare(run.subject, arguments, arguments.work / run.subject)
        result = perform(run, subject, arguments.work / run.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, result)
        last = result["curve"][-1]
        print(f"{run.name:40} {result['seconds']:5.0f} s: {last['accuracy']:.3f} of {result['exact']['accuracy']:.3f}")


def measure(arguments: argparse.Namespace) -> None:
    """Measures long proteins and the cost of a pass; for the latter the machine should be idle."""
    from scripts.conversion.long_proteins import measure_long, write_long
    from scripts.conversion.runs import prepare

    prepared = prepare("rotary", arguments, arguments.work / "rotary")
    write_long(arguments.long, measure_long(prepared, arguments.data, arguments.work))
    print(arguments.long)


def make_page(arguments: argparse.Namespace) -> None:
    """Makes the tables and pictures of the page anew."""
    from scripts.conversion.page import draw_pictures, read_long, read_results, with_tables

    page: Path = arguments.page
    results, long = read_results(arguments.runs), read_long(arguments.long)
    if not results:
        raise ProtlmError(f"{arguments.runs}: holds no runs; make some with `run`, or choose another --runs")
    pictures = page.with_suffix("")
    text = with_tables(page.read_text(encoding="utf-8"), results, long)
    for path in draw_pictures(results, pictures):
        print(path)
    files.write_each_whole(page.parent, {page.name: text})
    print(page)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are not there yet")
    run.add_argument("--subject", action="append", choices=SUBJECTS, help="only these models (repeatable)")
    run.add_argument("--arm", action="append", choices=ARMS, help="only these ways to recover (repeatable)")
    run.add_argument("--seed", action="append", type=int, choices=SEEDS, help="only these seeds (repeatable)")
    run.add_argument("--out", type=Path, default=RUNS, help="folder of the files (default: %(default)s)")
    long = commands.add_parser("long", help="measure long proteins and the cost of a pass, on an idle machine")
    for command in (run, long):
        command.add_argument("--airr", type=Path, help="example_airr.tsv.gz of the R package alakazam: VH sequences")
        command.add_argument("--antiberty", type=Path, help="wheel of antiberty 0.1.3 from PyPI, which holds the model")
        command.add_argument("--data", type=Path, default=DATA, help="folder of models and proteins (%(default)s)")
        command.add_argument("--work", type=Path, default=WORK, help="folder for datasets and runs (%(default)s)")
    page = commands.add_parser("page", help="draw the tables and figures from the files of the runs")
    page.add_argument("--runs", type=Path, default=RUNS, help="folder of the files (default: %(default)s)")
    page.add_argument("--page", type=Path, default=PAGE, help="page whose tables are replaced (default: %(default)s)")
    for command in (long, page):
        command.add_argument("--long", type=Path, default=LONG, help="file of these (default: %(default)s)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    arguments = parse(words)
    try:
        {"run": make_runs, "long": measure, "page": make_page}[arguments.command](arguments)
    except ProtlmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
