"""Packed rows: the bounds of the proteins of a row, in the forms that the layers need to keep proteins apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of one packed row, computed once for all layers; tensors only, so that layers can be compiled.

    Attributes:
        cu_seqlens: int32 bounds, 0 to length.
        cpu_bounds: The same on the CPU, for loops over segments.
        positions: Position of every token in its segment, from 0.
        lengths: Length of every token's segment.
        numbers: Number of every token's segment, from 0.
    """

    cu_seqlens: Int[Tensor, " bounds"]
    cpu_bounds: Int[Tensor, " bounds"]
    positions: Int[Tensor, " length"]
    lengths: Int[Tensor, " length"]
    numbers: Int[Tensor, " length"]

    @classmethod
    def from_bounds(cls, cu_seqlens: Int[Tensor, " bounds"]) -> "Segments":
        """Returns the segments between the given bounds."""
        if len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens: expected at least 2 bounds, got {len(cu_seqlens)}")
        sizes = cu_seqlens.diff().long()
        starts = torch.repeat_interleave(cu_seqlens[:-1].long(), sizes)
        positions = torch.arange(len(starts), device=cu_seqlens.device) - starts
        lengths = torch.repeat_interleave(sizes, sizes)
        numbers = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        return cls(cu_seqlens, cu_seqlens.cpu(), positions, lengths, numbers)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest segment."""
        return int(self.cpu_bounds.diff().max())

    def sums(self, x: Float[Tensor, "length heads head_dim"]) -> Float[Tensor, "segments heads head_dim"]:
        """Returns the sum of x over the tokens of every segment, always added in the same order."""
        sums: Tensor = torch.segment_reduce(x, "sum", lengths=self.cu_seqlens.diff().long(), unsafe=True)
        return sums

    def lacks_neighbour(self, offset: int) -> Bool[Tensor, " length"]:
        """Returns True for each token whose neighbour `offset` positions later is in another segment or in none."""
        neighbour = self.positions + offset
        return (neighbour < 0) | (neighbour >= self.lengths)
