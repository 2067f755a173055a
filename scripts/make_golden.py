"""Writes tests/golden: the numbers and help texts that a change of protlm must not change unless somebody means it.

Run it by hand: when a change of numerics is wanted, and say so in CHANGELOG.md under "Numerics changed"; and with
`--only-help` when a change of an option or its help is wanted.
"""

import csv
import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer

from protlm.cli.app import app, main
from protlm.data.storage.dataset import open_dataset

ROOT = Path(__file__).parents[1]
GOLDEN_PATH = ROOT / "tests" / "golden" / "golden.json"
HELP_DIR = ROOT / "tests" / "golden" / "help"
HELP_COLUMNS = 80
NUM_STEPS = 20


def measure(folder: Path) -> dict[str, Any]:
    """Returns the hash of the prepared sample and the first losses of the tiny configuration on it."""
    torch.set_num_threads(1)
    dataset, run = folder / "dataset", folder / "run"
    for arguments in (
        ["prep", str(ROOT / "data" / "trembl_sample.fasta.gz"), "--out", str(dataset)],
        ["train", str(dataset), "--out", str(run), "--config", "tiny", "--max-steps", str(NUM_STEPS),
         "--set", "data.tokens_per_batch=1024", "--set", "data.max_length=512"],
    ):  # fmt: skip
        if main(arguments) != 0:
            sys.exit(f"failed: protlm {' '.join(arguments)}")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        "dataset_hash": open_dataset(dataset).hash,
        "losses": [float(row["train/loss"]) for row in rows],
        "valid_perplexity": float(rows[-1]["valid/perplexity"]),
    }


def help_texts() -> dict[str, str]:
    """Returns the help of protlm and of each of its commands on a terminal of fixed width, by the name of the file."""
    texts = {}
    for command in ("protlm", *typer.main.get_command(app).commands):
        with mock.patch.dict(os.environ, COLUMNS=str(HELP_COLUMNS)), redirect_stdout(io.StringIO()) as text:
            main(["--help"] if command == "protlm" else [command, "--help"])
        texts[f"{command}.txt"] = text.getvalue()
    return texts


if __name__ == "__main__":
    HELP_DIR.mkdir(exist_ok=True)
    for name, text in help_texts().items():
        (HELP_DIR / name).write_text(text, encoding="utf-8")
    print(f"wrote {HELP_DIR}")
    if sys.argv[1:] == ["--only-help"]:
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN_PATH.write_text(json.dumps(measure(Path(folder)), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN_PATH}")
