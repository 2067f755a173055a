"""The attention maps of a protein: hides what makes a head diagonal, vertical or diffuse, and how a map is reduced."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protlm.inference.attention_weights import share_tiles, visit_protein
from protlm.model.attention_calls import AttentionCall
from protlm.model.performer import Performer

Pattern = Literal["diagonal", "vertical", "diffuse"]

PROFILE_REACH = 32
"""The profile goes from this many tokens before a query to as many after it."""

LOCAL_REACH = 4
"""Keys at most so many tokens away are near: residues i and i ± 4 meet on one side of an α-helix, the farthest contact
along the chain that needs no fold."""

COLUMN_SHARE = 0.02
"""Share of the tokens that count as the strongest key columns: few enough to be seen as lines in a picture."""

PATTERN_EXCESS = 0.1
"""A map is diagonal if its near keys, and vertical if its strongest columns, draw this share of the attention that a
uniform map gives to all other keys.

As a share of what is left, and not of everything, it means the same for short proteins, where a uniform map already has
much near the diagonal, and for long ones. It is 0 for a uniform map and 1 for a map with nothing else. A tenth doubles
the attention near the diagonal of a protein of 100 residues, and more in a longer one: a band that the eye sees.
Untrained models with the default settings have at most 0.08. Where both reach it, the larger one decides.
"""


@dataclass(frozen=True, kw_only=True)
class HeadMap:
    """The attention map of one head on one protein. All shares are means over the queries.

    Attributes:
        layer: From 1.
        head: From 1.
        pattern: The class, by PATTERN_EXCESS.
        local_share: Share of the attention at most LOCAL_REACH tokens from the query.
        uniform_local_share: The same for uniform attention over the keys that a query sees.
        column_share: Share on the strongest key columns, COLUMN_SHARE of all, rounded up.
        uniform_column_share: The same for uniform attention; for causal attention its strongest columns are the first.
        entropy: Mean entropy of the queries, as a fraction of that of uniform attention, from 0 to 1.
        special_share: Share on `<cls>` and `<eos>`.
        offset_profile: Mean weight of the pairs with key − query = −PROFILE_REACH … PROFILE_REACH; 0 without a pair.
        picture: The map in blocks of `AttentionMaps.block_tokens` × block_tokens: the mean weight of each block, a row
            of blocks for each block of queries.
    """

    layer: int
    head: int
    pattern: Pattern
    local_share: float
    uniform_local_share: float
    column_share: float
    uniform_column_share: float
    entropy: float
    special_share: float
    offset_profile: list[float]
    picture: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """The attention maps of all heads on one protein.

    Attributes:
        num_tokens: Length of the protein with `<cls>` and `<eos>`.
        block_tokens: Tokens along one side of a block of the pictures; the last block may be smaller.
        is_causal: Whether keys after the query are hidden; their weights count as 0.
        heads: Every head, layer after layer.
    """

    num_tokens: int
    block_tokens: int
    is_causal: bool
    heads: list[HeadMap]


def read_attention_maps(model: Performer, protein: np.ndarray, *, max_blocks: int = 128) -> AttentionMaps:
    """Returns the maps of every layer and head, read from the features as `weight_tiles` says.

    Cost: time O(length² · features) for each head, memory O(length).

    Args:
        model: On any device.
        protein: Residue tokens, uint8 (num_residues,).
        max_blocks: Largest number of blocks along one side of a picture.

    Raises:
        ValueError: The protein does not fit (see `visit_protein`), or weights that are not finite.
    """
    if max_blocks < 1:
        raise ValueError(f"max_blocks: expected at least 1, got {max_blocks}")
    num_tokens = len(protein) + 2
    block_tokens = math.ceil(num_tokens / max_blocks)
    heads: list[HeadMap] = []

    def read(call: AttentionCall) -> None:
        heads.extend(_read_head(call, head, block_tokens) for head in range(call.attention.num_heads))

    visit_protein(model, protein, read)
    return AttentionMaps(num_tokens=num_tokens, block_tokens=block_tokens, is_causal=model.config.causal, heads=heads)


def classify(
    local_share: float, uniform_local_share: float, column_share: float, uniform_column_share: float
) -> Pattern:
    """Returns the class of a map from its shares and those of a uniform map."""
    local_excess = _excess(local_share, uniform_local_share)
    column_excess = _excess(column_share, uniform_column_share)
    if max(local_excess, column_excess) < PATTERN_EXCESS:
        return "diffuse"
    return "diagonal" if local_excess >= column_excess else "vertical"


def _excess(share: float, uniform_share: float) -> float:
    """Returns the share of the attention that a uniform map gives elsewhere; 0 where it gives nothing elsewhere."""
    elsewhere = 1 - uniform_share
    return (share - uniform_share) / elsewhere if elsewhere > 1e-9 else 0.0


def _read_head(call: AttentionCall, head: int, block_tokens: int) -> HeadMap:
    length, causal = len(call.q), call.attention.causal
    sums: _MapSums | None = None
    for start, shares in share_tiles(call, head):
        sums = sums or _MapSums(length, block_tokens, shares.device)
        sums.add(start, shares)
    assert sums is not None
    num_columns = math.ceil(COLUMN_SHARE * length)
    local_share = float(sums.by_offset[_NEAR].sum()) / length
    column_share = float(sums.by_key.topk(num_columns).values.sum()) / length
    uniform_local_share, uniform_column_share, uniform_entropy = _uniform_numbers(length, num_columns, causal)
    return HeadMap(
        layer=call.layer,
        head=head + 1,
        pattern=classify(local_share, uniform_local_share, column_share, uniform_column_share),
        local_share=local_share,
        uniform_local_share=uniform_local_share,
        column_share=column_share,
        uniform_column_share=uniform_column_share,
        entropy=float(sums.entropy) / uniform_entropy,
        special_share=float(sums.by_key[0] + sums.by_key[-1]) / length,
        offset_profile=sums.offset_profile(),
        picture=sums.picture(),
    )


_NEAR = slice(PROFILE_REACH - LOCAL_REACH, PROFILE_REACH + LOCAL_REACH + 1)
"""The places of the near offsets in a profile."""


class _MapSums:
    """The sums of one map over its tiles, in float64.

    Attributes:
        by_offset: Of the shares at each offset of the profile.
        by_key: Of the shares of each key.
        entropy: Of the entropies of the queries, in nats.
    """

    def __init__(self, length: int, block_tokens: int, device: torch.device) -> None:
        self._length, self._block_tokens = length, block_tokens
        num_blocks = math.ceil(length / block_tokens)
        self._offsets = torch.arange(-PROFILE_REACH, PROFILE_REACH + 1, device=device)
        self._blocks = torch.zeros(num_blocks, num_blocks, dtype=torch.float64, device=device)
        self.by_offset = self._blocks.new_zeros(len(self._offsets))
        self.by_key = self._blocks.new_zeros(length)
        self.entropy = self._blocks.new_zeros(())

    def add(self, start: int, shares: Tensor) -> None:
        """Adds the tile (queries, length) whose first query is `start`."""
        queries = torch.arange(start, start + len(shares), device=shares.device)
        keys = queries.unsqueeze(1) + self._offsets
        exists = (keys >= 0) & (keys < self._length)
        self.by_offset += shares.gather(1, keys.clamp(0, self._length - 1)).masked_fill_(~exists, 0.0).sum(0)
        self.by_key += shares.sum(0)
        self.entropy += torch.special.entr(shares).sum()
        num_blocks, size = len(self._blocks), self._block_tokens
        columns = F.pad(shares, (0, num_blocks * size - self._length)).view(len(shares), num_blocks, size).sum(-1)
        # A product with 0 and 1 and not index_add_, whose order of summation changes from run to run on a GPU.
        is_row = torch.arange(num_blocks, device=shares.device).unsqueeze(1) == queries // size
        self._blocks += is_row.double() @ columns

    def offset_profile(self) -> list[float]:
        """Returns the mean weight at each offset."""
        num_pairs = (self._length - self._offsets.abs()).clamp(min=1)
        profile: list[float] = (self.by_offset / num_pairs).tolist()
        return profile

    def picture(self) -> list[list[float]]:
        """Returns the mean weight of each block."""
        sizes = torch.full((len(self._blocks),), self._block_tokens, dtype=torch.float64, device=self._blocks.device)
        sizes[-1] = self._length - (len(sizes) - 1) * self._block_tokens
        means: list[list[float]] = (self._blocks / (sizes.unsqueeze(1) * sizes)).tolist()
        return means


def _uniform_numbers(length: int, num_columns: int, causal: bool) -> tuple[float, float, float]:
    """Returns the local share, the share of the strongest columns and the summed entropy of uniform attention."""
    queries = torch.arange(length, dtype=torch.float64)
    first_near = (queries - LOCAL_REACH).clamp(min=0)
    last_near = queries if causal else (queries + LOCAL_REACH).clamp(max=length - 1)
    num_seen = queries + 1 if causal else torch.full_like(queries, length)
    local_share = ((last_near - first_near + 1) / num_seen).mean()
    # Of the queries that see a key, each gives it one of their equal shares.
    by_key = (1 / num_seen).flip(0).cumsum(0).flip(0) if causal else torch.ones_like(queries)
    return float(local_share), float(by_key[:num_columns].sum()) / length, float(num_seen.log().sum())
