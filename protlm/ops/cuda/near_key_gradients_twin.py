"""The float64 twin of `near_key_gradients`: automatic differentiation of the same sum as for queries."""

import torch
from torch import Tensor

from protlm.ops.cuda.near_query_gradients_twin import near_loss


def near_key_gradients(
    q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor, inner: Tensor, query_sums: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of Σ weights·(v·out_grad − inner) by k and v of one head; see `near_query_gradients`."""
    k, v = (x.detach().double().requires_grad_() for x in (k, v))
    k_grad, v_grad = torch.autograd.grad(near_loss(q.double(), k, v, out_grad, inner, query_sums, visible), (k, v))
    return k_grad, v_grad
