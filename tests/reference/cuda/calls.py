"""Calls of the kernels under Triton's interpreter, and the places of units and heads in what they write."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

from protlm.ops import draw_projection, favor_triton
from protlm.ops.cuda.call import Call
from protlm.ops.inputs import AttentionInputs
from tests import conftest
from tests.conftest import relative_error

HEADS, HEAD_DIM, FEATURES = 2, 24, 40
SEGMENTS = (300, 1, 0, 37)
"""The first takes two units of 256 tokens."""
MAPS = ("positive", "oprf", "relu")
TOLERANCE = conftest.TOLERANCE[torch.float32]


class Drawn:
    """One call on float32 tensors, a packed row with padding, and its parts as the twins take them."""

    def __init__(self, feature_map, seed=0):
        generator = torch.Generator().manual_seed(seed)
        length = sum(SEGMENTS)
        shape = (1, HEADS, length, HEAD_DIM)
        self.q, self.k, self.v, self.out_grad = (torch.randn(shape, generator=generator) for _ in range(4))
        self.mask = torch.rand(1, length, generator=generator) < 0.8
        self.projection = draw_projection(FEATURES, HEAD_DIM, num_heads=HEADS, generator=generator)
        self.a = torch.tensor([-0.2, 0.1]) if feature_map == "oprf" else None
        self.bounds = torch.tensor([0, 300, 301, 301, 338], dtype=torch.int32)
        self.is_exponential = feature_map != "relu"
        self.call = Call(
            AttentionInputs(
                self.q, self.k, self.v, self.projection, self.mask, self.bounds, self.a, feature_map=feature_map
            )
        )  # fmt: skip

    def rows(self, head):
        """Returns the rows of a head with their factors."""
        scale = 1.0 if self.a is None else (1 - 4 * self.a[head].item()) ** 0.5
        return self.projection[head].double() * HEAD_DIM**-0.25 * scale

    def constants(self, head):
        """Returns what `oprf` adds for queries, to base 2."""
        if self.a is None:
            return torch.zeros(FEATURES, dtype=torch.float64)
        rows = self.projection[head].double()
        return 2 * self.a[head].item() * rows.square().sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))

    def units(self):
        """Returns (unit, segment, positions of real tokens) of every unit that has any token."""
        table = self.call.units.table.tolist()
        return [
            (unit, segment, [t for t in range(start, stop) if self.mask[0, t]])
            for unit, (segment, start, stop) in enumerate(table)
            if start < stop
        ]

    def empty_states(self):
        """Returns means and references to be written."""
        return favor_triton.empty_states(self.call.inputs)

    def random_states(self, seed=1):
        """Returns states as any keys could have left them, with padded features that are not there."""
        generator = torch.Generator().manual_seed(seed)
        means, references = self.empty_states()
        means.zero_()[..., :FEATURES, :HEAD_DIM] = torch.randn(
            (*means.shape[:2], FEATURES, HEAD_DIM), generator=generator
        )
        references.fill_(-1e30 if self.is_exponential else 0.0)
        values = torch.randn((*references.shape[:2], FEATURES), generator=generator)
        references[..., :FEATURES] = values * 3 if self.is_exponential else values.abs() + 0.1
        return means, references


def assert_close(actual, expected, told=""):
    """Fails unless a tensor equals what its twin says."""
    assert relative_error(actual, expected) < TOLERANCE, told
