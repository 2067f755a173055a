"""The float64 twin of `add_gradients`."""

from torch import Tensor


def add_gradients(mean_grads: Tensor, sum_grads: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums over the units of one segment and head, given (units, features, head_dim), (units, features)."""
    return mean_grads.double().sum(0), sum_grads.double().sum(0)
