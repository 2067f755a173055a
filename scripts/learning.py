"""Trains every kind of attention on every task, a file a run, and draws the tables and figures of what_trains.md.

`run` makes the runs that are not there yet; a run that was stopped begins anew. `page` needs their files alone.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# One thread a run: the processor time of several also counts what they wait for each other. Waiting ones sleep.
os.environ.update(OMP_NUM_THREADS="1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from protlm.errors import ProtlmError
from scripts.experiments.plan import KINDS, VARIANTS, Result, Run, needed_by, planned_runs, settings_of
from scripts.experiments.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "docs" / "what_trains" / "runs"
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
        from scripts.experiments.runs import perform, read_result, remove_work, write_result
        from scripts.experiments.tasks import prepare_task

        if run.name in self.results:
            return
        for needed in needed_by(run):
            self.complete(needed)
        settings = list(settings_of(run, self.results))
        if self._arguments.steps is not None:
            settings[-1] = f"train.max_steps={self._arguments.steps}"
        path = self._arguments.out / f"{run.name}.json"
        result = read_result(path, settings)
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


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are not there yet")
    run.add_argument("--task", action="append", choices=TASKS, help="only these tasks (repeatable)")
    run.add_argument("--kind", action="append", choices=[*KINDS, *VARIANTS], help="only these kinds (repeatable)")
    run.add_argument("--seed", action="append", type=int, help="only these seeds (repeatable)")
    run.add_argument("--minutes", type=float, help="of processor time, after which no further run begins")
    run.add_argument("--steps", type=int, help="updates of every run, in place of those of the plan")
    run.add_argument("--proteins", type=int, help="most proteins of a split; default: all")
    run.add_argument("--out", type=Path, default=RUNS, help="folder of the files (default: %(default)s)")
    run.add_argument("--data", type=Path, default=DATA, help="folder of the proteins (default: %(default)s)")
    run.add_argument("--work", type=Path, default=WORK, help="folder for datasets and runs (default: %(default)s)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    arguments = parse(words)
    make_runs(arguments)


if __name__ == "__main__":
    main()
