"""Times protlm eval against bare forward passes on the same rows: the cost of scores, baselines and the bootstrap.

The model has the tiny configuration and random weights. Its evaluation, without start-up and without the page, takes
turns with forward passes on the rows that it scores. Nothing is reported unless both give the same loss.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

from protlm.config import load_config
from protlm.data.batching.batches import Objective, evaluation_rows
from protlm.data.batching.masking import MaskRates
from protlm.data.storage.dataset import Dataset, open_dataset
from protlm.inference.baselines import empirical, fit_markov, markov_predictions
from protlm.inference.metrics import MetricSums
from protlm.model.performer import Performer
from protlm.workflows.evaluate.breakdowns import Breakdowns
from protlm.workflows.evaluate.measure import Masks, measure_split
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare
from scripts.bench import harness
from scripts.bench.harness import Figure, ratio
from scripts.measuring import SAMPLE, SECONDS, take_turns, timed, using_threads

EVAL, FORWARD = "protlm eval", "bare forward passes"
MASKS = Masks(
    objective=Objective(causal=False, rates=MaskRates(0.15)).hiding_all(),
    seed=0,
    num_masks=1,
    tokens_per_batch=8192,
    window_tokens=None,
    max_residues=None,
)


def prepared(fasta: Path, folder: Path, fraction: float) -> Dataset:
    """Returns a dataset of a FASTA file, with this share of its proteins in the test split."""
    prepare(PrepRequest(inputs=[fasta], out=folder, test_fraction=fraction, valid_fraction=0.02, check_leaks=False))
    return open_dataset(folder)


def forward(model: Performer, dataset: Dataset) -> float:
    """Returns the mean loss over the targets of the test split, by forward passes and nothing else."""
    rows = evaluation_rows(dataset.split("test"), MASKS.tokens_per_batch, MASKS.seed, MASKS.objective)
    total, num_targets = 0.0, 0
    with torch.no_grad():
        for batch, _, _ in rows:
            logits = model(batch.tokens, batch.cu_seqlens, batch.target_positions)
            total += F.cross_entropy(logits.float(), batch.targets, reduction="sum").item()
            num_targets += len(batch.targets)
    return total / num_targets


def evaluate(model: Performer, dataset: Dataset, residue_counts: Mapping[str, int]) -> MetricSums:
    """Returns the sums of the model as protlm eval measures them: with baselines, replicates and breakdowns."""
    split = dataset.split("test")
    markov = fit_markov(dataset.split("train"), None, MASKS.objective, MASKS.seed)
    baselines = {"empirical": empirical(residue_counts)}
    if markov is not None:
        baselines["markov"] = markov_predictions(markov.model, MASKS.objective)
    breakdowns = Breakdowns(split)
    watch = lambda _mask, scores, resampled: breakdowns.add(scores, resampled)  # noqa: E731
    sums = measure_split(model, split, MASKS, baselines, watchers=(watch,))
    breakdowns.report()
    for measured in sums.values():
        measured.estimates()
    return sums["model"]


def measure(dataset: Dataset, repeats: int) -> dict[str, Any]:
    """Returns the times of both, after a check that they score the same."""
    model = Performer(load_config("tiny").model)
    model.reset(0)
    model.eval()
    counts = dataset.manifest.splits["train"].residue_counts
    losses = evaluate(model, dataset, counts).values()["bits_per_residue"] * 0.6931471805599453, forward(model, dataset)
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        sys.exit(f"error: losses of {losses[0]} and {losses[1]}; nothing is reported")
    calls = {
        EVAL: partial(timed, partial(evaluate, model, dataset, counts)),
        FORWARD: partial(timed, partial(forward, model, dataset)),
    }
    return {"proteins": dataset.split("test").num_records, "times": take_turns(calls, repeats)}


def figures(measured: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields the ratio of the times."""
    seconds = {name: times[SECONDS] for name, times in measured["times"].items()}
    yield ratio(f"time of {EVAL} / {FORWARD}", f"{measured['proteins']:,} proteins", seconds[EVAL], seconds[FORWARD])


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--fasta", type=Path, default=SAMPLE, metavar="FASTA", help="proteins, split at random")
    parser.add_argument("--test-fraction", type=float, default=0.2, help="share of them that is scored")
    return harness.parse(parser, words)


def main(words: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with tempfile.TemporaryDirectory() as folder, using_threads(arguments.threads):
        dataset = prepared(arguments.fasta, Path(folder) / "dataset", arguments.test_fraction)
        measured = measure(dataset, arguments.repeats)
        report = harness.Report(
            script="evaluate.py",
            words=words,
            setup="tiny, random weights, rows of 8,192 tokens",
            environment=harness.environment(),
            figures=list(figures(measured)),
            measured=measured,
        )
    report.publish(arguments)


if __name__ == "__main__":
    main()
