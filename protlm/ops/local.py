"""Exact softmax attention to near tokens: the public op, its backends and its gradients."""

import contextlib
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protlm.ops import compiled, favor_triton, local_cpp, local_torch, local_triton
from protlm.ops.inputs import LocalInputs, in_one_dtype

LocalBackend = Literal["auto", "torch", "cpp", "triton"]

_ONLY_ONCE = "local_attention has first derivatives in reverse mode only (backward, torch.func.grad and vjp)"


def local_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    *,
    window: int,
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    causal: bool = False,
    backend: LocalBackend = "auto",
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns exact softmax attention of every token to the tokens at most `window` away, in its segment.

    The weights are softmax(q·k/√d) over these tokens. Scores and sums are float32, for float64 inputs float64, also
    under autocast. Gradients flow to q, k and v, by `backward` and by torch.func.grad and vjp; second derivatives and
    forward mode are errors. The backward recomputes the scores.

    Cost per head: time O(length · window · head_dim), memory O(length · head_dim) and a bounded number of scores.

    Args:
        q: Queries, any strides.
        k: Keys.
        v: Values. Under autocast q, k and v may differ in dtype; the longest is then taken.
        window: Tokens on either side that a token sees, at least 1.
        token_mask: True at real tokens. Padding may hold any finite value: it changes no real output, gets no gradient,
            and its own output is zero.
        cu_seqlens: int32 bounds 0 = b₀ ≤ b₁ ≤ … = length of the segments packed into the row (batch = 1), with no
            attention across them. None makes each row one segment.
        causal: A token sees itself and earlier tokens alone.
        backend: `auto` takes `cpp`, the compiled kernel, for float32, bfloat16 and float16 on the CPU without
            token_mask, if it was built; `triton` for the same on CUDA and head_dim up to 128, if Triton is installed;
            else `torch`. A call that `cpp` or `triton` does not cover runs on `torch`.

    Returns:
        Shape and dtype of v. NaN in a real token propagates, with `cpp` and `triton` also to tokens of its segment that
        are not far beyond the window.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: An argument does not fit, or the named backend cannot run here.
        RuntimeError: A derivative of forward mode or of second order.
    """
    given = v
    q, k, v = in_one_dtype(q, k, v)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window: expected an integer of at least 1, got {window!r}")
    if backend not in get_args(LocalBackend):
        raise ValueError(f"backend: expected one of {get_args(LocalBackend)}, got {backend!r}")
    LocalInputs(q, k, v, token_mask, cu_seqlens, window, window).check()
    # No token is farther away.
    reach = min(window, q.shape[2])
    inputs = LocalInputs(q, k, v, token_mask, cu_seqlens, before=reach, after=0 if causal else reach)
    device = q.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext():
        out: Tensor = _LocalAttention.apply(  # type: ignore[no-untyped-call]
            q, k, v, token_mask, cu_seqlens, inputs.before, inputs.after, _module(backend, inputs)
        )[0]
    return out.to(given.dtype)


def _module(backend: LocalBackend, inputs: LocalInputs) -> ModuleType:
    if backend == "triton" and (why_not := favor_triton.why_not()):
        raise ValueError(f"backend: expected one that can run here, got 'triton': {why_not}")
    is_automatic = backend == "auto"
    # In the interpreter the kernels run only where they are asked for by name.
    if backend == "triton" or (is_automatic and inputs.q.device.type == "cuda"):
        return local_triton if local_triton.covers(inputs) else local_torch
    if backend == "torch" or not local_cpp.covers(inputs):
        return local_torch
    if backend == "cpp":
        compiled.library()
    return local_cpp if compiled.why_not() is None else local_torch


class _LocalAttention(torch.autograd.Function):
    """The op as a function of its tensors, with what its backward needs; a backend computes it."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *call, module = arguments
        result: tuple[Tensor, ...] = module.forward(LocalInputs(*call))
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.before, ctx.after, ctx.module = inputs
        ctx.mark_non_differentiable(*output[1:])
        # Masks and bounds too: autograd then sees if somebody changes them before the backward.
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = _LocalGradients.apply(  # type: ignore[no-untyped-call]
            grad, *ctx.saved_tensors, ctx.before, ctx.after, ctx.module
        )
        return *grads, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{_ONLY_ONCE}, got a tangent of forward mode")


class _LocalGradients(torch.autograd.Function):
    """The gradients of the op, which have none themselves."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, token_mask, cu_seqlens, *results, before, after, module = arguments
        inputs = LocalInputs(q, k, v, token_mask, cu_seqlens, before, after)
        result: tuple[Tensor, Tensor, Tensor] = module.backward(inputs, grad, *results)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{_ONLY_ONCE}, got a second derivative")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{_ONLY_ONCE}, got a tangent of forward mode")
