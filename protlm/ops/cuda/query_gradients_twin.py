"""The float64 twin of `query_gradients`: automatic differentiation of the twin of `read_state`."""

import torch
from torch import Tensor

from protlm.ops.cuda.read_state_twin import read_state


def query_gradients(
    q: Tensor, out_grad: Tensor, rows: Tensor, means: Tensor, references: Tensor, is_exponential: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the queries of one head, and the inner product of each output with its gradient."""
    q = q.detach().double().requires_grad_()
    out, _ = read_state(q, rows, means, references, is_exponential)
    (q_grad,) = torch.autograd.grad(out, q, out_grad.double())
    return q_grad, (out.detach() * out_grad.double()).sum(-1)
