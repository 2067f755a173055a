"""One call of the op as kernel launches: how arguments are prepared, and which of them each kernel gets."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from protlm.ops.cuda.add_gradients import add_gradients
from protlm.ops.cuda.fold_keys import fold_keys
from protlm.ops.cuda.key_gradients import key_gradients
from protlm.ops.cuda.launch import Launch, capability_for, is_wide, launch_of, run_on
from protlm.ops.cuda.merge_states import merge_states
from protlm.ops.cuda.query_gradients import query_gradients
from protlm.ops.cuda.read_state import read_state
from protlm.ops.cuda.short_backward import short_backward
from protlm.ops.cuda.short_forward import short_forward
from protlm.ops.cuda.state_gradients import state_gradients
from protlm.ops.cuda.tiles import Tile, fits_chip, padded_dim, padded_features, tile_of
from protlm.ops.cuda.units import Units, cut_into_units, state_dtype, whole_segments
from protlm.ops.feature_maps import check_backend
from protlm.ops.inputs import AttentionInputs

_LOG2_E = math.log2(math.e)
# Tokens of a unit: shorter if there are few programs, so that every multiprocessor has one.
_UNIT_TOKENS = (1024, 512, 256)
_ENOUGH_PROGRAMS = 264
# Segments up to this mean length are computed by one program per head, if its state fits on the chip.
_SHORT_TOKENS = 1024
_ENOUGH_SHORT_PROGRAMS = 64


@dataclass(frozen=True)
class StateGrad:
    """The gradient of the state of each segment.

    Attributes:
        means: (segments, heads, padded features, padded head_dim), each row relative to its size.
        sums: (segments, heads, padded features): Σ weights · inner product of output and gradient.
        sizes: The same shape: the largest number of each row of means.
    """

    means: Tensor
    sums: Tensor
    sizes: Tensor


class Call:
    """One call of the op: its launches, and the arguments that they have in common.

    The state of a segment is the mean of v under each feature (segments, heads, padded features, padded head_dim), and
    `references` (segments, heads, padded features): the base-2 logarithm of the feature's sum, for `relu` the sum.
    """

    def __init__(self, inputs: AttentionInputs, capability: int | None = None) -> None:
        """Prepares a call; `capability` (80, 90, …) stands in for that of the device."""
        check_backend(inputs.feature_map, "triton")
        self.inputs = inputs
        if capability is None:
            capability = capability_for(inputs.q.device)
        self.capability = capability
        self.heads, self.head_dim = inputs.q.shape[1], inputs.q.shape[-1]
        self.dim = padded_dim(self.head_dim)
        self.padded = padded_features(inputs.num_features)
        self._q, self._k, self._v = (with_neighbours(x) for x in (inputs.q, inputs.k, inputs.v))
        rows, self._scale = self._projection()
        padding = (0, self.dim - self.head_dim, 0, self.padded - rows.shape[-2])
        self._rows = torch.nn.functional.pad(rows, padding).contiguous()
        self._mask = inputs.token_mask.contiguous().view(torch.uint8) if inputs.token_mask is not None else None
        self._scales, self._constants = self._of_segments()

    def takes_short(self, kernel: str, *others: Tensor) -> bool:
        """Returns whether a kernel for short segments takes the call: by the mean length, which the host knows.

        `others` are the tensors that it would read and write along the length beside q, k and v.
        """
        inputs = self.inputs
        mean_length = inputs.q.shape[0] * inputs.q.shape[2] / inputs.num_segments
        has_enough = inputs.num_segments * self.heads >= _ENOUGH_SHORT_PROGRAMS
        # Within a segment these kernels count in 32 bits.
        reach = inputs.q.shape[2] * max(x.stride(2) for x in (self._q, self._k, self._v, *others))
        is_short = has_enough and mean_length <= _SHORT_TOKENS and reach < 2**31
        return is_short and fits_chip(kernel, self.capability, self.dim, self.padded, is_wide=is_wide(inputs.q))

    @functools.cached_property
    def units(self) -> Units:
        """Units of bounded length."""
        inputs = self.inputs
        programs = inputs.q.shape[0] * inputs.q.shape[2] * self.heads * max(1, self.padded // 128)
        tokens = next((n for n in _UNIT_TOKENS if programs // n >= _ENOUGH_PROGRAMS), _UNIT_TOKENS[-1])
        return cut_into_units(inputs, tokens)

    def run(self, launches: Sequence[Launch]) -> None:
        """Starts launches one after the other, on the current stream of the device of the inputs."""
        run_on(self.inputs.q.device, launches)

    def query_sums(self) -> Tensor:
        """Returns a tensor for the renormalisers, to be written."""
        return self._q.new_empty(self._q.shape[:3], dtype=torch.float32)

    def empty_state_grad(self) -> StateGrad:
        """Returns the gradient of the state, to be written."""
        shape = (self.inputs.num_segments, self.heads, self.padded)
        means = self.inputs.v.new_empty((*shape, self.dim), dtype=state_dtype(self.inputs))
        sums = means.new_empty(shape, dtype=torch.float32)
        return StateGrad(means, sums, torch.empty_like(sums))

    def query_references(self, references: Tensor) -> Tensor:
        """Returns the references for queries: those of `relu` relative to the largest."""
        if self.inputs.is_exponential:
            return references
        largest = references.amax(-1, keepdim=True)
        return torch.where(largest == 0, 0.0, references / largest)

    def short_forward(self, means: Tensor, references: Tensor, out: Tensor, query_sums: Tensor) -> Launch:
        """Returns the launch that does the whole forward, with one program per segment and head."""
        tensors = {"q": self._q, "k": self._k, "v": self._v, "out": out}
        arguments = {
            **self._reading(), "means": means, "references": references, "query_sums": query_sums,
            **self._sum_strides(),
            **self._factors("factor", "norm_factor"),
        }  # fmt: skip
        return self._launch(short_forward, whole_segments(self.inputs), tensors, arguments)

    def short_backward(
        self,
        out_grad: Tensor,
        out: Tensor,
        means: Tensor,
        references: Tensor,
        query_sums: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> Launch:
        """Returns the launch that does the whole backward, with one program per segment and head, into `grads`."""
        tensors = {"q": self._q, "k": self._k, "v": self._v, "out": out, "out_grad": with_neighbours(out_grad)}
        tensors |= zip(("q_grad", "k_grad", "v_grad"), grads, strict=True)
        arguments = {
            **self._reading(), "means": means, "references": references, "query_sums": query_sums,
            **self._sum_strides(),
            **self._factors("factor", "norm_factor", "grad_factor", "norm_grad_factor"),
        }  # fmt: skip
        return self._launch(short_backward, whole_segments(self.inputs), tensors, arguments)

    def fold(self, means: Tensor, references: Tensor) -> list[Launch]:
        """Returns the launches that fold the keys of every unit and merge the states of each segment."""
        unit_means, unit_references = self._of_units()
        arguments = {
            **self._common(), "means": unit_means, "references": unit_references,
            **self._factors("factor", "norm_factor"),
        }  # fmt: skip
        folded = self._launch(fold_keys, self.units, {"k": self._k, "v": self._v}, arguments)
        arguments = {
            "unit_means": unit_means, "unit_references": unit_references, "first_units": self.units.first,
            "means": means, "references": references,
        }  # fmt: skip
        return [folded, self._launch(merge_states, None, {}, arguments)]

    def read(self, means: Tensor, references: Tensor, out: Tensor, query_sums: Tensor) -> Launch:
        """Returns the launch that reads states, given the references for queries."""
        arguments = {
            **self._reading(), "means": means, "references": references, "query_sums": query_sums,
            **self._sum_strides(), **self._factors("factor"),
        }  # fmt: skip
        return self._launch(read_state, self.units, {"q": self._q, "out": out}, arguments)

    def query_gradients(
        self,
        out_grad: Tensor,
        out: Tensor,
        means: Tensor,
        references: Tensor,
        query_sums: Tensor,
        q_grad: Tensor,
        state_grad: StateGrad,
    ) -> list[Launch]:
        """Returns the launches for the gradients of the queries and of the state."""
        out_grad = with_neighbours(out_grad)
        common = {
            **self._reading(), "references": references, "query_sums": query_sums,
            "inner": torch.empty_like(query_sums), **self._sum_strides(),
        }  # fmt: skip
        tensors = {"q": self._q, "out": out, "out_grad": out_grad, "q_grad": q_grad}
        arguments = {
            **common, "means": means, "sums_grad": query_sums,
            **self._factors("factor", "norm_factor", "grad_factor", "norm_grad_factor"),
        }  # fmt: skip
        of_queries = self._launch(query_gradients, self.units, tensors, arguments)
        unit_means, unit_sums = self._of_units()
        arguments = {**common, "mean_grads": unit_means, "sum_grads": unit_sums, **self._factors("factor")}
        of_units = self._launch(state_gradients, self.units, {"q": self._q, "out_grad": out_grad}, arguments)
        arguments = {
            "unit_mean_grads": unit_means, "unit_sum_grads": unit_sums, "first_units": self.units.first,
            "mean_grads": state_grad.means, "sum_grads": state_grad.sums, "sizes": state_grad.sizes,
        }  # fmt: skip
        return [of_queries, of_units, self._launch(add_gradients, None, {}, arguments)]

    def key_gradients(self, references: Tensor, state_grad: StateGrad, k_grad: Tensor, v_grad: Tensor) -> Launch:
        """Returns the launch for the gradients of keys and values."""
        arguments = {
            **self._common(), "references": references, "mean_grads": state_grad.means,
            "sum_grads": state_grad.sums, "sizes": state_grad.sizes,
            **self._factors("factor", "norm_factor", "grad_factor", "norm_grad_factor"),
        }  # fmt: skip
        tensors = {"k": self._k, "v": self._v, "k_grad": k_grad, "v_grad": v_grad}
        return self._launch(key_gradients, self.units, tensors, arguments)

    def _launch(
        self,
        kernel: Any,
        units: Units | None,
        tensors: dict[str, Tensor],
        arguments: dict[str, Any],
        **others: int,
    ) -> Launch:
        """Returns a launch with the strides of tensors, the tiles of the device and the constants of all kernels.

        A program computes a unit and head, or a segment and head if `units` is None; for a kernel with several tiles,
        one tile of these. `others` are constants that are not those of all calls.
        """
        tile = self._tile_of(kernel.__name__)
        names = set(kernel.arg_names)
        if units is not None:
            arguments["units"] = units.table
        blocks = 1
        if "TILES" in names:
            assert units is not None
            blocks = -(-units.tokens // tile.tokens)
        elif "TILE_FEATURES" in names:
            blocks = self.padded // tile.features
        known = {
            "HEADS": self.heads, "HEAD_DIM": self.head_dim, "DIM": self.dim, "FEATURES": self.inputs.num_features,
            "PADDED": self.padded, "TILES": blocks,
            "IS_EXPONENTIAL": self.inputs.is_exponential, "HAS_MASK": self._mask is not None,
            "HAS_SCALES": self._scales is not None, "HAS_CONSTANTS": self._constants is not None,
            "HAS_SUMS_GRAD": False, "IS_ABSOLUTE": False, "PER_UNIT": False, **others,
        }  # fmt: skip
        programs = (self.inputs.num_segments if units is None else units.count) * self.heads * blocks
        is_batch = self.inputs.cu_seqlens is None
        return launch_of(kernel, tile, programs, tensors, arguments, known, is_batch=is_batch)

    def _tile_of(self, kernel: str) -> Tile:
        tile = tile_of(kernel, self.capability, self.dim, self.padded, is_wide=is_wide(self.inputs.q))
        if kernel == "read_state" and not self.inputs.is_exponential:
            # The state of `relu` is float32: half as many of its rows take the same registers.
            tile = replace(tile, features=min(tile.features, 32))
        return tile

    def _common(self) -> dict[str, Any]:
        """Returns the arguments of every kernel that multiplies with the projection."""
        rows, mask = self._rows, self._mask
        return {
            "projection": rows,
            "projection_head": rows.stride(0) if rows.dim() == 3 else 0,
            "scales": rows if self._scales is None else self._scales,
            # Without a mask the kernel reads none, and any tensor will do.
            "token_mask": rows.view(torch.uint8) if mask is None else mask,
            "mask_row": mask.stride(0) if mask is not None and self.inputs.cu_seqlens is None else 0,
        }

    def _reading(self) -> dict[str, Any]:
        """Returns the arguments of every kernel that has features of queries, too."""
        return {**self._common(), "constants": self._rows if self._constants is None else self._constants}

    def _sum_strides(self) -> dict[str, int]:
        length = self._q.shape[2]
        return {"sums_row": self.heads * length if self.inputs.cu_seqlens is None else 0, "sums_head": length}

    def _factors(self, *names: str) -> dict[str, float]:
        base = _LOG2_E if self.inputs.is_exponential else 1.0
        factors = {
            "factor": self._scale * base,
            "norm_factor": 0.5 * self.head_dim**-0.5 * base,
            "grad_factor": self._scale,
            "norm_grad_factor": self.head_dim**-0.5,
        }
        return {name: factors[name] for name in names}

    def _of_units(self) -> tuple[Tensor, Tensor]:
        """Returns float32 tensors (units, heads, features, dimensions) and (units, heads, features), both padded."""
        shape = (self.units.count, self.heads, self.padded)
        means = self._q.new_empty((*shape, self.dim), dtype=torch.float32)
        return means, means.new_empty(shape)

    def _projection(self) -> tuple[Tensor, float]:
        """Returns the rows of the features, rounded once to the dtype of q, and the factor of ω·x."""
        inputs = self.inputs
        if inputs.projection is None:
            return torch.eye(self.head_dim, dtype=inputs.q.dtype, device=inputs.q.device), 1.0
        definition = inputs.map_definition
        rows = definition.mirrored(definition.rescaled(inputs.projection.float()))
        return rows.to(inputs.q.dtype), self.head_dim**-0.25

    def _of_segments(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns √(1−4A) of `oprf` (segments, heads), and the constants of queries (segments, heads, padded features).

        These are 2A‖ω‖² of `oprf` and the feature bias, to base 2.
        """
        inputs, scales, constants = self.inputs, None, None
        if inputs.oprf_a is not None:
            a = inputs.oprf_a.detach().double().expand(inputs.num_segments, -1)
            squares = self._rows.double().square().sum(-1)
            constants = (2 * _LOG2_E * a).unsqueeze(-1) * squares
            scales = (1 - 4 * a).sqrt().float().contiguous()
        if inputs.feature_bias is not None:
            bias = inputs.feature_bias.detach().double().expand(self.heads, -1)
            bias = bias.repeat(1, inputs.map_definition.features_per_row) * _LOG2_E
            bias = torch.nn.functional.pad(bias, (0, self.padded - bias.shape[-1])).expand(inputs.num_segments, -1, -1)
            constants = bias if constants is None else constants + bias
        return scales, None if constants is None else constants.float().contiguous()


def with_neighbours(x: Tensor) -> Tensor:
    """Returns the tensor with the numbers of each vector contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
