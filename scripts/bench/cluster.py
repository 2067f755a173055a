"""Times `protlm prep` on one local worker, on two, and on two workers of a Dask cluster on the same machine.

The cluster is there already, as it would be; everything else is a command of its own, start included. The commands take
turns within each repeat, and nothing is reported unless all made the same bytes.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from protlm.data.storage.dataset import open_dataset
from scripts.bench import harness
from scripts.bench.harness import median, ratio
from scripts.bench.prep import prep, run, write_fasta
from scripts.measuring import SECONDS, take_turns

ONE, TWO, DASK = "1 worker", "2 workers", "2 workers of Dask"
NUM_WORKERS = 2
_START_SECONDS = 60


@contextlib.contextmanager
def dask_cluster(folder: Path) -> Iterator[Path]:
    """Yields the scheduler file of a cluster of two worker processes of one thread each."""
    scheduler_file = folder / "scheduler.json"
    program, place = [sys.executable, "-m", "dask"], ["--no-dashboard", "--scheduler-file", str(scheduler_file)]
    with contextlib.ExitStack() as stack:
        processes = []
        commands = [
            [*program, "scheduler", "--port", "0", *place],
            [*program, "worker", *place, "--nworkers", str(NUM_WORKERS), "--nthreads", "1"],
        ]
        for command in commands:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            processes.append(stack.enter_context(process))
            end = time.monotonic() + _START_SECONDS
            while not scheduler_file.exists():
                if time.monotonic() > end:
                    sys.exit("the scheduler of Dask did not start")
                time.sleep(0.1)
        try:
            from distributed import Client

            with Client(scheduler_file=str(scheduler_file), set_as_default=False) as client:
                client.wait_for_workers(NUM_WORKERS, timeout=_START_SECONDS)
            yield scheduler_file
        finally:
            for process in reversed(processes):
                process.terminate()


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=1200, help="size of all files together")
    parser.add_argument("--files", type=int, default=8, help="number of files")
    parser.add_argument("--folder", type=Path, help="folder of the files; by default the system's place")
    return harness.parse(parser, words, has_threads=False)


def main(words: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, dask_cluster(Path(name)) as scheduler_file:
        folder = Path(name)
        paths = [folder / f"{number}.fasta" for number in range(arguments.files)]
        num_records = sum(
            write_fasta(path, arguments.megabytes * 1_000_000 // arguments.files, seed=seed)
            for seed, path in enumerate(paths)
        )
        outs = {kind: folder / f"out-{number}" for number, kind in enumerate((ONE, TWO, DASK))}
        options = {ONE: [], TWO: ["--workers", str(NUM_WORKERS)], DASK: ["--scheduler-file", str(scheduler_file)]}
        commands = {kind: [*prep(paths[0], out), *paths[1:], *options[kind]] for kind, out in outs.items()}
        calls = {kind: partial(run, command) for kind, command in commands.items()}
        times = take_turns(calls, arguments.repeats)
        if len({open_dataset(out).hash for out in outs.values()}) != 1:
            sys.exit("the datasets differ; nothing is reported")
    seconds = {kind: values[SECONDS] for kind, values in times.items()}
    figures = [median("time", kind, values, " s") for kind, values in seconds.items()]
    figures += [ratio(f"{ONE} / {TWO}", "whole commands", seconds[ONE], seconds[TWO]),
                ratio(f"{DASK} / {TWO}", "whole commands", seconds[DASK], seconds[TWO])]  # fmt: skip
    harness.Report(
        script="cluster.py", words=words,
        setup=f"{num_records:,} records, {arguments.megabytes:,} MB in {arguments.files} files",
        figures=figures, measured={"records": num_records, "commands": times},
        environment=harness.environment("distributed", "h5py", "xxhash"),
    ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
