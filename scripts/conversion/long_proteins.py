"""What is measured without training: the near field of our own model, long proteins, and the cost of a pass."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from protlm import files
from protlm.config import ModelConfig
from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import EVALUATION_SEED
from protlm.inference.attention_swap import SwapSettings, measure_moments, swap_attention
from protlm.inference.scoring import score_row
from protlm.inference.swap_scores import SWAPPED, Candidate, measure_swaps
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import save_model
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.progress import no_progress
from protlm.workflows.convert.cost import measure_costs
from protlm.workflows.convert.proteins import SampledProteins, sample_proteins
from scripts.conversion.plan import FORMAT_VERSION
from scripts.conversion.runs import Prepared
from scripts.environment import environment
from scripts.measuring import using_threads

POSITION_STARTS = (0, 200, 400, 600, 800)
"""Where the bins of position begin, in residues."""
SHAPE = {"num_layers": 6, "model_dim": 320, "num_heads": 20, "ffn_dim": 1280}
"""The shape of ESM-2 8M, whose cost is measured with random weights."""
COST_SETTINGS = SwapSettings(attention="positive", num_features=128, near_block=32, balance="none", seed=0)


BLOCKS, FEATURES = (16, 32, 64), (128, 512)
"""Near fields and numbers of random rows with which our own model is swapped."""


def measure_long(prepared: Prepared, data: Path, work: Path) -> dict[str, Any]:
    """Returns what our own rotary model keeps of swaps, by block and on long proteins, and the costs of ESM-2's shape.

    Args:
        prepared: Our own model, and its calibration.
        data: Folder of families_long.
        work: Folder for models.
    """
    model, description = read_named_model(prepared.model)
    subject = prepared.subject
    calibration = sample_proteins(prepared.calibration, "--calibrate", subject.longest, 0, no_progress)
    settings = SwapSettings(
        attention="positive", num_features=subject.num_features, near_block=subject.near_block, balance="dense", seed=0
    )
    with using_threads(1):
        moments = measure_moments(model, calibration.residues)
        swapped = swap_attention(model, settings, moments)
        swaps = [replace(settings, num_features=m, near_block=w) for w in BLOCKS for m in FEATURES]
        by_block = _by_block(model, {each: swap_attention(model, each, moments) for each in swaps}, data, description)
        by_position = _by_position({"exact": model, "swapped": swapped}, _long_proteins(data), description.objective)
    exact_folder, swapped_folder = work / "shape", work / "shape-swapped"
    shape = Performer(ModelConfig(**SHAPE, attention=("softmax",), qk_norm=False, conv_width=0))
    shape.reset(0)
    save_model(exact_folder, shape, description.model_copy(update={"model": shape.config}))
    other = swap_attention(shape.eval(), COST_SETTINGS, None)
    save_model(swapped_folder, other, description.model_copy(update={"model": other.config}))
    return {
        "format_version": FORMAT_VERSION,
        "blocks": by_block,
        "positions": by_position,
        "exact_costs": [asdict(cost) for cost in measure_costs(exact_folder, None)],
        "costs": [asdict(cost) for cost in measure_costs(swapped_folder, None)],
        "environment": environment(),
    }


def _by_block(
    model: Performer, swaps: dict[SwapSettings, Performer], data: Path, description: ModelDescription
) -> list[dict[str, Any]]:
    """Returns the accuracy with exact attention and with each swap, on proteins of the families that it knows."""
    proteins = sample_proteins(data / "families" / "iid.fasta.gz", "--report", None, 0, no_progress)
    candidates = [Candidate(SWAPPED, swap, s.num_features, s.near_block) for s, swap in swaps.items()]
    rows = evaluation_rows(proteins, 4096, EVALUATION_SEED, description.objective.hiding_all())
    return [
        {
            "features": scores.num_features,
            "block": scores.near_block,
            "accuracy": round(scores.accuracy.value, 5),
            "perplexity": round(scores.perplexity.value, 4),
        }
        for scores in measure_swaps(model, candidates, rows, proteins.key)
    ]


def _long_proteins(data: Path) -> SampledProteins:
    """Returns the proteins of families_long that the tests of learning hold out."""
    samples = [
        sample_proteins(data / "families_long" / f"{name}.fasta.gz", "--report", None, 0, no_progress)
        for name in ("iid", "held")
    ]
    residues = [tokens for sample in samples for tokens in sample.residues]
    return SampledProteins(residues, len(residues), 0)


def _by_position(models: dict[str, Performer], proteins: SampledProteins, objective: Any) -> list[dict[str, Any]]:
    """Returns the number of hidden residues in each bin of position, and the perplexity of every model there."""
    sums = {name: np.zeros((len(POSITION_STARTS), 2)) for name in models}
    for row in evaluation_rows(proteins, 4096, EVALUATION_SEED, objective.hiding_all()):
        for name, model in models.items():
            scores = score_row(model, row)
            bins = np.searchsorted(POSITION_STARTS, scores.positions, side="right") - 1
            sums[name][:, 0] += np.bincount(bins, minlength=len(POSITION_STARTS))
            losses = -scores.true_log_probabilities()
            sums[name][:, 1] += np.bincount(bins, weights=losses, minlength=len(POSITION_STARTS))
    return [
        {
            "start": start,
            "num_targets": int(next(iter(sums.values()))[place, 0]),
            **{name: round(float(np.exp(each[place, 1] / each[place, 0])), 4) for name, each in sums.items()},
        }
        for place, start in enumerate(POSITION_STARTS)
        if all(each[place, 0] for each in sums.values())
    ]


def write_long(path: Path, content: dict[str, Any]) -> None:
    """Writes the measurements, whole or not at all."""
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
