"""Attention on tensors: random features, the ops and their float64 twins. It knows nothing of proteins."""

from protlm.ops.context_parallel import local_bounds
from protlm.ops.favor import backends, favor_attention
from protlm.ops.local import local_attention
from protlm.ops.random_features import draw_projection, kernel_features, oprf_parameter

__all__ = [
    "backends",
    "draw_projection",
    "favor_attention",
    "kernel_features",
    "local_attention",
    "local_bounds",
    "oprf_parameter",
]
