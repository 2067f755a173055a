"""The values that steps in plain torch hand on: states that stay in range, the inputs of a backward, and products."""

from dataclasses import dataclass

import torch
from torch import Tensor

from protlm.ops.blocks import Block, Stretch

LOG_ZERO = -1e30
"""Stands for log 0 where a state has seen no key: finite, so that differences of it are not NaN."""
NOT_REAL = 1e30
"""Query sums that make the features, or the gradient, of a token that is not real vanish."""


@dataclass
class State:
    """Sums over keys whose features are relative to the references.

    Attributes:
        sums: (heads, segments, features, head_dim + 1).
        references: (heads, segments, features or 1), logarithms.
    """

    sums: Tensor
    references: Tensor

    @classmethod
    def taken(cls, states: Tensor, references: Tensor, block: Block) -> "State":
        """Returns a copy of the states of the segments of a block."""
        return cls(states[block.segments].transpose(0, 1), references[block.segments].transpose(0, 1))

    def put(self, states: Tensor, references: Tensor, block: Block) -> None:
        """Writes the state of a block to the states of all segments."""
        states[block.segments] = self.sums.transpose(0, 1)
        references[block.segments] = self.references.transpose(0, 1)

    def move_to(self, references: Tensor) -> None:
        """Makes the sums relative to other references."""
        self.sums.mul_(torch.exp(self.references - references).unsqueeze(-1))
        self.references = references

    def add(self, features: Tensor, values: Tensor) -> None:
        """Adds Σ features ⊗ values over positions."""
        add_product(self.sums, features.transpose(2, 3), values)

    def clone(self) -> "State":
        """Returns a copy that changes of this state do not reach."""
        return State(self.sums.clone(), self.references)


@dataclass(frozen=True)
class Saved:
    """The tensors along the length that the backward gets.

    Attributes:
        out_grad: The gradient of the output.
        out: The output.
        query_sums: The renormaliser of each query, for exponential maps its logarithm (batch, heads, length).
        sums_grad: The gradient of these logarithms; None for zero.
    """

    out_grad: Tensor
    out: Tensor
    query_sums: Tensor
    sums_grad: Tensor | None = None

    def pulled(self, stretch: Stretch, dtype: torch.dtype) -> Tensor:
        """Returns the gradient of the sums of [v, 1], but for the division by the renormaliser.

        It is the gradient of the output, followed by minus its inner product with the output.
        """
        out_grad = stretch.take(self.out_grad, dtype, only_valid=True)
        inner = (out_grad * stretch.take(self.out, dtype)).sum(-1, keepdim=True).neg_()
        if self.sums_grad is not None:
            inner += stretch.take(self.sums_grad.unsqueeze(-1), dtype, only_valid=True)
        return torch.cat((out_grad, inner), -1)

    def sums(self, stretch: Stretch, dtype: torch.dtype) -> Tensor:
        """Returns the query sums (…, positions, 1); those of padding make its features vanish."""
        sums = stretch.take(self.query_sums.unsqueeze(-1), dtype)
        return sums if stretch.valid is None else sums.masked_fill(~stretch.valid[..., None], NOT_REAL)

    def of_heads(self, heads: slice) -> "Saved":
        """Returns the part of these heads."""
        sums_grad = None if self.sums_grad is None else self.sums_grad[:, heads]
        return Saved(self.out_grad[:, heads], self.out[:, heads], self.query_sums[:, heads], sums_grad)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a·b for two leading axes taken as one batch."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:2], a.shape[2], b.shape[-1])


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a·b to out, for two leading axes taken as one batch."""
    out.view(-1, *out.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
