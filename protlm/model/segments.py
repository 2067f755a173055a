"""Packed rows: the bounds of the proteins of a row, in the forms that the layers need to keep proteins apart."""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protlm.ops.inputs import check_bounds, runs_ahead


@dataclass(frozen=True)
class Segments:
    """The segments of one packed row, computed once for all layers; tensors only, so that layers can be compiled.

    Attributes:
        cu_seqlens: int32 bounds, 0 to length.
        positions: Position of every token in its segment, from 0.
        lengths: Length of every token's segment.
        numbers: Number of every token's segment, from 0.
    """

    cu_seqlens: Int[Tensor, " bounds"]
    positions: Int[Tensor, " length"]
    lengths: Int[Tensor, " length"]
    numbers: Int[Tensor, " length"]

    @classmethod
    def from_bounds(cls, cu_seqlens: Int[Tensor, " bounds"], length: int) -> "Segments":
        """Returns the segments between the given bounds of a row of this length; on a GPU the host does not wait.

        Raises:
            ValueError: Bounds that do not rise from 0 to the length; on a GPU the device asserts it.
        """
        if len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens: expected at least 2 bounds, got {len(cu_seqlens)}")
        check_bounds(cu_seqlens, length)
        places = torch.arange(length, device=cu_seqlens.device)
        numbers = torch.searchsorted(cu_seqlens, places, right=True) - 1
        bounds = cu_seqlens.long()
        return cls(cu_seqlens, places - bounds[numbers], bounds.diff()[numbers], numbers)

    @functools.cached_property
    def cpu_bounds(self) -> Int[Tensor, " bounds"]:
        """The bounds on the CPU, for loops over segments: on a GPU the host waits for them."""
        return self.cu_seqlens.cpu()

    def check_longest(self, max_positions: int) -> None:
        """Checks that no segment has more tokens; on a GPU the device asserts it.

        Raises:
            ValueError: One has more.
        """
        longest = self.cu_seqlens.diff().max()
        expected = f"cu_seqlens: expected segments of at most max_positions = {max_positions} tokens"
        if runs_ahead(longest.device):
            torch._assert_async(longest <= max_positions, expected)
        elif longest > max_positions:
            raise ValueError(f"{expected}, got one of {int(longest)}")

    def sums(self, x: Float[Tensor, "length heads head_dim"]) -> Float[Tensor, "segments heads head_dim"]:
        """Returns the sum of x over the tokens of every segment, always added in the same order."""
        sums: Tensor = torch.segment_reduce(x, "sum", lengths=self.cu_seqlens.diff().long(), unsafe=True)
        return sums

    def lacks_neighbour(self, offset: int) -> Bool[Tensor, " length"]:
        """Returns True for each token whose neighbour `offset` positions later is in another segment or in none."""
        neighbour = self.positions + offset
        return (neighbour < 0) | (neighbour >= self.lengths)
