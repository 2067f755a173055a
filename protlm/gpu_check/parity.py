"""Comparison of the op with its float64 twin, case by case: the cases that reach every kernel and mode."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from protlm.gpu_check.tolerances import LOOSER_ON_GPU, NAMES, TOLERANCE
from protlm.ops import draw_projection, favor_attention, favor_triton, local_attention, reference
from protlm.ops.feature_maps import DEFINITIONS, definition_of
from protlm.ops.inputs import AttentionInputs

SEGMENTS = (300, 0, 1, 37, 1500)
MAPS = (*(name for name, definition in DEFINITIONS.items() if "triton" in definition.backends), "bare relu")
"""The maps that the kernels compute; `bare relu` is `relu` without a projection."""
_OF_FAVOR = ("feature_map", "oprf_a", "near_block", "feature_bias")
OTHER_MAPS = tuple(name for name in DEFINITIONS if name not in MAPS)


@dataclass(frozen=True)
class Case:
    """The shape of one comparison; `segments` packs them into one row, and `batch` and `length` are then ignored.

    With a window it is one of `local_attention`.
    """

    feature_map: str = "positive"
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    heads: int = 4
    length: int = 300
    head_dim: int = 64
    features: int = 128
    is_masked: bool = False
    segments: tuple[int, ...] = ()
    has_projection_per_head: bool = True
    is_strided: bool = False
    causal: bool = False
    scale: float = 1.0
    near_block: int = 0
    has_bias: bool = False
    window: int = 0

    def __str__(self) -> str:
        default = Case()
        changes = [f"{n}={v}" for n, v in vars(self).items() if n != "feature_map" and v != getattr(default, n)]
        return " ".join((self.feature_map, *changes)).replace("torch.", "")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        case: Name of the case.
        computed_by: The backend that computed it: `torch` where the kernels do not cover the case.
        errors: Relative errors, by tensor.
        fault: Description of the fault, None if there is none.
    """

    case: str
    computed_by: str
    errors: dict[str, float]
    fault: str | None


def cases() -> list[Case]:
    """Returns cases for every map, mode and kernel, and for calls that fall back to torch."""
    chosen = []
    for name in MAPS:
        plain = Case(feature_map=name)
        chosen += [
            plain,
            replace(plain, dtype=torch.float16),
            replace(plain, is_masked=True, length=1000),
            replace(plain, segments=SEGMENTS, is_masked=True),
            # Many short segments: one kernel for each.
            replace(plain, batch=64, length=200),
            replace(plain, segments=SEGMENTS[:4] * 8, is_masked=True),
            # Several units a segment.
            replace(plain, batch=1, length=6000, is_masked=True),
            replace(plain, is_strided=True, has_projection_per_head=False),
        ]
    for head_dim in (16, 32, 60, 80, 128):
        chosen += [Case(head_dim=head_dim), Case(head_dim=head_dim, features=200, segments=SEGMENTS)]
        chosen += [Case(head_dim=head_dim, batch=64, length=100), Case(head_dim=head_dim, batch=64, features=256)]
    chosen += [Case(features=256, scale=4.0), Case(length=1), Case(segments=(0, 0))]
    packed = Case(segments=SEGMENTS, is_masked=True)
    for causal in (False, True):
        for dtype in TOLERANCE:
            if dtype == torch.float64:
                continue
            here = replace(packed, causal=causal, dtype=dtype)
            chosen += [
                replace(here, near_block=32, has_bias=True),
                replace(here, window=32),
                replace(here, window=2000),
            ]
        chosen += [Case(causal=causal, near_block=size, head_dim=dim) for size, dim in ((16, 32), (64, 64), (128, 128))]
        chosen += [replace(packed, causal=causal, near_block=32, feature_map=name) for name in ("hyperbolic", "oprf")]
        chosen += [Case(causal=causal, window=100, head_dim=head_dim) for head_dim in (32, 80, 128)]
    seen_before = replace(packed, causal=True)
    chosen += [replace(seen_before, feature_map=name) for name in MAPS if name != "bare relu"]
    chosen += [replace(seen_before, dtype=torch.float16), Case(causal=True, features=256, length=1000, head_dim=128)]
    chosen += [Case(dtype=torch.float32), replace(packed, dtype=torch.float32, feature_map="relu")]
    chosen += [replace(packed, dtype=torch.float32, head_dim=128, features=200), replace(packed, has_bias=True)]
    # What goes to torch.
    chosen += [Case(feature_map=name, features=512) for name in OTHER_MAPS]
    return [*chosen, Case(head_dim=256), Case(dtype=torch.float32, causal=True)]


def compare_cases(
    chosen: list[Case], device: str, backend: str, attention: Callable[..., Tensor] = favor_attention
) -> Iterator[Outcome]:
    """Yields the outcome of each case; an exception of a kernel is an outcome too."""
    for case in chosen:
        try:
            yield _compare(case, device, backend, _with_window(case.window) if case.window else attention)
        except Exception as error:  # drivers and compilers raise anything, and the other cases must still run
            yield Outcome(str(case), backend, {}, first_line(error))


def _with_window(window: int) -> Callable[..., Tensor]:
    """Returns local attention with the arguments of `favor_attention`, of which it has no use for some."""

    def attention(q: Tensor, k: Tensor, v: Tensor, _projection: Tensor, **options: Any) -> Tensor:
        options = {name: value for name, value in options.items() if name not in _OF_FAVOR}
        return local_attention(q, k, v, window=window, **options)

    return attention


def outcome_of(case: Case, computed_by: str, errors: dict[str, float]) -> Outcome:
    """Returns the outcome of a case with these errors."""
    feature_map = case.feature_map.removeprefix("bare ")
    bounds = {name: TOLERANCE[case.dtype] * LOOSER_ON_GPU.get((feature_map, name), 1) for name in errors}
    wrong = ", ".join(
        f"{name} by more than {bounds[name]}" for name, error in errors.items() if not error <= bounds[name]
    )
    fault = f"{wrong}: too far from the float64 twin" if wrong else None
    return Outcome(str(case), computed_by, errors, fault)


def first_line(error: Exception) -> str:
    """Returns the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _compare(case: Case, device: str, backend: str, attention: Callable[..., Tensor]) -> Outcome:
    drawn = draw(case, device)
    first, second = (differentiate(attention, drawn, {"backend": backend}) for _ in range(2))
    expected = expected_of(drawn, case)
    errors = {name: error_of(a, b, b) for name, a, b in zip(NAMES, first, expected, strict=True)}
    outcome = outcome_of(case, computed_by(drawn, backend), errors)
    if outcome.fault is None and not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        return replace(outcome, fault="a second call gave other bits")
    return outcome


@dataclass(frozen=True)
class Drawn:
    """The arguments of the op in a case; `tensors` are q, k, v and the gradient of the output."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    projection: Tensor | None
    options: dict[str, Any]
    window: int = 0


def draw(case: Case, device: str) -> Drawn:
    """Returns the arguments of the op in a case, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    length = sum(case.segments) if case.segments else case.length
    shape = (1 if case.segments else case.batch, case.heads, length, case.head_dim)
    tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
    tensors[:2] = [x * (0.5 * case.scale) for x in tensors[:2]]
    tensors = [x.to(device, case.dtype) for x in tensors]
    if case.is_strided:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    projection = None
    if case.feature_map != "bare relu":
        heads = case.heads if case.has_projection_per_head else None
        projection = draw_projection(case.features, case.head_dim, num_heads=heads, generator=generator).to(device)
    options: dict[str, Any] = {"feature_map": case.feature_map.removeprefix("bare "), "causal": case.causal}
    if case.near_block:
        options["near_block"] = case.near_block
    if case.has_bias:
        bias = 0.5 * torch.randn((case.heads, case.features), generator=generator)
        options["feature_bias"] = bias.to(device)
    if case.feature_map == "oprf" and case.causal:
        options["oprf_a"] = torch.linspace(-0.2, 0.1, case.heads, device=device)
    if case.is_masked:
        options["token_mask"] = (torch.rand(shape[0], length, generator=generator) < 0.8).to(device)
    if case.segments:
        bounds = torch.tensor([0, *case.segments]).cumsum(0)
        options["cu_seqlens"] = bounds.to(device, torch.int32)
    q, k, v, out_grad = tensors
    return Drawn((q, k, v, out_grad), projection, options, case.window)


def computed_by(drawn: Drawn, backend: str) -> str:
    """Returns the name of the backend that computes a call."""
    inputs = AttentionInputs(*drawn.tensors[:3], drawn.projection, **drawn.options)
    covers = favor_triton.covers_tensor(inputs.q) if drawn.window else favor_triton.covers(inputs)
    return "torch" if backend == "triton" and not covers else backend


def expected_of(drawn: Drawn, case: Case) -> tuple[Tensor, ...]:
    """Returns output and gradients of the float64 twin on the same values."""
    q, k, v, out_grad = (x.double() for x in drawn.tensors)
    wide = Drawn((q, k, v, out_grad), _rounded(drawn.projection, case), drawn.options)
    return differentiate(_exact(case.window) if case.window else reference.favor_attention, wide, {})


def _exact(window: int) -> Callable[..., Tensor]:
    """Returns the twin of local attention with the arguments of `favor_attention`."""

    def attention(q: Tensor, k: Tensor, v: Tensor, _projection: Tensor, **options: Any) -> Tensor:
        options = {name: value for name, value in options.items() if name not in _OF_FAVOR}
        return reference.softmax_attention(q, k, v, window=window, **options)

    return attention


def differentiate(attention: Callable[..., Tensor], drawn: Drawn, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Returns the output and the gradients of an attention function."""
    *inputs, out_grad = drawn.tensors
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = attention(*leaves, drawn.projection, **drawn.options, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, out_grad)


def error_of(actual: Tensor, expected: Tensor, whole: Tensor) -> float:
    """Returns the largest difference, relative to the largest number of the whole tensor."""
    if not expected.numel():
        return 0.0
    scale = whole.abs().max().item()
    difference = (actual.double() - expected.to(actual.device)).abs().max().item()
    # A lone token has a gradient of zero, up to rounding.
    return difference / scale if scale > 1e-9 else difference


def _rounded(projection: Tensor | None, case: Case) -> Tensor | None:
    """Returns the rows as the op uses them: rescaled if the map does so, then rounded once."""
    if projection is None:
        return None
    if definition_of(case.feature_map).rescales_rows:
        # Written out: `MapDefinition.rescaled` is part of what is checked.
        projection = projection * (case.head_dim**0.5 / projection.norm(dim=-1, keepdim=True))
    return projection.to(case.dtype)
