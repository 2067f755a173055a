"""The one public attention op: checks its arguments, chooses a backend and registers forward and backward with torch.

A backend is a module with a `forward` and a `backward` of the signatures of `protlm.ops.favor_torch`; a further one is
added to `_BACKENDS` and to `backends`.
"""

from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protlm.ops import favor_torch
from protlm.ops.random_features import FEATURE_MAPS, FeatureMap

Backend = Literal["auto", "torch"]

_BACKENDS: dict[str, ModuleType] = {"torch": favor_torch}


def backends() -> dict[str, str]:
    """Returns the backends that can run here, each with a line on what it is."""
    return {"torch": "chunked torch operations with a recomputing backward, on any device"}


def favor_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns bidirectional FAVOR attention: D⁻¹(φ(q)·(φ(k)ᵀv)) with D the row sums of φ(q)·φ(k)ᵀ.

    This is equations 3 and 4 of arXiv 2009.14794, with φ as in `kernel_features`. The un-normalised weights of
    `positive` are unbiased estimates of exp(q·k/√d); the normalised output is a ratio of such estimates, consistent but
    not unbiased. No epsilon is added: exponents are kept in log space with a running maximum per feature, and nothing
    overflows for norms of q and k up to 1e14. Exponents, maxima and sums are float32 for float32 and shorter inputs,
    float64 for float64. Gradients flow to q, k and v only, and features are recomputed for them.

    Cost per head: time O(length · features · head_dim), memory O(segments · features · head_dim) and one chunk of
    features beside the inputs and the output.

    Args:
        q: Queries, any strides.
        k: Keys.
        v: Values.
        projection: Rows ω, shared by the heads or one set a head; None (for `relu` only) applies ReLU to q and k.
        feature_map: `positive` estimates softmax attention; `relu` is the paper's generalised attention.
        token_mask: True at real tokens. Padding may hold any finite value: it changes no real output, gets no gradient,
            and its own output is zero.
        cu_seqlens: int32 bounds 0 = b₀ ≤ b₁ ≤ … = length of the segments packed into the row (batch = 1): no attention
            across them. None takes each row as one segment.
        backend: `auto` takes the fastest that covers the arguments.

    Returns:
        Shape and dtype of v. A segment without a real token gives zero; NaN in a real token propagates.

    Raises:
        ValueError: A shape, dtype, device or bound that does not fit.
    """
    check_arguments(q, k, v, projection, feature_map=feature_map, token_mask=token_mask, cu_seqlens=cu_seqlens)
    if backend not in ("auto", *_BACKENDS):
        raise ValueError(f"backend: expected 'auto' or one of {sorted(_BACKENDS)}, got {backend!r}")
    chosen = "torch" if backend == "auto" else backend
    out: Tensor = _favor(q, k, v, projection, token_mask, cu_seqlens, feature_map, chosen)[0]
    return out


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    *,
    feature_map: str,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError, naming argument, expected and got, unless the arguments of an attention fit together."""
    _expect("q", "4 axes (batch, heads, length, head_dim)", q.dim() == 4, tuple(q.shape))
    batch, heads, length, head_dim = q.shape
    _expect("q", "a floating dtype", q.is_floating_point(), q.dtype)
    for name, tensor in (("k", k), ("v", v)):
        _expect(name, f"the shape of q, {tuple(q.shape)}", tensor.shape == q.shape, tuple(tensor.shape))
        _expect(name, f"the dtype of q, {q.dtype}", tensor.dtype == q.dtype, tensor.dtype)
    _expect("feature_map", f"one of {FEATURE_MAPS}", feature_map in FEATURE_MAPS, repr(feature_map))
    if projection is None:
        _expect("projection", f"a tensor for feature_map {feature_map!r}", feature_map == "relu", None)
    else:
        shape = tuple(projection.shape)
        fits = len(shape) in (2, 3) and shape[-1] == head_dim and shape[-2] > 0 and shape[:-2] in ((), (heads,))
        _expect("projection", f"(features, {head_dim}) or ({heads}, features, {head_dim})", fits, shape)
        _expect("projection", "a floating dtype", projection.is_floating_point(), projection.dtype)
    if token_mask is not None:
        _expect("token_mask", f"shape {(batch, length)}", token_mask.shape == (batch, length), tuple(token_mask.shape))
        _expect("token_mask", "dtype torch.bool", token_mask.dtype == torch.bool, token_mask.dtype)
    if cu_seqlens is not None:
        _expect("cu_seqlens", "one axis with at least 2 bounds", cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2,
                tuple(cu_seqlens.shape))  # fmt: skip
        _expect("cu_seqlens", "dtype torch.int32", cu_seqlens.dtype == torch.int32, cu_seqlens.dtype)
        _expect("q", "batch = 1 with cu_seqlens", batch == 1, batch)
    for name, other in (("k", k), ("v", v), ("projection", projection), ("token_mask", token_mask),
                        ("cu_seqlens", cu_seqlens)):  # fmt: skip
        if other is not None:
            _expect(name, f"the device of q, {q.device}", other.device == q.device, other.device)


def _expect(argument: str, expected: str, holds: bool, got: object) -> None:
    if not holds:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


@torch.library.custom_op("protlm::favor", mutates_args=())
def _favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output and what the backward needs: context, key renormaliser, query renormaliser."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _BACKENDS[backend].forward(
        q, k, v, projection, token_mask, cu_seqlens, feature_map
    )
    return result


@torch.library.custom_op("protlm::favor_backward", mutates_args=())
def _favor_backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    context: Tensor,
    key_sums: Tensor,
    query_sums: Tensor,
    feature_map: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _BACKENDS[backend].backward(
        out_grad, q, k, v, projection, token_mask, cu_seqlens, out, context, key_sums, query_sums, feature_map
    )
    return result


@_favor.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, head_dim = q.shape
    features = head_dim if projection is None else projection.shape[-2]
    segments = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = favor_torch.compute_dtype(q)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty((segments, heads, features, head_dim), dtype=dtype),
        q.new_empty((segments, heads, features), dtype=dtype),
        q.new_empty((batch, heads, length), dtype=dtype),
    )


@_favor_backward.register_fake
def _(out_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return q_grad, k_grad, v_grad


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.feature_map, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _propagate(ctx: Any, out_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if out_grad is None:
        return (None,) * 8
    grads = _favor_backward(out_grad, *ctx.saved_tensors, ctx.feature_map, ctx.backend)
    return (*grads, None, None, None, None, None)


_favor.register_autograd(_propagate, setup_context=_save_for_backward)
