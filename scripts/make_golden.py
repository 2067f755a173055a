"""Writes tests/golden/golden.json: what a change of protlm must not change unless somebody means it.

Run it by hand when a change of numerics is wanted, and say so in CHANGELOG.md under "Numerics changed".
"""

import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset

ROOT = Path(__file__).parents[1]
GOLDEN_PATH = ROOT / "tests" / "golden" / "golden.json"
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN_PATH.write_text(json.dumps(measure(Path(folder)), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN_PATH}")
