"""The share of a call that one program computes, chosen by kernel and architecture with tests/machine_code."""

from dataclasses import dataclass, replace

MAX_DIM = 128
"""Largest padded head_dim for which there are tiles."""
MIN_CAPABILITY = 80
"""Least compute capability, 10 · major + minor: the tensor cores of older GPUs have no bfloat16."""


@dataclass(frozen=True)
class Tile:
    """The block of a call that one program holds at a time.

    Attributes:
        features: Rows of the state.
        tokens: Tokens.
        num_warps: Warps of a program.
        num_stages: Most loads in flight in a loop.
        others: Tokens that the tokens are paired with.
    """

    features: int
    tokens: int
    num_warps: int
    num_stages: int
    others: int = 0


# For head_dim up to 64; for larger ones the longer side is halved.
_TILES = {
    "fold_keys": Tile(128, 64, 8, 2),
    "merge_states": Tile(16, 0, 4, 1),
    "read_state": Tile(64, 128, 8, 2),
    "query_gradients": Tile(64, 128, 8, 2),
    "state_gradients": Tile(128, 64, 8, 2),
    "add_gradients": Tile(16, 0, 4, 1),
    "key_gradients": Tile(32, 128, 8, 2),
    "short_forward": Tile(0, 64, 8, 2),
    "short_backward": Tile(0, 32, 8, 2),
    "scan_states": Tile(16, 0, 4, 1),
    "fold_queries": Tile(128, 64, 8, 2),
    "near_forward": Tile(0, 64, 4, 2, others=64),
    "near_query_gradients": Tile(0, 64, 4, 2, others=32),
    "near_key_gradients": Tile(0, 64, 8, 2, others=32),
    "triangle_forward": Tile(32, 16, 8, 1, others=32),
    "triangle_query_gradients": Tile(32, 16, 8, 1, others=32),
    "triangle_key_gradients": Tile(32, 16, 8, 1, others=32),
}
_WIDE_TILES = {
    "fold_keys": Tile(64, 32, 8, 2),
    "read_state": Tile(32, 32, 8, 2),
    "query_gradients": Tile(32, 32, 8, 2),
    "state_gradients": Tile(32, 32, 4, 2),
    "key_gradients": Tile(32, 16, 8, 2),
    "fold_queries": Tile(32, 32, 4, 2),
    "near_forward": Tile(0, 64, 8, 2, others=32),
    "near_query_gradients": Tile(0, 32, 8, 2, others=16),
    "near_key_gradients": Tile(0, 16, 4, 2, others=32),
}
"""The tiles of float32: smaller, as three products of tf32 take more registers than one of bfloat16."""
_THREE_STAGES = ("fold_keys", "read_state", "short_forward")
# Most features of a state that one program keeps in its registers. The backward keeps its gradient there too; only
# Hopper holds more of both, as compiling shows.
_MOST_FEATURES_ON_CHIP = {"short_forward": 256, "short_backward": 128}
_MOST_DIM_ON_CHIP = 64


def fits_chip(kernel: str, capability: int, dim: int, padded_features: int, *, is_wide: bool = False) -> bool:
    """Returns whether one program of a kernel for short segments can hold the state of a segment and head.

    `is_wide` says that q, k and v are float32.
    """
    is_power_of_two = padded_features & (padded_features - 1) == 0
    most = 256 if 90 <= capability < 100 else _MOST_FEATURES_ON_CHIP[kernel]
    return not is_wide and is_power_of_two and padded_features <= most and dim <= _MOST_DIM_ON_CHIP


def tile_of(kernel: str, capability: int, dim: int, padded_features: int, *, is_wide: bool = False) -> Tile:
    """Returns the tile of a kernel.

    Args:
        kernel: Name of the kernel.
        capability: Compute capability of the device: 80, 90, 100, …
        dim: Padded head_dim.
        padded_features: Padded number of features, the most that a tile has.
        is_wide: Whether q, k and v are float32.
    """
    tile = _WIDE_TILES.get(kernel, _TILES[kernel]) if is_wide else _TILES[kernel]
    features, tokens = tile.features, tile.tokens
    num_warps = tile.num_warps
    if kernel == "query_gradients" and dim <= 32 and not is_wide:
        tokens, num_warps = 64, 4
    if dim > 64:
        features, tokens = (features, tokens // 2) if tokens > features else (features // 2, tokens)
    # Hopper and the Blackwell chips for data centres multiply by groups of warps; other chips (8.x, 12.x) do not.
    has_warp_groups = 90 <= capability < 120
    stages = 3 if has_warp_groups and kernel in _THREE_STAGES and dim <= 64 else tile.num_stages
    if kernel == "short_forward" and not has_warp_groups:
        # With larger tiles it runs out of registers.
        tokens = 16 if padded_features > 128 and dim < 64 else 32
    return Tile(min(features, padded_features), tokens, num_warps, stages, tile.others)


def no_longer_than(tile: Tile, tokens: int) -> Tile:
    """Returns the tile with no more tokens than a unit of so many needs: a power of two, at least 16."""
    needed = min(tile.tokens, max(16, 1 << (tokens - 1).bit_length()))
    return replace(tile, tokens=needed, num_warps=max(4, tile.num_warps * needed // tile.tokens))


def padded_dim(head_dim: int) -> int:
    """Returns the head_dim that the kernels use: a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def padded_features(features: int) -> int:
    """Returns the number of features that the kernels use, a power of two or multiple of 128: every tile divides it."""
    return max(16, 1 << (features - 1).bit_length()) if features <= 128 else -(-features // 128) * 128
