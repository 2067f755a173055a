"""QK-norm and rotary positions of queries and keys, and which implementation of them runs where."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from protlm.model.positions import rotate

# A vector shorter than this keeps its direction and stays short, instead of dividing by zero.
_SMALLEST_NORM = 1e-12
# Tokens that are rotated together on a CPU: their intermediate results stay in its cache.
_STRETCH_TOKENS = 256


def normalise(
    x: Float[Tensor, "length heads head_dim"], lengths: Float[Tensor, " heads"]
) -> Float[Tensor, "length heads head_dim"]:
    """Returns the vectors of every head rescaled to the length of the head, in the type of the lengths or longer."""
    x = _widened(x, lengths)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (lengths.unsqueeze(-1) / norms.clamp_min(_SMALLEST_NORM))


def normalise_and_rotate(
    x: Float[Tensor, "length heads head_dim"],
    lengths: Float[Tensor, " heads"],
    rotary: tuple[Float[Tensor, "length head_dim"], Float[Tensor, "length head_dim"]],
) -> Float[Tensor, "length heads head_dim"]:
    """Returns the normalised and rotated vectors of every head, in float32 or longer."""
    x = _widened(x, lengths)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != lengths.dtype:
        return rotate(normalise(x, lengths), *rotary)
    result: Tensor = _NormaliseAndRotate.apply(x, lengths, *rotary)  # type: ignore[no-untyped-call]
    return result


def _widened(x: Tensor, lengths: Tensor) -> Tensor:
    """Returns x in float32 or longer where nothing is trained.

    The norm of half-precision numbers may be beyond their range, and a short one nothing. In training under autocast,
    which is of bfloat16, the range is that of float32, and a wider copy would be kept for the gradients.
    """
    return x if torch.is_grad_enabled() else x.to(torch.promote_types(x.dtype, lengths.dtype))


class _NormaliseAndRotate(torch.autograd.Function):
    """Normalisation and rotation on a CPU, in few passes and without intermediate tensors of the whole row.

    With y = R·s·x/‖x‖ and g the gradient of y, the gradient of x is Rᵀ(g − y·(y·g)/s²)·s/‖x‖, and that of s is (y·g)/s
    summed over tokens: only y is kept, which attention keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factors = lengths.unsqueeze(-1) / norms.clamp_min(_SMALLEST_NORM)
        out = _turned(x, cosines, sines, factors)
        ctx.save_for_backward(out, lengths, cosines, sines, norms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        out, lengths, cosines, sines, norms = ctx.saved_tensors
        lengths = lengths.unsqueeze(-1)
        products = torch.linalg.vecdot(out, grad).unsqueeze(-1)
        lengths_grad = products.sum(0).div_(lengths).squeeze(-1)
        # Vectors below the smallest norm were only multiplied by a constant.
        shares = products.div_(lengths.square()).masked_fill_(norms < _SMALLEST_NORM, 0.0)
        tangent = torch.addcmul(grad, out, shares, value=-1)
        x_grad = _turned(tangent, cosines, -sines, lengths / norms.clamp_min(_SMALLEST_NORM))
        return x_grad, lengths_grad, None, None


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, factors: Tensor) -> Tensor:
    """Returns R·x·factors, a stretch at a time; the two halves of the cosines are equal, and those of the sines."""
    half = x.shape[-1] // 2
    cosines, sines = (y[:, :half].unsqueeze(1) for y in (cosines, sines))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, len(x), _STRETCH_TOKENS):
        tokens = slice(start, start + _STRETCH_TOKENS)
        first, second = (x[tokens] * factors[tokens]).chunk(2, dim=-1)
        cosine, sine = cosines[tokens], sines[tokens]
        torch.mul(first, cosine, out=out[tokens, :, :half]).addcmul_(second, sine, value=-1)
        torch.mul(second, cosine, out=out[tokens, :, half:]).addcmul_(first, sine)
    return out
