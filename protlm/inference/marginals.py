"""Probabilities of residues, position by position: which passes of a protein they take, and how passes fill rows.

With hidden residues a protein is passed once for each position, in copies that differ in the one `<mask>`; with visible
residues once. Copies are segments of a packed row, so nothing is padded.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from protlm.choices import ResidueContext, ScoreStrategy
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.batches import Batch, EvaluationRow, pack_row
from protlm.data.batching.rows import packed_in_order
from protlm.data.mutations import Substitution
from protlm.inference.long_proteins import Cut, Window
from protlm.inference.scoring import score_row
from protlm.model.performer import Performer
from protlm.vocabulary import MASK, TOKEN_IDS, VOCABULARY_SIZE

CONTEXTS: dict[ScoreStrategy, ResidueContext] = {
    "masked-marginals": "masked",
    "wt-marginals": "wild-type",
    "pseudo-perplexity": "masked",
}
"""The context in which each strategy asks for probabilities."""


class Pass(NamedTuple):
    """A protein, or a window of it, as a model sees it once, and the residues whose probabilities are taken from it.

    Attributes:
        record: Number of the protein.
        start: The first residue that is seen.
        tokens: The residue tokens of the stretch, uint8, nothing hidden.
        places: Places in `tokens` of the residues that are predicted, int64.
        is_hidden: Whether these are hidden.
    """

    record: int
    start: int
    tokens: np.ndarray
    places: np.ndarray
    is_hidden: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of its segment."""
        return len(self.tokens) + SPECIAL_TOKENS_PER_SEGMENT


def passes_of(
    record: int, tokens: np.ndarray, positions: np.ndarray, context: ResidueContext, cut: Cut
) -> Iterator[Pass]:
    """Yields the passes of a protein that give the probabilities at some positions, in the order of the positions.

    Args:
        record: Number of the protein.
        tokens: Its residue tokens.
        positions: Positions from 0, rising, int64.
        context: Whether each position is hidden, which takes a pass for each.
        cut: The treatment of a long protein: a position is computed in the window whose middle is nearest to it.
    """
    for window in cut.windows(record, len(tokens)):
        first, last = np.searchsorted(positions, (window.core_start, window.core_stop))
        places = positions[first:last] - window.start
        yield from _passes_of_window(window, tokens[window.start : window.stop], places, context)


def _passes_of_window(
    window: Window, tokens: np.ndarray, places: np.ndarray, context: ResidueContext
) -> Iterator[Pass]:
    if context == "wild-type":
        if len(places):
            yield Pass(window.record, window.start, tokens, places, False)
        return
    for number in range(len(places)):
        yield Pass(window.record, window.start, tokens, places[number : number + 1], True)


def packed_passes(passes: Iterable[Pass], tokens_per_batch: int) -> Iterator[list[Pass]]:
    """Yields the passes of each row, in order: as many as the budget allows, or a single longer one."""
    return packed_in_order(passes, lambda each: each.num_tokens, tokens_per_batch)


def row_of(passes: Sequence[Pass]) -> EvaluationRow:
    """Returns a packed row of some passes, whose targets are their predicted residues, in order."""
    tokens, bounds = pack_row([_seen(each) for each in passes])
    # One `<cls>` stands before each segment.
    places = [start + 1 + each.places for start, each in zip(bounds[:-1].tolist(), passes, strict=True)]
    batch = Batch(
        tokens=tokens,
        cu_seqlens=bounds,
        target_positions=torch.from_numpy(np.concatenate(places)),
        targets=torch.from_numpy(np.concatenate([each.tokens[each.places] for each in passes]).astype(np.int64)),
        epoch=0,
        num_residues=sum(len(each.tokens) for each in passes),
    )
    counts = [len(each.places) for each in passes]
    records = np.repeat(np.array([each.record for each in passes], dtype=np.int64), counts)
    return EvaluationRow(batch, records, np.concatenate([each.start + each.places for each in passes]))


def _seen(each: Pass) -> np.ndarray:
    if not each.is_hidden:
        return each.tokens
    seen = each.tokens.copy()
    seen[each.places] = MASK
    return seen


def check_mutants(substitutions: Sequence[Substitution], lacked: str) -> None:
    """Raises ValueError if a mutant letter is one of those for which a model has no token, `lacked`."""
    for substitution in substitutions:
        if substitution.mutant in lacked:
            raise ValueError(f"this model has no token for {substitution.mutant}, and so no probability")


def marginals(
    model: Performer,
    tokens: np.ndarray,
    positions: np.ndarray,
    context: ResidueContext,
    cut: Cut,
    tokens_per_batch: int,
) -> np.ndarray:
    """Returns the log-probabilities of all tokens at some positions of a protein, float32 (positions, 33).

    Args:
        model: In evaluation mode, on any device.
        tokens: Residue tokens of the protein.
        positions: Positions from 0, rising, int64.
        context: Whether each position is hidden, which takes a pass for each.
        cut: The treatment of a long protein.
        tokens_per_batch: Budget of a row of passes.
    """
    logs = np.empty((len(positions), VOCABULARY_SIZE), dtype=np.float32)
    done = 0
    for row in packed_passes(passes_of(0, tokens, positions, context, cut), tokens_per_batch):
        computed = score_row(model, row_of(row)).log_probabilities
        logs[done : done + len(computed)] = computed
        done += len(computed)
    return logs


def pseudo_losses(model: Performer, proteins: Iterable[np.ndarray], cut: Cut, tokens_per_batch: int) -> Iterator[float]:
    """Yields log PPPL of each protein: −1/L Σ_i log P(x_i | x without x_i); passes of several share a row.

    Args:
        model: In evaluation mode, on any device.
        proteins: Residue tokens of each.
        cut: The treatment of a long protein.
        tokens_per_batch: Budget of a row of passes.
    """
    passes = (
        each
        for number, tokens in enumerate(proteins)
        for each in passes_of(number, tokens, np.arange(len(tokens)), "masked", cut)
    )
    total, count, current = 0.0, 0, 0
    for row in packed_passes(passes, tokens_per_batch):
        scores = score_row(model, row_of(row))
        for record, value in zip(scores.records.tolist(), scores.true_log_probabilities().tolist(), strict=True):
            if record != current:
                yield -total / count
                total, count, current = 0.0, 0, record
            total += value
            count += 1
    if count:
        yield -total / count


def marginal_score(
    log_probabilities: np.ndarray, positions: np.ndarray, substitutions: Sequence[Substitution]
) -> float:
    """Returns Σ_i (log P(mutant_i) − log P(wild type_i)) over the substituted positions i.

    This is the score of masked marginals where position i was hidden, and of wild-type marginals where it was seen
    (Meier et al., bioRxiv 2021.07.09.450648). At all other positions the model sees the wild type, also for a multiple
    mutant, whose score is therefore the sum of those of its substitutions.

    Args:
        log_probabilities: At some positions, (positions, 33).
        positions: These positions, rising; those of the substitutions are among them.
        substitutions: The substitutions.
    """
    rows = np.searchsorted(positions, [substitution.position for substitution in substitutions])
    mutants = [TOKEN_IDS[substitution.mutant] for substitution in substitutions]
    wild_types = [TOKEN_IDS[substitution.wild_type] for substitution in substitutions]
    gains = log_probabilities[rows, mutants].astype(np.float64) - log_probabilities[rows, wild_types]
    return float(gains.sum())


def perplexity_score(wild_type: float, variant: float) -> float:
    """Returns log PPPL(wild type) − log PPPL(variant), given the logarithms of both pseudo-perplexities.

    log PPPL(x) = −1/L Σ_i log P(x_i | x without x_i), where L is the length of x, so that variants of other lengths
    than the wild type can be scored: with insertions and deletions.
    """
    return wild_type - variant
