"""Similarity of amino acids from the attention of a model."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protlm.inference.attention_weights import share_tiles, visit_protein
from protlm.inference.blosum import STANDARD_RESIDUES, BlosumAgreement, compare_with_blosum62
from protlm.model.attention_calls import AttentionCall
from protlm.model.performer import Performer
from protlm.vocabulary import FIRST_RESIDUE, NUM_STANDARD_RESIDUES


@dataclass(frozen=True, kw_only=True)
class AttentionSimilarity:
    """Similarity of amino acids from attention.

    Attributes:
        residues: The letters of rows and columns.
        log_odds: (20, 20), natural logarithms; None where a pair never occurs or is never attended to.
        blosum62: Its agreement with BLOSUM62.
        by_head: The agreement of every head alone, (layers, heads).
        num_proteins: Proteins that were read.
    """

    residues: str
    log_odds: list[list[float | None]]
    blosum62: BlosumAgreement
    by_head: list[list[BlosumAgreement]]
    num_proteins: int


def attention_similarity(model: Performer, proteins: Iterable[np.ndarray]) -> AttentionSimilarity:
    """Returns the similarity of amino acids from the attention of all layers and heads, as in the paper's figure.

    The log-odds of residues a and b are log((O_ab + O_ba)/(E_ab + E_ba)). O_ab is the attention from residues a to
    other residues b, as a share of the attention to all other standard residues; E_ab is the same for uniform
    attention, so that only frequencies count in it. Both are sums over queries, proteins and heads. The attention of a
    residue to itself is left out, which says nothing about similarity, and so is that to `<cls>` and `<eos>`. (arXiv
    2009.14794 shows the attention between amino acids, summed over heads and layers, beside BLOSUM62; this
    normalisation is ours.)

    Cost: time O(length² · features) for each protein and head, memory O(length).

    Args:
        model: On any device.
        proteins: Residue tokens of each protein, uint8.

    Raises:
        ValueError: No protein, or one that does not fit (see `visit_protein`).
    """
    shape = (model.config.num_layers, model.config.num_heads, NUM_STANDARD_RESIDUES, NUM_STANDARD_RESIDUES)
    observed, expected = np.zeros(shape), np.zeros(shape)
    num_proteins = 0
    for protein in proteins:
        types = _one_hot_types(protein)

        def add(call: AttentionCall, types: Tensor = types) -> None:
            for head in range(call.attention.num_heads):
                sums = _pair_sums(call, head, types)
                observed[call.layer - 1, head] += sums[0]
                expected[call.layer - 1, head] += sums[1]

        visit_protein(model, protein, add)
        num_proteins += 1
    if not num_proteins:
        raise ValueError("proteins: expected at least one, got none")
    log_odds = pair_log_odds(observed.sum((0, 1)), expected.sum((0, 1)))
    by_head = [
        [compare_with_blosum62(pair_log_odds(o, e)) for o, e in zip(*of_layer, strict=True)]
        for of_layer in zip(observed, expected, strict=True)
    ]
    return AttentionSimilarity(
        residues=STANDARD_RESIDUES,
        log_odds=[[float(value) if np.isfinite(value) else None for value in row] for row in log_odds],
        blosum62=compare_with_blosum62(log_odds),
        by_head=by_head,
        num_proteins=num_proteins,
    )


def pair_log_odds(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns log((O + Oᵀ)/(E + Eᵀ)) for sums over ordered pairs of residues, (…, 20, 20); NaN where either is 0."""
    observed, expected = (sums + sums.swapaxes(-1, -2) for sums in (observed, expected))
    occurs = (observed > 0) & (expected > 0)
    ratio = np.divide(observed, expected, out=np.ones_like(expected), where=occurs)
    return np.where(occurs, np.log(ratio), np.nan)


def _one_hot_types(protein: np.ndarray) -> Tensor:
    """Returns float64 (num_residues + 2, 20): 1 at the type of each standard residue; other tokens have no type."""
    types = torch.from_numpy(protein.astype(np.int64)) - FIRST_RESIDUE
    others = NUM_STANDARD_RESIDUES
    types = F.pad(types.clamp(max=others), (1, 1), value=others)
    return F.one_hot(types, others + 1)[:, :others].double()


def _pair_sums(call: AttentionCall, head: int, types: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns O and E of one head on one protein, each (20, 20), queries along the rows."""
    observed, expected = torch.zeros(2, NUM_STANDARD_RESIDUES, NUM_STANDARD_RESIDUES, dtype=torch.float64)
    # The keys of each type that a query sees, without itself.
    num_seen = types.cumsum(0) if call.attention.causal else types.sum(0).expand_as(types)
    num_seen = num_seen - types
    for start, shares in share_tiles(call, head):
        rows = slice(start, start + len(shares))
        shares.diagonal(start).zero_()
        attended = (shares @ types.to(shares.device)).cpu()
        totals = attended.sum(-1, keepdim=True)
        # A query that sees no other residue, or attends to none, has no share to divide.
        queries = torch.where(totals > 0, types[rows], 0.0)
        observed += queries.T @ (attended / torch.where(totals > 0, totals, 1.0))
        expected += queries.T @ (num_seen[rows] / num_seen[rows].sum(-1, keepdim=True).clamp(min=1))
    return observed.numpy(), expected.numpy()
