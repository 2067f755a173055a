"""The feed-forward layer: its activation functions, whose results are recomputed for the gradients and not kept."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def activated(
    inner: Float[Tensor, "length ffn_dim"], gate: Float[Tensor, "length ffn_dim"] | None
) -> Float[Tensor, "length ffn_dim"]:
    """Returns GELU(inner), or with a gate SwiGLU's SiLU(gate) · inner."""
    return F.gelu(inner) if gate is None else F.silu(gate) * inner


def activate_and_project(
    inner: Float[Tensor, "length ffn_dim"], gate: Float[Tensor, "length ffn_dim"] | None, out: nn.Linear
) -> Float[Tensor, "length model_dim"]:
    """Returns out(activated(inner, gate)); keeps `inner` and `gate` for the gradients, but not their activation.

    So the widest tensors of a layer are kept once, not twice, at the cost of a second evaluation of the activation
    function. Under autocast, or if a compiler decides which tensors are kept, the plain formula runs.
    """
    if torch.compiler.is_compiling() or inner.dtype != out.weight.dtype:
        projected: Tensor = out(activated(inner, gate))
        return projected
    result: Tensor = _ActivateAndProject.apply(inner, gate, out.weight, out.bias)  # type: ignore[no-untyped-call]
    return result


class _ActivateAndProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(inner, gate, weight)
        return F.linear(activated(inner, gate), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        inner, gate, weight = ctx.saved_tensors
        weight_grad, bias_grad = grad.T @ activated(inner, gate), grad.sum(0)
        grad = grad @ weight
        if gate is None:
            return torch.ops.aten.gelu_backward(grad, inner), None, weight_grad, bias_grad
        gate_grad = torch.ops.aten.silu_backward(grad * inner, gate)
        return grad * F.silu(gate), gate_grad, weight_grad, bias_grad
