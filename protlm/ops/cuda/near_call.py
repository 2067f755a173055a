"""The launches of exact attention to near tokens: of `local_attention`, and of the near field of near-far attention."""

import math

import torch
from torch import Tensor

from protlm.ops.cuda.launch import Launch, capability_for, is_wide, launch_of
from protlm.ops.cuda.near_forward import near_forward
from protlm.ops.cuda.near_key_gradients import near_key_gradients
from protlm.ops.cuda.near_query_gradients import near_query_gradients
from protlm.ops.cuda.tiles import no_longer_than, padded_dim, tile_of
from protlm.ops.cuda.units import Units
from protlm.ops.inputs import AttentionInputs


class NearCall:
    """One call: the launches, and the arguments that they have in common."""

    def __init__(
        self, inputs: AttentionInputs, units: Units, before: int, after: int, capability: int | None = None
    ) -> None:
        """Prepares a call.

        Args:
            inputs: The inputs, with the numbers of each vector contiguous; those of FAVOR are not read.
            units: Its units, with their reach.
            before: Most tokens that a key in reach may stand before a query that sees it.
            after: The same behind it; 0 is causal.
            capability: Stands in for the compute capability of the device.
        """
        self.inputs, self.units = inputs, units
        self.heads, self.head_dim = inputs.q.shape[1], inputs.q.shape[-1]
        self._capability = capability or capability_for(inputs.q.device)
        length = inputs.q.shape[2]
        self._reach = {"before": min(before, length), "after": min(after, length)}

    def forward(
        self, out: Tensor, query_sums: Tensor, far: Tensor | None = None, far_sums: Tensor | None = None
    ) -> Launch:
        """Returns the launch that computes the output and the logarithms to base 2 of the normalisers."""
        inputs = self.inputs
        tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "far": inputs.q if far is None else far, "out": out}
        arguments: dict[str, Tensor | int | float] = {
            "query_sums": query_sums, "far_sums": query_sums if far_sums is None else far_sums,
            "norm_factor": 0.5 * self.head_dim**-0.5 * math.log2(math.e),
        }  # fmt: skip
        constants = {"HAS_FAR": far is not None, "IS_CAUSAL": self._reach["after"] == 0}
        return self._launch(near_forward, tensors, arguments, constants)

    def query_gradients(
        self,
        out_grad: Tensor,
        out: Tensor,
        query_sums: Tensor,
        inner: Tensor,
        q_grad: Tensor,
        far_grad: Tensor | None = None,
    ) -> Launch:
        """Returns the launch for the gradient of the queries; it reads `inner` beside a far part, else it writes it."""
        inputs = self.inputs
        tensors = {
            "q": inputs.q, "k": inputs.k, "v": inputs.v, "out": out, "out_grad": out_grad,
            "far_grad": q_grad if far_grad is None else far_grad, "q_grad": q_grad,
        }  # fmt: skip
        arguments = {"query_sums": query_sums, "inner": inner, "grad_factor": self.head_dim**-0.5}
        return self._launch(near_query_gradients, tensors, arguments, {"HAS_FAR": far_grad is not None})

    def key_gradients(
        self,
        out_grad: Tensor,
        query_sums: Tensor,
        inner: Tensor,
        grads: tuple[Tensor, Tensor],
        far_grads: tuple[Tensor, Tensor] | None = None,
    ) -> Launch:
        """Returns the launch for the gradients of keys and values, into `grads`."""
        inputs = self.inputs
        tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "out_grad": out_grad}
        tensors |= zip(("far_k_grad", "far_v_grad"), far_grads or grads, strict=True)
        tensors |= zip(("k_grad", "v_grad"), grads, strict=True)
        arguments = {"query_sums": query_sums, "inner": inner, "grad_factor": self.head_dim**-0.5}
        return self._launch(near_key_gradients, tensors, arguments, {"HAS_FAR": far_grads is not None})

    def _launch(
        self,
        kernel: object,
        tensors: dict[str, Tensor],
        arguments: dict[str, Tensor | int | float],
        constants: dict[str, bool],
    ) -> Launch:
        dim, mask, length = padded_dim(self.head_dim), self.inputs.token_mask, self.inputs.q.shape[2]
        name: str = kernel.__name__  # type: ignore[attr-defined]
        tile = tile_of(name, self._capability, dim, 0, is_wide=is_wide(self.inputs.q))
        tile = no_longer_than(tile, self.units.tokens)
        is_batch = self.inputs.cu_seqlens is None
        tiles = -(-self.units.tokens // tile.tokens)
        common: dict[str, Tensor | int | float] = {
            # Without a mask the kernel reads none, and any tensor will do.
            "token_mask": self.units.table if mask is None else mask.contiguous().view(torch.uint8),
            "mask_row": length if mask is not None and is_batch else 0,
            "units": self.units.table,
            "sums_row": self.heads * length if is_batch else 0,
            "sums_head": length,
            "factor": self.head_dim**-0.5 * math.log2(math.e),
            **self._reach,
        }  # fmt: skip
        known = {
            "HEADS": self.heads, "HEAD_DIM": self.head_dim, "DIM": dim, "TILES": tiles, "HAS_MASK": mask is not None,
            **constants,
        }  # fmt: skip
        programs = self.units.count * self.heads * tiles
        return launch_of(kernel, tile, programs, tensors, {**common, **arguments}, known, is_batch=is_batch)
