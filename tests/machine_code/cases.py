"""Which launches are compiled: every kernel as a call of the op would start it, on tensors that hold no memory."""

import torch

from protlm.ops import local_triton
from protlm.ops.cuda.call import Call
from protlm.ops.cuda.tiles import fits_chip
from protlm.ops.cuda.unit_call import UnitCall
from protlm.ops.favor_triton import empty_states
from protlm.ops.inputs import AttentionInputs, LocalInputs, result_like
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
    "scan_states": 0,
    "fold_queries": 2,
    "near_forward": 2,
    "near_query_gradients": 3,
    "near_key_gradients": 4,
    "triangle_forward": 2,
    "triangle_query_gradients": 3,
    "triangle_key_gradients": 3,
}
"""Products of matrices in one iteration of the hot loop of each kernel; of those of triangles the smallest ones."""

VARIANTS = {
    "positive-64": ("positive", 64, 256, True),
    "positive-128": ("positive", 128, 256, False),
    "relu-64": ("relu", 64, 128, True),
    "oprf-32": ("oprf", 32, 128, False),
}
"""Feature map, head_dim, features, and whether the row is packed and masked."""

WIDE_VARIANT = ("positive", 64, 256, True)
"""As `VARIANTS`, of float32."""

UNIT_VARIANTS = {
    "near-far-64": ("positive", 64, 256, False, 32),
    "causal-64": ("positive", 64, 256, True, 0),
    "causal-relu-64": ("relu", 64, 256, True, 0),
    "causal-near-128": ("oprf", 128, 256, True, 64),
}
"""Feature map, head_dim, features, whether it is causal, and near_block, of packed and masked rows."""

NARROW = ("short_backward",)
"""Kernels with products whose only long side is head_dim."""

OF_FEATURES = ("fold_keys", "state_gradients", "fold_queries", "short_forward", "short_backward")
"""Kernels whose products have features for rows."""

ONLY_FOR = {
    "positive-128": (80, 90, 100), "oprf-32": (90,), "causal-relu-64": (90,), "causal-near-128": (80, 90, 120),
}  # fmt: skip
"""Where compiling a variant for every GPU would take more time than it tells."""


def cases(capability):
    """Returns the cases for a GPU by name."""
    by_name = {}
    for variant, options in VARIANTS.items():
        if capability in ONLY_FOR.get(variant, (capability,)):
            by_name |= {f"{launch.kernel.__name__}-{variant}": launch for launch in launches(capability, *options)}
    for variant, options in UNIT_VARIANTS.items():
        if capability in ONLY_FOR.get(variant, (capability,)):
            for launch in unit_launches(capability, *options):
                # Scans are two, and states of keys are computed twice.
                kind = "-of-queries" if launch.constants.get("OF_QUERIES") else ""
                by_name[f"{launch.kernel.__name__}-{variant}{kind}"] = launch
    by_name |= {f"{launch.kernel.__name__}-local-64": launch for launch in local_launches(capability)}
    by_name |= _of_float32(capability)
    return {name: _case(launch, capability) for name, launch in by_name.items()}


def _of_float32(capability):
    wide = torch.float32
    # The state and its gradient are merged as they are for shorter numbers.
    found = [
        *(each for each in launches(capability, *WIDE_VARIANT, dtype=wide) if PRODUCTS[each.kernel.__name__]),
        *local_launches(capability, dtype=wide),
    ]
    # Causal FAVOR without a near field has no float32.
    near_far = unit_launches(capability, "positive", 64, 256, False, 32, dtype=wide)
    by_name = {f"{launch.kernel.__name__}-float32": launch for launch in found}
    return by_name | {f"{launch.kernel.__name__}-float32-near-far": launch for launch in near_far}


def _case(launch, capability):
    name, tile = launch.kernel.__name__, launch.constants
    rows = tile.get("TILE_OTHERS") or tile.get("TILE_FEATURES") or tile["PADDED"]
    depth = tile["TILE_FEATURES"] if name.startswith("triangle") else tile["DIM"]
    multiplied = PRODUCTS[name] * rows * tile.get("TILE_TOKENS", 0) * depth
    # Groups of warps multiply 64 rows and more: tokens, where the state is read, else features.
    side = tile.get("TILE_FEATURES") or tile["PADDED"] if name in OF_FEATURES else tile.get("TILE_TOKENS", 64)
    has_wide = capability in (80, 120) or side >= 64
    return Case(
        launch, multiplied,
        has_pipelined_loads=PRODUCTS[name] > 0 and not name.startswith("triangle"),
        has_narrow_products=not has_wide or (name in NARROW and tile["DIM"] < 64),
        has_wide_products=has_wide,
    )  # fmt: skip


def launches(
    capability, feature_map, head_dim, features, is_packed, length=8192, batch=8, heads=8, dtype=torch.bfloat16
):
    """Returns the launches of a forward and a backward by units, and of each in a single kernel, if it takes these."""
    if is_packed:
        batch, length = 1, batch * length
    shape = (batch, length, heads, head_dim)
    # As a model lays them out.
    q, k, v, out_grad = (torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4))
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
    is_wide = dtype == torch.float32
    if fits_chip("short_forward", capability, call.dim, call.padded, is_wide=is_wide):
        result.append(call.short_forward(means, references, out, query_sums))
    if fits_chip("short_backward", capability, call.dim, call.padded, is_wide=is_wide):
        result.append(call.short_backward(out_grad, out, means, references, query_sums, grads))
    return result


def unit_launches(
    capability, feature_map, head_dim, features, causal, near_block, tokens=65_536, heads=8, dtype=torch.bfloat16
):
    """Returns the launches of a forward and a backward of a call whose units have states."""
    q, k, v, out_grad = _packed(tokens, heads, head_dim, dtype)
    inputs = AttentionInputs(
        q, k, v, torch.empty(heads, features, head_dim, device="meta"), _mask(tokens), _bounds(),
        torch.empty(heads, device="meta") if feature_map == "oprf" else None, feature_map, causal, "",
        torch.empty(heads, features, device="meta") if near_block else None, near_block,
    )  # fmt: skip
    call = UnitCall(inputs, capability)
    out, query_sums = result_like(v), call.query_sums()
    sums_grad = call.query_sums() if near_block else None
    inner, q_grad = call.query_sums(), result_like(q)
    return [
        *call.forward(out, query_sums),
        *call.of_queries(out_grad, out, query_sums, sums_grad, inner, q_grad),
        *call.of_keys(out_grad, query_sums, inner, (result_like(k), result_like(v))),
    ]


def local_launches(capability, window=32, head_dim=64, tokens=65_536, heads=8, dtype=torch.bfloat16):
    """Returns the launches of a forward and a backward of local attention."""
    q, k, v, out_grad = _packed(tokens, heads, head_dim, dtype)
    call = local_triton.near_call(LocalInputs(q, k, v, None, _bounds(), window, window), capability)
    out, query_sums, inner = result_like(v), *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return [
        call.forward(out, query_sums),
        call.query_gradients(out_grad, out, query_sums, inner, result_like(q)),
        call.key_gradients(out_grad, query_sums, inner, (result_like(k), result_like(v))),
    ]


def _packed(tokens, heads, head_dim, dtype):
    shape = (1, tokens, heads, head_dim)
    return [torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4)]


def _mask(tokens):
    return torch.empty(1, tokens, dtype=torch.bool, device="meta")


def _bounds():
    return torch.empty(101, dtype=torch.int32, device="meta")
