"""Self-attention over packed rows: the kind of attention, and how q and k are kept in its range."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from protlm.choices import EXACT_KINDS, AttentionKind, FeatureMap
from protlm.config import ModelConfig
from protlm.model.convolution import SegmentConvolution
from protlm.model.exact_attention import softmax_attention
from protlm.model.qk_norm import prepare
from protlm.model.segments import Segments
from protlm.model.stretches import in_stretches
from protlm.ops import draw_projection, favor_attention, heads_cpp, local_attention, oprf_parameter
from protlm.ops.feature_maps import definition_of
from protlm.ops.inputs import AttentionInputs, runs_ahead
from protlm.ops.oprf import oprf_a_from_data

_INITIAL_TEMPERATURE = 0.75
"""Initial temperature of a head with a bound, as a share of max_temperature."""


class SelfAttention(nn.Module):
    """Multi-head attention of one kind: FAVOR, `near-far`, exact `softmax` or `local`; bidirectional or causal.

    With qk_norm every head has ‖q‖² = ‖k‖² = τ·√head_dim with a learned τ. FAVOR keeps τ in (0, max_temperature], which
    bounds the relative variance of the estimated weights by (e^{4τ} − 1)/num_features. rescale_qk then changes these
    norms, but never increases the sum of ‖q‖² and ‖k‖². Exact kinds have no variance, and their τ no bound.

    An estimator (`ModelConfig.estimator`) stands for an exact layer: its τ has no bound either. Its random rows are
    ω' = ω + μ with a shift μ of each head and a bias c = −μ·ω − ‖μ‖²/2 of each row, which keep the estimate unbiased
    (see `favor_attention`); with `qk_balance` q and k are multiplied by A and A⁻ᵀ of each head.

    Attributes:
        kind: The kind, of `AttentionKind`.
        feature_map: The feature map of FAVOR; None where there is none.
        is_exact: Whether the attention has no random features.
    """

    def __init__(self, config: ModelConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.kind: AttentionKind = kind
        self.feature_map: FeatureMap | None = config.feature_map_of(kind)
        self.takes_oprf_a = self.feature_map is not None and definition_of(self.feature_map).takes_oprf_a
        self.near_block = config.near_block if kind == "near-far" else 0
        self.causal = config.causal
        self.window = config.local_window
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rescale_qk = config.rescale_qk
        self.projection_kind = config.projection
        self.max_temperature = config.max_temperature
        self.initial_temperature = config.exact_temperature
        self.initial_bias = config.local_bias
        self.query, self.key, self.value, self.output = (
            nn.Linear(config.model_dim, config.model_dim) for _ in range(4)
        )
        self.query_norm, self.key_norm = (
            nn.LayerNorm(config.model_dim, eps=config.norm_eps, bias=False) if config.qk_layer_norm else None
            for _ in range(2)
        )
        self.convolution = (
            SegmentConvolution(3 * config.model_dim, config.conv_width, causal=config.causal)
            if config.conv_width
            else None
        )
        is_estimator = config.estimator and not self.is_exact
        is_free = (self.is_exact or is_estimator) and config.exact_temperature > 0
        self.temperature_logit, self.log_temperature, self.local_bias = (
            nn.Parameter(torch.empty(config.num_heads)) if is_learned else None
            for is_learned in (
                config.qk_norm and not is_free,
                config.qk_norm and is_free,
                kind == "softmax" and config.local_bias > 0,
            )
        )
        shape = (config.num_heads, config.num_features, config.head_dim)
        has_projection = not self.is_exact and config.projection != "none"
        self.projection: Tensor | None
        self.register_buffer("projection", torch.empty(shape) if has_projection else None)
        self.feature_shift: Tensor | None
        self.register_buffer("feature_shift", torch.empty(shape[0], shape[2]) if is_estimator else None)
        self.feature_bias: Tensor | None
        self.register_buffer("feature_bias", torch.empty(shape[:2]) if is_estimator else None)
        square = (shape[0], shape[2], shape[2])
        is_balanced = is_estimator and config.qk_balance
        self.query_balance: Tensor | None
        self.register_buffer("query_balance", torch.empty(square) if is_balanced else None)
        self.key_balance: Tensor | None
        self.register_buffer("key_balance", torch.empty(square) if is_balanced else None)
        self._uncompiled: Callable[..., Tensor] | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the attention has no random features."""
        return self.kind in EXACT_KINDS

    def prepare_compile(self) -> None:
        """Excludes exact kinds from compilation: their number of calls depends on the segments and on the length."""
        # Not as a decorator, which would import the compiler even where nothing is compiled.
        self._uncompiled = torch.compiler.disable(self._exact)  # type: ignore[no-untyped-call]

    def reset(self, generator: torch.Generator) -> None:
        """Sets the parameters that are not of linear layers, and draws the projection."""
        if self.convolution is not None:
            self.convolution.reset()
        if self.temperature_logit is not None:
            nn.init.constant_(self.temperature_logit, math.log(_INITIAL_TEMPERATURE / (1 - _INITIAL_TEMPERATURE)))
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.initial_temperature))
        if self.local_bias is not None:
            nn.init.constant_(self.local_bias, self.initial_bias)
        self.reset_balance()
        self.redraw(generator)

    @torch.no_grad()
    def reset_balance(self) -> None:
        """Sets an estimator to balance nothing and not to shift its random rows, those drawn from now on."""
        if self.feature_shift is not None:
            nn.init.zeros_(self.feature_shift)
        for balance in (self.query_balance, self.key_balance):
            if balance is not None:
                balance.copy_(torch.eye(self.head_dim))

    def learn_features(self) -> None:
        """Makes parameters of the projection and of its biases, if there are any; their names stay."""
        for name in ("projection", "feature_bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(tensor))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Draws a new projection for every head, if the attention has projections."""
        if self.projection is not None:
            assert self.projection_kind != "none"
            heads, features, head_dim = self.projection.shape
            drawn = draw_projection(features, head_dim, kind=self.projection_kind, num_heads=heads, generator=generator)
            self.set_rows(drawn)

    @torch.no_grad()
    def set_rows(self, drawn: Float[Tensor, "heads features head_dim"]) -> None:
        """Takes random rows as they were drawn; those of an estimator are shifted, and get their biases."""
        assert self.projection is not None
        if self.feature_shift is not None and self.feature_bias is not None:
            shift = self.feature_shift.to(drawn).unsqueeze(1)
            self.feature_bias.copy_(-(drawn * shift).sum(-1) - 0.5 * shift.square().sum(-1))
            drawn = drawn + shift
        self.projection.copy_(drawn)

    def forward(
        self,
        x: Float[Tensor, "length model_dim"],
        segments: Segments,
        rotary: tuple[Tensor, Tensor] | None,
        kept: Int[Tensor, " kept"] | None = None,
    ) -> Float[Tensor, "kept_or_length model_dim"]:
        """Returns the output of the attention for one packed row; without `rotary`, q and k are not rotated.

        Args:
            x: The row.
            segments: Its segments.
            rotary: The angles of rotary positions.
            kept: Positions of the row whose output is wanted; None: all.
        """
        # On a GPU one call for the whole row takes less time than the host would wait for bounds.
        if kept is not None and self._is_plain_softmax and not runs_ahead(x.device):
            out = self._attend_from(x, segments, rotary, kept)
        else:
            out = self.attend(*self.queries_keys_values(x, segments, rotary), segments)
            out = out if kept is None else out.index_select(0, kept)
        (result,) = in_stretches(lambda out: (self.output(out),), out.flatten(1))
        return result

    def attend(
        self,
        q: Float[Tensor, "length heads head_dim"],
        k: Float[Tensor, "length heads head_dim"],
        v: Float[Tensor, "length heads head_dim"],
        segments: Segments,
    ) -> Float[Tensor, "length heads head_dim"]:
        """Returns the attention of every head, before they are joined and projected."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        if self.is_exact or self.feature_map is None:
            out = (self._uncompiled or self._exact)(q, k, v, segments)
        else:
            out = favor_attention(
                q,
                k,
                v,
                self.projection,
                feature_map=self.feature_map,
                cu_seqlens=segments.cu_seqlens,
                causal=self.causal,
                oprf_a=self.fixed_oprf_a(),
                near_block=self.near_block,
                feature_bias=self.feature_bias,
            )
        return out.squeeze(0).transpose(0, 1)

    @property
    def _is_plain_softmax(self) -> bool:
        """Whether a query depends on its own token alone, and attends to all tokens of its segment alike."""
        is_free = self.convolution is None and not self.rescale_qk and not self.causal
        return self.kind == "softmax" and self.local_bias is None and is_free

    def _attend_from(
        self, x: Tensor, segments: Segments, rotary: tuple[Tensor, Tensor] | None, kept: Tensor
    ) -> Float[Tensor, "kept heads head_dim"]:
        """Returns plain softmax attention from some positions of the row only."""
        heads = (-1, self.num_heads, self.head_dim)

        def keys_and_values(x: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor]:
            k = _normed(self.key(x), self.key_norm)
            return self._prepare(k.view(heads), (angles[0], angles[1]) if angles else None), self.value(x).view(heads)

        k, v = in_stretches(keys_and_values, x, *(rotary or ()))
        own = _normed(self.query(x[kept]), self.query_norm)
        q = self._prepare(own.view(heads), None if rotary is None else (rotary[0][kept], rotary[1][kept]))
        # To the dtype of v, which is shorter under autocast.
        q, k = q.to(v.dtype), k.to(v.dtype)
        numbers = segments.numbers[kept].tolist()
        out = torch.empty_like(q)
        for number in set(numbers):
            start, stop = segments.cpu_bounds[number : number + 2].tolist()
            places = [place for place, other in enumerate(numbers) if other == number]
            queries, keys, values = (y.transpose(0, 1) for y in (q[places], k[start:stop], v[start:stop]))
            out[places] = F.scaled_dot_product_attention(queries, keys, values).transpose(0, 1)
        return out

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """Returns the output of an exact kind, (1, heads, length, head_dim) as q, k and v."""
        if self.kind == "local":
            return local_attention(q, k, v, window=self.window, cu_seqlens=segments.cu_seqlens, causal=self.causal)
        return softmax_attention(q, k, v, segments, self.causal, self.local_bias, self.window)

    def queries_keys_values(
        self, x: Float[Tensor, "length model_dim"], segments: Segments, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[
        Float[Tensor, "length heads head_dim"],
        Float[Tensor, "length heads head_dim"],
        Float[Tensor, "length heads head_dim"],
    ]:
        """Returns the q, k and v that enter the attention."""
        angles = rotary or ()
        if self.convolution is None:
            q, k, v = in_stretches(lambda x, *angles: self._prepared(*self._projected(x), *angles), x, *angles)
        else:
            projected = in_stretches(self._projected, x)
            fused = self._convolved_and_prepared(projected, segments, rotary)
            q, k, v = fused or in_stretches(self._prepared, *self.convolution(projected, segments), *angles)
        if self.rescale_qk:
            q, k = rescale(q, k, segments)
        return q, k, v

    def fixed_oprf_a(self) -> Float[Tensor, " heads"] | None:
        """Returns the A of causal `oprf`, which must not depend on later tokens; None if the op computes its own.

        With x = q/d^¼ and y = k/d^¼, ‖x‖² = ‖y‖² = τ under qk_norm, so the mean ‖x + y‖² over independent directions is
        2τ: a function of the weights alone. No gradient flows to it.
        """
        if not self.takes_oprf_a or not self.causal:
            return None
        temperature = self._temperature()
        assert temperature is not None
        return oprf_parameter(2 * temperature.detach(), self.head_dim)

    def oprf_a(
        self, q: Float[Tensor, "length heads head_dim"], k: Float[Tensor, "length heads head_dim"], segments: Segments
    ) -> Float[Tensor, "segments heads"] | None:
        """Returns the A of every segment with which the attention is computed; None for maps without an A."""
        if not self.takes_oprf_a:
            return None
        fixed = self.fixed_oprf_a()
        if fixed is not None:
            return fixed.expand(len(segments.cu_seqlens) - 1, -1)
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        return oprf_a_from_data(AttentionInputs(q, k, q, None, None, segments.cu_seqlens))

    def _temperature(self) -> Tensor | None:
        """Returns the temperature τ of every head, None without qk_norm."""
        if self.log_temperature is not None:
            return self.log_temperature.exp()
        return None if self.temperature_logit is None else self.max_temperature * torch.sigmoid(self.temperature_logit)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _normed(self.query(x), self.query_norm), _normed(self.key(x), self.key_norm), self.value(x)

    def _prepared(self, q: Tensor, k: Tensor, v: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the heads of q, k and v, with q and k normalised and rotated; tokens do not interact."""
        q, k, v = self._heads(q, k, v)
        rotary = (angles[0], angles[1]) if angles else None
        return self._balanced(self._prepare(q, rotary), self._prepare(k, rotary), v)

    def _convolved_and_prepared(
        self, projected: tuple[Tensor, ...], segments: Segments, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns the heads of q, k and v after the convolution, each in one pass; None where the kernel cannot."""
        is_possible = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if self.convolution is None or not is_possible:
            return None
        lengths = self._lengths()
        q, k, v = heads = self._heads(*projected)
        if not all(heads_cpp.covers(x, lengths, *(rotary or ()), self.convolution.weight) for x in heads):
            return None
        of_q, of_k, of_v = self.convolution.neighbours(segments, 3)
        return self._balanced(
            heads_cpp.forward(q, lengths, rotary, neighbours=of_q),
            heads_cpp.forward(k, lengths, rotary, neighbours=of_k),
            heads_cpp.forward(v, neighbours=of_v),
        )

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (-1, self.num_heads, self.head_dim)
        return q.view(shape), k.view(shape), v.view(shape)

    def _balanced(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.query_balance is not None and self.key_balance is not None:
            q, k = _times(self.query_balance, q), _times(self.key_balance, k)
        # To the dtype of v, which is shorter under autocast.
        return q.to(v.dtype), k.to(v.dtype), v

    def _prepare(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        return prepare(x, self._lengths(), rotary)

    def _lengths(self) -> Tensor | None:
        """Returns ‖q‖ = ‖k‖ of every head, None without qk_norm."""
        # The root of τ·√d via logarithms: for τ near zero τ itself has no gradient, and its root an infinite one.
        if self.log_temperature is not None:
            return float(self.head_dim**0.25) * torch.exp(0.5 * self.log_temperature)
        if self.temperature_logit is None:
            return None
        largest = math.sqrt(self.max_temperature * math.sqrt(self.head_dim))
        return largest * torch.exp(0.5 * F.logsigmoid(self.temperature_logit))


def _normed(x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """Returns q or k after its norm over all heads, if it has one; in the type of the norm, x may be shorter."""
    if norm is None:
        return x
    normed: Tensor = norm(x.to(norm.weight.dtype))
    return normed


def _times(
    balance: Float[Tensor, "heads head_dim head_dim"], x: Float[Tensor, "length heads head_dim"]
) -> Float[Tensor, "length heads head_dim"]:
    """Returns the product of the matrix of each head with every vector of it."""
    return (x.transpose(0, 1) @ balance.to(x.dtype).mT).transpose(0, 1)


def rescale(
    q: Float[Tensor, "length heads head_dim"], k: Float[Tensor, "length heads head_dim"], segments: Segments
) -> tuple[Float[Tensor, "length heads head_dim"], Float[Tensor, "length heads head_dim"]]:
    """Returns Ψ·q and k/Ψ with Ψ_l = (Σk_l²/Σq_l²)^¼ over the tokens of a segment, for each head (arXiv 2302.00787).

    q·k stays the same, and of all such rescalings this one minimises Σ‖q‖² + Σ‖k‖². No gradient flows through Ψ. It
    depends on the whole segment, so causal attention cannot use it.
    """
    with torch.no_grad():
        q_sums, k_sums = (segments.sums(x.float().square()) for x in (q, k))
        # A dimension that is zero in all tokens stays as it is.
        ratio = torch.where((q_sums > 0) & (k_sums > 0), k_sums / q_sums, 1.0)
        # Not pow(¼): its last bits depend on the position of a number in memory.
        psi = ratio.sqrt().sqrt().index_select(0, segments.numbers)
    return (q * psi).to(q.dtype), (k / psi).to(k.dtype)
