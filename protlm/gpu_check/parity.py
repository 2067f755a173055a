"""Whether the op gives what its float64 twin gives, case by case: hides which cases reach every kernel and mode."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from protlm.gpu_check.tolerances import LOOSER_ON_GPU, NAMES, TOLERANCE
from protlm.ops import draw_projection, favor_attention, favor_triton, reference
from protlm.ops.inputs import AttentionInputs

SEGMENTS = (300, 0, 1, 37, 1500)


@dataclass(frozen=True)
class Case:
    """One comparison; `segments` packs them into one row, and `batch` and `length` are then ignored."""

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

    def __str__(self) -> str:
        default = Case()
        told = [f"{n}={v}" for n, v in vars(self).items() if n != "feature_map" and v != getattr(default, n)]
        return " ".join((self.feature_map, *told)).replace("torch.", "")


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: Its name.
        computed_by: The backend that took it: `torch` is what the kernels leave to others.
        errors: Relative, by tensor.
        fault: What is wrong, None for nothing.
    """

    case: str
    computed_by: str
    errors: dict[str, float]
    fault: str | None


def cases() -> list[Case]:
    """Returns cases for every map, mode and kernel, and for what falls back to torch."""
    found = []
    for name in ("positive", "hyperbolic", "oprf", "regularised", "relu", "bare relu"):
        plain = Case(feature_map=name)
        found += [
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
        found += [Case(head_dim=head_dim), Case(head_dim=head_dim, features=200, segments=SEGMENTS)]
        found += [Case(head_dim=head_dim, batch=64, length=100), Case(head_dim=head_dim, batch=64, features=256)]
    found += [Case(features=256, scale=4.0), Case(length=1), Case(segments=(0, 0))]
    falls_back = (Case(causal=True, feature_map="relu"), Case(causal=True), Case(feature_map="trig", features=512))
    return [*found, *falls_back, Case(head_dim=256), Case(dtype=torch.float32)]


def check(
    chosen: list[Case], device: str, backend: str, attention: Callable[..., Tensor] = favor_attention
) -> Iterator[Outcome]:
    """Yields the outcome of each case; a kernel that raises is one."""
    for case in chosen:
        try:
            yield _check_one(case, device, backend, attention)
        except Exception as error:  # whatever a driver or compiler raises: the other cases shall be seen
            yield Outcome(str(case), backend, {}, first_line(error))


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
    """Returns what an exception says, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _check_one(case: Case, device: str, backend: str, attention: Callable[..., Tensor]) -> Outcome:
    drawn = draw(case, device)
    found, again = (differentiate(attention, drawn, {"backend": backend}) for _ in range(2))
    expected = expected_of(drawn, case)
    errors = {name: error_of(a, b, b) for name, a, b in zip(NAMES, found, expected, strict=True)}
    outcome = outcome_of(case, computed_by(drawn, backend), errors)
    if outcome.fault is None and not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        return replace(outcome, fault="a second call gave other bits")
    return outcome


@dataclass(frozen=True)
class Drawn:
    """What a case hands to the op; `tensors` are q, k, v and the gradient of the output."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    projection: Tensor | None
    options: dict[str, Any]


def draw(case: Case, device: str) -> Drawn:
    """Returns what a case hands to the op, the same on every machine."""
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
    if case.is_masked:
        options["token_mask"] = (torch.rand(shape[0], length, generator=generator) < 0.8).to(device)
    if case.segments:
        bounds = torch.tensor([0, *case.segments]).cumsum(0)
        options["cu_seqlens"] = bounds.to(device, torch.int32)
    q, k, v, out_grad = tensors
    return Drawn((q, k, v, out_grad), projection, options)


def computed_by(drawn: Drawn, backend: str) -> str:
    """Returns the name of the backend that takes a call."""
    inputs = AttentionInputs(*drawn.tensors[:3], drawn.projection, **drawn.options)
    return "torch" if backend == "triton" and not favor_triton.covers(inputs) else backend


def expected_of(drawn: Drawn, case: Case) -> tuple[Tensor, ...]:
    """Returns output and gradients of the float64 twin on the same values."""
    q, k, v, out_grad = (x.double() for x in drawn.tensors)
    wide = Drawn((q, k, v, out_grad), _rounded(drawn.projection, case), drawn.options)
    return differentiate(reference.favor_attention, wide, {})


def differentiate(attention: Callable[..., Tensor], drawn: Drawn, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Returns output and gradients of an attention."""
    *inputs, out_grad = drawn.tensors
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = attention(*leaves, drawn.projection, **drawn.options, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, out_grad)


def error_of(found: Tensor, expected: Tensor, whole: Tensor) -> float:
    """Returns the largest difference, relative to the largest number of the whole tensor."""
    if not expected.numel():
        return 0.0
    scale = whole.abs().max().item()
    difference = (found.double() - expected.to(found.device)).abs().max().item()
    # A lone token has a gradient of zero, up to rounding.
    return difference / scale if scale > 1e-9 else difference


def _rounded(projection: Tensor | None, case: Case) -> Tensor | None:
    """Returns the rows as the op sees them: rounded once, after `regularised` gave them their common length."""
    if projection is None:
        return None
    if case.feature_map == "regularised":
        projection = projection * (case.head_dim**0.5 / projection.norm(dim=-1, keepdim=True))
    return projection.to(case.dtype)
