"""The parts of a comparison of the attention op with its float64 twin: a case, its draw, both sides, their error."""

import math
from dataclasses import dataclass
from itertools import accumulate, cycle

import torch

from protlm.gpu_check.tolerances import LOOSER_IN_TESTS, NAMES
from protlm.ops import compiled, draw_projection, favor_attention, favor_cpp, favor_torch, reference
from protlm.ops.feature_maps import DEFINITIONS, definition_of
from tests.conftest import TOLERANCE, relative_error

MAPS = (*DEFINITIONS, "bare relu")
"""Every feature map; `bare relu` is `relu` without a projection."""
# Segments of 0, 1 and 3 tokens, several that share a block, and one longer than a stretch.
MIXED = (0, 1, 0, 3, 3, 20, 21, 22, 23, 1, 100, 0, 75, 80, 9, 300, 0)


@dataclass(frozen=True)
class Case:
    """The shape of one comparison; `segments` packs them into a single row, and `length` is then ignored.

    Attributes:
        num_features: Rows of the projection; None takes 37, and 256 for `trig`.
        padding: `some` hides 3 of 10 tokens, `left` the first third, `row` all of row 1 and some of the others.
        a_axes: `heads` or `segments` gives the A of `oprf`; `data` leaves it to the data, where that is allowed.
        stretch_tokens: Tokens of a stretch; None leaves the constants as they are.
        causal_stretch_length: The same, of causal stretches.
    """

    length: int = 100
    head_dim: int = 8
    feature_map: str = "positive"
    causal: bool = False
    batch: int = 2
    heads: int = 2
    num_features: int | None = None
    per_head: bool = True
    padding: str = ""
    segments: tuple[int, ...] = ()
    is_strided: bool = False
    a_axes: str = "data"
    stretch_tokens: int | None = None
    causal_stretch_length: int | None = None

    def __str__(self):
        default = Case()
        return "-".join(f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n)) or "default"

    @property
    def rows(self):
        """Rows of the projection; the renormaliser of `trig` is mere noise with few."""
        return self.num_features or (256 if self.feature_map == "trig" else 37)


def maps_on(backend):
    """Returns the maps that a backend computes."""
    return tuple(name for name in MAPS if backend in definition_of(name.removeprefix("bare ")).backends)


def segments_of(length):
    """Returns segments of many sizes that fill a row of this length, empty ones among them."""
    sizes = [0]
    for size in cycle((1, 3, 21, 23, 22, 0, 20, 150)):
        rest = length - sum(sizes)
        if size >= rest:
            return (*sizes, rest)
        sizes.append(size)
    raise AssertionError


def bounds(sizes):
    """Returns the cu_seqlens of segments of these sizes."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def draw(case, dtype, seed=0):
    """Returns q, k, v, the cotangent of the output, the projection and the options of a case.

    A score within rounding of 0 may be on either side of the kink of `relu`, where gradients jump: no draw has one.
    """
    arguments = _draw_once(case, dtype, seed)
    while case.feature_map == "relu" and _is_near_the_kink(*arguments[:2], arguments[4]):
        seed += 1
        arguments = _draw_once(case, dtype, seed)
    return arguments


def _is_near_the_kink(q, k, projection):
    scores = torch.stack((q, k)).double() @ projection.double().transpose(-1, -2) * q.shape[-1] ** -0.25
    return bool((scores.abs() < 3e-6).any())


def _draw_once(case, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    length = sum(case.segments) if case.segments else case.length
    batch = 1 if case.segments else case.batch
    shape = (batch, case.heads, length, case.head_dim)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    if case.is_strided:
        # As a model lays them out: token-major, seen as (batch, heads, length, head_dim).
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    projection = None
    if case.feature_map != "bare relu":
        heads = case.heads if case.per_head else None
        projection = draw_projection(case.rows, case.head_dim, num_heads=heads, generator=generator, dtype=dtype)
    options = {"feature_map": case.feature_map.removeprefix("bare "), "causal": case.causal}
    if case.padding:
        options["token_mask"] = _token_mask(case.padding, batch, length, generator)
    if case.segments:
        options["cu_seqlens"] = bounds(case.segments)
    if case.feature_map == "oprf" and (case.a_axes != "data" or case.causal):
        num_segments = len(case.segments) or batch
        a_shape = (num_segments, case.heads) if case.a_axes == "segments" else (case.heads,)
        options["oprf_a"] = 0.12 - 0.4 * torch.rand(a_shape, generator=generator)
    return *tensors, projection, options


def differentiate(attention, q, k, v, out_grad, projection, options):
    """Returns the output and the gradients of q, k and v; inputs become leaves with their strides."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (q, k, v)]
    out = attention(*leaves, projection, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, out_grad)


def computed_of(arguments, backend="auto"):
    """Returns output and gradients of the op."""
    *tensors, options = arguments
    return differentiate(favor_attention, *tensors, {**options, "backend": backend})


def backends_of(feature_map, dtype):
    """Returns the backends that compute such a call here."""
    is_compiled = dtype != torch.float64 and feature_map in maps_on("cpp") and compiled.why_not() is None
    return ("torch", "cpp") if is_compiled else ("torch",)


def expected_of(q, k, v, out_grad, projection, options):
    """Returns output and gradients of the float64 twin."""
    doubles = [tensor.double() for tensor in (q, k, v, out_grad)]
    return differentiate(reference.favor_attention, *doubles, projection, options)


def assert_equal(actual, expected, tolerance, told="", feature_map="positive"):
    """Fails unless output and gradients are within a relative tolerance; `told` says of what."""
    # One key a segment leaves dq and dk exactly zero, and no relative error: then dv gives the scale.
    gradient_scale = expected[3].abs().max().item() if expected[3].numel() else 0.0
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        bound = tolerance * LOOSER_IN_TESTS.get((feature_map, name), 1)
        if b.numel() and b.abs().max() < 1e-12 * gradient_scale:
            assert a.shape == b.shape, (name, told)
            assert a.abs().max().item() <= bound * gradient_scale, (name, told)
        else:
            assert relative_error(a, b) <= bound, (name, told)


def assert_op_equals_twin(case, dtype, seed=0):
    """Fails unless output and gradients of the op, on every backend, have the dtype and the values of the twin."""
    arguments = draw(case, dtype, seed)
    expected = expected_of(*arguments)
    for backend in backends_of(case.feature_map, dtype):
        actual = computed_of(arguments, backend)
        assert [tensor.dtype for tensor in actual] == [dtype] * 4
        told = f"{case}, {dtype}, {backend}"
        assert_equal(actual, expected, TOLERANCE[dtype], told, arguments[-1]["feature_map"])


def make_stretches_small(case, monkeypatch):
    """Sets the constants of the backends to the stretch sizes of the case."""
    if case.stretch_tokens is not None:
        definition = definition_of(case.feature_map.removeprefix("bare "))
        features = case.head_dim if case.feature_map == "bare relu" else case.rows * definition.features_per_row
        monkeypatch.setattr(favor_torch, "_MIN_STRETCH_TOKENS", 1)
        monkeypatch.setattr(favor_torch, "_STRETCH_FEATURES", case.stretch_tokens * case.heads * features)
        monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", case.stretch_tokens)
    if case.causal_stretch_length is not None:
        monkeypatch.setattr(favor_torch, "_CAUSAL_STRETCH_LENGTH", case.causal_stretch_length)


def _token_mask(padding, batch, length, generator):
    token_mask = torch.rand(batch, length, generator=generator) < 0.7
    if padding == "left":
        return (torch.arange(length) >= math.ceil(length / 3)).expand(batch, length).contiguous()
    if padding == "row":
        token_mask[1] = False
    return token_mask
