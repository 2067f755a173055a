"""The float64 twin of `read_state`."""

import torch
from torch import Tensor

from protlm.ops.cuda.merge_states_twin import LOG_2
from protlm.ops.feature_maps import RELU_OFFSET


def read_state(
    q: Tensor, rows: Tensor, means: Tensor, references: Tensor, is_exponential: bool
) -> tuple[Tensor, Tensor]:
    """Returns the output of some queries of one head, and log2 of their renormalisers, for ReLU the renormalisers.

    Args:
        q: (queries, head_dim).
        rows: (features, head_dim), with the factor d^-¼ and the scale of `oprf` in them.
        means: (features, head_dim).
        references: (features), those of `Call.query_references`: log2 of sums, for ReLU sums.
        is_exponential: Whether they are logarithms.
    """
    weights, sums = query_weights(q, rows, references, is_exponential)
    return weights @ means.double(), sums


def query_weights(q: Tensor, rows: Tensor, references: Tensor, is_exponential: bool) -> tuple[Tensor, Tensor]:
    """Returns the weight of each feature's mean for each query (queries, features), and the renormalisers."""
    scores, references = q.double() @ rows.double().T, references.double()
    if is_exponential:
        exponents = scores + references * LOG_2
        return exponents.softmax(-1), exponents.logsumexp(-1) / LOG_2
    weights = (scores.clamp(min=0) + RELU_OFFSET) * references
    sums = weights.sum(-1)
    return torch.where(sums[:, None] == 0, 0.0, weights / sums[:, None]), sums
