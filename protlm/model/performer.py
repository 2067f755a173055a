"""The Performer masked language model: a pre-LN encoder over packed rows, with a head of ESM's shape."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from protlm.config import ModelConfig
from protlm.model.attention import SelfAttention
from protlm.model.segments import Segments
from protlm.vocabulary import PAD, VOCABULARY_SIZE

_EMBEDDING_SCALE = 0.02


class EncoderLayer(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)), with GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim)
        self.attention = SelfAttention(config)
        self.ffn_norm = nn.LayerNorm(config.model_dim)
        self.ffn_in = nn.Linear(config.model_dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.model_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "length model_dim"], segments: Segments, rotary: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "length model_dim"]:
        """Returns the residual stream after this layer."""
        x = x + self.dropout(self.attention(self.attention_norm(x), segments, rotary))
        x = x + self.dropout(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x)))))
        return x


class LanguageModelHead(nn.Module):
    """dense – GELU – LayerNorm – decoder with bias; the decoder's matrix is the token embedding (tied)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.model_dim, config.model_dim)
        self.norm = nn.LayerNorm(config.model_dim)
        self.bias = nn.Parameter(torch.empty(VOCABULARY_SIZE))

    def forward(self, x: Float[Tensor, "*axes model_dim"], embedding: Tensor) -> Float[Tensor, "*axes vocab_size"]:
        """Returns the logits of every token."""
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)


class Performer(nn.Module):
    """A masked language model over packed rows of proteins.

    A row is a 1-D tensor of tokens, `<cls> residues <eos>` of each protein back to back, with the bounds of its
    segments; no protein sees another. Weights and projections are undefined until `reset` or a loaded state.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY_SIZE, config.model_dim, padding_idx=PAD)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.model_dim)
        self.head = LanguageModelHead(config)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Sets every weight and projection as a function of the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, SelfAttention):
                module.reset(generator)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_SCALE, generator=generator)
        nn.init.zeros_(self.head.bias)
        # The residual stream sums two outputs a layer; its variance at the start must not grow with depth.
        for layer in self._encoder_layers():
            layer.attention.output.weight.mul_((2 * self.config.num_layers) ** -0.5)
            layer.ffn_out.weight.mul_((2 * self.config.num_layers) ** -0.5)

    def redraw(self, generator: torch.Generator) -> None:
        """Draws new projections in every layer."""
        for layer in self._encoder_layers():
            layer.attention.redraw(generator)

    def hidden_states(
        self, tokens: Int[Tensor, " length"], cu_seqlens: Int[Tensor, " bounds"], layers: Collection[int]
    ) -> dict[int, Tensor]:
        """Returns the wanted hidden states of a row, each (length, model_dim).

        Args:
            tokens: A packed row.
            cu_seqlens: int32 bounds of its segments.
            layers: 0 is the embedding, i the residual stream after layer i; the last one is after the final LayerNorm.

        Raises:
            ValueError: A layer that is not there.
        """
        unknown = sorted(set(layers) - set(range(self.config.num_layers + 1)))
        if unknown:
            raise ValueError(f"layers: expected numbers from 0 to {self.config.num_layers}, got {unknown}")
        segments = Segments.from_bounds(cu_seqlens)
        x = self.embedding(tokens)
        wanted = {0: x} if 0 in layers else {}
        rotary = segments.rotary(self.config.head_dim, x.dtype)
        for number, layer in enumerate(self._encoder_layers(), start=1):
            x = layer(x, segments, rotary)
            if number == self.config.num_layers:
                x = self.final_norm(x)
            if number in layers:
                wanted[number] = x
        return wanted

    def forward(
        self,
        tokens: Int[Tensor, " length"],
        cu_seqlens: Int[Tensor, " bounds"],
        target_positions: Int[Tensor, " targets"] | None = None,
    ) -> Float[Tensor, "targets vocab_size"]:
        """Returns the logits at the target positions, by default at all of the row."""
        last = self.config.num_layers
        x = self.hidden_states(tokens, cu_seqlens, (last,))[last]
        if target_positions is not None:
            x = x.index_select(0, target_positions)
        logits: Tensor = self.head(x, self.embedding.weight)
        return logits

    def _encoder_layers(self) -> list[EncoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, EncoderLayer)]
