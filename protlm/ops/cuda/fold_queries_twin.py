"""The float64 twin of `fold_queries`."""

import torch
from torch import Tensor

from protlm.ops.cuda.merge_states_twin import LOG_2
from protlm.ops.feature_maps import RELU_OFFSET


def fold_queries(
    q: Tensor,
    out_grad: Tensor,
    inner: Tensor,
    query_sums: Tensor,
    rows: Tensor,
    constants: Tensor,
    is_exponential: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the state of some queries of one head, whose weights are their features divided by their normalisers.

    Args:
        q: (queries, head_dim), the real ones only.
        out_grad: The same shape.
        inner: (queries), inner products of outputs and gradients.
        query_sums: (queries), log2 of the normalisers, for ReLU the normalisers.
        rows: (features, head_dim), with the factor d^-¼ and the scale of `oprf` in them.
        constants: (features), added to exponents, to base 2.
        is_exponential: Whether φ is an exponential, else ReLU.

    Returns:
        The mean of out_grad under each feature (features, head_dim), log2 of the sum of weights of each feature, for
        ReLU the sum, and the mean of inner.
    """
    scores, columns = q.double() @ rows.double().T, torch.cat((out_grad.double(), inner.double().unsqueeze(-1)), -1)
    if is_exponential:
        exponents = scores + (constants.double() - query_sums.double().unsqueeze(-1)) * LOG_2
        means, references = exponents.softmax(0).T @ columns, exponents.logsumexp(0) / LOG_2
    else:
        weights = (scores.clamp(min=0) + RELU_OFFSET) / query_sums.double().unsqueeze(-1)
        references = weights.sum(0)
        means = weights.T @ columns / references.unsqueeze(-1)
    return means[:, :-1], references, means[:, -1]
