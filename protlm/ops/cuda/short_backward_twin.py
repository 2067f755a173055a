"""The float64 twin of `short_backward`: automatic differentiation of the twin of `short_forward`."""

import torch
from torch import Tensor

from protlm.ops.cuda.short_forward_twin import short_forward


def short_backward(
    q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor, rows: Tensor, constants: Tensor, is_exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v of one head of a segment whose tokens are all real; see `short_forward`."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, _, _ = short_forward(q, k, v, rows, constants, is_exponential)
    q_grad, k_grad, v_grad = torch.autograd.grad(out, (q, k, v), out_grad.double())
    return q_grad, k_grad, v_grad
