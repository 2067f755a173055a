"""The share of a call that one program computes, chosen by kernel and architecture with tests/machine_code."""

from dataclasses import dataclass

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
    """

    features: int
    tokens: int
    num_warps: int
    num_stages: int


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
}
_THREE_STAGES = ("fold_keys", "read_state", "short_forward")
# Most features of a state that one program keeps in its registers. The backward keeps its gradient there too; only
# Hopper holds more of both, as compiling shows.
_MOST_FEATURES_ON_CHIP = {"short_forward": 256, "short_backward": 128}
_MOST_DIM_ON_CHIP = 64


def fits_chip(kernel: str, capability: int, dim: int, padded_features: int) -> bool:
    """Returns whether one program of a kernel for short segments can hold the state of a segment and head."""
    is_power_of_two = padded_features & (padded_features - 1) == 0
    most = 256 if 90 <= capability < 100 else _MOST_FEATURES_ON_CHIP[kernel]
    return is_power_of_two and padded_features <= most and dim <= _MOST_DIM_ON_CHIP


def tile_of(kernel: str, capability: int, dim: int, padded_features: int) -> Tile:
    """Returns the tile of a kernel.

    Args:
        kernel: Name of the kernel.
        capability: Compute capability of the device: 80, 90, 100, …
        dim: Padded head_dim.
        padded_features: Padded number of features, the most that a tile has.
    """
    tile = _TILES[kernel]
    features, tokens = tile.features, tile.tokens
    num_warps = tile.num_warps
    if kernel == "query_gradients" and dim <= 32:
        tokens, num_warps = 64, 4
    if dim > 64:
        features, tokens = (features, tokens // 2) if tokens > features else (features // 2, tokens)
    # Hopper and the Blackwell chips for data centres multiply by groups of warps; other chips (8.x, 12.x) do not.
    has_warp_groups = 90 <= capability < 120
    stages = 3 if has_warp_groups and kernel in _THREE_STAGES and dim <= 64 else tile.num_stages
    if kernel == "short_forward" and not has_warp_groups:
        # With larger tiles it runs out of registers.
        tokens = 16 if padded_features > 128 and dim < 64 else 32
    return Tile(min(features, padded_features), tokens, num_warps, stages)


def padded_dim(head_dim: int) -> int:
    """Returns the head_dim that the kernels use: a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def padded_features(features: int) -> int:
    """Returns the number of features that the kernels use, a power of two or multiple of 128: every tile divides it."""
    return max(16, 1 << (features - 1).bit_length()) if features <= 128 else -(-features // 128) * 128
