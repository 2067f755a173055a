"""The float64 twin of `scan_states`."""

import torch
from torch import Tensor

from protlm.ops.cuda.merge_states_twin import merge_states


def scan_states(
    means: Tensor, references: Tensor, inners: Tensor, gap: int, has_before: bool, has_after: bool, is_exponential: bool
) -> list[tuple[Tensor, Tensor, Tensor] | None]:
    """Returns for every unit of one segment and head the state of all units that are far of it; None for no unit.

    Args:
        means: (units, features, head_dim).
        references: (units, features): log2 of sums, for ReLU sums.
        inners: The same shape: a further column of the means.
        gap: Units on either side that are not far.
        has_before: Whether units before are far.
        has_after: Whether units after are far.
        is_exponential: Whether references are logarithms.
    """
    columns = torch.cat((means, inners.unsqueeze(-1)), -1)
    states: list[tuple[Tensor, Tensor, Tensor] | None] = []
    for unit in range(len(means)):
        before = list(range(unit - gap)) if has_before else []
        after = list(range(unit + gap + 1, len(means))) if has_after else []
        far = before + after
        if not far:
            states.append(None)
            continue
        merged, reference = merge_states(columns[far], references[far], is_exponential)
        states.append((merged[:, :-1], reference, merged[:, -1]))
    return states
