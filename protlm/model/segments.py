"""Packed rows: hides where the proteins of a row begin and end from every layer that must not look across."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of one packed row, computed once for all layers.

    Attributes:
        cu_seqlens: int32 bounds, 0 to length.
        bounds: The same bounds as Python numbers.
        positions: Place of every token in its segment, from 0.
        lengths: Length of every token's segment.
        numbers: Number of every token's segment, from 0.
    """

    cu_seqlens: Int[Tensor, " bounds"]
    bounds: tuple[int, ...]
    positions: Int[Tensor, " length"]
    lengths: Int[Tensor, " length"]
    numbers: Int[Tensor, " length"]

    @classmethod
    def from_bounds(cls, cu_seqlens: Int[Tensor, " bounds"]) -> "Segments":
        """Returns the segments between the given bounds."""
        sizes = cu_seqlens.diff().long()
        starts = torch.repeat_interleave(cu_seqlens[:-1].long(), sizes)
        positions = torch.arange(len(starts), device=cu_seqlens.device) - starts
        lengths = torch.repeat_interleave(sizes, sizes)
        numbers = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        return cls(cu_seqlens, tuple(cu_seqlens.tolist()), positions, lengths, numbers)

    def sums(self, x: Float[Tensor, "length heads head_dim"]) -> Float[Tensor, "segments heads head_dim"]:
        """Returns the sum of x over the tokens of every segment, always in the same order."""
        sums: Tensor = torch.segment_reduce(x, "sum", lengths=self.cu_seqlens.diff().long(), unsafe=True)
        return sums

    def without_neighbour(self, offset: int) -> Int[Tensor, " tokens"]:
        """Returns the places in the row whose token `offset` places further is of another segment or of none."""
        neighbour = self.positions + offset
        return ((neighbour < 0) | (neighbour >= self.lengths)).nonzero().squeeze(1)

    def rotary(self, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines, each (length, head_dim), of rotary positions that start anew in every segment.

        Angles are position · 10000^(−2i/head_dim) for the pairs (i, i + head_dim/2), as in ESM-2.
        """
        pairs = torch.arange(0, head_dim, 2, device=self.positions.device, dtype=torch.float32)
        frequencies = 10000.0 ** (-pairs / head_dim)
        angles = torch.outer(self.positions.float(), frequencies).repeat(1, 2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "length heads head_dim"],
    cosines: Float[Tensor, "length head_dim"],
    sines: Float[Tensor, "length head_dim"],
) -> Float[Tensor, "length heads head_dim"]:
    """Returns x turned by the angles of its position; norms stay, and q·k depends on the distance alone."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.addcmul(x * cosines.unsqueeze(1), turned, sines.unsqueeze(1))
