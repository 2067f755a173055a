"""Trains the models of the paper's table on Swiss-Prot, a file a run, and draws the tables of paper_table.md.

`run` makes the runs that are not there yet, each for so many minutes; a run that was stopped begins anew. `page` needs
their files alone.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protlm import files
from protlm.errors import ProtlmError
from scripts.paper.plan import TASKS, planned_runs, settings_of, sweep

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "paper_table.md"
RUNS = PAGE.with_suffix("") / "runs"
DATA = ROOT.parent / "shared" / "data" / "swissprot"
WORK = Path(tempfile.gettempdir()) / "protlm-paper-table"


def make_runs(arguments: argparse.Namespace) -> None:
    """Makes the runs that are asked for and not there, each in a process of its own, whose memory is measured."""
    names = [run.name for run in planned_runs()]
    for name in arguments.only or ():
        if name not in names:
            raise ProtlmError(f"--only: expected the name of a run, such as {names[0]}, got {name}")
    for name in names:
        if (arguments.only and name not in arguments.only) or (arguments.out / f"{name}.json").exists():
            continue
        words = ["--only", name, "--out", str(arguments.out), "--data", str(arguments.data), "--work",
                 str(arguments.work), "--minutes", str(arguments.minutes)]  # fmt: skip
        if arguments.steps is not None:
            words += ["--steps", str(arguments.steps)]
        if arguments.proteins is not None:
            words += ["--proteins", str(arguments.proteins)]
        status = subprocess.run([sys.executable, __file__, "one", *words], check=False).returncode
        if status:
            sys.exit(status)


def make_one(arguments: argparse.Namespace) -> None:
    """Makes one run."""
    # Lightning takes seconds to import: after all that can be wrong with the command line.
    from scripts.experiments.results import read_results
    from scripts.experiments.runs import write_result
    from scripts.paper.page import best_temperature
    from scripts.paper.proteins import NUM_SCORED, prepare_sets
    from scripts.paper.runs import perform

    (name,) = arguments.only
    run = next(run for run in planned_runs() if run.name == name)
    temperature = best_temperature(read_results(arguments.out))
    if run.kind == "exact" and run.temperature is None and temperature is None:
        listed = ", ".join(each.name for each in sweep())
        raise ProtlmError(f"{name}: its temperature follows from other runs; make these first: {listed}")
    sets = prepare_sets(arguments.data, arguments.work / "sets", num_scored=arguments.proteins or NUM_SCORED)
    steps = arguments.steps or TASKS[run.task].steps
    settings = settings_of(run, temperature)
    result = perform(run, settings, sets, arguments.work / name, arguments.minutes, steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_result(arguments.out / f"{name}.json", result)
    shutil.rmtree(arguments.work / name, ignore_errors=True)
    end = result["curve"][-1]
    print(
        f"{name:36} {result['training_seconds'] / 60:5.1f} min, {end['step']:6,} updates: {end['accuracy']:.3f}, "
        f"perplexity {end['perplexity']:.2f} on valid",
        flush=True,
    )


def make_page(arguments: argparse.Namespace) -> None:
    """Makes the tables and pictures of the page anew."""
    from scripts.experiments.results import read_results
    from scripts.paper.page import draw_pictures, with_tables

    results = read_results(arguments.out)
    if not results:
        raise ProtlmError(f"{arguments.out}: holds no runs; make some with `run`, or choose another --out")
    page: Path = arguments.page
    text = with_tables(page.read_text(encoding="utf-8"), results)
    for path in draw_pictures(results, page.with_suffix("")):
        print(path)
    files.write_each_whole(page.parent, {page.name: text})
    print(page)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are not there yet")
    one = commands.add_parser("one", help="make one run in this process")
    for command in (run, one):
        command.add_argument("--only", action="append", metavar="RUN", help="only this run (repeatable)")
        command.add_argument("--minutes", type=float, default=20, help="CPU minutes of training a run (%(default)s)")
        command.add_argument("--data", type=Path, default=DATA, help="folder of Swiss-Prot's splits (%(default)s)")
        command.add_argument("--work", type=Path, default=WORK, help="folder for datasets and runs (%(default)s)")
        command.add_argument("--steps", type=int, help="updates of the equal comparison in place of the plan's")
        command.add_argument("--proteins", type=int, help="proteins of each scored set in place of the plan's")
    page = commands.add_parser("page", help="draw the tables and figures from the files of the runs")
    page.add_argument("--page", type=Path, default=PAGE, help="page whose tables are replaced (default: %(default)s)")
    for command in (run, one, page):
        command.add_argument("--out", type=Path, default=RUNS, help="folder of the files (default: %(default)s)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the subcommand of the command line."""
    arguments = parse(words)
    try:
        {"run": make_runs, "one": make_one, "page": make_page}[arguments.command](arguments)
    except ProtlmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
