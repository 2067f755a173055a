"""Exact softmax attention over the segments of a packed row, by the kernels that PyTorch has for the device."""

import functools
import inspect
import itertools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protlm.model.segments import Segments
from protlm.ops import local_attention, local_cpp, local_triton
from protlm.ops.cuda.launch import capability_of
from protlm.ops.cuda.tiles import MIN_CAPABILITY
from protlm.ops.inputs import LocalInputs

_HALF = (torch.bfloat16, torch.float16)
_MOST_FLASH_DIM = 256


def softmax_attention(
    q: Float[Tensor, "1 heads length head_dim"],
    k: Float[Tensor, "1 heads length head_dim"],
    v: Float[Tensor, "1 heads length head_dim"],
    segments: Segments,
    causal: bool,
    local_bias: Float[Tensor, " heads"] | None,
    window: int,
) -> Float[Tensor, "1 heads length head_dim"]:
    """Returns softmax attention inside segments, without a (length, length) mask over the row.

    On a GPU it is one call for all segments, and the host waits for nothing: PyTorch's flash attention of sequences of
    any lengths in half precision, where this version has it, else the Triton kernels of `local_attention`, whose window
    is then the row. So it is on a CPU, for neighbouring segments for which its compiled kernels are faster than
    PyTorch's. Everywhere else, and with a bias, it is one call a segment.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        segments: The segments of the row.
        causal: Whether a token sees itself and earlier ones alone.
        local_bias: Added to the logits of keys within `window` tokens, one for each head; None for nothing.
        window: See `local_bias`.
    """
    if q.device.type == "cuda" and local_bias is None:
        if _takes_flash(q):
            return _in_one_call(q, k, v, segments, causal)
        length = q.shape[2]
        if local_triton.covers(LocalInputs(q, k, v, None, segments.cu_seqlens, length, 0 if causal else length)):
            return local_attention(q, k, v, window=length, cu_seqlens=segments.cu_seqlens, causal=causal)
    if q.device.type == "cpu" and local_bias is None and not torch.compiler.is_compiling():
        longest = local_cpp.longest_exact(v.dtype, has_gradients=torch.is_grad_enabled())
        if longest:
            return _by_length(q, k, v, segments, causal, longest)
    return _one_by_one(q, k, v, segments.cpu_bounds, causal, local_bias, window)


def _takes_flash(q: Tensor) -> bool:
    """Returns whether PyTorch's flash attention of sequences of any lengths takes tensors like q."""
    is_new = capability_of(q.device.index) >= MIN_CAPABILITY
    fits = q.dtype in _HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= _MOST_FLASH_DIM
    return (
        is_new and fits and _flash_of_any_lengths() is not None and torch.backends.cuda.is_flash_attention_available()
    )


@functools.cache
def _flash_of_any_lengths() -> Callable[..., Tensor] | None:
    """Returns that attention, of tensors (length, heads, head_dim); None for a version of PyTorch without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return _with_causal(varlen_attn)


def _with_causal(attention: Callable[..., Any]) -> Callable[..., Tensor]:
    """Returns attention that is told by `causal` what versions of PyTorch are told in different ways."""
    has_window = "window_size" in inspect.signature(attention).parameters

    def with_causal(*arguments: Any, causal: bool) -> Tensor:
        options = {"window_size": (-1, 0 if causal else -1)} if has_window else {"is_causal": causal}
        out: Tensor = attention(*arguments, **options)
        return out

    return with_causal


def _in_one_call(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    attention = _flash_of_any_lengths()
    assert attention is not None
    # The length of the row bounds that of every segment, which only the device knows.
    length, bounds = q.shape[2], segments.cu_seqlens
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    return attention(q, k, v, bounds, bounds, length, length, causal=causal).transpose(0, 1).unsqueeze(0)


def _by_length(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, longest: int
) -> Float[Tensor, "1 heads length head_dim"]:
    """Returns attention on the CPU: neighbouring segments that are no longer than `longest` are one call."""
    bounds = segments.cpu_bounds
    lengths = bounds.diff().tolist()
    if max(lengths) <= longest:
        return local_attention(q, k, v, window=max(1, *lengths), cu_seqlens=bounds, causal=causal)
    outs, first = [], 0
    for is_long, group in itertools.groupby(lengths, lambda length: length > longest):
        last = first + len(list(group))
        own_bounds = bounds[first : last + 1] - bounds[first]
        q_part, k_part, v_part = (x[:, :, bounds[first] : bounds[last]] for x in (q, k, v))
        if is_long:
            outs.append(_one_by_one(q_part, k_part, v_part, own_bounds, causal, None, 0))
        elif q_part.shape[2]:
            window = max(lengths[first:last])
            outs.append(local_attention(q_part, k_part, v_part, window=window, cu_seqlens=own_bounds, causal=causal))
        first = last
    return _joined(outs)


def _joined(outs: list[Tensor]) -> Tensor:
    """Concatenates outputs of segments in their memory layout, tokens first."""
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, local_bias: Tensor | None, window: int
) -> Tensor:
    outs = []
    for start, stop in pairwise(bounds.tolist()):
        if stop == start:
            continue
        q_part, k_part, v_part = (x[:, :, start:stop] for x in (q, k, v))
        if local_bias is None:
            outs.append(F.scaled_dot_product_attention(q_part, k_part, v_part, is_causal=causal))
        else:
            biases = _biases(local_bias.to(q.dtype), stop - start, window, causal)
            outs.append(F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=biases))
    return _joined(outs)


def _biases(local_bias: Tensor, length: int, window: int, causal: bool) -> Tensor:
    """Returns the biases of a segment's logits, −∞ for keys that a query must not see (1, heads, length, length)."""
    places = torch.arange(length, device=local_bias.device)
    distances = places - places.unsqueeze(1)
    biases = torch.where(distances.abs() <= window, local_bias.view(1, -1, 1, 1), 0.0)
    return biases.masked_fill(distances > 0, -torch.inf) if causal else biases
