"""The convolution before attention: how it stays inside the proteins of a row, and which implementation runs where."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from protlm.model.segments import Segments
from protlm.ops.heads_cpp import Neighbours


class SegmentConvolution(nn.Module):
    """A depthwise convolution along the length that stays inside segments; it starts as the identity.

    Its window is centred on a token, or ends with the token if it is causal.
    """

    def __init__(self, channels: int, width: int, *, causal: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels))
        first = 1 - width if causal else -(width // 2)
        self.offsets = tuple(range(first, first + width))

    def reset(self) -> None:
        """Sets the weights of the identity: 1 for the token itself, 0 for its neighbours."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[self.offsets.index(0)])

    def forward(
        self, inputs: Sequence[Float[Tensor, "length _"]], segments: Segments
    ) -> list[Float[Tensor, "length _"]]:
        """Returns Σ_o weight_o · x_{t+o} over the neighbours in the same segment, for each input.

        Args:
            inputs: Tensors whose channels, concatenated, are those of the convolution.
            segments: The segments of the row.
        """
        pairs = zip(inputs, torch.split(self.weight, [x.shape[1] for x in inputs], dim=1), strict=True)
        x = inputs[0]
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != self.weight.dtype:
            # In the dtype of x, which is shorter under autocast: the attention that follows is faster in it.
            return [shifted_sum(x, weight.to(x.dtype), self.offsets, segments) for x, weight in pairs]
        lacking = [segments.lacks_neighbour(offset).nonzero().squeeze(1) for offset in self.offsets]
        lacked = [segments.lacks_neighbour(-offset).nonzero().squeeze(1) for offset in self.offsets]
        return [
            _InPlaceSum.apply(x, weight, self.offsets, lacking, lacked)  # type: ignore[no-untyped-call]
            for x, weight in pairs
        ]

    def neighbours(self, segments: Segments, num_inputs: int) -> list[Neighbours]:
        """Returns the convolution of each of so many equal inputs, as the kernel that prepares heads takes it."""
        places = (self.offsets[0], segments.positions, segments.lengths)
        return [Neighbours(weight, *places) for weight in self.weight.chunk(num_inputs, dim=1)]


def shifted_sum(
    x: Float[Tensor, "length channels"],
    weight: Float[Tensor, "width channels"],
    offsets: Sequence[int],
    segments: Segments,
) -> Float[Tensor, "length channels"]:
    """Returns the convolution by operations on whole tensors: few kernels on a GPU, which a compiler fuses into one."""
    out = x * weight[offsets.index(0)]
    for row, offset in enumerate(offsets):
        if offset:
            # Tokens that the roll wraps around lack that neighbour too. Filled with zeros, not multiplied by them, so
            # that a NaN of another protein has no effect.
            shifted = x.roll(-offset, 0).masked_fill(segments.lacks_neighbour(offset).unsqueeze(1), 0.0)
            out = torch.addcmul(out, shifted, weight[row])
    return out


class _InPlaceSum(torch.autograd.Function):
    """The convolution on a CPU, without shifted copies of the row, which would cost more than the sums themselves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offsets: Sequence[int], lacking: list[Tensor], lacked: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.offsets, ctx.lacking, ctx.lacked = offsets, lacking, lacked
        return _add_shifted(x, weight, offsets, lacking)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        # If t + o is the neighbour of t at o, t is the neighbour of t + o at −o.
        x_grad = _add_shifted(grad, weight, [-offset for offset in ctx.offsets], ctx.lacked)
        weight_grad = torch.empty_like(weight)
        products = torch.empty_like(x)
        for row, (offset, lacking) in enumerate(zip(ctx.offsets, ctx.lacking, strict=True)):
            here, there = _overlap(len(x), offset)
            torch.mul(grad[here], x[there], out=products[here])
            torch.sum(products.index_fill_(0, lacking, 0.0), 0, out=weight_grad[row])
        return x_grad, weight_grad, None, None, None


def _add_shifted(x: Tensor, weight: Tensor, offsets: Sequence[int], lacking: list[Tensor]) -> Tensor:
    out = x * weight[offsets.index(0)]
    for row, offset in enumerate(offsets):
        if offset:
            here, there = _overlap(len(x), offset)
            # Saved and restored, not corrected, so that a NaN of another protein has no effect.
            kept = out.index_select(0, lacking[row])
            out[here].addcmul_(x[there], weight[row])
            out.index_copy_(0, lacking[row], kept)
    return out


def _overlap(length: int, offset: int) -> tuple[slice, slice]:
    """Returns the tokens whose neighbour at `offset` is in the row, and those neighbours."""
    start = max(0, -offset)
    stop = max(start, min(length, length - offset))
    return slice(start, stop), slice(start + offset, stop + offset)
