"""How a model attends, for a report: the maps of named proteins, similarity of residues, and the cost of estimating."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from protlm.choices import SplitName
from protlm.data.batching.batches import evaluation_rows
from protlm.data.storage.dataset import Split
from protlm.errors import ProtlmError
from protlm.inference.approximation import measure_approximation
from protlm.inference.attention_maps import read_attention_maps
from protlm.inference.attention_swap import exact_twin
from protlm.inference.baselines import Beginning, empirical
from protlm.inference.metrics import MetricSums
from protlm.inference.replaced_attention import score_replacements, sentence_of
from protlm.inference.residue_similarity import attention_similarity
from protlm.inference.scoring import score_model
from protlm.inference.swap_scores import measure_swaps, parts_of
from protlm.model.performer import Performer
from protlm.runtime.progress import Advance
from protlm.workflows.evaluate.measure import Masks

PAPER_PROTEIN = "BPT1_BOVIN"
"""The protein of the paper's figure, shown wherever a scored split has it."""

_MOST_BLOCKS = 64
_SIMILARITY_PROTEINS = 50
_SAMPLED_RESIDUES = 2_000
"""Residues of a protein that a sample takes, since exact attention and maps cost the square of the length."""
_MEASURED_PROTEINS = 50
_SCORED_PROTEINS = 200
_NUM_DRAWS = 10


def find_proteins(splits: Mapping[SplitName, Split], ids: Sequence[str]) -> list[tuple[Split, int]]:
    """Returns the split and the number of each protein, by its id, its accession or its entry name.

    Without ids it is the protein of the paper, where a split has it.

    Raises:
        ProtlmError: An id that no scored split has.
    """
    wanted = list(ids) or [PAPER_PROTEIN]
    places: dict[str, tuple[Split, int]] = {}
    for split in splits.values():
        for record in range(split.num_records):
            record_id = split.id(record)
            for name in (record_id, *record_id.split("|")):
                if name in wanted and name not in places:
                    places[name] = (split, record)
    for name in ids:
        if name not in places:
            raise ProtlmError(
                f"--attention {name}: no such protein in {', '.join(splits)}; give an id of a scored split"
            )
    return [places[name] for name in wanted if name in places]


def attention_of(
    model: Performer, proteins: Sequence[tuple[Split, int]], max_residues: int | None
) -> dict[str, Any] | None:
    """Returns the attention maps of proteins, and the similarity of residues from the attention on their split.

    Args:
        model: On the device to use.
        proteins: Split and number of each; none gives None.
        max_residues: Residues that the model's positions reach; a longer protein is cut to them.
    """
    if not proteins:
        return None
    maps = []
    for split, record in proteins:
        tokens = np.asarray(split.tokens(record))[:max_residues]
        content = asdict(read_attention_maps(model, tokens, max_blocks=_MOST_BLOCKS))
        for head in content["heads"]:
            head["picture"] = [[float(f"{value:.3g}") for value in row] for row in head["picture"]]
        maps.append({"id": split.id(record), "split": split.name, "num_residues": len(tokens), **content})
    split = proteins[0][0]
    similarity = attention_similarity(model, islice(_sampled(split, max_residues), _SIMILARITY_PROTEINS))
    return {"proteins": maps, "similarity": asdict(similarity)}


def approximation_of(
    model: Performer,
    split: Split,
    masks: Masks,
    training_counts: Mapping[str, int],
    *,
    redraw_every_steps: int,
    advance: Advance,
) -> dict[str, Any]:
    """Returns the error of a FAVOR model's attention against exact attention, and what it means for its scores.

    Args:
        model: On the device to use; its attention has random features.
        split: The proteins; the first ones are taken.
        masks: How targets are drawn.
        training_counts: Residues of the training set by letter.
        redraw_every_steps: Updates between two draws in training; 0: none.
        advance: Called with residues that were done.
    """
    beginning = Beginning(split, _SCORED_PROTEINS)

    def measured() -> dict[str, MetricSums]:
        return score_model(
            model,
            beginning,
            masks.objective,
            {"empirical": empirical(training_counts)},
            seed=masks.seed,
            tokens_per_batch=masks.tokens_per_batch,
            window_tokens=masks.window_tokens,
            max_residues=masks.max_residues,
            advance=advance,
        )

    frequencies = measured()["empirical"].score()
    sample = _sampled(split, masks.max_residues)
    errors = measure_approximation(
        model, sample, max_proteins=_MEASURED_PROTEINS, num_draws=_NUM_DRAWS, seed=masks.seed, advance=advance
    )
    replaced = score_replacements(
        model, lambda: measured()["model"].score(), frequencies, num_draws=_NUM_DRAWS, seed=masks.seed
    )
    swap = None
    if model.config.estimator:
        rows = evaluation_rows(
            beginning, masks.tokens_per_batch, masks.seed, masks.objective,
            window_tokens=masks.window_tokens, max_residues=masks.max_residues,
        )  # fmt: skip
        swap = measure_swaps(
            exact_twin(model), parts_of(model), rows, lambda record: np.asarray(split.tokens(record)).tobytes(),
            seed=masks.seed, advance=advance,
        )  # fmt: skip
    return {
        "swap": None if swap is None else [asdict(each) for each in swap],
        "split": split.name,
        "num_scored_proteins": len(beginning.lengths),
        "sentence": sentence_of(replaced, redraw_every_steps=redraw_every_steps),
        "errors": asdict(errors),
        "scores": asdict(replaced),
    }


def approximation_residues(split: Split) -> int:
    """Returns the residues that `approximation_of` reports to its progress, at most."""
    lengths = split.lengths
    return int(lengths[:_SCORED_PROTEINS].sum()) * (_NUM_DRAWS + 6) + int(lengths[:_MEASURED_PROTEINS].sum())


def _sampled(split: Split, max_residues: int | None) -> Iterator[np.ndarray]:
    """Yields the residue tokens of a split's proteins, each cut to what is sampled and what the model reaches."""
    limit = _SAMPLED_RESIDUES if max_residues is None else min(max_residues, _SAMPLED_RESIDUES)
    return (np.asarray(split.tokens(record))[:limit] for record in range(split.num_records))
