"""One split, measured: the model and every baseline on the same targets, in one pass over the stream of scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import Objective
from protlm.data.storage.dataset import Split
from protlm.inference.baselines import Predict
from protlm.inference.metrics import MetricSums, Resampled, replicate_weights, sums_by_protein
from protlm.inference.residue_scores import ResidueScores
from protlm.inference.scoring import score_rows
from protlm.model.performer import Performer
from protlm.runtime.progress import Advance, no_advance


@dataclass(frozen=True, kw_only=True)
class Masks:
    """How targets are drawn and rows are made.

    Attributes:
        objective: What is predicted, and what is hidden.
        seed: Of the masks and of the bootstrap.
        num_masks: How often every protein is scored, each time with other masks.
        tokens_per_batch: Budget of a row.
        window_tokens: Length of a window of concatenated proteins; None: each protein is a segment.
        max_residues: Residues of a protein that are scored at most; None: all.
    """

    objective: Objective
    seed: int
    num_masks: int
    tokens_per_batch: int
    window_tokens: int | None
    max_residues: int | None

    def seed_of(self, mask: int) -> int:
        """Returns the seed of the masks with this number; the first one is the seed itself."""
        return self.seed if mask == 0 else xxhash.xxh3_64_intdigest(f"{self.seed} {mask}".encode()) >> 1


Watcher = Callable[[int, ResidueScores, Resampled], None]
"""Called with the number of the masks, the scores of the model at the targets of a row, and the proteins of these."""


def measure_split(
    model: Performer,
    split: Split,
    masks: Masks,
    baselines: Mapping[str, Predict],
    *,
    watchers: tuple[Watcher, ...] = (),
    advance: Advance = no_advance,
) -> dict[str, MetricSums]:
    """Returns the sums of the model, under `model`, and of each baseline, all on the same targets.

    Args:
        model: On the device to use.
        split: The proteins.
        masks: How targets are drawn.
        baselines: Baselines by name.
        watchers: See every row of scores of the model.
        advance: Called with the residues of each row.
    """
    sums = {name: MetricSums() for name in ("model", *baselines)}
    for mask in range(masks.num_masks):
        rows = evaluation_rows(
            split,
            masks.tokens_per_batch,
            masks.seed_of(mask),
            masks.objective,
            window_tokens=masks.window_tokens,
            max_residues=masks.max_residues,
        )
        for row, scores in score_rows(model, rows, advance=advance):
            if not len(scores):
                continue
            records, terms = sums_by_protein(scores)
            keys = [resampling_key(split, record) for record in records.tolist()]
            weights = replicate_weights(keys, masks.seed)
            resampled = Resampled(records, keys, weights)
            sums["model"].add(terms, weights, keys)
            for name, predict in baselines.items():
                sums[name].add(sums_by_protein(scores.predicted_as(predict(row)))[1], weights, keys)
            for watch in watchers:
                watch(mask, scores, resampled)
    return sums


def has_clusters(split: Split) -> bool:
    """Returns whether any protein of a split has a cluster, by which it is resampled."""
    return any(split.labels(record).clusters for record in range(split.num_records))


def resampling_key(split: Split, record: int) -> bytes:
    """Returns the key by which a protein is resampled: relatives of one cluster go together."""
    clusters = split.labels(record).clusters
    return clusters[0].encode() if clusters else np.asarray(split.tokens(record)).tobytes()
