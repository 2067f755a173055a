"""Writes tests/golden: the numbers and help texts that a change of protlm must not change unless somebody means it.

Run it by hand: when a change of numerics is wanted, and say so in CHANGELOG.md under "Numerics changed"; and with
`--only-help` when a change of an option or its help is wanted.
"""

import csv
import io
import itertools
import json
import os
import platform
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer

import protlm
from protlm.cli.app import app, main
from protlm.data.storage.dataset import open_dataset
from protlm.ops import compiled

ROOT = Path(__file__).parents[1]
GOLDEN_PATH = ROOT / "tests" / "golden" / "golden.json"
HELP_DIR = ROOT / "tests" / "golden" / "help"
HELP_COLUMNS = 80
SAMPLE = ROOT / "data" / "trembl_sample.fasta.gz"
NUM_STEPS = 60
"""The warm-up of the tiny configuration ends after 40."""
NUM_PROTEINS = 3
MAX_RESIDUES = 512

TOLERANCES = {"losses": 1e-6, "valid_perplexity": 1e-6, "embeddings": 1e-5}
"""Largest difference between machines of one class, relative to a number, or to the largest number of an embedding."""
TOLERANCE_OF_OTHER_MACHINES = 1e-4


def machine_class() -> dict[str, str]:
    """Returns the versions that decide the order in which sums are computed, and with it the last bits of a result."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__.partition("+")[0],
        "instructions of torch": torch.backends.cpu.get_cpu_capability(),
        "kernel of protlm": compiled.best_kernel() if compiled.why_not() is None else "none",
    }


def measure(folder: Path) -> dict[str, Any]:
    """Returns the hash of the prepared sample, losses of the tiny configuration, and embeddings by its model."""
    torch.set_num_threads(1)
    dataset, run = folder / "dataset", folder / "run"
    for arguments in (
        ["prep", str(SAMPLE), "--out", str(dataset)],
        ["train", str(dataset), "--out", str(run), "--config", "tiny", "--max-steps", str(NUM_STEPS),
         "--set", "data.tokens_per_batch=1024", "--set", f"data.max_length={MAX_RESIDUES}",
         "--set", "train.valid_every_steps=20"],
    ):  # fmt: skip
        if main(arguments) != 0:
            sys.exit(f"failed: protlm {' '.join(arguments)}")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    short = (record.sequence for record in protlm.read_records(SAMPLE) if len(record.sequence) <= MAX_RESIDUES)
    embeddings = protlm.load_model(run).embed(itertools.islice(short, NUM_PROTEINS))
    return {
        "machine": machine_class(),
        "dataset_hash": open_dataset(dataset).hash,
        "losses": [float(row["train/loss"]) for row in rows],
        "valid_perplexity": [float(row["valid/perplexity"]) for row in rows if row["valid/perplexity"]],
        "embeddings": [embedding["mean"].tolist() for embedding in embeddings],
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
