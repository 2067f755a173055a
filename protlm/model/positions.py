"""The position of a token in its protein: how rotary and sinusoidal positions are computed and applied."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BASE = 10000.0


def rotary_angles(
    positions: Int[Tensor, " length"],
    head_dim: int,
    dtype: torch.dtype,
    frequencies: Float[Tensor, " pairs"] | None = None,
) -> tuple[Float[Tensor, "length head_dim"], Float[Tensor, "length head_dim"]]:
    """Returns the cosines and sines of rotary positions.

    The angles are position · 10000^(−2i/head_dim) for the pairs (i, i + head_dim/2), as in ESM-2, or position times the
    given frequencies: those of a published model may be rounded to 16 bits, and at a thousand residues the difference
    changes its results by a percent.
    """
    if frequencies is None:
        frequencies = rotary_frequencies(head_dim, positions.device)
    angles = torch.outer(positions.float(), frequencies.float()).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "length heads head_dim"],
    cosines: Float[Tensor, "length head_dim"],
    sines: Float[Tensor, "length head_dim"],
) -> Float[Tensor, "length heads head_dim"]:
    """Returns x rotated by the angles of its position; norms stay the same, and q·k depends on distances alone."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.addcmul(x * cosines.unsqueeze(1), turned, sines.unsqueeze(1))


def sinusoids(positions: Int[Tensor, " length"], model_dim: int) -> Float[Tensor, "length model_dim"]:
    """Returns sin and cos of position · 10000^(−2i/model_dim) in the columns 2i and 2i + 1 (arXiv 1706.03762)."""
    angles = torch.outer(positions.float(), rotary_frequencies(model_dim, positions.device))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def standard_frequencies(dim: int) -> Float[Tensor, " pairs"]:
    """Returns 10000^(−2i/dim), rounded as other programs do, for an imported model that does not hold its own."""
    return 1.0 / (_BASE ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def rotary_frequencies(dim: int, device: torch.device | None = None) -> Float[Tensor, " pairs"]:
    """Returns 10000^(−2i/dim)."""
    pairs = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    return _BASE ** (-pairs / dim)
