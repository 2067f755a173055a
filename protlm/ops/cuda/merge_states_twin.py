"""The float64 twin of `merge_states`."""

import torch
from torch import Tensor


def merge_states(means: Tensor, references: Tensor, is_exponential: bool) -> tuple[Tensor, Tensor]:
    """Returns the state of all units of one segment and head.

    Args:
        means: (units, features, head_dim).
        references: (units, features): log2 of sums, for ReLU sums.
        is_exponential: Whether references are logarithms.
    """
    means, references = means.double(), references.double()
    if not is_exponential:
        sums = references.sum(0)
        return torch.where(sums[:, None] == 0, 0.0, (means * references[..., None]).sum(0) / sums[:, None]), sums
    weights = (references * LOG_2).softmax(0)
    return (means * weights[..., None]).sum(0), (references * LOG_2).logsumexp(0) / LOG_2


LOG_2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
