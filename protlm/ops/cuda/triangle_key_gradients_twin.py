"""The float64 twin of `triangle_key_gradients`: automatic differentiation of the same sum as for queries."""

import torch
from torch import Tensor

from protlm.ops.cuda.triangle_forward_twin import triangle_weights
from protlm.ops.cuda.triangle_query_gradients_twin import triangle_loss


def triangle_key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_grad: Tensor,
    inner: Tensor,
    query_sums: Tensor,
    rows: Tensor,
    constants: Tensor,
    is_exponential: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of Σ weights·(v·out_grad − inner) by k and v; see `triangle_query_gradients`."""
    k, v = (x.detach().double().requires_grad_() for x in (k, v))
    weights = triangle_weights(q.double(), k, rows, constants, is_exponential)
    loss = triangle_loss(weights, v, out_grad, inner, query_sums, is_exponential)
    k_grad, v_grad = torch.autograd.grad(loss, (k, v))
    return k_grad, v_grad
