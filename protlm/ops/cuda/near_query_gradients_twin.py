"""The float64 twin of `near_query_gradients`: automatic differentiation of the twin of `near_forward`."""

import torch
from torch import Tensor

from protlm.ops.cuda.merge_states_twin import LOG_2


def near_query_gradients(
    q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor, inner: Tensor, query_sums: Tensor, visible: Tensor
) -> Tensor:
    """Returns the gradient of Σ weights·(v·out_grad − inner) by q of one head.

    Normalisers and inner products are fixed. `query_sums` are log2 of the normalisers; see `near_forward` for the
    others.
    """
    q = q.detach().double().requires_grad_()
    loss = near_loss(q, k.double(), v.double(), out_grad, inner, query_sums, visible)
    (q_grad,) = torch.autograd.grad(loss, q)
    return q_grad


def near_loss(
    q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor, inner: Tensor, query_sums: Tensor, visible: Tensor
) -> Tensor:
    """Returns Σ over queries and the keys that they see of weights·(v·out_grad − inner)."""
    exponents = q @ k.T * q.shape[-1] ** -0.5 - query_sums.double().unsqueeze(-1) * LOG_2
    weights = exponents.masked_fill(~visible, -torch.inf).exp()
    pulls = out_grad.double() @ v.T - inner.double().unsqueeze(-1)
    return torch.sum(weights * pulls)
