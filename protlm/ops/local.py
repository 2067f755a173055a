"""Exact softmax attention to near tokens: the public op, its backends and its gradients."""

from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from protlm.ops import compiled, local_cpp, local_torch
from protlm.ops.inputs import LocalInputs, in_one_dtype

LocalBackend = Literal["auto", "torch", "cpp"]


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
    under autocast. Gradients flow to q, k and v, once; the backward recomputes the scores.

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
        backend: `auto` takes `cpp`, the compiled kernel, for float32 on the CPU without token_mask, if it was built;
            else `torch`. A call that `cpp` does not cover runs on `torch`.

    Returns:
        Shape and dtype of v. NaN in a real token propagates, also to tokens somewhat beyond the window.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: An argument does not fit, or the named backend cannot run here.
    """
    given = v
    q, k, v = in_one_dtype(q, k, v)
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if backend not in ("auto", "torch", "cpp"):
        raise ValueError(f"backend: expected 'auto', 'torch' or 'cpp', got {backend!r}")
    inputs = LocalInputs(q, k, v, token_mask, cu_seqlens, before=window, after=0 if causal else window)
    inputs.check()
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _LocalAttention.apply(q, k, v, inputs, _module(backend, inputs))  # type: ignore[no-untyped-call]
    return out.to(given.dtype)


def _module(backend: LocalBackend, inputs: LocalInputs) -> ModuleType:
    if backend == "torch" or not local_cpp.covers(inputs):
        return local_torch
    if backend == "cpp":
        compiled.library()
    return local_cpp if compiled.why_not() is None else local_torch


class _LocalAttention(torch.autograd.Function):
    """The op as a function of q, k and v; a backend computes it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, inputs: LocalInputs, module: ModuleType) -> Tensor:
        inputs = inputs.with_tensors(q, k, v)
        out, log_sums = module.forward(inputs)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.inputs, ctx.module = inputs.without_tensors(), module
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, log_sums = ctx.saved_tensors
        return *ctx.module.backward(ctx.inputs.with_tensors(q, k, v), grad, out, log_sums), None, None
