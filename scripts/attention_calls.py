"""One call of attention, as the benchmark and the report measure it: its size, its inputs and its peak of memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from protlm.ops import draw_projection
from scripts.measuring import WARM_UP_LENGTH, peak_during, resident_bytes

HEADS, HEAD_DIM, FEATURES = 8, 64, 256
FORWARD, BOTH = "forward", "forward + backward"

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes q, k, v and the projection to the output."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of one call: q, k and v, the projection, and the gradient of the output."""

    qkv: tuple[Tensor, Tensor, Tensor]
    projection: Tensor
    out_grad: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Returns the same in another number type."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in self.qkv)
        return Inputs((q, k, v), self.projection.to(dtype), self.out_grad.to(dtype))

    def forward(self, attention: Attention) -> Tensor:
        """Returns the output."""
        return attention(*self.qkv, self.projection)

    def backward(self, attention: Attention) -> tuple[Tensor, ...]:
        """Returns the output and the gradients of q, k and v."""
        out = self.forward(attention)
        return out.detach(), *torch.autograd.grad(out, self.qkv, self.out_grad)

    def outputs(self, attention: Attention, work: str) -> tuple[Tensor, ...]:
        """Returns the output of a forward that keeps nothing for a backward; for `BOTH` also the gradients."""
        if work == BOTH:
            return self.backward(attention)
        with torch.no_grad():
            return (self.forward(attention),)


def draw_inputs(length: int, heads: int = HEADS) -> Inputs:
    """Returns inputs of unit variance, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, HEAD_DIM)
    q, k, v, out_grad = (torch.randn(shape, generator=generator) for _ in range(4))
    projection = draw_projection(FEATURES, HEAD_DIM, num_heads=heads, generator=generator)
    return Inputs((q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), projection, out_grad)


def exact(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, causal: bool = False) -> Tensor:
    """Returns softmax attention by torch's fused kernel; the projection is not used."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def peak_above_inputs(attention: Attention, length: int, work: str) -> int:
    """Returns the peak of one call in this process, in bytes above its inputs and outputs, after a short call."""
    draw_inputs(WARM_UP_LENGTH).outputs(attention, work)
    inputs = draw_inputs(length)
    before = resident_bytes()
    peak, outputs = peak_during(lambda: inputs.outputs(attention, work))
    return peak - before - sum(output.nbytes for output in outputs)
