"""Which launches are compiled: every kernel as a call of the op would start it, on tensors that hold no memory."""

import torch

from protlm.ops.cuda.call import Call
from protlm.ops.cuda.tiles import fits_chip
from protlm.ops.favor_triton import empty_states
from protlm.ops.inputs import AttentionInputs, result_like
from tests.machine_code.expectations import Case

PRODUCTS = {
    "fold_keys": 2,
    "read_state": 2,
    "query_gradients": 3,
    "state_gradients": 2,
    "key_gradients": 4,
    "short_forward": 2,
    "short_backward": 4,
    "merge_states": 0,
    "add_gradients": 0,
}
"""Products of matrices in one iteration of the hot loop of each kernel."""

VARIANTS = {
    "positive-64": ("positive", 64, 256, True),
    "positive-128": ("positive", 128, 256, False),
    "relu-64": ("relu", 64, 128, True),
    "oprf-32": ("oprf", 32, 128, False),
}
"""Feature map, head_dim, features, and whether the row is packed and masked."""

NARROW = ("short_backward",)
"""Kernels with products whose only long side is head_dim."""

ONLY_FOR = {"positive-128": (80, 90, 100), "oprf-32": (90,)}
"""Where compiling a variant for every GPU would take more time than it tells."""


def cases(capability):
    """Returns the cases for a GPU by name."""
    by_name = {}
    for variant, options in VARIANTS.items():
        if capability not in ONLY_FOR.get(variant, (capability,)):
            continue
        for launch in launches(capability, *options):
            name = launch.kernel.__name__
            tile = launch.constants
            rows = tile.get("TILE_FEATURES", tile["PADDED"])
            multiplied = PRODUCTS[name] * rows * tile.get("TILE_TOKENS", 0) * tile["DIM"]
            narrow = name in NARROW and tile["DIM"] < 64
            by_name[f"{name}-{variant}"] = Case(launch, multiplied, PRODUCTS[name] > 0, has_narrow_products=narrow)
    return by_name


def launches(capability, feature_map, head_dim, features, is_packed, length=8192, batch=8, heads=8):
    """Returns the launches of a forward and a backward by units, and of each in a single kernel, if it takes these."""
    if is_packed:
        batch, length = 1, batch * length
    shape = (batch, length, heads, head_dim)
    # As a model lays them out.
    q, k, v, out_grad = (torch.empty(shape, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(4))
    inputs = AttentionInputs(
        q, k, v, torch.empty(heads, features, head_dim, device="meta"), feature_map=feature_map,
        token_mask=torch.empty(batch, length, dtype=torch.bool, device="meta") if is_packed else None,
        cu_seqlens=torch.empty(101, dtype=torch.int32, device="meta") if is_packed else None,
        oprf_a=torch.empty(heads, device="meta") if feature_map == "oprf" else None,
    )  # fmt: skip
    call = Call(inputs, capability)
    out, query_sums = result_like(v), call.query_sums()
    means, references = empty_states(inputs)
    state_grad = call.empty_state_grad()
    result = [
        *call.fold(means, references),
        call.read(means, references, out, query_sums),
        *call.query_gradients(out_grad, out, means, references, query_sums, result_like(q), state_grad),
        call.key_gradients(references, state_grad, result_like(k), result_like(v)),
    ]
    grads = result_like(q), result_like(k), result_like(v)
    if fits_chip("short_forward", capability, call.dim, call.padded):
        result.append(call.short_forward(means, references, out, query_sums))
    if fits_chip("short_backward", capability, call.dim, call.padded):
        result.append(call.short_backward(out_grad, out, means, references, query_sums, grads))
    return result
