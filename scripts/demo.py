"""Runs the real commands on one FASTA file: prep, train, eval, embed; this is `make demo`.

It ends with a table of the model beside the empirical baseline, and with status 1 if the model does not win both.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

DEMO_STEPS = 500
"""Enough to see the model learn in a few minutes; the tiny configuration itself trains longer."""


def run_command(*words: str | Path | int) -> None:
    """Shows a protlm command and runs it in a process of its own; a failure ends the demo with the same status."""
    arguments = [str(word) for word in words]
    print(f"\n$ protlm {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "protlm.cli.app", *arguments])
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            # The command got the same Ctrl-C, and may need a moment to leave a checkpoint.
            continue
    if status:
        sys.exit(status if status > 0 else 128 - status)


def run_commands(fasta: Path, out: Path, max_steps: int) -> dict[str, Any]:
    """Runs the four commands, replacing what an earlier demo left in `out`, and returns the content of report.json."""
    dataset, run, report, embeddings = out / "dataset", out / "run", out / "report", out / "embeddings.h5"
    run_command("prep", fasta, "--out", dataset, "--valid-fraction", "0.1", "--test-fraction", "0.1", "--force")
    run_command("train", dataset, "--out", run, "--config", "tiny", "--max-steps", max_steps, "--force")
    run_command("eval", run, dataset, "--split", "test", "--out", report, "--force")
    run_command("embed", run, fasta, "--out", embeddings, "--include", "mean", "--force")
    content: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return content


def print_summary(report: dict[str, Any], out: Path) -> None:
    """Prints the table and the paths of all results."""
    print(f"\n{'':20}  accuracy  perplexity   ({report['num_targets']:,} masked residues of the test split)")
    for name, key in (("model", "model"), ("empirical baseline", "empirical")):
        print(f"{name:20}  {report[key]['accuracy']:8.4f}  {report[key]['perplexity']:10.3f}")
    print(f"\nloss curve  {out / 'run' / 'curves.png'}")
    print(f"embeddings  {out / 'embeddings.h5'}")
    print(f"model       {out / 'run' / 'model'}")
    print(f"report      {out / 'report' / 'report.json'}", flush=True)


def lost_measures(report: dict[str, Any]) -> list[str]:
    """Returns the measures in which the model is not better than the empirical baseline; NaN is not better."""
    model, empirical = report["model"], report["empirical"]
    lost = [] if model["accuracy"] > empirical["accuracy"] else ["accuracy"]
    # JSON as Python writes it may hold NaN and Infinity.
    wins_perplexity = math.isfinite(model["perplexity"]) and model["perplexity"] < empirical["perplexity"]
    return lost if wins_perplexity else [*lost, "perplexity"]


def main() -> None:
    """Runs the demo that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="proteins, FASTA, plain or .gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that the demo makes")
    parser.add_argument("--max-steps", type=int, default=DEMO_STEPS, help="optimizer updates")
    arguments = parser.parse_args()
    report = run_commands(arguments.fasta, arguments.out, arguments.max_steps)
    print_summary(report, arguments.out)
    if lost := lost_measures(report):
        sys.exit(f"error: the model does not beat the empirical baseline in {' and '.join(lost)}")


if __name__ == "__main__":
    main()
