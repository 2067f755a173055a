"""Self-attention over packed rows: hides which kind of attention is used, and how q and k are kept in its range."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from protlm.config import ModelConfig
from protlm.model.segments import Segments, rotate
from protlm.ops import draw_projection, favor_attention

_INITIAL_TEMPERATURE = 0.75
"""Share of max_temperature at which every head starts."""

# A vector shorter than this keeps its direction and stays short, instead of dividing by zero.
_SMALLEST_NORM = 1e-12


class SegmentConvolution(nn.Module):
    """A depthwise convolution along the length that stays inside segments; it starts as the identity."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels))

    def reset(self) -> None:
        """Sets the identity: weight 1 on the token itself, 0 on its neighbours."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[len(self.weight) // 2])

    def forward(self, x: Float[Tensor, "length channels"], segments: Segments) -> Float[Tensor, "length channels"]:
        """Returns Σ_o weight_o · x_{t+o} over the neighbours of the same segment."""
        half = len(self.weight) // 2
        out = x * self.weight[half]
        for offset in range(-half, half + 1):
            if offset:
                # What the roll brings round the end has no neighbour there either.
                shifted = x.roll(-offset, 0)
                # Zeros put in rather than multiplied with: what another protein holds cannot even pass on a NaN.
                shifted = shifted.index_fill_(0, segments.without_neighbour(offset), 0.0)
                out = torch.addcmul(out, shifted, self.weight[half + offset])
        return out


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions: FAVOR with any feature map, or exact `softmax`.

    Under qk_norm every head has ‖q‖² = ‖k‖² = τ·√head_dim with a learned τ in (0, max_temperature], so that the
    variance of the estimated weights stays bounded: (e^{4τ} − 1)/num_features relative to the weight, at the worst.
    rescale_qk then changes their norms, and never makes the sum of ‖q‖² and ‖k‖² larger.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.attention
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rescale_qk = config.rescale_qk
        self.projection_kind = config.projection
        self.max_temperature = config.max_temperature
        self.query, self.key, self.value, self.output = (
            nn.Linear(config.model_dim, config.model_dim) for _ in range(4)
        )
        self.convolution = SegmentConvolution(3 * config.model_dim, config.conv_width) if config.conv_width else None
        self.temperature_logit = nn.Parameter(torch.empty(config.num_heads)) if config.qk_norm else None
        shape = (config.num_heads, config.num_features, config.head_dim)
        self.projection: Tensor | None
        self.register_buffer("projection", torch.empty(shape) if config.has_projection else None)

    def reset(self, generator: torch.Generator) -> None:
        """Sets what is no weight of a linear layer, and draws the projection."""
        if self.convolution is not None:
            self.convolution.reset()
        if self.temperature_logit is not None:
            nn.init.constant_(self.temperature_logit, math.log(_INITIAL_TEMPERATURE / (1 - _INITIAL_TEMPERATURE)))
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Draws a new projection for every head; nothing to do where there is none."""
        if self.projection is not None:
            assert self.projection_kind != "none"
            heads, features, head_dim = self.projection.shape
            drawn = draw_projection(features, head_dim, kind=self.projection_kind, num_heads=heads, generator=generator)
            self.projection.copy_(drawn)

    def forward(
        self, x: Float[Tensor, "length model_dim"], segments: Segments, rotary: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "length model_dim"]:
        """Returns the attention's output for one packed row."""
        inputs = torch.cat((self.query(x), self.key(x), self.value(x)), dim=-1)
        if self.convolution is not None:
            inputs = self.convolution(inputs, segments)
        heads = inputs.view(len(x), 3, self.num_heads, self.head_dim)
        # One call for q and k, and back to the dtype of v, which autocast may have made shorter.
        q_and_k = rotate(self._normalise(heads[:, :2]).flatten(1, 2), *rotary).to(heads.dtype)
        q, k = q_and_k.view(len(x), 2, self.num_heads, self.head_dim).unbind(1)
        if self.rescale_qk:
            q, k = rescale(q, k, segments)
        q, k, v = (y.transpose(0, 1).unsqueeze(0) for y in (q, k, heads[:, 2]))
        if self.kind == "softmax":
            out = _exact_attention(q, k, v, segments)
        else:
            out = favor_attention(q, k, v, self.projection, feature_map=self.kind, cu_seqlens=segments.cu_seqlens)
        result: Tensor = self.output(out.squeeze(0).transpose(0, 1).flatten(1))
        return result

    def _normalise(self, x: Tensor) -> Tensor:
        if self.temperature_logit is None:
            return x
        temperature = self.max_temperature * torch.sigmoid(self.temperature_logit)
        wanted = torch.sqrt(temperature * math.sqrt(self.head_dim)).unsqueeze(-1)
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (wanted / norm.clamp_min(_SMALLEST_NORM))


def rescale(
    q: Float[Tensor, "length heads head_dim"], k: Float[Tensor, "length heads head_dim"], segments: Segments
) -> tuple[Float[Tensor, "length heads head_dim"], Float[Tensor, "length heads head_dim"]]:
    """Returns Ψ·q and k/Ψ with Ψ_l = (Σk_l²/Σq_l²)^¼ over the tokens of a segment, for each head (arXiv 2302.00787).

    q·k stays, and of all such rescalings this one makes Σ‖q‖² + Σ‖k‖² least. Ψ is no path for gradients. It is made of
    the whole segment, so it has no place in causal attention.
    """
    with torch.no_grad():
        q_sums, k_sums = (segments.sums(x.float().square()) for x in (q, k))
        # A dimension that is zero throughout has nothing to even out.
        ratio = torch.where((q_sums > 0) & (k_sums > 0), k_sums / q_sums, 1.0)
        psi = ratio.pow(0.25).index_select(0, segments.numbers)
    return (q * psi).to(q.dtype), (k / psi).to(k.dtype)


def _exact_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Returns softmax attention, one segment at a time: never a (length, length) mask over the row."""
    outs = [
        F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop])
        for start, stop in pairwise(segments.bounds)
        if stop > start
    ]
    return torch.cat(outs, dim=2)
