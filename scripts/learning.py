"""Trains every kind of attention on every task, a file a run, and draws the tables and figures of what_trains.md.

`run` makes the runs that are not there yet; a run that was stopped begins anew. `page` needs their files alone.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protlm import files
from protlm.errors import ProtlmError
from scripts.experiments.plan import KINDS, SEEDS, VARIANTS, Result, Run, needed_by, planned_runs, settings_of
from scripts.experiments.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "what_trains.md"
RUNS = PAGE.with_suffix("") / "runs"
DATA = ROOT.parent / "shared" / "data"
WORK = Path(tempfile.gettempdir()) / "protlm-learning"


class Runner:
    """Makes runs, each after those whose results it needs.

    Attributes:
        results: Results by the names of the runs: made, or found in the folder.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.results: dict[str, Result] = {}

    def complete(self, run: Run) -> None:
        """Makes a run, unless it was made before.

        Raises:
            ProtlmError: A file of another run in its place, data that is not there, a loss that is no number.
        """
        # Lightning takes seconds to import: after all that can be wrong with the command line.
        from scripts.experiments.runs import earlier_result, perform, remove_work, write_result
        from scripts.experiments.tasks import prepare_task

        if run.name in self.results:
            return
        for needed in needed_by(run):
            self.complete(needed)
        settings = settings_of(run, self.results, self._arguments.steps)
        path = self._arguments.out / f"{run.name}.json"
        result = earlier_result(path, settings)
        if result is None:
            began = time.process_time()
            work = self._arguments.work / run.name
            folder = self._arguments.work / "tasks" / run.task
            dataset = prepare_task(TASKS[run.task], self._arguments.data, folder, most=self._arguments.proteins)
            result = perform(run, settings, dataset, work)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_result(path, result)
            remove_work(work)
            print(summary(run, result, time.process_time() - began), flush=True)
        self.results[run.name] = result


def summary(run: Run, result: Result, seconds: float) -> str:
    """Returns a line about a run: the processor seconds of it all and of its training, and its scores."""
    scores = ", ".join(
        f"{name} {split['accuracy']:.3f} / {split['perplexity']:.2f}" for name, split in result["splits"].items()
    )
    return f"{run.name:30} {seconds:5.0f} s, training {result['training_seconds']:5.0f} s: {scores}"


def chosen(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yields the runs of the plan that the command line asks for, in their order."""
    for run in planned_runs():
        wanted = ((arguments.task, run.task), (arguments.kind, run.kind), (arguments.seed, run.seed))
        if all(not choices or value in choices for choices, value in wanted):
            yield run


def make_runs(arguments: argparse.Namespace) -> None:
    """Makes the runs that are asked for and not there, until the minutes are over."""
    runner, failed = Runner(arguments), []
    for run in chosen(arguments):
        if arguments.minutes is not None and time.process_time() >= 60 * arguments.minutes:
            print(f"{arguments.minutes:g} minutes are over; the same command goes on with {run.name}")
            break
        try:
            runner.complete(run)
        except ProtlmError as error:
            # The others may be well: one kind may have diverged.
            print(f"error: {run.name}: {error}", file=sys.stderr, flush=True)
            failed.append(run.name)
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}")


def make_page(arguments: argparse.Namespace) -> None:
    """Makes the tables and pictures of the page anew."""
    from scripts.experiments.curves import draw_pictures
    from scripts.experiments.results import read_results
    from scripts.experiments.tables import with_tables

    page: Path = arguments.page
    if not page.is_file():
        raise ProtlmError(f"{page}: no such page; give one that has the marks of tables with --page")
    results = read_results(arguments.runs)
    if not results:
        raise ProtlmError(f"{arguments.runs}: holds no runs; make some with `run`, or choose another --runs")
    pictures = page.with_suffix("")
    text = with_tables(page.read_text(encoding="utf-8"), results, pictures.name)
    pictures.mkdir(exist_ok=True)
    for path in draw_pictures(results, pictures):
        print(path)
    files.write_each_whole(page.parent, {page.name: text})
    print(page)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are not there yet")
    run.add_argument("--task", action="append", choices=TASKS, help="only these tasks (repeatable)")
    run.add_argument("--kind", action="append", choices=[*KINDS, *VARIANTS], help="only these kinds (repeatable)")
    run.add_argument("--seed", action="append", type=int, choices=SEEDS, help="only these seeds (repeatable)")
    run.add_argument("--minutes", type=float, help="of processor time, after which no further run begins")
    run.add_argument("--steps", type=int, help="updates of every run, in place of those of the plan")
    run.add_argument("--proteins", type=int, help="most proteins of a split; default: all")
    run.add_argument("--out", type=Path, default=RUNS, help="folder of the files (default: %(default)s)")
    run.add_argument("--data", type=Path, default=DATA, help="folder of the proteins (default: %(default)s)")
    run.add_argument("--work", type=Path, default=WORK, help="folder for datasets and runs (default: %(default)s)")
    page = commands.add_parser("page", help="draw the tables and figures from the files of the runs")
    page.add_argument("--runs", type=Path, default=RUNS, help="folder of the files (default: %(default)s)")
    page.add_argument(
        "--page", type=Path, default=PAGE,
        help="page whose tables are replaced; the figures go into the folder beside it (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    arguments = parse(words)
    try:
        make_runs(arguments) if arguments.command == "run" else make_page(arguments)
    except ProtlmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        # What is whole is written; the run that was at work begins anew.
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
