"""The float64 twin of `key_gradients`: automatic differentiation of the contribution of keys and values."""

import torch
from torch import Tensor

from protlm.ops.cuda.fold_keys_twin import key_exponents
from protlm.ops.cuda.merge_states_twin import LOG_2
from protlm.ops.feature_maps import RELU_OFFSET


def key_gradients(
    k: Tensor, v: Tensor, rows: Tensor, references: Tensor, mean_grads: Tensor, sum_grads: Tensor, is_exponential: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of Σ φ(k)/sum · (v·mean_grad − sum_grad) by k and v of one head, with fixed sums."""
    k, v = (x.detach().double().requires_grad_() for x in (k, v))
    rows, references = rows.double(), references.double()
    if is_exponential:
        weights = torch.exp(key_exponents(k, rows) - references * LOG_2)
    else:
        weights = ((k @ rows.T).clamp(min=0) + RELU_OFFSET) / references
    loss = (weights * (v @ mean_grads.double().T - sum_grads.double())).sum()
    k_grad, v_grad = torch.autograd.grad(loss, (k, v))
    return k_grad, v_grad
