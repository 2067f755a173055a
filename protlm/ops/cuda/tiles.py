"""How much of a call one program takes, by kernel and architecture: found by compiling, see tests/machine_code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time.

    Attributes:
        features: Rows of the state.
        tokens: Tokens.
        num_warps: Warps of a program.
        num_stages: Loads in flight in a loop, at most.
    """

    features: int
    tokens: int
    num_warps: int
    num_stages: int


# For head_dim up to 64; the larger side is halved above.
_TILES = {
    "fold_keys": Tile(128, 64, 8, 2),
    "merge_states": Tile(16, 0, 4, 1),
    "read_state": Tile(64, 128, 8, 2),
    "query_gradients": Tile(64, 128, 8, 2),
    "state_gradients": Tile(128, 64, 8, 2),
    "add_gradients": Tile(16, 0, 4, 1),
    "key_gradients": Tile(32, 128, 8, 2),
    "short_forward": Tile(0, 64, 8, 2),
}
_HOPPER = 90
_THREE_STAGES = ("fold_keys", "read_state")
# With a larger state and larger tiles, `short_forward` runs out of registers there.
_MOST_STATE_OF_AMPERE = 128 * 64


def tile_of(kernel: str, capability: int, dim: int, padded_features: int) -> Tile:
    """Returns the tile of a kernel.

    Args:
        kernel: Its name.
        capability: Of the device: 80, 90, 100, …
        dim: head_dim, padded.
        padded_features: Features, padded: no tile has more of them.
    """
    tile = _TILES[kernel]
    features, tokens = tile.features, tile.tokens
    num_warps = tile.num_warps
    if kernel == "query_gradients" and dim <= 32:
        tokens, num_warps = 64, 4
    if dim > 64:
        features, tokens = (features, tokens // 2) if tokens > features else (features // 2, tokens)
    stages = 3 if capability >= _HOPPER and kernel in _THREE_STAGES and dim <= 64 else tile.num_stages
    if kernel == "short_forward" and capability < _HOPPER and dim * padded_features > _MOST_STATE_OF_AMPERE:
        tokens //= 2
    return Tile(min(features, padded_features), tokens, num_warps, stages)
