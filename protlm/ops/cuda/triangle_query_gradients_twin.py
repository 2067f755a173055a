"""The float64 twin of `triangle_query_gradients`: automatic differentiation of the weights of `triangle_forward`."""

import torch
from torch import Tensor

from protlm.ops.cuda.merge_states_twin import LOG_2
from protlm.ops.cuda.triangle_forward_twin import triangle_weights


def triangle_query_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_grad: Tensor,
    inner: Tensor,
    query_sums: Tensor,
    rows: Tensor,
    constants: Tensor,
    is_exponential: bool,
) -> Tensor:
    """Returns the gradient of Σ weights·(v·out_grad − inner) by q of one head.

    Normalisers and inner products are fixed. `query_sums` are log2 of the normalisers, for ReLU the normalisers; see
    `triangle_forward` for the others.
    """
    q = q.detach().double().requires_grad_()
    weights = triangle_weights(q, k.double(), rows, constants, is_exponential)
    loss = triangle_loss(weights, v.double(), out_grad, inner, query_sums, is_exponential)
    (q_grad,) = torch.autograd.grad(loss, q)
    return q_grad


def triangle_loss(
    weights: Tensor, v: Tensor, out_grad: Tensor, inner: Tensor, query_sums: Tensor, is_exponential: bool
) -> Tensor:
    """Returns Σ over queries and keys of weights/normaliser·(v·out_grad − inner)."""
    normalisers = torch.exp(query_sums.double() * LOG_2) if is_exponential else query_sums.double()
    return (weights / normalisers.unsqueeze(-1) * (out_grad.double() @ v.T - inner.double().unsqueeze(-1))).sum()
