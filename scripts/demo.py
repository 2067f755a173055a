"""The whole road by the real commands: prep, train, eval, embed, on the families in `data/` or on a file of yours.

`make demo` runs it. It ends with the table of eval, and with status 1 if the model does not beat every baseline on the
test split.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

DEMO_STEPS = 800
"""Enough to see the model learn in a few minutes; the tiny configuration itself trains longer."""
SHOWN_PROTEIN = "P05514"
"""The scored protein of the families whose attention is shown: HU of Anabaena, a histone-like protein of bacteria."""
FAMILIES = Path(__file__).parents[1] / "data" / "families"


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


def run_road(fasta: Path | None, out: Path, max_steps: int) -> dict[str, Any]:
    """Runs the four commands, replacing what an earlier demo left in `out`, and returns the content of report.json.

    Args:
        fasta: Proteins, which are split at random; None: the families, whose splits are ready-made.
        out: Folder for everything.
        max_steps: Optimizer updates.
    """
    dataset, run, report, embeddings = out / "dataset", out / "run", out / "report", out / "embeddings.h5"
    if fasta is None:
        made = [
            word for name in ("valid", "test", "ood") for word in (f"--{name}-input", FAMILIES / f"{name}.fasta.gz")
        ]
        proteins, options, splits = FAMILIES / "train.fasta.gz", made, ("test", "ood")
        options += ["--families", FAMILIES / "families.tsv"]
        shown = ["--attention", SHOWN_PROTEIN]
    else:
        proteins, options, splits = fasta, ["--valid-fraction", "0.1", "--test-fraction", "0.1"], ("test",)
        shown = []
    run_command("prep", proteins, *options, "--out", dataset, "--force")
    run_command("train", dataset, "--out", run, "--config", "tiny", "--max-steps", max_steps, "--force")
    scored = [word for name in splits for word in ("--split", name)]
    run_command("eval", run, dataset, *scored, *shown, "--out", report, "--force")
    run_command("embed", run, proteins, "--out", embeddings, "--include", "mean", "--force")
    content: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return content


def print_summary(report: dict[str, Any], out: Path) -> None:
    """Prints the table and where everything is."""
    names = {
        "model": "model",
        "empirical": "empirical baseline",
        "markov": "Markov, before",
        "two_sided": "Markov, both sides",
    }
    for split, measured in report["splits"].items():
        print(f"\n{split:20}  accuracy  perplexity   ({measured['num_targets']:,} hidden residues)")
        for key, name in names.items():
            if key in measured["scores"]:
                row = measured["scores"][key]
                print(f"{name:20}  {row['accuracy']:8.4f}  {row['perplexity']:10.3f}")
    print(f"\nreport      {out / 'report' / 'report.html'}")
    print(f"loss curve  {out / 'run' / 'curves.png'}")
    print(f"embeddings  {out / 'embeddings.h5'}")
    print(f"model       {out / 'run' / 'model'}", flush=True)


def unbeaten_baselines(report: dict[str, Any]) -> list[str]:
    """Returns the baselines that have a lower perplexity than the model on the first split; NaN beats nothing."""
    scores = report["splits"][report["split"]]["scores"]
    # JSON as Python writes it may hold NaN and Infinity.
    model = scores["model"]["perplexity"]
    return [
        name
        for name in ("empirical", "markov", "two_sided")
        if name in scores and not (math.isfinite(model) and model < scores[name]["perplexity"])
    ]


def main() -> None:
    """Runs the demo that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, help="your proteins, FASTA, plain or .gz; default: the families in data/")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that the demo makes")
    parser.add_argument("--max-steps", type=int, default=DEMO_STEPS, help="optimizer updates")
    arguments = parser.parse_args()
    report = run_road(arguments.fasta, arguments.out, arguments.max_steps)
    print_summary(report, arguments.out)
    if unbeaten := unbeaten_baselines(report):
        sys.exit(f"error: the model does not beat the {' and the '.join(unbeaten)} baseline")


if __name__ == "__main__":
    main()
