"""Measures how far half precision moves the embeddings and the predictions of a model: the table of embeddings.md.

On a GPU, and on a CPU with units for bfloat16, attention too computes in half precision; on other CPUs in float32 from
rounded q, k and v.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from protlm import read_records
from protlm.choices import UsedPrecision
from protlm.errors import ProtlmError
from protlm.inference.precision import NAMES, set_precision
from protlm.inference.protein_model import ProteinModel
from protlm.pretrained.model_names import read_named_model
from scripts.report.page import table

HALF: tuple[UsedPrecision, ...] = ("bf16", "fp16")


def results(model: Path, sequences: Sequence[str], precision: UsedPrecision) -> Iterator[dict[str, np.ndarray]]:
    """Returns an iterator over the embeddings and logits of sequences, computed in a precision."""
    network, description = read_named_model(model)
    set_precision(network, precision)
    return ProteinModel(network, description).embed(sequences, include=("mean", "per-residue", "logits"))


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the cosines of the rows of two arrays."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.atleast_1d((first.astype(np.float64) * second).sum(-1) / lengths)


def moved(model: Path, sequences: Sequence[str], precision: UsedPrecision) -> tuple[str, ...]:
    """Returns the row of a precision: how far everything is from float32."""
    means, residues, differences, largest, agreements = [], [], 0.0, 0.0, []
    pairs = zip(results(model, sequences, "32"), results(model, sequences, precision), strict=True)
    for full, half in pairs:
        means.append(cosines(full["mean"], half["mean"]))
        residues.append(cosines(full["per-residue"], half["per-residue"]))
        differences = max(differences, float(np.abs(full["per-residue"] - half["per-residue"]).max()))
        largest = max(largest, float(np.abs(full["per-residue"]).max()))
        agreements.append(full["logits"].argmax(1) == half["logits"].argmax(1))
    return (
        NAMES[precision],
        f"{1 - np.concatenate(means).min():.1e}",
        f"{1 - np.concatenate(residues).min():.1e}",
        f"{differences:.2g} of {largest:.2g}",
        f"{np.concatenate(agreements).mean():.2%}",
    )


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="any MODEL of protlm embed")
    parser.add_argument("proteins", type=Path, help="a protein file")
    parser.add_argument("--num-proteins", type=int, default=500, help="the first so many (default: %(default)s)")
    arguments = parser.parse_args(words)
    try:
        records = zip(range(arguments.num_proteins), read_records(arguments.proteins), strict=False)
        sequences = [record.sequence for _, record in records]
        rows = [moved(arguments.model, sequences, precision) for precision in HALF]
    except ProtlmError as error:
        sys.exit(f"error: {error}")
    columns = ("a residue", "largest difference in a residue's vector", "equal first choices")
    header = ("", "1 − cosine of a mean, at most", *columns)
    print(table(header, rows, f"{len(sequences):,} proteins, against float32"))


if __name__ == "__main__":
    main()
