"""The float64 twin of `triangle_forward`."""

import torch
from torch import Tensor

from protlm.ops.cuda.fold_keys_twin import key_exponents
from protlm.ops.cuda.merge_states_twin import LOG_2
from protlm.ops.feature_maps import RELU_OFFSET


def triangle_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    constants: Tensor,
    far: Tensor,
    far_sums: Tensor,
    is_exponential: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the output of the queries of a unit of one head, and log2 of their normalisers, for ReLU the normalisers.

    Args:
        q: (tokens, head_dim), all real.
        k: The same shape; a query sees the keys up to its own.
        v: The same shape.
        rows: (features, head_dim), with the factor d^-¼ and the scale of `oprf` in them.
        constants: (features), added to the exponents of queries, to base 2.
        far: (tokens, head_dim), the mean of the values of the units before.
        far_sums: (tokens), log2 of the sum of their weights, for ReLU the sum.
        is_exponential: Whether φ is an exponential, else ReLU.
    """
    weights = triangle_weights(q.double(), k.double(), rows, constants, is_exponential)
    if not is_exponential:
        sums = weights.sum(-1) + far_sums.double()
        return (weights @ v.double() + far.double() * far_sums.double().unsqueeze(-1)) / sums.unsqueeze(-1), sums
    exponents = torch.cat((weights.log(), far_sums.double().unsqueeze(-1) * LOG_2), -1)
    shares = exponents.softmax(-1)
    return shares[:, :-1] @ v.double() + shares[:, -1:] * far.double(), exponents.logsumexp(-1) / LOG_2


def triangle_weights(q: Tensor, k: Tensor, rows: Tensor, constants: Tensor, is_exponential: bool) -> Tensor:
    """Returns Σ φ(q)·φ(k) (queries, keys), zero for keys after a query."""
    rows = rows.double()
    if is_exponential:
        queries, keys = torch.exp(q @ rows.T + constants.double() * LOG_2), torch.exp(key_exponents(k, rows))
    else:
        queries, keys = ((x @ rows.T).clamp(min=0) + RELU_OFFSET for x in (q, k))
    return (queries @ keys.T).tril()
