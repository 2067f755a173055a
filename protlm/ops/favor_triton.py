"""FAVOR on a GPU by Triton kernels: hides how a call is cut into units, prepared and put into launches.

A unit is a run of consecutive tokens of one segment. Keys are folded unit by unit, the partial states of a segment are
merged in their order, and queries read the state; gradients go the same way back. No sum depends on which program ends
first, so equal calls give equal bits. Where units begin is computed on the GPU: the host waits for nothing.

The state of a segment is, for each feature, the mean of v under the key features and `references`, the base-2 logarithm
of their sum; for `relu` the sum. Features are padded to whole tiles and head_dim to a power of two.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protlm.ops.inputs import AttentionInputs, result_like
from protlm.ops.random_features import to_common_length

LOG_BASE = 2.0
"""Base of the references and query sums of exponential maps."""

# References of features without a key, as in favor_torch.
_LOG_ZERO = -1e30
_LOG2_E = math.log2(math.e)
_MAX_HEAD_DIM = 128
# Tokens of a unit: with few programs they are cut shorter, so that every multiprocessor has one.
_UNIT_TOKENS = (1024, 512, 256)
_ENOUGH_PROGRAMS = 264
# Segments up to here, on average, are taken by one program a head, if their state fits on the chip.
_SHORT_TOKENS = 1024
_SHORT_FEATURES, _SHORT_DIM = 256, 64
_ENOUGH_SHORT_PROGRAMS = 64


def why_not() -> str | None:
    """Returns why the kernels cannot be used here, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with the CUDA builds of PyTorch"
    if torch.cuda.is_available() or _is_interpreted():
        return None
    return "PyTorch sees no CUDA device"


def covers(inputs: AttentionInputs) -> bool:
    """Says whether the kernels take such a call; another one is left to `favor_torch`, on the same device."""
    is_interpreted = _is_interpreted()
    dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if is_interpreted else ()))
    return (
        (inputs.q.device.type == "cuda" or is_interpreted)
        and inputs.q.dtype in dtypes
        and inputs.q.shape[-1] <= _MAX_HEAD_DIM
        and inputs.feature_map != "trig"
        and not inputs.causal
        and inputs.q.numel() > 0
    )


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output and what `backward` needs.

    Returns:
        out, like v; the means (segments, heads, padded features, padded head_dim), in the dtype of v; the references
        (segments, heads, padded features); the query sums (batch, heads, length), to base 2 for exponential maps.
    """
    call = Call(inputs)
    out, query_sums = result_like(inputs.v), call.query_sums()
    means, references = empty_states(inputs)
    if call.is_short:
        call.run([call.short_forward(means, references, out, query_sums)])
    else:
        call.run(call.fold(means, references))
        call.run([call.read(means, call.query_references(references), out, query_sums)])
    return out, means, references, query_sums


def backward(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; features are computed once more."""
    call = Call(inputs)
    q_grad, k_grad, v_grad = (result_like(x) for x in (inputs.q, inputs.k, inputs.v))
    state_grad = call.empty_state_grad()
    found = call.query_references(references)
    call.run(call.query_gradients(out_grad, out, states, found, query_sums, q_grad, state_grad))
    call.run([call.key_gradients(references, state_grad, k_grad, v_grad)])
    return q_grad, k_grad, v_grad


def empty_states(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns means and references to be written, in the shapes of `forward`."""
    heads, head_dim = inputs.q.shape[1], inputs.q.shape[-1]
    shape = (inputs.num_segments, heads, _padded_features(inputs.num_features))
    means = inputs.v.new_empty((*shape, _padded_dim(head_dim)))
    return means, means.new_empty(shape, dtype=torch.float32)


def fold(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns states and references as `favor_torch` keeps them, but to base 2: those of the keys given here."""
    call = Call(inputs)
    means, references = empty_states(inputs)
    means = means.float()
    call.run(call.fold(means, references))
    means, references = call.without_padding(means, references)
    if inputs.is_exponential:
        ones = (references > _LOG_ZERO / 2).to(means.dtype).unsqueeze(-1)
        # A reference of NaN is no sign of absence.
        ones = torch.where(references.isnan().unsqueeze(-1), references.unsqueeze(-1), ones)
        return torch.cat((means, ones), -1), references
    sums = references.unsqueeze(-1)
    is_empty = (references == 0).all(-1, keepdim=True)
    return torch.cat((means * sums, sums), -1), torch.where(is_empty, _LOG_ZERO, torch.zeros_like(references[..., :1]))


def read(inputs: AttentionInputs, states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output and the query sums, from a state of that form."""
    call = Call(inputs)
    out, query_sums = result_like(inputs.v), call.query_sums()
    means, references = call.with_padding(states, references)
    call.run([call.read(means, call.query_references(references), out, query_sums)])
    return out, query_sums


def query_gradients(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of q and what these queries give to that of the state, in the form of the states."""
    call = Call(inputs)
    q_grad, state_grad = result_like(inputs.q), call.empty_state_grad()
    means, padded_references = call.with_padding(states, references)
    found = call.query_references(padded_references)
    call.run(call.query_gradients(out_grad, out, means, found, query_sums, q_grad, state_grad))
    mean_grads, sum_grads, sizes = state_grad.means.float(), state_grad.sums, state_grad.sizes
    mean_grads, sum_grads = call.without_padding(mean_grads * sizes.unsqueeze(-1), sum_grads)
    grads = torch.cat((mean_grads, -sum_grads.unsqueeze(-1)), -1)
    if not inputs.is_exponential:
        # From the gradient of a mean times its sum to that of the plain sums.
        sums = states[..., -1:]
        grads = torch.where(sums == 0, 0.0, grads / sums)
    return q_grad, grads


def key_gradients(
    inputs: AttentionInputs, states: Tensor, references: Tensor, state_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of k and v from the whole gradient of the state, in the form of the states."""
    call = Call(inputs)
    k_grad, v_grad = result_like(inputs.k), result_like(inputs.v)
    if not inputs.is_exponential:
        state_grad = state_grad * states[..., -1:]
    _, padded_references = call.with_padding(states, references)
    padded = call.empty_state_grad()
    sizes = state_grad[..., :-1].abs().amax(-1)
    sizes = torch.where(sizes == 0, 1.0, sizes)
    means, sums = state_grad[..., :-1] / sizes.unsqueeze(-1), -state_grad[..., -1]
    for target, source in ((padded.means, means), (padded.sums, sums), (padded.sizes, sizes)):
        target.zero_()
        target[tuple(slice(n) for n in source.shape)].copy_(source)
    call.run([call.key_gradients(padded_references, padded, k_grad, v_grad)])
    return k_grad, v_grad


@dataclass(frozen=True)
class _StateGrad:
    """The gradient of the state of each segment.

    Attributes:
        means: (segments, heads, padded features, padded head_dim), each row relative to its size.
        sums: (segments, heads, padded features): Σ weights · inner product of output and gradient.
        sizes: The same shape, the largest number of each row.
    """

    means: Tensor
    sums: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class _Units:
    """How tokens are shared out.

    Attributes:
        table: int32 (units, 3): segment, first position, the position behind the last; empty units have none.
        first: int32 (segments + 1): the first unit of each segment.
        tokens: The largest unit.
    """

    table: Tensor
    first: Tensor
    tokens: int

    @property
    def count(self) -> int:
        return self.table.shape[0]


class Call:
    """One call of the op: what its launches have in common."""

    def __init__(self, inputs: AttentionInputs, capability: int | None = None) -> None:
        """Prepares a call; `capability` (80, 90, …) stands in for that of the device."""
        self.inputs = inputs
        self.capability = capability or _capability(inputs.q.device)
        self.heads, self.head_dim = inputs.q.shape[1], inputs.q.shape[-1]
        self.dim = _padded_dim(self.head_dim)
        self.padded = _padded_features(inputs.num_features)
        self._q, self._k, self._v = (_with_neighbours(x) for x in (inputs.q, inputs.k, inputs.v))
        rows, self._scale = self._projection()
        self._rows = torch.nn.functional.pad(
            rows, (0, self.dim - self.head_dim, 0, self.padded - rows.shape[-2])
        ).contiguous()
        self._mask = inputs.token_mask.contiguous().view(torch.uint8) if inputs.token_mask is not None else None
        self._scales, self._constants = self._oprf(rows)

    @property
    def fits_short(self) -> bool:
        """Whether the state of a segment and head fits on the chip."""
        return self.padded in (16, 32, 64, 128, _SHORT_FEATURES) and self.dim <= _SHORT_DIM

    @property
    def is_short(self) -> bool:
        """Whether one program a segment and head does the whole forward: by their mean length, known to the host."""
        inputs = self.inputs
        mean_length = inputs.q.shape[0] * inputs.q.shape[2] / inputs.num_segments
        has_enough = inputs.num_segments * self.heads >= _ENOUGH_SHORT_PROGRAMS
        # Within a segment the kernel counts in 32 bits.
        reach = inputs.q.shape[2] * max(x.stride(2) for x in (self._q, self._k, self._v))
        return self.fits_short and has_enough and mean_length <= _SHORT_TOKENS and reach < 2**31

    @functools.cached_property
    def units(self) -> _Units:
        """Units of bounded length."""
        inputs = self.inputs
        programs = inputs.q.shape[0] * inputs.q.shape[2] * self.heads * max(1, self.padded // 128)
        tokens = next((n for n in _UNIT_TOKENS if programs // n >= _ENOUGH_PROGRAMS), _UNIT_TOKENS[-1])
        return _units_of(inputs, tokens)

    def run(self, launches: list[Any]) -> None:
        """Starts launches on the device of the inputs."""
        from protlm.ops.cuda.launch import run_all

        if self.inputs.q.device.type == "cuda":
            with torch.cuda.device(self.inputs.q.device):
                run_all(launches)
        else:
            run_all(launches)

    def query_sums(self) -> Tensor:
        """Returns a tensor for the renormalisers, to be written."""
        return self._q.new_empty(self._q.shape[:3], dtype=torch.float32)

    def empty_state_grad(self) -> _StateGrad:
        """Returns the gradient of the state, to be written."""
        means, sums = empty_states(self.inputs)
        return _StateGrad(means, sums, torch.empty_like(sums))

    def query_references(self, references: Tensor) -> Tensor:
        """Returns references as queries find them: with the constants of `oprf`; for `relu` relative to the largest."""
        if not self.inputs.is_exponential:
            largest = references.amax(-1, keepdim=True)
            return torch.where(largest == 0, 0.0, references / largest)
        return references if self._constants is None else references + self._constants

    def without_padding(self, means: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features and dimensions that there are."""
        features = self.inputs.num_features
        return means[..., :features, : self.head_dim], references[..., :features]

    def with_padding(self, states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Returns means and references as the kernels take them from states that other processes had a part in."""
        means, padded = empty_states(self.inputs)
        sums = states[..., -1]
        is_exponential = self.inputs.is_exponential
        means.zero_()[..., : states.shape[-2], : self.head_dim] = torch.where(
            sums.unsqueeze(-1) == 0, 0.0, states[..., :-1] / sums.unsqueeze(-1)
        ).to(means.dtype)
        padded.fill_(_LOG_ZERO if is_exponential else 0.0)[..., : states.shape[-2]] = (
            torch.where(sums == 0, _LOG_ZERO, references + sums.log2()) if is_exponential else sums
        )
        return means, padded

    def short_forward(self, means: Tensor, references: Tensor, out: Tensor, query_sums: Tensor) -> Any:
        """Returns the launch that does everything for segments of any length, one program a segment and head."""
        from protlm.ops.cuda.short_forward import short_forward

        units = _whole_segments(self.inputs)
        tensors = {"q": self._q, "k": self._k, "v": self._v, "out": out}
        arguments = {
            **self._common(units), **self._token_mask(), "means": means, "references": references,
            "constants": references if self._constants is None else self._constants,
            "query_sums": query_sums, **self._sum_strides(), **self._factors("factor", "norm_factor"),
        }  # fmt: skip
        return self._launch(short_forward, units.count * self.heads, tensors, arguments, {"FEATURES": self._features})

    def fold(self, means: Tensor, references: Tensor) -> list[Any]:
        """Returns the launches that fold the keys of every unit and merge what each segment got."""
        from protlm.ops.cuda.fold_keys import fold_keys
        from protlm.ops.cuda.merge_states import merge_states

        unit_means, unit_references = self._of_units()
        arguments = {
            **self._common(self.units), **self._token_mask(), "means": unit_means, "references": unit_references,
            **self._factors("factor", "norm_factor"),
        }  # fmt: skip
        folded = self._launch(
            fold_keys, self.units.count * self.heads, {"k": self._k, "v": self._v}, arguments,
            {"FEATURES": self._features},
        )  # fmt: skip
        arguments = {
            "unit_means": unit_means, "unit_references": unit_references, "first_units": self.units.first,
            "means": means, "references": references,
        }  # fmt: skip
        return [folded, self._launch(merge_states, self.inputs.num_segments * self.heads, {}, arguments, {})]

    def read(self, means: Tensor, references: Tensor, out: Tensor, query_sums: Tensor) -> Any:
        """Returns the launch that reads states with references as queries find them."""
        from protlm.ops.cuda.read_state import read_state

        arguments = {
            **self._common(self.units), **self._token_mask(), "means": means, "references": references,
            "query_sums": query_sums, **self._sum_strides(), **self._factors("factor"),
        }  # fmt: skip
        return self._launch(read_state, self.units.count * self.heads, {"q": self._q, "out": out}, arguments, {})

    def query_gradients(
        self,
        out_grad: Tensor,
        out: Tensor,
        means: Tensor,
        references: Tensor,
        query_sums: Tensor,
        q_grad: Tensor,
        state_grad: _StateGrad,
    ) -> list[Any]:
        """Returns the launches for the gradients of the queries and of the state."""
        from protlm.ops.cuda.add_gradients import add_gradients
        from protlm.ops.cuda.query_gradients import query_gradients
        from protlm.ops.cuda.state_gradients import state_gradients

        out_grad = _with_neighbours(out_grad)
        inner = torch.empty_like(query_sums)
        common = {
            **self._common(self.units), **self._token_mask(), "references": references, "query_sums": query_sums,
            "inner": inner, **self._sum_strides(),
        }  # fmt: skip
        programs = self.units.count * self.heads
        tensors = {"q": self._q, "out": out, "out_grad": out_grad, "q_grad": q_grad}
        arguments = {**common, "means": means, **self._factors("factor", "grad_factor")}
        of_queries = self._launch(query_gradients, programs, tensors, arguments, {})
        unit_means, unit_sums = self._of_units()
        arguments = {**common, "mean_grads": unit_means, "sum_grads": unit_sums, **self._factors("factor")}
        of_units = self._launch(state_gradients, programs, {"q": self._q, "out_grad": out_grad}, arguments, {})
        arguments = {
            "unit_mean_grads": unit_means, "unit_sum_grads": unit_sums, "first_units": self.units.first,
            "mean_grads": state_grad.means, "sum_grads": state_grad.sums, "sizes": state_grad.sizes,
        }  # fmt: skip
        added = self._launch(add_gradients, self.inputs.num_segments * self.heads, {}, arguments, {})
        return [of_queries, of_units, added]

    def key_gradients(self, references: Tensor, state_grad: _StateGrad, k_grad: Tensor, v_grad: Tensor) -> Any:
        """Returns the launch for the gradients of keys and values."""
        from protlm.ops.cuda.key_gradients import key_gradients

        arguments = {
            **self._common(self.units), **self._token_mask(), "references": references,
            "mean_grads": state_grad.means, "sum_grads": state_grad.sums, "sizes": state_grad.sizes,
            **self._factors("factor", "norm_factor", "grad_factor", "norm_grad_factor"),
        }  # fmt: skip
        tensors = {"k": self._k, "v": self._v, "k_grad": k_grad, "v_grad": v_grad}
        return self._launch(key_gradients, self.units.count * self.heads, tensors, arguments, {})

    @property
    def _features(self) -> int:
        return self.inputs.num_features

    def _launch(
        self,
        kernel: Any,
        programs: int,
        tensors: dict[str, Tensor],
        arguments: dict[str, Any],
        constants: dict[str, int],
    ) -> Any:
        """Returns a launch with the strides of tensors, the tiles of the device and the constants of all kernels."""
        from protlm.ops.cuda.launch import IS_INTERPRETED, Launch
        from protlm.ops.cuda.tiles import tile_of

        tile = tile_of(kernel.__name__, self.capability, self.dim, self.padded)
        has_row = self.inputs.cu_seqlens is None
        for name, tensor in tensors.items():
            arguments[name] = tensor
            strides = (tensor.stride(0) if has_row else 0, tensor.stride(1), tensor.stride(2))
            arguments |= zip((f"{name}_row", f"{name}_head", f"{name}_token"), strides, strict=True)
        names = set(kernel.arg_names)
        blocks = 1
        if "TILES" in names:
            blocks = -(-self.units.tokens // tile.tokens)
        elif "TILE_FEATURES" in names:
            blocks = self.padded // tile.features
        known = {
            "HEADS": self.heads, "HEAD_DIM": self.head_dim, "DIM": self.dim, "PADDED": self.padded,
            "TILE_FEATURES": tile.features, "TILE_TOKENS": tile.tokens, "TILES": blocks,
            "IS_EXPONENTIAL": self.inputs.is_exponential, "HAS_MASK": self._mask is not None,
            "HAS_SCALES": self._scales is not None, "UPCAST": IS_INTERPRETED, **constants,
        }  # fmt: skip
        return Launch(
            kernel=kernel,
            grid=(programs * blocks,),
            arguments=arguments,
            constants={name: value for name, value in known.items() if name in names},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def _common(self, units: _Units) -> dict[str, Any]:
        rows = self._rows
        return {
            "projection": rows, "projection_head": rows.stride(0) if rows.dim() == 3 else 0, "units": units.table,
            "scales": rows if self._scales is None else self._scales,
        }  # fmt: skip

    def _token_mask(self) -> dict[str, Any]:
        mask = self._mask
        # Without a mask the kernel reads none: any tensor will do.
        return {
            "token_mask": self._rows.view(torch.uint8) if mask is None else mask,
            "mask_row": mask.stride(0) if mask is not None and self.inputs.cu_seqlens is None else 0,
        }

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
        """Returns float32 tensors for a number of each feature and dimension of every unit, and of each feature."""
        shape = (self.units.count, self.heads, self.padded)
        means = self._q.new_empty((*shape, self.dim), dtype=torch.float32)
        return means, means.new_empty(shape)

    def _projection(self) -> tuple[Tensor, float]:
        """Returns the rows of the features, rounded once to the dtype of q, and the factor of ω·x."""
        inputs = self.inputs
        if inputs.projection is None:
            return torch.eye(self.head_dim, dtype=inputs.q.dtype, device=inputs.q.device), 1.0
        rows = inputs.projection.float()
        if inputs.feature_map == "regularised":
            rows = to_common_length(rows)
        if inputs.feature_map == "hyperbolic":
            rows = torch.cat((rows, -rows), -2)
        return rows.to(inputs.q.dtype), self.head_dim**-0.25

    def _oprf(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns √(1−4A) (segments, heads) and 2A‖ω‖² to base 2 (segments, heads, padded features)."""
        inputs = self.inputs
        if inputs.oprf_a is None:
            return None, None
        a = inputs.oprf_a.detach().double().expand(inputs.num_segments, -1)
        squares = self._rows.double().square().sum(-1)
        constants = (2 * _LOG2_E * a).unsqueeze(-1) * squares
        return (1 - 4 * a).sqrt().float().contiguous(), constants.float().contiguous()


def _units_of(inputs: AttentionInputs, tokens: int) -> _Units:
    """Returns units of at most so many tokens; how many a segment has is known to the device only."""
    batch, _, length, _ = inputs.q.shape
    device = inputs.q.device
    if inputs.cu_seqlens is None:
        return _units_of_rows(batch, length, tokens, device)
    return _cut(_checked(inputs.cu_seqlens, length), length // tokens + inputs.num_segments, tokens)


@functools.lru_cache(maxsize=64)
def _units_of_rows(batch: int, length: int, tokens: int, device: torch.device) -> _Units:
    per_row = -(-length // tokens)
    starts = torch.arange(per_row, dtype=torch.int32, device=device) * tokens
    rows = torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(per_row)
    starts = starts.repeat(batch)
    table = torch.stack((rows, starts, (starts + tokens).clamp(max=length)), 1).contiguous()
    return _Units(table, torch.arange(batch + 1, dtype=torch.int32, device=device) * per_row, tokens)


def _cut(bounds: Tensor, count: int, tokens: int) -> _Units:
    starts, stops = bounds[:-1], bounds[1:]
    first = torch.nn.functional.pad(((stops - starts + tokens - 1) // tokens).cumsum(0, dtype=torch.int32), (1, 0))
    units = torch.arange(count, dtype=torch.int32, device=bounds.device)
    segments = torch.searchsorted(first[1:], units, right=True).clamp_(max=len(starts) - 1)
    begin = starts[segments] + (units - first[segments]) * tokens
    end = torch.minimum(begin + tokens, stops[segments])
    # Those that nothing was left for are empty.
    begin = torch.minimum(begin, end)
    return _Units(torch.stack((segments.int(), begin, end), 1).int().contiguous(), first, tokens)


def _whole_segments(inputs: AttentionInputs) -> _Units:
    batch, _, length, _ = inputs.q.shape
    if inputs.cu_seqlens is None:
        return _units_of_rows(batch, length, length, inputs.q.device)
    bounds = _checked(inputs.cu_seqlens, length)
    segments = torch.arange(inputs.num_segments, dtype=torch.int32, device=bounds.device)
    return _Units(torch.stack((segments, bounds[:-1], bounds[1:]), 1).contiguous(), segments, length)


def _checked(cu_seqlens: Tensor, length: int) -> Tensor:
    """Returns the bounds, of which the device itself checks that they rise from 0 to the length."""
    if cu_seqlens.device.type != "meta":
        is_right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        if cu_seqlens.device.type == "cpu" and not is_right:
            raise ValueError(
                f"cu_seqlens: expected bounds that rise from 0 to the length {length}, got {cu_seqlens[:8].tolist()}…"
            )
        if cu_seqlens.device.type != "cpu":
            torch._assert_async(is_right, f"cu_seqlens: expected bounds that rise from 0 to the length {length}")
    return cu_seqlens


def _with_neighbours(x: Tensor) -> Tensor:
    """Returns the tensor such that the numbers of a vector are neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _padded_dim(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _padded_features(features: int) -> int:
    """Returns the next power of two, or multiple of 128: every tile divides it."""
    return max(16, 1 << (features - 1).bit_length()) if features <= 128 else -(-features // 128) * 128


def _is_interpreted() -> bool:
    from protlm.ops.cuda.launch import IS_INTERPRETED

    return IS_INTERPRETED and importlib.util.find_spec("triton") is not None


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    return _capability_of(device.index)


@functools.cache
def _capability_of(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
