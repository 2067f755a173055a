"""The float64 twin of `near_forward`."""

import torch
from torch import Tensor

from protlm.ops.cuda.merge_states_twin import LOG_2


def near_forward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, far: Tensor | None = None, far_sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the output of some queries of one head, and log2 of their absolute normalisers.

    Args:
        q: (queries, head_dim).
        k: (keys, head_dim).
        v: The same shape.
        visible: (queries, keys), True where a query sees a key.
        far: (queries, head_dim), the mean of the values that are far; None for none.
        far_sums: (queries), log2 of the sum of their weights but for the factor exp(−‖q‖²/(2√d)).
    """
    q, scale = q.double(), q.shape[-1] ** -0.5
    exponents = (q @ k.double().T * scale).masked_fill(~visible, -torch.inf)
    values = v.double()
    if far is None or far_sums is None:
        return exponents.softmax(-1) @ values, exponents.logsumexp(-1) / LOG_2
    of_far = far_sums.double() * LOG_2 - q.square().sum(-1) * (0.5 * scale)
    exponents = torch.cat((exponents, of_far.unsqueeze(-1)), -1)
    weights = exponents.softmax(-1)
    return weights[:, :-1] @ values + weights[:, -1:] * far.double(), exponents.logsumexp(-1) / LOG_2
