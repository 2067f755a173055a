"""The float64 twin of `fold_keys`."""

import torch
from torch import Tensor

from protlm.ops.feature_maps import RELU_OFFSET


def fold_keys(k: Tensor, v: Tensor, rows: Tensor, is_exponential: bool) -> tuple[Tensor, Tensor]:
    """Returns the state of some keys of one head.

    Args:
        k: (keys, head_dim), the real ones only.
        v: The same shape.
        rows: (features, head_dim), with the factor d^-¼ and the scale of `oprf` in them.
        is_exponential: Whether φ is an exponential, else ReLU.

    Returns:
        The mean of v under each feature (features, head_dim), and log2 of the feature's sum, for ReLU the sum.
    """
    k, v, rows = k.double(), v.double(), rows.double()
    if not is_exponential:
        weights = (k @ rows.T).clamp(min=0) + RELU_OFFSET
        sums = weights.sum(0)
        return torch.where(sums[:, None] == 0, 0.0, weights.T @ v / sums[:, None]), sums
    exponents = key_exponents(k, rows)
    return exponents.softmax(0).T @ v, exponents.logsumexp(0) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def key_exponents(k: Tensor, rows: Tensor) -> Tensor:
    """Returns ω·k/d^¼ − ‖k‖²/(2√d), (keys, features)."""
    exponents: Tensor = k @ rows.T - k.square().sum(-1, keepdim=True) / (2 * k.shape[-1] ** 0.5)
    return exponents
