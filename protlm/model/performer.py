"""The Performer language model: an encoder over packed rows, and a language-model head of the shape of ESM's."""

import math
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protlm.choices import AttentionKind
from protlm.config import ModelConfig
from protlm.model.attention import SelfAttention
from protlm.model.feed_forward import activate_and_project
from protlm.model.norms import encoder_norm
from protlm.model.positions import rotary_angles, rotary_frequencies, sinusoids
from protlm.model.segments import Segments
from protlm.model.stretches import in_stretches
from protlm.model.token_table import TokenTable

_EMBEDDING_SCALE = 0.02
_DROPPED_IN_TRAINING = 0.15 * 0.8
"""Mean fraction of `<mask>` in a protein while ESM was trained."""


class EncoderLayer(nn.Module):
    """Attention and a feed-forward layer f, each with a residual sum: x + f(LN(x)), or LN(x + f(x)) for post-LN.

    The feed-forward layer is W_out·GELU(W_in·x), or W_out·(SiLU(W_gate·x) · W_in·x) for SwiGLU. W_gate and W_in are
    separate matrices, because Muon orthogonalises each matrix by itself.
    """

    def __init__(self, config: ModelConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.is_pre_norm = config.layer_norm == "pre"
        self.attention_norm = encoder_norm(config)
        self.attention = SelfAttention(config, kind)
        self.ffn_norm = encoder_norm(config)
        self.ffn_in = nn.Linear(config.model_dim, config.ffn_dim)
        self.ffn_gate = nn.Linear(config.model_dim, config.ffn_dim) if config.ffn == "swiglu" else None
        self.ffn_out = nn.Linear(config.ffn_dim, config.model_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "length model_dim"],
        segments: Segments,
        rotary: tuple[Tensor, Tensor] | None,
        kept: Int[Tensor, " kept"] | None = None,
    ) -> Float[Tensor, "kept_or_length model_dim"]:
        """Returns the residual stream after this layer, at the `kept` positions of the row or at all of them."""
        attended = self.attention(self.attention_norm(x) if self.is_pre_norm else x, segments, rotary, kept)
        if kept is not None:
            x = x.index_select(0, kept)
        (x,) = in_stretches(self._after_attention, x, attended)
        return x

    def _after_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor]:
        x = x + self.dropout(attended)
        if self.is_pre_norm:
            return (x + self.dropout(self._feed_forward(self.ffn_norm(x))),)
        x = self.attention_norm(x)
        return (self.ffn_norm(x + self.dropout(self._feed_forward(x))),)

    def _feed_forward(self, x: Tensor) -> Tensor:
        gate = None if self.ffn_gate is None else self.ffn_gate(x)
        return activate_and_project(self.ffn_in(x), gate, self.ffn_out)


class LanguageModelHead(nn.Module):
    """dense – GELU – LayerNorm – decoder with bias, or the decoder alone; its matrix may be the embedding (tied)."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        is_dense = config.head == "dense"
        self.dense = nn.Linear(config.model_dim, config.model_dim) if is_dense else None
        self.norm = nn.LayerNorm(config.model_dim, eps=config.norm_eps) if is_dense else None
        # No nn.Linear, whose matrices decay and may be Muon's: it is an embedding of tokens.
        self.decoder = None if config.tied_head else nn.Parameter(torch.empty(vocabulary_size, config.model_dim))
        self.bias = nn.Parameter(torch.empty(vocabulary_size))

    def forward(self, x: Float[Tensor, "*axes model_dim"], embedding: Tensor) -> Float[Tensor, "*axes model_tokens"]:
        """Returns the logits of every token of the model."""
        if self.dense is not None and self.norm is not None:
            # In float32: weights of the dense layer may be shorter.
            x = self.norm(F.gelu(self.dense(x)).to(self.norm.weight.dtype))
        return F.linear(x, embedding if self.decoder is None else self.decoder, self.bias)


class Performer(nn.Module):
    """A language model over packed rows of proteins that predicts hidden residues, or the next token if it is causal.

    A row is a 1-D tensor of tokens of data, `<cls> residues <eos>` of each protein back to back, with the bounds of its
    segments; no protein sees another. Logits are those of the model's own tokens, which may be others.
    Weights and projections are undefined until `reset` or a loaded state.

    Attributes:
        token_table: Translates between the tokens of data and those of the model.
        checkpoint_activations: Whether training keeps only the input of each layer, and recomputes the rest for the
            gradients, which stay the same to the bit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        vocabulary = config.tokens()
        self.token_table = TokenTable(vocabulary)
        self.embedding = nn.Embedding(len(vocabulary), config.model_dim, padding_idx=vocabulary.pad)
        self.position_embedding = (
            nn.Embedding(config.max_positions, config.model_dim) if config.positions == "learned" else None
        )
        self.embedding_norm = encoder_norm(config) if config.embedding_norm else None
        self.rotary_frequencies: Tensor | None
        pairs = config.head_dim // 2
        self.register_buffer("rotary_frequencies", torch.empty(pairs) if config.stored_frequencies else None)
        self.layers = nn.ModuleList(EncoderLayer(config, kind) for kind in config.kinds)
        # The last layer of a post-LN encoder ends with a norm of its own.
        self.final_norm = encoder_norm(config) if config.layer_norm == "pre" else None
        self.head = LanguageModelHead(config, len(vocabulary))

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Sets every weight and projection as a function of the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, SelfAttention):
                module.reset(generator)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_SCALE, generator=generator)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=_EMBEDDING_SCALE, generator=generator)
        if self.head.decoder is not None:
            nn.init.normal_(self.head.decoder, std=_EMBEDDING_SCALE, generator=generator)
        if self.rotary_frequencies is not None:
            self.rotary_frequencies.copy_(rotary_frequencies(self.config.head_dim))
        nn.init.zeros_(self.head.bias)
        # The residual stream sums two outputs per layer; its initial variance must not grow with depth. With post-LN,
        # small outputs keep deep encoders stable (arXiv 2203.00555).
        for layer in self.encoder_layers():
            layer.attention.output.weight.mul_((2 * self.config.num_layers) ** -0.5)
            layer.ffn_out.weight.mul_((2 * self.config.num_layers) ** -0.5)

    def redraw(self, generator: torch.Generator) -> None:
        """Draws new projections in every layer."""
        for layer in self.encoder_layers():
            layer.attention.redraw(generator)

    def compile_layers(self) -> None:
        """Compiles the forward of each encoder layer, once for rows of all lengths; names of parameters stay."""
        for layer in self.encoder_layers():
            layer.attention.prepare_compile()
            layer.compile(dynamic=True)

    def hidden_states(
        self, tokens: Int[Tensor, " length"], cu_seqlens: Int[Tensor, " bounds"], layers: Collection[int]
    ) -> dict[int, Tensor]:
        """Returns the requested hidden states of a row, each (length, model_dim).

        Args:
            tokens: A packed row.
            cu_seqlens: int32 bounds of its segments.
            layers: 0 is the embedding with the positions added to it, normalised if the model does so; i the residual
                stream after layer i, and the last one the result of the final norm.

        Raises:
            ValueError: There is no such layer, or a segment is longer than the learned positions.
        """
        unknown = sorted(set(layers) - set(range(self.config.num_layers + 1)))
        if unknown:
            raise ValueError(f"layers: expected numbers from 0 to {self.config.num_layers}, got {unknown}")
        return self._states(tokens, cu_seqlens, layers, None)

    def attention_outputs(
        self,
        inputs: Mapping[int, Float[Tensor, "length model_dim"]],
        segments: Segments,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> dict[int, Float[Tensor, "length model_dim"]]:
        """Returns the outputs of the attention of some layers, each for a row that is given to it alone.

        Args:
            inputs: The row of each layer, as its attention would get it, by the number of the layer, from 1.
            segments: Its segments, the same for all.
            rotary: The angles of rotary positions.
        """
        layers, outputs = self.encoder_layers(), {}
        for number, x in inputs.items():
            attention = layers[number - 1].attention
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                outputs[number] = checkpoint(attention, x, segments, rotary, use_reentrant=False)
            else:
                outputs[number] = attention(x, segments, rotary)
        return outputs

    def _states(
        self, tokens: Tensor, cu_seqlens: Tensor, layers: Collection[int], kept: Tensor | None
    ) -> dict[int, Tensor]:
        """Returns hidden states; that after the last layer only at the `kept` positions, unless that is None."""
        segments = Segments.from_bounds(cu_seqlens, len(tokens))
        x = self._embed(tokens, segments)
        states = {0: x} if 0 in layers else {}
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_angles(segments.positions, self.config.head_dim, x.dtype, self.rotary_frequencies)
        for number, layer in enumerate(self.encoder_layers(), start=1):
            is_last = number == self.config.num_layers
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, segments, rotary, use_reentrant=False)
            elif is_last and kept is not None:
                x = layer(x, segments, rotary, kept)
            else:
                x = layer(x, segments, rotary)
            if is_last and self.final_norm is not None:
                x = self.final_norm(x)
            if number in layers:
                states[number] = x
        return states

    def forward(
        self,
        tokens: Int[Tensor, " length"],
        cu_seqlens: Int[Tensor, " bounds"],
        target_positions: Int[Tensor, " targets"] | None = None,
    ) -> Float[Tensor, "targets model_tokens"]:
        """Returns the logits of the model's tokens at the target positions, by default at all positions of the row.

        Raises:
            ValueError: A segment is longer than the learned positions; on a GPU the device asserts it.
        """
        last = self.config.num_layers
        # Without gradients the feed-forward part of the last layer, too, is computed at the targets only.
        kept = None if torch.is_grad_enabled() else target_positions
        x = self._states(tokens, cu_seqlens, (last,), kept)[last]
        if target_positions is not None and kept is None:
            x = x.index_select(0, target_positions)
        logits: Tensor = self.head(x, self.embedding.weight)
        return logits

    def _embed(self, tokens: Tensor, segments: Segments) -> Tensor:
        tokens = self.token_table.own(tokens)
        x: Tensor = self.embedding(tokens)
        if self.config.token_dropout:
            x = self._without_masks(x, tokens == self.token_table.vocabulary.mask, segments)
        if self.position_embedding is not None:
            segments.check_longest(self.config.max_positions)
            x = x + self.position_embedding(segments.positions)
        elif self.config.positions == "sinusoidal":
            # Sines have a mean square of 1/2: scaled to that of an initial embedding, neither dominates the other.
            scale = math.sqrt(2) * _EMBEDDING_SCALE
            x = x + scale * sinusoids(segments.positions, self.config.model_dim).to(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _without_masks(self, x: Tensor, is_mask: Tensor, segments: Segments) -> Tensor:
        """Returns the embedding with zeros for `<mask>`, and as large as in ESM's training whatever is hidden."""
        sizes = segments.cu_seqlens.diff()
        counts = torch.zeros(len(sizes), device=x.device).index_add_(0, segments.numbers, is_mask.float())
        shares = (counts / sizes)[segments.numbers].unsqueeze(1)
        return (x.masked_fill(is_mask.unsqueeze(1), 0.0) * (1 - _DROPPED_IN_TRAINING) / (1 - shares)).to(x.dtype)

    def encoder_layers(self) -> list[EncoderLayer]:
        """Returns the layers, first layer first."""
        return [layer for layer in self.layers if isinstance(layer, EncoderLayer)]
