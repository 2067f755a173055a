"""The operators that torch knows, `protlm::favor` and its backward: which backend computes a call, and their gradients.

A backend is a module with the functions of `protlm.ops.favor_torch`: `forward`, `backward` and `empty_states`, and the
halves `fold`, `read`, `query_gradients` and `key_gradients`, between which ranks of a process group exchange states.
A new one is added to `BACKENDS`, to `favor.backends` and to the definitions of the maps that it computes.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from protlm.ops import compiled, context_parallel, favor_cpp, favor_torch, favor_triton
from protlm.ops.derivatives import gradients, refuse_second_derivative, save_for_backward
from protlm.ops.inputs import AttentionInputs, result_like
from protlm.ops.oprf import oprf_a_from_data

BACKENDS: dict[str, ModuleType] = {"torch": favor_torch, "cpp": favor_cpp, "triton": favor_triton}

# From this value on the variance of the estimate is infinite.
_MAX_OPRF_A = 0.125


def backend_of(backend: str, inputs: AttentionInputs) -> ModuleType:
    """Returns the backend of a call, the same for its forward and its backward."""
    if backend == "torch":
        return favor_torch
    if backend == "auto":
        if inputs.q.device.type == "cuda":
            return favor_triton if favor_triton.why_not() is None and favor_triton.covers(inputs) else favor_torch
        return favor_cpp if favor_cpp.covers(inputs) and compiled.why_not() is None else favor_torch
    # Inside the operator, which a compiler does not trace.
    if backend == "triton" and (why_not := favor_triton.why_not()):
        raise ValueError(f"backend: expected one that can run here, got 'triton': {why_not}")
    chosen = favor_cpp if backend == "cpp" else favor_triton
    return chosen if chosen.covers(inputs) else favor_torch


def _check_oprf_a(oprf_a: Tensor) -> None:
    if oprf_a.device.type == "cuda":
        # The host would have to wait for the answer.
        torch._assert_async((oprf_a < _MAX_OPRF_A).all(), "oprf_a: expected values below 1/8")
    elif bool((oprf_a >= _MAX_OPRF_A).any()):
        raise ValueError(f"oprf_a: expected values below 1/8, got up to {oprf_a.max().item()}")


@torch.library.custom_op("protlm::oprf_a", mutates_args=())
def oprf_a(
    q: Tensor, k: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None, group_name: str, near_block: int = 0
) -> Tensor:
    """Returns the A of each segment and head (segments, heads) from the data; an operator, so that it compiles."""
    return oprf_a_from_data(
        AttentionInputs(q, k, q, None, token_mask, cu_seqlens, group_name=group_name, near_block=near_block)
    )


@oprf_a.register_fake
def _(
    q: Tensor, k: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None, group_name: str, near_block: int = 0
) -> Tensor:
    inputs = AttentionInputs(q, k, q, None, token_mask, cu_seqlens)
    return q.new_empty((inputs.num_segments, q.shape[1]), dtype=torch.float64)


@torch.library.custom_op("protlm::favor", mutates_args=())
def favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    oprf_a: Tensor | None,
    feature_map: str,
    causal: bool,
    backend: str,
    group_name: str = "",
    feature_bias: Tensor | None = None,
    near_block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output, and for the backward the states, their references and the query sums."""
    if oprf_a is not None:
        _check_oprf_a(oprf_a)
    inputs = AttentionInputs(
        q, k, v, projection, token_mask, cu_seqlens, oprf_a, feature_map, causal, group_name, feature_bias, near_block
    )
    chosen = backend_of(backend, inputs)
    # Autocast would round the exponents and sums of the operations inside.
    with torch.autocast(q.device.type, enabled=False):
        if group_name:
            return context_parallel.forward_in_group(chosen, inputs)
        result: tuple[Tensor, Tensor, Tensor, Tensor] = chosen.forward(inputs)
    return result


@torch.library.custom_op("protlm::favor_backward", mutates_args=())
def favor_backward(
    out_grad: Tensor,
    sums_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    oprf_a: Tensor | None,
    feature_bias: Tensor | None,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    query_sums: Tensor,
    feature_map: str,
    causal: bool,
    backend: str,
    group_name: str,
    near_block: int,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, and with `learns` of the parameters: of the projection, the feature bias."""
    inputs = AttentionInputs(
        q, k, v, projection, token_mask, cu_seqlens, oprf_a, feature_map, causal, group_name, feature_bias, near_block
    )
    chosen = backend_of(backend, inputs)
    saved = (out_grad, out, states, references, query_sums)
    assert not learns or chosen is favor_torch
    projection_grad = bias_grad = None
    with torch.autocast(q.device.type, enabled=False):
        if group_name:
            q_grad, k_grad, v_grad = context_parallel.backward_in_group(chosen, inputs, *saved, sums_grad)
        elif chosen is favor_torch:
            results = favor_torch.all_gradients(inputs, *saved, sums_grad, learns=learns)
            q_grad, k_grad, v_grad, projection_grad, bias_grad = results
        else:
            q_grad, k_grad, v_grad = chosen.backward(inputs, *saved, sums_grad)
    of_parameters = [q.new_empty(0) if grad is None else grad for grad in (projection_grad, bias_grad)]
    return q_grad, k_grad, v_grad, of_parameters[0], of_parameters[1]


@favor.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    oprf_a: Tensor | None,
    feature_map: str,
    causal: bool,
    backend: str,
    group_name: str = "",
    feature_bias: Tensor | None = None,
    near_block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = AttentionInputs(
        q, k, v, projection, token_mask, cu_seqlens, oprf_a, feature_map, causal, group_name, feature_bias, near_block
    )
    out = result_like(v)
    # Ranks exchange states of one form, the same for all backends.
    states, references = (favor_torch if group_name else backend_of(backend, inputs)).empty_states(inputs)
    return out, states, references, q.new_empty(q.shape[:3], dtype=inputs.compute_dtype)


@favor_backward.register_fake
def _(
    out_grad: Tensor, sums_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, projection: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (result_like(x) for x in (q, k, v))
    feature_bias, learns = rest[3], rest[-1]
    projection_grad, bias_grad = (
        q.new_empty(0) if parameter is None or not learns else parameter.new_empty(parameter.shape)
        for parameter in (projection, feature_bias)
    )
    return q_grad, k_grad, v_grad, projection_grad, bias_grad


favor.register_autograd(gradients, setup_context=save_for_backward)
favor_backward.register_autograd(refuse_second_derivative)
