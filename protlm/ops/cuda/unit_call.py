"""Causal and near-far attention as kernel launches: every unit reads the state of the units that are far of it.

Both have the same four steps. Units are folded into states; a scan gives every unit the state of the units that are far
of it, before it and, unless causal, after it; the queries of a unit read that state; and what is near, the tokens of
the unit itself and of its neighbours, is computed pair by pair and merged. In the backward queries are folded too, are
scanned in the other direction, and are read by keys.
"""

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from protlm.ops.cuda.call import Call, with_neighbours
from protlm.ops.cuda.fold_keys import fold_keys
from protlm.ops.cuda.fold_queries import fold_queries
from protlm.ops.cuda.key_gradients import key_gradients
from protlm.ops.cuda.launch import Launch
from protlm.ops.cuda.near_call import NearCall
from protlm.ops.cuda.query_gradients import query_gradients
from protlm.ops.cuda.read_state import read_state
from protlm.ops.cuda.scan_states import scan_states
from protlm.ops.cuda.tiles import Tile, no_longer_than
from protlm.ops.cuda.triangle_forward import triangle_forward
from protlm.ops.cuda.triangle_key_gradients import triangle_key_gradients
from protlm.ops.cuda.triangle_query_gradients import triangle_query_gradients
from protlm.ops.cuda.units import Units, cut_into_units, state_dtype, with_reach
from protlm.ops.inputs import AttentionInputs

CAUSAL_UNIT_TOKENS = 128
"""Tokens of a unit of causal attention without a near field: more of them make more pairs, fewer more states."""


class UnitCall(Call):
    """One call, causal or with a near field: its launches, and the arguments that they have in common."""

    def __init__(self, inputs: AttentionInputs, capability: int | None = None) -> None:
        """Prepares a call; `capability` (80, 90, …) stands in for that of the device."""
        super().__init__(inputs, capability)
        self._has_near = inputs.near_block > 0
        if self._has_near:
            self._constants = self._absolute_constants()
            length = inputs.q.shape[2]
            laid_out = replace(inputs, q=self._q, k=self._k, v=self._v)
            reach = with_reach(self.units, inputs, self.units.tokens)
            self._near = NearCall(laid_out, reach, length, 0 if inputs.causal else length, self.capability)

    @functools.cached_property
    def units(self) -> Units:
        """The blocks of the near field, or units of bounded length."""
        return cut_into_units(self.inputs, unit_tokens(self.inputs))

    def forward(self, out: Tensor, query_sums: Tensor) -> list[Launch]:
        """Returns the launches that compute the output and the query sums, to base 2 for exponential maps.

        Those of a near field are logarithms of absolute normalisers, others those of `read_state`.
        """
        launches, means, references = self._key_states()
        far, far_sums = self._wide(self._q), torch.empty_like(query_sums)
        arguments = {
            **self._reading(), "means": means, "references": references, "query_sums": far_sums,
            **self._sum_strides(), **self._factors("factor"),
        }  # fmt: skip
        launches.append(self._launch(read_state, self.units, {"q": self._q, "out": far}, arguments, PER_UNIT=True))
        if self._has_near:
            return [*launches, self._near.forward(out, query_sums, far, far_sums)]
        arguments = {
            **self._reading(), "far_sums": far_sums, "query_sums": query_sums, **self._sum_strides(),
            **self._factors("factor", "norm_factor"),
        }  # fmt: skip
        tensors = {"q": self._q, "k": self._k, "v": self._v, "far": far, "out": out}
        return [*launches, self._launch(triangle_forward, self.units, tensors, arguments)]

    def of_queries(
        self,
        out_grad: Tensor,
        out: Tensor,
        query_sums: Tensor,
        sums_grad: Tensor | None,
        inner: Tensor,
        q_grad: Tensor,
    ) -> list[Launch]:
        """Returns the launches of the gradient of q, into `q_grad`, and of `inner`, which `of_keys` reads.

        `query_sums` are those of `forward`; `sums_grad` is the gradient of their natural logarithms, of a near field.
        """
        out_grad = with_neighbours(out_grad)
        launches, means, references = self._key_states()
        far_grad = self._wide(self._q)
        tensors = {"q": self._q, "out": out, "out_grad": out_grad, "q_grad": far_grad}
        arguments = {
            **self._reading(), "means": means, "references": references, "query_sums": query_sums, "inner": inner,
            "sums_grad": query_sums if sums_grad is None else sums_grad, **self._sum_strides(),
            **self._factors("factor", "norm_factor", "grad_factor", "norm_grad_factor"),
        }  # fmt: skip
        constants = {"PER_UNIT": True, "IS_ABSOLUTE": self._has_near, "HAS_SUMS_GRAD": sums_grad is not None}
        launches.append(self._launch(query_gradients, self.units, tensors, arguments, **constants))
        if self._has_near:
            return [*launches, self._near.query_gradients(out_grad, out, query_sums, inner, q_grad, far_grad)]
        arguments = {
            **self._reading(), "query_sums": query_sums, "inner": inner, **self._sum_strides(),
            **self._factors("factor", "norm_factor", "grad_factor"),
        }  # fmt: skip
        tensors = {
            "q": self._q, "k": self._k, "v": self._v, "out_grad": out_grad, "far_grad": far_grad, "q_grad": q_grad
        }  # fmt: skip
        return [*launches, self._launch(triangle_query_gradients, self.units, tensors, arguments)]

    def of_keys(
        self, out_grad: Tensor, query_sums: Tensor, inner: Tensor, grads: tuple[Tensor, Tensor]
    ) -> list[Launch]:
        """Returns the launches of the gradients of k and v, into `grads`."""
        out_grad = with_neighbours(out_grad)
        unit_means, unit_references = self._of_units()
        unit_inners = torch.empty_like(unit_references)
        arguments = {
            **self._reading(), "query_sums": query_sums, "inner": inner, "means": unit_means,
            "references": unit_references, "inners": unit_inners, **self._sum_strides(),
            **self._factors("factor", "norm_factor"),
        }  # fmt: skip
        tensors = {"q": self._q, "out_grad": out_grad}
        folded = self._launch(fold_queries, self.units, tensors, arguments, IS_ABSOLUTE=self._has_near)
        means, references = self._scanned()
        inners, sizes = torch.empty_like(references), torch.empty_like(references)
        given = {
            "unit_means": unit_means, "unit_references": unit_references, "unit_inners": unit_inners, "means": means,
            "references": references, "inners": inners, "sizes": sizes,
        }  # fmt: skip
        scanned = self._scan(given, of_queries=True)
        far_grads = self._wide(self._k), self._wide(self._v)
        tensors = {"k": self._k, "v": self._v, "k_grad": far_grads[0], "v_grad": far_grads[1]}
        arguments = {
            **self._common(), "references": references, "mean_grads": means, "sum_grads": inners, "sizes": sizes,
            **self._factors("factor", "norm_factor", "grad_factor", "norm_grad_factor"),
        }  # fmt: skip
        read = self._launch(key_gradients, self.units, tensors, arguments, PER_UNIT=True)
        if self._has_near:
            near = self._near.key_gradients(out_grad, query_sums, inner, grads, far_grads)
            return [folded, scanned, read, near]
        tensors = {"q": self._q, "k": self._k, "v": self._v, "out_grad": out_grad}
        tensors |= zip(("far_k_grad", "far_v_grad", "k_grad", "v_grad"), (*far_grads, *grads), strict=True)
        arguments = {
            **self._reading(), "query_sums": query_sums, "inner": inner, **self._sum_strides(),
            **self._factors("factor", "norm_factor", "grad_factor", "norm_grad_factor"),
        }  # fmt: skip
        return [folded, scanned, read, self._launch(triangle_key_gradients, self.units, tensors, arguments)]

    def _key_states(self) -> tuple[list[Launch], Tensor, Tensor]:
        """Returns the launches that compute the state of the keys far of each unit, and its means and references."""
        unit_means, unit_references = self._of_units()
        arguments = {
            **self._common(), "means": unit_means, "references": unit_references,
            **self._factors("factor", "norm_factor"),
        }  # fmt: skip
        folded = self._launch(fold_keys, self.units, {"k": self._k, "v": self._v}, arguments)
        means, references = self._scanned()
        # States of keys have no inner products, and any tensor will do.
        given = {
            "unit_means": unit_means, "unit_references": unit_references, "unit_inners": unit_references,
            "means": means, "references": references, "inners": references, "sizes": references,
        }  # fmt: skip
        return [folded, self._scan(given, of_queries=False)], means, references

    def _scan(self, tensors: dict[str, Tensor], *, of_queries: bool) -> Launch:
        is_causal = self.inputs.causal
        log_size = (self.inputs.q.shape[2] - 1).bit_length()
        arguments: dict[str, Any] = {
            **tensors, "first_units": self.units.first, "size": 2.0**log_size, "log_size": float(log_size)
        }  # fmt: skip
        constants = {
            "GAP": 1 if self._has_near else 0, "HAS_BEFORE": not (is_causal and of_queries),
            "HAS_AFTER": of_queries or not is_causal, "OF_QUERIES": of_queries,
        }  # fmt: skip
        return self._launch(scan_states, None, {}, arguments, **constants)

    def _scanned(self) -> tuple[Tensor, Tensor]:
        """Returns means, in `state_dtype`, and references of every unit, to be written."""
        shape = (self.units.count, self.heads, self.padded)
        means = self._v.new_empty((*shape, self.dim), dtype=state_dtype(self.inputs))
        return means, means.new_empty(shape, dtype=torch.float32)

    def _wide(self, x: Tensor) -> Tensor:
        """Returns a float32 tensor of the shape of x, to be written."""
        return torch.empty(x.shape, dtype=torch.float32, device=x.device)

    def _tile_of(self, kernel: str) -> Tile:
        tile = super()._tile_of(kernel)
        return no_longer_than(tile, self.units.tokens) if tile.tokens else tile

    def _absolute_constants(self) -> Tensor:
        """Returns the constants of queries with all that makes weights absolute but ‖q‖²: 1/features, and that of A."""
        # Filled on the device: a number of the host would be copied, and the host would wait.
        constants = self._rows.new_full((), -math.log2(self.inputs.num_features), dtype=torch.float32)
        if self._constants is not None:
            constants = self._constants + constants
        if self._scales is not None:
            constants = constants + self.head_dim * self._scales.log2().unsqueeze(-1)
        return constants.expand(self.inputs.num_segments, self.heads, self.padded).contiguous()


def unit_tokens(inputs: AttentionInputs) -> int:
    """Returns the most tokens of a unit.

    Kernels are compiled anew for another number of tiles in a unit: a block longer than the row becomes a power of two.
    """
    return min(inputs.near_block or CAUSAL_UNIT_TOKENS, max(16, 1 << (inputs.q.shape[2] - 1).bit_length()))
