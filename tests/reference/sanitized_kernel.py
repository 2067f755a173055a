"""Runs a kernel from a library that was built with sanitizers, over edges of its range: a program of its own.

A sanitizer ends the process at the first fault, so that reaching the last line is the result.

    python sanitized_kernel.py LIBRARY KERNEL
"""

import sys
from itertools import product

import torch

from protlm.ops import compiled, favor_attention, favor_cpp, local_attention, local_cpp, near_far_cpp
from tests.reference.cases import MIXED, Case, computed_of, draw, maps_on

LAYOUTS = (
    {"length": 1, "head_dim": 1, "num_features": 1},
    {"length": 130, "head_dim": 17, "num_features": 33, "padding": "some"},
    {"segments": MIXED, "head_dim": 16, "num_features": 40},
    # Causal segments beyond 500 tokens are several units, whose states are kept in slots.
    {"segments": (700, 3, 1300, 0, 501), "head_dim": 16, "num_features": 20},
)
LOCAL_SHAPES = (((1,), 1), ((130,), 17), (MIXED, 16), ((700, 3, 0, 501), 40))
"""Segments and head_dim."""
# 2^x overflows from 128 on, integers from 2^31 on, floats at infinity.
SIZES = (1.0, 30.0, 1e3, 1e6, 1e18, float("inf"), float("nan"))


def main(library, kernel):
    compiled.importlib.util.find_spec = lambda _: type("Spec", (), {"origin": library})
    compiled.best_kernel = lambda: kernel
    assert compiled.why_not() is None, compiled.why_not()
    for options, feature_map, causal, size, unit_tokens in product(
        LAYOUTS, maps_on("cpp"), (False, True), SIZES, (favor_cpp._UNIT_TOKENS, 70)
    ):
        favor_cpp._UNIT_TOKENS = unit_tokens
        q, k, v, out_grad, *rest = draw(Case(feature_map=feature_map, causal=causal, **options), torch.float32)
        for edge in (q, k):
            # One token at the edge among others that are not.
            edge.detach()[..., edge.shape[-2] // 2, :] *= size
        computed_of((q, k, v, out_grad, *rest), "cpp")
    for options, feature_map, causal, size, (near_block, unit_bytes) in product(
        LAYOUTS, ("positive", "hyperbolic"), (False, True), SIZES, ((1, 1), (8, near_far_cpp._UNIT_BYTES), (40, 1))
    ):
        near_far_cpp._UNIT_BYTES = unit_bytes
        q, k, v, out_grad, projection, others = draw(
            Case(feature_map=feature_map, causal=causal, **options), torch.float32
        )
        for edge in (q, k):
            edge[..., edge.shape[-2] // 2, :] *= size
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = favor_attention(*leaves, projection, near_block=near_block, backend="cpp", **others)
        torch.autograd.grad(out, leaves, out_grad)
    for shape, window, causal, size, unit_tokens in product(
        LOCAL_SHAPES, (1, 9, 32, 5000), (False, True), SIZES, (local_cpp._UNIT_TOKENS, 32)
    ):
        local_cpp._UNIT_TOKENS = unit_tokens
        attend_locally(*shape, window, causal, size)
    print("no fault")


def attend_locally(segments, head_dim, window, causal, size):
    """Computes one call of local attention, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn((1, 2, sum(segments), head_dim), generator=generator) for _ in range(4)]
    for edge in tensors[:2]:
        edge[..., edge.shape[-2] // 2, :] *= size
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    cu_seqlens = torch.tensor([0, *torch.tensor(segments).cumsum(0)], dtype=torch.int32)
    out = local_attention(*leaves, window=window, cu_seqlens=cu_seqlens, causal=causal, backend="cpp")
    torch.autograd.grad(out, leaves, tensors[3])


if __name__ == "__main__":
    main(*sys.argv[1:])
