"""QK-norm and rotary positions of queries and keys, and which implementation of them runs where."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from protlm.model.positions import rotate
from protlm.ops import heads_cpp

# A vector shorter than this keeps its direction and stays short, instead of dividing by zero.
_SMALLEST_NORM = 1e-12

Rotary = tuple[Float[Tensor, "length head_dim"], Float[Tensor, "length head_dim"]]


def prepare(
    x: Float[Tensor, "length heads head_dim"],
    lengths: Float[Tensor, " heads"] | None,
    rotary: Rotary | None,
) -> Float[Tensor, "length heads head_dim"]:
    """Returns the vectors of every head rescaled to its length and rotated, by the compiled kernel where it can be.

    Args:
        x: Vectors.
        lengths: The length of each head; None: vectors keep their own.
        rotary: The cosines and sines of rotary positions; None: vectors are not rotated.

    Returns:
        In the dtype of x by the kernel, else in that or a longer one.
    """
    if lengths is None and rotary is None:
        return x
    if torch.compiler.is_compiling() or not heads_cpp.covers(x, lengths, *(rotary or ())):
        x = x if lengths is None else normalise(x, lengths)
        return x if rotary is None else rotate(x, *rotary)
    result: Tensor = _Prepare.apply(x, lengths, *(rotary or (None, None)))[0]  # type: ignore[no-untyped-call]
    return result


def normalise(
    x: Float[Tensor, "length heads head_dim"], lengths: Float[Tensor, " heads"]
) -> Float[Tensor, "length heads head_dim"]:
    """Returns the vectors of every head rescaled to the length of the head, in the type of the lengths or longer."""
    x = _widened(x, lengths)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (lengths.unsqueeze(-1) / norms.clamp_min(_SMALLEST_NORM))


def _widened(x: Tensor, lengths: Tensor) -> Tensor:
    """Returns x in float32 or longer where nothing is trained.

    The norm of half-precision numbers may be beyond their range, and a short one nothing. In training under autocast,
    which is of bfloat16, the range is that of float32, and a wider copy would be kept for the gradients.
    """
    return x if torch.is_grad_enabled() else x.to(torch.promote_types(x.dtype, lengths.dtype))


class _Prepare(torch.autograd.Function):
    """The kernel and its gradients, for which only its result is kept, which attention keeps anyway."""

    @staticmethod
    def forward(
        x: Tensor, lengths: Tensor | None, cosines: Tensor | None, sines: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        norms = x.new_empty(x.shape[:2], dtype=torch.float32)
        rotary = None if cosines is None or sines is None else (cosines, sines)
        return heads_cpp.forward(x, lengths, rotary, norms=norms), norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, lengths, cosines, sines = inputs
        out, norms = output
        ctx.mark_non_differentiable(norms)
        ctx.save_for_backward(out, lengths, cosines, sines, norms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _norms: Tensor | None) -> tuple[Tensor, Tensor | None, None, None]:
        out, lengths, *others = ctx.saved_tensors
        # In a function of its own, which gets plain tensors under torch.func too.
        x_grad, lengths_grad = _PrepareGradients.apply(grad, out, lengths, *others)  # type: ignore[no-untyped-call]
        return x_grad, None if lengths is None else lengths_grad, None, None


class _PrepareGradients(torch.autograd.Function):
    """The gradients of the kernel, which have none themselves; that of the lengths is empty without lengths."""

    @staticmethod
    def forward(
        grad: Tensor, out: Tensor, lengths: Tensor | None, cosines: Tensor | None, sines: Tensor | None, norms: Tensor
    ) -> tuple[Tensor, Tensor]:
        rotary = None if cosines is None or sines is None else (cosines, sines)
        x_grad, lengths_grad = heads_cpp.backward(grad, out, lengths, rotary, norms)
        return x_grad, norms.new_empty(0) if lengths_grad is None else lengths_grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("lengths and rotations of q and k have first derivatives only, got a second derivative")
