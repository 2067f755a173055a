"""The public attention op: how its arguments are checked before `operators` computes it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from protlm.choices import FeatureMap
from protlm.ops import compiled, favor_triton, operators
from protlm.ops.derivatives import Attention
from protlm.ops.feature_maps import DEFINITIONS, definition_of
from protlm.ops.inputs import AttentionInputs, in_one_dtype
from protlm.ops.log_normaliser import absolute_logarithm
from protlm.ops.process_groups import group_name_of

Backend = Literal["auto", "torch", "cpp", "triton"]


def backends() -> dict[str, str]:
    """Returns every backend by name, with one line that describes it or the reason why it cannot run here."""
    descriptions = {"torch": "chunked torch operations with a recomputing backward, on any device"}
    cpp_why_not, triton_why_not = compiled.why_not(), favor_triton.why_not()
    descriptions["cpp"] = (
        f"not available: {cpp_why_not}"
        if cpp_why_not
        else f"compiled kernels on the CPU, {_compiled_kernels()}, {_maps_of('cpp')}"
    )
    descriptions["triton"] = (
        f"not available: {triton_why_not}"
        if triton_why_not
        else f"fused kernels for bfloat16, float16 and float32 on CUDA, {_maps_of('triton')}"
    )
    return descriptions


def _compiled_kernels() -> str:
    half = compiled.best_half_kernel()
    of_half = f"bfloat16 on {half}" if half else "no units for bfloat16"
    return f"float32 on {compiled.best_kernel()}, {of_half}"


def _maps_of(backend: str) -> str:
    others = [name for name, definition in DEFINITIONS.items() if backend not in definition.backends]
    return f"every feature map but {', '.join(others)}" if others else "every feature map"


@overload
def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    *,
    feature_map: FeatureMap = ...,
    token_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    oprf_a: Tensor | None = ...,
    process_group: ProcessGroup | None = ...,
    near_block: int = ...,
    feature_bias: Tensor | None = ...,
    return_log_normaliser: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    *,
    feature_map: FeatureMap = ...,
    token_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    oprf_a: Tensor | None = ...,
    process_group: ProcessGroup | None = ...,
    near_block: int = ...,
    feature_bias: Tensor | None = ...,
    return_log_normaliser: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def favor_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    projection: Float[Tensor, "*heads features head_dim"] | None,
    *,
    feature_map: FeatureMap = "positive",
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    causal: bool = False,
    oprf_a: Float[Tensor, "*segments heads"] | None = None,
    process_group: ProcessGroup | None = None,
    near_block: int = 0,
    feature_bias: Float[Tensor, "*bias_heads features"] | None = None,
    return_log_normaliser: bool = False,
    backend: Backend = "auto",
) -> (
    Float[Tensor, "batch heads length head_dim"]
    | tuple[Float[Tensor, "batch heads length head_dim"], Float[Tensor, "batch heads length"]]
):
    """Returns FAVOR attention: D⁻¹(φ(q)·(φ(k)ᵀv)) with D the row sums of φ(q)·φ(k)ᵀ.

    These are equations 3 and 4 of arXiv 2009.14794, for causal attention its section 2.5.1, with φ of
    `kernel_features`. The un-normalised weights are unbiased estimates of exp(q·k/√d) for `positive`, `hyperbolic`,
    `trig` and `oprf`; the normalised output is a ratio of such estimates, consistent but not unbiased. No epsilon is
    added: exponents are kept in log space relative to references that cancel, and nothing overflows for norms of q and
    k up to 1e14. (The renormaliser of `trig` is a sum of signed terms and can come close to 0: its outputs may be of
    any size.) Exponents, maxima and sums are float32 for float32 and shorter inputs, also under autocast, and float64
    for float64. Gradients flow to q, k, v, the projection and the feature bias, by `backward` and by torch.func.grad,
    vjp and jacrev; second derivatives and forward mode are errors. The backward recomputes features.

    With `near_block` = W the weights of near tokens are exact. Segments are cut into blocks of W tokens from their
    start, padding counted; near are the tokens of a query's own block and of the two neighbouring ones (causal: of them
    those that it sees), far are the rest of its segment:

        out_i = [Σ_near e^(q_i·k_l/√d) v_l + Σ_far φ(q_i)·φ(k_l) v_l] / [Σ_near e^(q_i·k_l/√d) + Σ_far φ(q_i)·φ(k_l)]

    Numerator and denominator stay unbiased, with fewer random terms. If W is at least the length this is exact softmax
    attention. Near and far are merged in log space, and nothing overflows.

    Cost per head: time O(length · features · head_dim), memory O(segments · features · head_dim) and one stretch of
    features beside the inputs and the output; the causal backward keeps `features` numbers for every stretch. With
    `near_block` time O(length · (W + features) · head_dim), and memory O(W² + (W + features) · head_dim) for each of a
    fixed number of blocks; besides that a few states for every unit of blocks that is held at once. The backend
    `triton` holds a state, features · head_dim numbers, for every block of the row, causal for every 128 tokens.

    Args:
        q: Queries, any strides.
        k: Keys.
        v: Values. Under autocast q, k and v may differ in dtype; the longest is then taken.
        projection: Rows ω, shared by the heads or one set per head; None (for `relu` only) applies ReLU to q and k. One
            that requires a gradient gets it, but not in a process group.
        feature_map: `positive`, `hyperbolic`, `trig` and `oprf` estimate softmax attention, `regularised` a smoother
            kernel; `relu` is the paper's generalised attention. `hyperbolic` and `trig` give two features per row.
        token_mask: True at real tokens. Padding may hold any finite value: it changes no real output, gets no gradient,
            and its own output is zero.
        cu_seqlens: int32 bounds 0 = b₀ ≤ b₁ ≤ … = length of the segments packed into the row (batch = 1), with no
            attention across them. None makes each row one segment.
        causal: A token sees itself and the earlier tokens of its segment; no later token changes a bit of its output.
        oprf_a: The A of `oprf`, below 1/8, (heads) or (segments, heads); no gradient flows to it. None computes
            `oprf_parameter` of the mean ‖x + y‖² over all pairs of real tokens of the segment; causal attention needs
            a value, as the data would reveal later tokens.
        process_group: The length is split over the ranks of this group, in their order: q, k, v, token_mask, the output
            and all gradients are those of the rank's own tokens, which may be none. Rows and segments continue across
            ranks; `cu_seqlens` are the `local_bounds` of all segments. All other arguments are the same on all ranks,
            and all ranks call the op, and its backward, in the same order. Without near_block they exchange states,
            whose size does not depend on the length. torch.compile runs the call in eager torch. None means one
            process.
        near_block: Tokens of a block; 0 for no near field. For `positive`, `hyperbolic` and `oprf` only: `regularised`
            estimates another kernel, whose weights have another unit than exact ones. In a process group the ranks
            exchange their tokens for heads, and each computes some heads of all tokens: at most as many ranks as heads
            have work.
        feature_bias: c_j, (features) or (heads, features), one for each row of the projection, for exponential maps:
            Σ_j e^(c_j) φ_j(q)·φ_j(k) takes the place of φ(q)·φ(k). Rows ω' = ω + μ with c = −μ·ω − ‖μ‖²/2 keep the
            estimate unbiased for any μ; with μ = q̄/d^¼ + k̄/d^¼ `positive` errs as if q and k were centred. One that
            requires a gradient gets it, but not in a process group.
        return_log_normaliser: Whether to return the logarithm of the divisor too, through which gradients flow: with it
            attentions over different keys can be merged. For exponential maps only; in a process group with near_block.
        backend: `auto` chooses the fastest that covers the arguments: `cpp` for float32, bfloat16 and float16 on the
            CPU and every map but `trig`, if it was built; `triton` for the same on CUDA, head_dim up to 128 and every
            map but `trig`, if Triton is installed; else `torch`. Calls that `cpp` or `triton` do not cover (other
            devices, dtypes and maps, causal attention in a process group, return_log_normaliser without near_block,
            gradients of the projection and of the feature bias; for `triton` also causal attention in float32 without
            near_block, and `relu` in float16) run on `torch`.

    Returns:
        Shape and dtype of v. A segment without a real token gives zero; NaN in a real token propagates. With
        return_log_normaliser also log Σ of the weights (batch, heads, length), the unit of which is e^(q·k/√d), in
        float32, or float64 for float64; zero for padding.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: An argument does not fit, one requires a gradient that it cannot get, this process is not in the
            group, or the named backend cannot run here.
        RuntimeError: A derivative of forward mode or of second order.
    """
    group_name = group_name_of(process_group)
    given = v
    q, k, v = in_one_dtype(q, k, v)
    inputs = AttentionInputs(
        q, k, v, projection, token_mask, cu_seqlens, oprf_a, feature_map, causal, group_name, feature_bias, near_block
    )
    inputs.check()
    if return_log_normaliser:
        inputs.check_log_normaliser()
    _check_no_gradient(oprf_a=oprf_a)
    if group_name:
        _check_no_gradient(projection=projection, feature_bias=feature_bias)
    if backend not in ("auto", *operators.BACKENDS):
        raise ValueError(f"backend: expected 'auto' or one of {sorted(operators.BACKENDS)}, got {backend!r}")
    if (return_log_normaliser and not near_block) or _needs_gradient(projection) or _needs_gradient(feature_bias):
        backend = "torch"
    masks = (token_mask, cu_seqlens, oprf_a)
    arguments = (q, k, v, projection, *masks, feature_map, causal, backend, group_name, feature_bias, near_block)
    call: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = _attention
    if torch.compiler.is_compiling() and (group_name or forward_ad._current_level >= 0):
        # A compiler treats the operators as functions of their arguments: it drops those of empty tensors, for which
        # the other ranks would wait, and orders them by sizes, which differ from rank to rank. And it would trace
        # forward mode through them to tangents of zero, without an error.
        reason = "the ranks of a process group wait for each other" if group_name else "forward mode is refused"
        call = torch.compiler.disable(_attention, reason=reason)  # type: ignore[no-untyped-call]
    out, query_sums, used_a = call(*arguments)
    out = out.to(given.dtype)
    if not return_log_normaliser:
        return out
    if near_block:
        return out, query_sums
    return out, absolute_logarithm(replace(inputs, oprf_a=used_a), query_sums)


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _check_no_gradient(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if _needs_gradient(tensor):
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient, as it gets none, got one that does; "
                f"pass {name}.detach()"
            )


def _attention(
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
    group_name: str,
    feature_bias: Tensor | None,
    near_block: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the output, the query sums and the A of `oprf`."""
    definition = definition_of(feature_map)
    if definition.takes_oprf_a and oprf_a is None:
        oprf_a = operators.oprf_a(q.detach(), k.detach(), token_mask, cu_seqlens, group_name, near_block)
    dtype = v.dtype
    if definition.is_signed and dtype in (torch.float16, torch.bfloat16) and projection is not None:
        # The backward reads the output, and the small renormaliser would amplify the rounding of the output.
        projection = projection.to(dtype)
        q, k, v = q.float(), k.float(), v.float()
    masks = (token_mask, cu_seqlens, oprf_a)
    arguments = (q, k, v, projection, *masks, feature_map, causal, backend, group_name, feature_bias, near_block)
    call: Callable[..., tuple[Tensor, ...]] = operators.favor if torch.compiler.is_compiling() else Attention.apply
    out, _, _, query_sums = call(*arguments)
    return out.to(dtype), query_sums, oprf_a
