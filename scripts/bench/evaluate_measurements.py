"""What the benchmark of evaluation measures: `protlm eval` as a function, bare forward passes, and peaks of memory."""

import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from protlm.config_files import load_config
from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import Objective
from protlm.data.storage.dataset import Dataset, open_dataset
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import read_model, save_model
from protlm.runtime.devices import best_device
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.request import EvalRequest
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare
from scripts.measuring import Times, in_a_process, peak_during, take_turns, timed

EVAL, FORWARD = "protlm eval", "bare forward passes"


def prepared(fasta: Path, folder: Path, fraction: float) -> Dataset:
    """Returns a dataset of a FASTA file, with this share of its proteins in the test split."""
    prepare(PrepRequest(inputs=[fasta], out=folder, test_fraction=fraction, valid_fraction=0.02, check_leaks=False))
    return open_dataset(folder)


def saved_model(folder: Path, dataset: Dataset) -> Path:
    """Saves a tiny model with random weights, as if it were trained on the dataset."""
    config = load_config("tiny")
    model = Performer(config.model)
    model.reset(0)
    counts = dataset.manifest.splits["train"].residue_counts
    known = {"redraw_every_steps": 0, "seed": 0, "step": 1, "dataset_hash": dataset.hash, "mask_rate": 0.15}
    save_model(folder, model, ModelDescription(model=model.config, residue_counts=counts, **known))
    return folder


def request(model: Path, dataset: Path) -> EvalRequest:
    """Returns the request to score a test split, whose report lies beside the dataset."""
    return EvalRequest(model=model, dataset=dataset, splits=("test",), out=dataset.with_suffix(".report"), force=True)


def evaluated(asked: EvalRequest) -> float:
    """Returns the mean loss in nats that `protlm eval` reports, after all of its work."""
    bits = evaluate(asked).model["bits_per_residue"]
    assert bits is not None
    return bits * math.log(2)


def forward(model: Performer, objective: Objective, asked: EvalRequest, dataset: Dataset) -> float:
    """Returns the mean loss over the targets of the test split, by forward passes and nothing else."""
    device = model.embedding.weight.device
    total, num_targets = 0.0, 0
    with torch.no_grad():
        for row in evaluation_rows(dataset.split("test"), asked.tokens_per_batch, asked.seed, objective):
            batch = row.batch
            logits = model(batch.tokens.to(device), batch.cu_seqlens.to(device), batch.target_positions.to(device))
            total += F.cross_entropy(logits.float().cpu(), batch.targets, reduction="sum").item()
            num_targets += len(batch.targets)
    return total / num_targets


def speed(folder: Path, dataset: Dataset, repeats: int) -> Times:
    """Returns the times of both, after a check that they score the same."""
    asked = request(saved_model(folder, dataset), dataset.path)
    model, description = read_model(asked.model)
    passes = partial(forward, model.to(best_device()).eval(), description.objective.hiding_all(), asked, dataset)
    losses = evaluated(asked), passes()
    if not abs(losses[0] - losses[1]) <= 1e-4 * losses[1]:
        sys.exit(f"error: losses of {losses[0]} and {losses[1]}; nothing is reported")
    return take_turns({EVAL: partial(timed, partial(evaluated, asked)), FORWARD: partial(timed, passes)}, repeats)


def peak(folder: Path, dataset: Dataset) -> int:
    """Returns the peak memory of a new process that evaluates, with all that it imports."""
    model = saved_model(folder, dataset)
    peak_bytes: int = in_a_process({}, peak_here, model=str(model), dataset=str(dataset.path))
    return peak_bytes


def peak_here(model: str, dataset: str) -> int:
    """Returns the peak in this process."""
    return peak_during(partial(evaluated, request(Path(model), Path(dataset))))[0]
