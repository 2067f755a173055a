"""The norms of the encoder: LayerNorm, or RMSNorm for models that were trained with it."""

from torch import nn

from protlm.config import ModelConfig

EncoderNorm = nn.LayerNorm | nn.RMSNorm


def encoder_norm(config: ModelConfig) -> EncoderNorm:
    """Returns a norm over the residual stream, of the kind in the settings."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.model_dim, eps=config.norm_eps)
