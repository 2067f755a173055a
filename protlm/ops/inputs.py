"""The arguments of one call of the attention op as one value, and the conditions under which they fit together."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protlm.ops.blocks import read_bounds
from protlm.ops.feature_maps import MapDefinition, check_feature_map, definition_of, map_names

_DTYPES = {
    **dict.fromkeys(("q", "k", "v", "projection", "oprf_a", "feature_bias"), ""),
    "token_mask": ", dtype=torch.bool",
    "cu_seqlens": ", dtype=torch.int32",
}
"""The tensors among the arguments, with what `torch.as_tensor` needs to make them of others."""


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments of `favor_attention`, which documents them, as every backend and the float64 twin take them.

    `group_name` is the name of the process group, empty for one process.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    projection: Tensor | None
    token_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    oprf_a: Tensor | None = None
    feature_map: str = "positive"
    causal: bool = False
    group_name: str = ""
    feature_bias: Tensor | None = None
    near_block: int = 0

    @property
    def map_definition(self) -> MapDefinition:
        """The definition of the feature map."""
        return definition_of(self.feature_map)

    @property
    def num_segments(self) -> int:
        """Number of segments of the packed row, or of rows of the batch."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def num_features(self) -> int:
        """Number of features of one vector."""
        if self.projection is None:
            return self.q.shape[-1]
        return self.projection.shape[-2] * self.map_definition.features_per_row

    @property
    def is_exponential(self) -> bool:
        """Whether features are exponentials, so that a state has a reference for each feature."""
        return self.map_definition.is_exponential

    @property
    def is_plain(self) -> bool:
        """Whether the call has neither a near field nor a feature bias: what every backend computes."""
        return self.near_block == 0 and self.feature_bias is None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of exponents, maxima and sums: float32, but float64 for float64 and for signed maps, where it exists.

        The renormaliser of a signed map is a sum of terms that nearly cancel: in float32 the rounding of the terms
        shows in the third digit of the output.
        """
        needs_float64 = self.map_definition.is_signed and self.q.device.type != "mps"
        return torch.float64 if needs_float64 or self.q.dtype == torch.float64 else torch.float32

    def of_heads(self, heads: slice) -> "AttentionInputs":
        """Returns the part of these heads."""
        projection, bias, a = self.projection, self.feature_bias, self.oprf_a
        return replace(
            self,
            q=self.q[:, heads],
            k=self.k[:, heads],
            v=self.v[:, heads],
            # Without an axis of heads, all heads share them.
            projection=projection if projection is None or projection.dim() == 2 else projection[heads],
            feature_bias=bias if bias is None or bias.dim() == 1 else bias[heads],
            oprf_a=None if a is None else a[..., heads],
        )

    def check(self) -> None:
        """Raises ValueError, naming argument, expected and got, unless the arguments fit together.

        Raises TypeError, saying what to pass, for a list, a number or a NumPy array in place of a tensor.
        """
        for name, dtype in _DTYPES.items():
            check_tensor(name, getattr(self, name), dtype, is_optional=name not in ("q", "k", "v"))
        q, projection, token_mask, cu_seqlens = self.q, self.projection, self.token_mask, self.cu_seqlens
        _expect("q", "4 axes (batch, heads, length, head_dim)", q.dim() == 4, tuple(q.shape))
        batch, heads, length, head_dim = q.shape
        _expect("q", "a floating dtype", q.is_floating_point(), q.dtype)
        for name, tensor in (("k", self.k), ("v", self.v)):
            _expect(name, f"the shape of q, {tuple(q.shape)}", tensor.shape == q.shape, tuple(tensor.shape))
            _expect(name, f"the dtype of q, {q.dtype}", tensor.dtype == q.dtype, tensor.dtype)
        check_feature_map(self.feature_map, has_projection=projection is not None, has_oprf_a=self.oprf_a is not None)
        if projection is not None:
            shape = tuple(projection.shape)
            fits = len(shape) in (2, 3) and shape[-1] == head_dim and shape[-2] > 0 and shape[:-2] in ((), (heads,))
            _expect("projection", f"(features, {head_dim}) or ({heads}, features, {head_dim})", fits, shape)
            _expect("projection", "a floating dtype", projection.is_floating_point(), projection.dtype)
        if token_mask is not None:
            shape = tuple(token_mask.shape)
            _expect("token_mask", f"shape {(batch, length)}", shape == (batch, length), shape)
            _expect("token_mask", "dtype torch.bool", token_mask.dtype == torch.bool, token_mask.dtype)
        if cu_seqlens is not None:
            shape = tuple(cu_seqlens.shape)
            _expect("cu_seqlens", "one axis with at least 2 bounds", len(shape) == 1 and shape[0] >= 2, shape)
            _expect("cu_seqlens", "dtype torch.int32", cu_seqlens.dtype == torch.int32, cu_seqlens.dtype)
            _expect("q", "batch = 1 with cu_seqlens", batch == 1, batch)
        self._check_oprf_a(heads)
        self._check_feature_bias(heads)
        self._check_near_block()
        self._check_devices()

    def check_log_normaliser(self) -> None:
        """Raises ValueError unless the logarithm of the normaliser can be returned."""
        maps, is_fitting = map_names(lambda definition: definition.is_exponential), self.is_exponential
        _expect("feature_map", f"one of {maps} with return_log_normaliser", is_fitting, repr(self.feature_map))
        is_one_process = not self.group_name or self.near_block > 0
        _expect("process_group", "None with return_log_normaliser and no near_block", is_one_process, "a group")

    def _check_oprf_a(self, heads: int) -> None:
        a = self.oprf_a
        if a is None:
            is_needed = self.map_definition.takes_oprf_a and self.causal
            expected = "a tensor for causal attention, as the data would tell of later tokens"
            _expect("oprf_a", expected, not is_needed, None)
            return
        shape, allowed = tuple(a.shape), ((heads,), (self.num_segments, heads))
        # Not `shape in allowed`: under torch.compile with dynamic shapes that compares symbols by identity.
        fits = shape == allowed[0] or shape == allowed[1]
        _expect("oprf_a", f"shape {allowed[0]} or {allowed[1]}", fits, shape)
        _expect("oprf_a", "a floating dtype", a.is_floating_point(), a.dtype)

    def _check_feature_bias(self, heads: int) -> None:
        bias, projection = self.feature_bias, self.projection
        if bias is None:
            return
        maps, is_fitting = map_names(lambda definition: definition.is_exponential), self.is_exponential
        _expect("feature_map", f"one of {maps} with feature_bias", is_fitting, repr(self.feature_map))
        assert projection is not None
        shape, rows = tuple(bias.shape), projection.shape[-2]
        fits = shape == (rows,) or shape == (heads, rows)
        _expect("feature_bias", f"shape {(rows,)} or {(heads, rows)}", fits, shape)
        _expect("feature_bias", "a floating dtype", bias.is_floating_point(), bias.dtype)

    def _check_near_block(self) -> None:
        near_block = self.near_block
        is_number = isinstance(near_block, int) and not isinstance(near_block, bool)
        _expect("near_block", "an integer of at least 0", is_number and near_block >= 0, near_block)
        _expect("near_block", "an integer below 2^63", near_block < 1 << 63, near_block)
        if near_block == 0:
            return
        maps = map_names(lambda definition: definition.joins_exact_weights)
        is_fitting = self.map_definition.joins_exact_weights
        _expect("feature_map", f"one of {maps} with near_block > 0", is_fitting, repr(self.feature_map))

    def _check_devices(self) -> None:
        device = self.q.device
        for name in ("k", "v", "projection", "token_mask", "cu_seqlens", "oprf_a", "feature_bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                _expect(name, f"the device of q, {device}", tensor.device == device, tensor.device)


@dataclass(frozen=True)
class LocalInputs:
    """The arguments of `local_attention`, which documents them, as its backends take them.

    `before` and `after` are the numbers of tokens that a token sees on either side.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    token_mask: Tensor | None
    cu_seqlens: Tensor | None
    before: int
    after: int

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of scores and sums."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def check(self) -> None:
        """Raises ValueError or TypeError unless the tensors fit together."""
        # Like the inputs of a map that needs no projection.
        AttentionInputs(self.q, self.k, self.v, None, self.token_mask, self.cu_seqlens, None, "relu").check()
        check_bounds(self.cu_seqlens, self.q.shape[2])

    def segment_numbers(self) -> Tensor:
        """Returns the number of every token's segment, int32 (batch · length,); −1 for padding."""
        batch, _, length, _ = self.q.shape
        device = self.q.device
        if self.cu_seqlens is None:
            numbers = torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(length)
        else:
            places = torch.arange(length, dtype=torch.int32, device=device)
            numbers = torch.searchsorted(self.cu_seqlens, places, right=True, out_int32=True)
        return numbers if self.token_mask is None else numbers.masked_fill(~self.token_mask.flatten(), -1)


def runs_ahead(device: torch.device) -> bool:
    """Returns whether a device computes while the host goes on, which would have to wait to read a number.

    Tensors of the device `meta` have no numbers to read: with them a test sees that none is read.
    """
    return device.type in ("cuda", "meta")


def check_bounds(cu_seqlens: Tensor | None, length: int) -> None:
    """Checks that the bounds of a packed row rise from 0 to its length; on a GPU the device checks it later.

    Raises:
        ValueError: The bounds, on the CPU, do not.
    """
    if cu_seqlens is None:
        return
    if not runs_ahead(cu_seqlens.device):
        read_bounds(cu_seqlens, length)
        return
    is_right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    torch._assert_async(is_right, f"cu_seqlens: expected bounds that rise from 0 to the length {length}")


def check_tensor(name: str, value: object, dtype: str, *, is_optional: bool = False) -> None:
    """Raises TypeError, saying what to pass, for a value that is no tensor, or None where that is not allowed."""
    if isinstance(value, Tensor) or (value is None and is_optional):
        return
    kind = type(value)
    got = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    raise TypeError(f"{name}: expected a torch.Tensor, got {got}; pass torch.as_tensor({name}{dtype})")


def in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v, under autocast in the longest of their dtypes, as it shortens some tensors and others not."""
    tensors = (q, k, v)
    if not all(isinstance(x, Tensor) for x in tensors) or q.dtype == k.dtype == v.dtype:
        return tensors
    device = q.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def result_like(x: Tensor, *, dtype: torch.dtype | None = None, is_zeroed: bool = False) -> Tensor:
    """Returns a tensor for results in the layout of x, so that a caller who made x as a view need not copy them.

    Only the numbers along head_dim are always contiguous. Its dtype is that of x unless one is given.
    """
    make = torch.zeros_like if is_zeroed else torch.empty_like
    result = make(x, dtype=dtype)
    if result.stride(-1) == 1 or result.shape[-1] == 1:
        return result
    return make(x, dtype=dtype, memory_format=torch.contiguous_format)


def _expect(argument: str, expected: str, holds: bool, got: object) -> None:
    if not holds:
        raise ValueError(f"{argument}: expected {expected}, got {got}")
