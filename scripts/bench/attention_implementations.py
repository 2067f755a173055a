"""What the attention benchmark compares: hides how each implementation is called, timed and held against the twin."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from protlm.ops import draw_projection, favor_attention, kernel_features, reference
from scripts.report.cost import FEATURES, HEAD_DIM, HEADS

FORWARD, BOTH = "forward", "forward + backward"
OURS: dict[str, dict[str, Any]] = {
    "favor": {},
    "favor relu": {"feature_map": "relu"},
    "favor causal": {"causal": True},
    "chunked torch": {"backend": "torch"},
}
"""The ways in which the op is called."""
SOFTMAX_PEER, RELU_PEER = "performer-pytorch softmax", "performer-pytorch relu"
COMPILED = "compiled formula"
GEMM_SIZE = 2048
GEMM = "GEMM"
CHECKED_LENGTH, CHECKED_BOUNDS = 777, (0, 1, 300, 300, 777)
# As in the tests of the op: where a query and its only keys open few rows in common, the gradients of q and k of `relu`
# nearly cancel over a small renormaliser.
TOLERANCE = {"positive": 1e-5, "relu": 1e-4}

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Times = dict[str, dict[str, list[float]]]
"""Seconds of every repeat, by name and pass."""


@dataclass(frozen=True)
class Inputs:
    """What one call is given: q, k and v, the projection, and the gradient of the output."""

    qkv: tuple[Tensor, Tensor, Tensor]
    projection: Tensor
    out_grad: Tensor

    def forward(self, attention: Attention) -> Tensor:
        """Returns the output."""
        return attention(*self.qkv, self.projection)

    def backward(self, attention: Attention) -> tuple[Tensor, ...]:
        """Returns the output and the gradients of q, k and v."""
        out = self.forward(attention)
        return out.detach(), *torch.autograd.grad(out, self.qkv, self.out_grad)


def draw_inputs(length: int, heads: int = HEADS) -> Inputs:
    """Returns inputs of unit variance, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, HEAD_DIM)
    q, k, v, out_grad = (torch.randn(shape, generator=generator) for _ in range(4))
    projection = draw_projection(FEATURES, HEAD_DIM, num_heads=heads, generator=generator)
    return Inputs((q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), projection, out_grad)


def plain_formula(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Returns FAVOR attention with all features in memory: safe only for small norms."""
    q_features = kernel_features(q, projection)
    k_features = kernel_features(k, projection)
    totals = q_features @ k_features.sum(2).unsqueeze(-1)
    return (q_features @ (k_features.transpose(-1, -2) @ v)) / totals


def exact(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Returns softmax attention; the projection is not used."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def implementations() -> dict[str, Attention]:
    """Returns what is compared, by name, without what takes no part here, which is told."""
    found: dict[str, Attention] = {name: partial(favor_attention, **options) for name, options in OURS.items()}
    return found | {"plain formula": plain_formula, "exact (SDPA)": exact} | performer_pytorch_attention()


def performer_pytorch_attention() -> dict[str, Attention]:
    """Returns both kinds of performer-pytorch, where it is installed."""
    try:
        # Its imports use what Python and torch have deprecated.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from performer_pytorch import FastAttention
    except ImportError as error:
        print(f"performer-pytorch takes no part: {error}", file=sys.stderr)
        return {}
    found: dict[str, Attention] = {}
    for name, is_relu in ((SOFTMAX_PEER, False), (RELU_PEER, True)):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            module = FastAttention(HEAD_DIM, FEATURES, generalized_attention=is_relu)
        # It has a projection of its own, which its heads share.
        found[name] = lambda q, k, v, _, module=module: module(q, k, v)
    return found


def compiled_formula() -> dict[str, Attention]:
    """Returns the plain formula by torch.compile, if it compiles."""
    # `fullgraph` makes an error of what would silently run uncompiled.
    compiled = torch.compile(plain_formula, fullgraph=True, dynamic=False)
    try:
        draw_inputs(64).backward(compiled)
    except Exception as error:  # a compiler may fail in any way, which is told
        reason = str(error).strip().splitlines() or [""]
        print(f"torch.compile takes no part: {type(error).__name__}: {reason[0]}", file=sys.stderr)
        return {}
    return {COMPILED: compiled}


def check_values(functions: Mapping[str, Attention]) -> None:
    """Ends the program unless the op, and the formula plain and compiled, equal the float64 twin, gradients too."""
    inputs = draw_inputs(CHECKED_LENGTH, heads=2)
    bounds = torch.tensor(CHECKED_BOUNDS, dtype=torch.int32)
    for name, options in (OURS | {"plain formula": {}, COMPILED: {}}).items():
        if name not in functions:
            continue
        of_twin = {key: value for key, value in options.items() if key != "backend"}
        for layout in ({}, {"cu_seqlens": bounds}) if name in OURS else ({},):
            expected = inputs.backward(partial(_twin, **of_twin, **layout))
            found = inputs.backward(partial(functions[name], **layout))
            tolerance = TOLERANCE[options.get("feature_map", "positive")]
            for what, ours, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
                error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
                if not error < (TOLERANCE["positive"] if what == "output" else tolerance):
                    packed = ", packed" if layout else ""
                    sys.exit(f"error: {name}{packed}: {what} differs from the float64 twin by {error:.1e}; "
                             "nothing is timed")  # fmt: skip


def _twin(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, **options: Any) -> Tensor:
    """Returns the output of the twin in float32, so that gradients of the output fit it."""
    return reference.favor_attention(q, k, v, projection, **options).float()


def timed(attention: Attention, inputs: Inputs) -> dict[str, float]:
    """Returns the seconds of a forward that keeps nothing for a backward, and of a forward with its backward."""
    seconds = {}
    with torch.no_grad():
        started = time.perf_counter()
        out = inputs.forward(attention)
        seconds[FORWARD] = time.perf_counter() - started
    del out
    started = time.perf_counter()
    inputs.backward(attention)
    seconds[BOTH] = time.perf_counter() - started
    return seconds


def gemm() -> Callable[[], dict[str, float]]:
    """Returns a call that times the product of two large matrices: what the machine can do."""
    left, right, product = (torch.ones(GEMM_SIZE, GEMM_SIZE) for _ in range(3))

    def call() -> dict[str, float]:
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        return {FORWARD: time.perf_counter() - started}

    return call


def take_turns(calls: Mapping[str, Callable[[], dict[str, float]]], repeats: int) -> Times:
    """Returns the seconds of calls that take turns within each repeat, after one round to warm up."""
    times: Times = {}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            for what, seconds in call().items():
                if repeat:
                    times.setdefault(name, {}).setdefault(what, []).append(seconds)
    return times


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Lets torch use this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
