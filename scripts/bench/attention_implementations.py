"""The implementations that the attention benchmark compares: how each is called, timed and held against the twin."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from protlm.gpu_check import tolerances
from protlm.ops import favor_attention, kernel_features, reference
from scripts.attention_calls import BOTH, FEATURES, FORWARD, HEAD_DIM, Attention, Inputs, draw_inputs, exact
from scripts.bench.models import building_a_peer, why_missing
from scripts.measuring import timed

OURS: dict[str, dict[str, Any]] = {
    "favor": {},
    "favor relu": {"feature_map": "relu"},
    "favor causal": {"causal": True},
    "chunked torch": {"backend": "torch"},
}
"""The ways in which the op is called."""
SOFTMAX_PEER, RELU_PEER = "performer-pytorch softmax", "performer-pytorch relu"
PEER_MODULE = "performer_pytorch"
COMPILED = "compiled formula"
GEMM_SIZE = 2048
GEMM = "GEMM"
CHECKED_LENGTH, CHECKED_BOUNDS = 777, (0, 1, 300, 300, 777)
TOLERANCE = {
    kind: tolerances.TOLERANCE[torch.float32] * tolerances.LOOSER_IN_TESTS.get((kind, "q_grad"), 1)
    for kind in ("positive", "relu")
}


def plain_formula(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Returns FAVOR attention with all features in memory: safe only for small norms."""
    q_features = kernel_features(q, projection)
    k_features = kernel_features(k, projection)
    totals = q_features @ k_features.sum(2).unsqueeze(-1)
    return (q_features @ (k_features.transpose(-1, -2) @ v)) / totals


def implementations() -> dict[str, Attention]:
    """Returns the implementations by name; why performer-pytorch is left out is printed to standard error."""
    ours: dict[str, Attention] = {name: partial(favor_attention, **options) for name, options in OURS.items()}
    return ours | {"plain formula": plain_formula, "exact (SDPA)": exact} | performer_pytorch_attention()


def performer_pytorch_attention() -> dict[str, Attention]:
    """Returns both kinds of performer-pytorch, where it is installed."""
    if reason := why_missing(PEER_MODULE):
        print(f"performer-pytorch takes no part: {reason}", file=sys.stderr)
        return {}
    peers: dict[str, Attention] = {}
    for name, is_relu in ((SOFTMAX_PEER, False), (RELU_PEER, True)):
        with building_a_peer():
            from performer_pytorch import FastAttention

            module = FastAttention(HEAD_DIM, FEATURES, generalized_attention=is_relu)
        # It has a projection of its own, which its heads share.
        peers[name] = lambda q, k, v, _, module=module: module(q, k, v)
    return peers


def compiled_formula() -> dict[str, Attention]:
    """Returns the plain formula by torch.compile, if it compiles."""
    # `fullgraph` makes an error of what would silently run uncompiled.
    compiled = torch.compile(plain_formula, fullgraph=True, dynamic=False)
    try:
        draw_inputs(64).backward(compiled)
    except Exception as error:  # a compiler may fail in any way; the reason is printed
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
            outputs = inputs.backward(partial(functions[name], **layout))
            tolerance = TOLERANCE[options.get("feature_map", "positive")]
            for output, ours, twins in zip(("output", "dq", "dk", "dv"), outputs, expected, strict=True):
                error = ((ours - twins).abs().max() / twins.abs().max()).item()
                if not error < (TOLERANCE["positive"] if output == "output" else tolerance):
                    packed = ", packed" if layout else ""
                    sys.exit(f"error: {name}{packed}: {output} differs from the float64 twin by {error:.1e}; "
                             "nothing is timed")  # fmt: skip


def _twin(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, **options: Any) -> Tensor:
    """Returns the output of the twin in float32, so that gradients of the output fit it."""
    return reference.favor_attention(q, k, v, projection, **options).float()


def both_passes(attention: Attention, inputs: Inputs) -> dict[str, float]:
    """Returns the seconds of a forward that keeps nothing for a backward, and of a forward with its backward."""
    kept: list[tuple[Tensor, ...]] = []
    # Freeing the output is no part of the forward.
    seconds = timed(lambda: kept.append(inputs.outputs(attention, FORWARD)), FORWARD)
    kept.clear()
    return seconds | timed(partial(inputs.outputs, attention, BOTH), BOTH)


def gemm() -> Callable[[], dict[str, float]]:
    """Returns a call that times the product of two large matrices: the peak rate of the machine."""
    left, right, product = (torch.ones(GEMM_SIZE, GEMM_SIZE) for _ in range(3))
    return partial(timed, partial(torch.mm, left, right, out=product), FORWARD)
