"""How torch differentiates the op: once, in reverse, by `backward` and by torch.func; all else is one clear error.

`torch.library` alone would give no error in forward mode, but tangents of zero, and no gradient under torch.func. So in
eager torch the operators are called inside functions of autograd, which torch.func knows; a compiler takes the
operators as they are.
"""

from typing import Any

import torch
from torch import Tensor

# The arguments of `protlm::favor`, and the places of its parameters among them.
_NUM_ARGUMENTS = 13
_PROJECTION, _FEATURE_BIAS = 3, 11
_ONLY_ONCE = "favor_attention has first derivatives in reverse mode only (backward, torch.func.grad, vjp and jacrev)"


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what `gradients` needs."""
    *tensors, ctx.feature_map, ctx.causal, ctx.backend, ctx.group_name, feature_bias, ctx.near_block = inputs
    ctx.mark_non_differentiable(*output[1:3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, feature_bias, *output)


def gradients(
    ctx: Any, out_grad: Tensor | None, _states: None, _references: None, sums_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of q, k, v, the projection and the feature bias, and None for every other argument."""
    if out_grad is None and sums_grad is None:
        return (None,) * _NUM_ARGUMENTS
    saved = ctx.saved_tensors
    out_grad = torch.zeros_like(saved[2]) if out_grad is None else out_grad
    # A compiler leaves out trailing arguments that have their defaults.
    is_needed = (*ctx.needs_input_grad, *(False,) * _NUM_ARGUMENTS)
    learns = is_needed[_PROJECTION] or is_needed[_FEATURE_BIAS]
    options = (ctx.feature_map, ctx.causal, ctx.backend, ctx.group_name, ctx.near_block, learns)
    if torch.compiler.is_compiling():
        grads = torch.ops.protlm.favor_backward(out_grad, sums_grad, *saved, *options)
    else:
        grads = _Gradients.apply(out_grad, sums_grad, *saved, *options)  # type: ignore[no-untyped-call]
    of_all: list[Tensor | None] = [None] * _NUM_ARGUMENTS
    of_all[:3] = grads[:3]
    if is_needed[_PROJECTION]:
        of_all[_PROJECTION] = grads[3]
    if is_needed[_FEATURE_BIAS]:
        of_all[_FEATURE_BIAS] = grads[4]
    return tuple(of_all)


def refuse_second_derivative(ctx: Any, *grad_outputs: Any) -> Any:
    """Raises RuntimeError: the backward of the backward."""
    raise RuntimeError(f"{_ONLY_ONCE}, got a second derivative")


def _refuse_forward_mode(ctx: Any, *grad_inputs: Any) -> Any:
    modes = "torch.func.jvp, jacfwd, hessian or torch.autograd.forward_ad"
    raise RuntimeError(f"{_ONLY_ONCE}, got a tangent of forward mode ({modes})")


class Attention(torch.autograd.Function):
    """The operator `protlm::favor` as a function of autograd."""

    generate_vmap_rule = True
    backward = staticmethod(gradients)
    jvp = staticmethod(_refuse_forward_mode)
    setup_context = staticmethod(save_for_backward)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """Returns what the operator returns."""
        result: tuple[Tensor, ...] = torch.ops.protlm.favor(*arguments)
        return result


class _Gradients(torch.autograd.Function):
    """The operator `protlm::favor_backward` as a function of autograd."""

    generate_vmap_rule = True
    backward = staticmethod(refuse_second_derivative)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.protlm.favor_backward(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass
