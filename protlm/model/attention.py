"""Self-attention over packed rows: the kind of attention, and how q and k are kept in its range."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from protlm.config import ModelConfig
from protlm.model.convolution import SegmentConvolution
from protlm.model.positions import rotate
from protlm.model.qk_norm import normalise, normalise_and_rotate
from protlm.model.segments import Segments
from protlm.model.stretches import in_stretches
from protlm.ops import draw_projection, favor_attention, oprf_parameter
from protlm.ops.feature_maps import definition_of
from protlm.ops.inputs import AttentionInputs
from protlm.ops.oprf import oprf_a_from_data

_INITIAL_TEMPERATURE = 0.75
"""Initial temperature of every head, as a share of max_temperature."""


class SelfAttention(nn.Module):
    """Multi-head attention: FAVOR with any feature map, or exact `softmax`; bidirectional or causal.

    With qk_norm every head has ‖q‖² = ‖k‖² = τ·√head_dim with a learned τ in (0, max_temperature], which bounds the
    relative variance of the estimated weights by (e^{4τ} − 1)/num_features. rescale_qk then changes these norms, but
    never increases the sum of ‖q‖² and ‖k‖².
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.attention
        self.takes_oprf_a = config.attention != "softmax" and definition_of(config.attention).takes_oprf_a
        self.causal = config.causal
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rescale_qk = config.rescale_qk
        self.projection_kind = config.projection
        self.max_temperature = config.max_temperature
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
        self.temperature_logit = nn.Parameter(torch.empty(config.num_heads)) if config.qk_norm else None
        shape = (config.num_heads, config.num_features, config.head_dim)
        self.projection: Tensor | None
        self.register_buffer("projection", torch.empty(shape) if config.has_projection else None)
        self._uncompiled: Callable[..., Tensor] | None = None

    def prepare_compile(self) -> None:
        """Excludes exact attention from compilation: its number of calls depends on the number of segments."""
        # Not as a decorator, which would import the compiler even where nothing is compiled.
        self._uncompiled = torch.compiler.disable(_exact_attention)  # type: ignore[no-untyped-call]

    def reset(self, generator: torch.Generator) -> None:
        """Sets the parameters that are not of linear layers, and draws the projection."""
        if self.convolution is not None:
            self.convolution.reset()
        if self.temperature_logit is not None:
            nn.init.constant_(self.temperature_logit, math.log(_INITIAL_TEMPERATURE / (1 - _INITIAL_TEMPERATURE)))
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Draws a new projection for every head, if the attention has projections."""
        if self.projection is not None:
            assert self.projection_kind != "none"
            heads, features, head_dim = self.projection.shape
            drawn = draw_projection(features, head_dim, kind=self.projection_kind, num_heads=heads, generator=generator)
            self.projection.copy_(drawn)

    def forward(
        self, x: Float[Tensor, "length model_dim"], segments: Segments, rotary: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "length model_dim"]:
        """Returns the output of the attention for one packed row; without `rotary`, q and k are not rotated."""
        out = self.attend(*self.queries_keys_values(x, segments, rotary), segments)
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
        if self.kind == "softmax":
            exact_attention = self._uncompiled or _exact_attention
            out = exact_attention(q, k, v, segments, self.causal)
        else:
            out = favor_attention(
                q,
                k,
                v,
                self.projection,
                feature_map=self.kind,
                cu_seqlens=segments.cu_seqlens,
                causal=self.causal,
                oprf_a=self.fixed_oprf_a(),
            )
        return out.squeeze(0).transpose(0, 1)

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
            convolved = self.convolution(in_stretches(self._projected, x), segments)
            q, k, v = in_stretches(self._prepared, *convolved, *angles)
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
        return None if self.temperature_logit is None else self.max_temperature * torch.sigmoid(self.temperature_logit)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def _prepared(self, q: Tensor, k: Tensor, v: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the heads of q, k and v, with q and k normalised and rotated; tokens do not interact."""
        q, k, v = (y.view(-1, self.num_heads, self.head_dim) for y in (q, k, v))
        rotary = (angles[0], angles[1]) if angles else None
        # To the dtype of v, which is shorter under autocast.
        return self._prepare(q, rotary).to(v.dtype), self._prepare(k, rotary).to(v.dtype), v

    def _prepare(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.temperature_logit is None:
            return x if rotary is None else rotate(x, *rotary)
        # The root of τ·√d via logarithms: for τ near zero τ itself has no gradient, and its root an infinite one.
        largest = math.sqrt(self.max_temperature * math.sqrt(self.head_dim))
        lengths = largest * torch.exp(0.5 * F.logsigmoid(self.temperature_logit))
        return normalise(x, lengths) if rotary is None else normalise_and_rotate(x, lengths, rotary)


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


def _exact_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Returns softmax attention, one segment at a time, without a (length, length) mask over the row."""
    outs = [
        F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], is_causal=causal)
        for start, stop in pairwise(segments.cpu_bounds.tolist())
        if stop > start
    ]
    # Concatenated in their memory layout, tokens first.
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)
