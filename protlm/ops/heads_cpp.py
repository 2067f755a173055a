"""Queries and keys before attention by the compiled kernel: how a call is passed to C++.

In one pass a convolution along the segment, the length that the head gives its vectors, and the rotation by their
position; each may be left out. Numbers are summed in float32.
"""

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from protlm.ops import compiled

# As in cpp/heads.h.
_BLOCK_TOKENS = 64
_LARGEST_HEAD = 512
_DTYPES = (torch.float32, torch.bfloat16)

Rotary = tuple[Float[Tensor, "length head_dim"], Float[Tensor, "length head_dim"]]


@dataclass(frozen=True)
class Neighbours:
    """A depthwise convolution that stays inside segments.

    Attributes:
        weight: Of every offset and channel; the channels are contiguous.
        first_offset: The offset of the first row; one of the rows is that of offset 0.
        positions: Position of every token in its segment, from 0.
        lengths: Length of every token's segment.
    """

    weight: Float[Tensor, "width channels"]
    first_offset: int
    positions: Int[Tensor, " length"]
    lengths: Int[Tensor, " length"]


def covers(x: Float[Tensor, "length heads head_dim"], *others: Tensor | None) -> bool:
    """Returns whether the kernel can prepare x; `others` are the lengths and angles, which it takes in float32."""
    is_simple = x.device.type == "cpu" and x.dtype in _DTYPES and x.shape[-1] <= _LARGEST_HEAD
    are_float32 = all(other is None or other.dtype == torch.float32 for other in others)
    return is_simple and are_float32 and compiled.why_not() is None


def forward(
    x: Float[Tensor, "length heads head_dim"],
    lengths: Float[Tensor, " heads"] | None = None,
    rotary: Rotary | None = None,
    *,
    neighbours: Neighbours | None = None,
    norms: Float[Tensor, "length heads"] | None = None,
) -> Float[Tensor, "length heads head_dim"]:
    """Returns the prepared vectors, in the dtype of x.

    Args:
        x: Vectors.
        lengths: What those of each head are rescaled to; None: their own.
        rotary: The cosines and sines of rotary positions; the two halves of each are equal.
        neighbours: The convolution that comes first.
        norms: Where to write the norms before rescaling.
    """
    out = x.new_empty(x.shape)
    call = _Call(x, out, lengths, rotary)
    if norms is not None:
        call.structure.norms = norms.data_ptr()
    if neighbours is not None:
        call.enter(neighbours)
    call.run("forward")
    return out


def backward(
    grad: Float[Tensor, "length heads head_dim"],
    out: Float[Tensor, "length heads head_dim"],
    lengths: Float[Tensor, " heads"] | None,
    rotary: Rotary | None,
    norms: Float[Tensor, "length heads"] | None,
) -> tuple[Float[Tensor, "length heads head_dim"], Float[Tensor, " heads"] | None]:
    """Returns the gradients of x and of the lengths from that of `out`, what `forward` returned without neighbours."""
    grad, out = _with_heads(grad), _with_heads(out)
    x_grad = out.new_empty(out.shape)
    call = _Call(x_grad, out, lengths, rotary)
    call.structure.grad, call.structure.grad_stride = grad.data_ptr(), grad.stride(0)
    call.structure.x_grad = x_grad.data_ptr()
    partial = None
    if lengths is not None and norms is not None:
        partial = norms.new_empty((-(-len(out) // _BLOCK_TOKENS), len(lengths)))
        call.structure.norms, call.structure.length_grads = norms.data_ptr(), partial.data_ptr()
    call.run("backward")
    return x_grad, None if partial is None else partial.sum(0)


class _Call:
    """The structure `HeadsCall` of a call, and the tensors that it points to."""

    def __init__(self, x: Tensor, out: Tensor, lengths: Tensor | None, rotary: Rotary | None) -> None:
        x = _with_heads(x)
        lengths = None if lengths is None else lengths.detach().contiguous()
        cosines, sines = (None, None) if rotary is None else (angles.contiguous() for angles in rotary)
        self._alive = [x, out, lengths, cosines, sines]
        self.structure = compiled.HeadsCall(
            tokens=x.shape[0],
            heads=x.shape[1],
            head_dim=x.shape[2],
            is_half=x.dtype == torch.bfloat16,
            x=x.data_ptr(),
            out=out.data_ptr(),
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            lengths=None if lengths is None else lengths.data_ptr(),
            cosines=None if cosines is None else cosines.data_ptr(),
            sines=None if sines is None else sines.data_ptr(),
            angles_stride=x.shape[2],
            num_threads=torch.get_num_threads(),
        )

    def enter(self, neighbours: Neighbours) -> None:
        """Enters a convolution."""
        weight = neighbours.weight.detach()
        self._alive += [weight, neighbours.positions, neighbours.lengths]
        self.structure.width, self.structure.first_offset = len(weight), neighbours.first_offset
        self.structure.weight, self.structure.weight_stride = weight.data_ptr(), weight.stride(0)
        self.structure.positions = neighbours.positions.data_ptr()
        self.structure.segment_lengths = neighbours.lengths.data_ptr()

    def run(self, task: str) -> None:
        """Runs a task of the kernel."""
        compiled.functions("heads", compiled.best_kernel())[task](ctypes.byref(self.structure))


def _with_heads(x: Tensor) -> Tensor:
    """Returns x with contiguous heads of contiguous numbers."""
    is_fitting = (x.stride(2) == 1 or x.shape[2] == 1) and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
    return x if is_fitting else x.contiguous()
