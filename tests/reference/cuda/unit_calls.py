"""Causal and near-far calls under Triton's interpreter, and the parts of them that each kernel and its twin compute."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

from protlm.ops import draw_projection
from protlm.ops.cuda import unit_call
from protlm.ops.cuda.unit_call import UnitCall
from protlm.ops.inputs import AttentionInputs, result_like

HEADS, HEAD_DIM, FEATURES, UNIT = 2, 24, 40, 32
BOUNDS = [0, 90, 91, 91, 128]
MODES = {
    "causal oprf": ("oprf", True, 0),
    "causal relu": ("relu", True, 0),
    "near-far": ("positive", False, UNIT),
    "causal near-far oprf": ("oprf", True, UNIT),
}
"""Feature map, whether it is causal, and near_block."""
WITHOUT_NEAR = [name for name, (_, _, near_block) in MODES.items() if not near_block]


class Computed:
    """One call on float32 tensors, a packed row with padding, computed, and its parts as the twins take them."""

    def __init__(self, mode, seed=0):
        feature_map, self.causal, self.near_block = MODES[mode]
        generator = torch.Generator().manual_seed(seed)
        length = BOUNDS[-1]
        shape = (1, HEADS, length, HEAD_DIM)
        self.q, self.k, self.v, self.out_grad = (torch.randn(shape, generator=generator) for _ in range(4))
        self.sums_grad = torch.randn(shape[:3], generator=generator) if self.near_block else None
        self.mask = torch.rand(1, length, generator=generator) < 0.8
        self.projection = draw_projection(FEATURES, HEAD_DIM, num_heads=HEADS, generator=generator)
        self.a = torch.tensor([-0.2, 0.1]) if feature_map == "oprf" else None
        self.bias = None if feature_map == "relu" else 0.5 * torch.randn(HEADS, FEATURES, generator=generator)
        self.is_exponential = feature_map != "relu"
        self.call = UnitCall(
            AttentionInputs(
                self.q, self.k, self.v, self.projection, self.mask, torch.tensor(BOUNDS, dtype=torch.int32), self.a,
                feature_map, self.causal, "", self.bias, self.near_block,
            )
        )  # fmt: skip
        self.out, self.query_sums = result_like(self.v), self.call.query_sums()
        self.grads = tuple(torch.empty_like(x) for x in (self.q, self.k, self.v))
        self.of_forward = self._run(self.call.forward(self.out, self.query_sums))
        inner = torch.empty_like(self.query_sums)
        given = (self.out_grad, self.out, self.query_sums, self.sums_grad, inner, self.grads[0])
        self.of_backward = self._run(self.call.of_queries(*given))
        self.of_backward |= self._run(self.call.of_keys(self.out_grad, self.query_sums, inner, self.grads[1:]))

    def _run(self, launches):
        """Runs launches and returns their arguments by the name of the kernel; later ones hide earlier ones."""
        self.call.run(launches)
        return {launch.kernel.__name__: launch.arguments for launch in launches}

    def rows(self, head):
        """Returns the rows of a head with their factors."""
        scale = 1.0 if self.a is None else (1 - 4 * self.a[head].item()) ** 0.5
        return self.projection[head].double() * HEAD_DIM**-0.25 * scale

    def constants(self, head):
        """Returns what queries add, to base 2."""
        rows, log_2 = self.projection[head].double(), torch.log(torch.tensor(2.0, dtype=torch.float64))
        added = torch.zeros(FEATURES, dtype=torch.float64)
        if self.a is not None:
            added = added + 2 * self.a[head].item() * rows.square().sum(-1)
        if self.bias is not None:
            added = added + self.bias[head].double()
        if self.near_block:
            added = added - torch.log(torch.tensor(float(FEATURES), dtype=torch.float64))
            if self.a is not None:
                added = added + 0.5 * HEAD_DIM * torch.log1p(-4 * self.a[head].double())
        return added / log_2

    def units(self):
        """Returns (unit, segment, all positions) of every unit that has any token."""
        table = self.call.units.table.tolist()
        return [
            (unit, segment, range(start, stop)) for unit, (segment, start, stop) in enumerate(table) if start < stop
        ]

    def real(self, tokens):
        """Returns those positions that hold real tokens."""
        return [t for t in tokens if self.mask[0, t]]

    def near(self, segment, tokens):
        """Returns the real positions that are near to a unit, and which of them each of its real queries sees."""
        low = max(BOUNDS[segment], tokens.start - UNIT)
        high = min(BOUNDS[segment + 1], tokens.start + 2 * UNIT)
        queries, keys = self.real(tokens), self.real(range(low, high))
        distances = torch.tensor(keys).unsqueeze(0) - torch.tensor(queries).unsqueeze(1)
        return queries, keys, (distances <= 0) if self.causal else torch.ones_like(distances, dtype=torch.bool)


@functools.cache
def computed(mode):
    """Returns the call of a mode, which takes seconds, computed once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_call, "CAUSAL_UNIT_TOKENS", UNIT)
        return Computed(mode)


def parts(*tensors, head, tokens):
    """Returns the vectors or numbers of some tokens of one head."""
    return [tensor[0, head, tokens] for tensor in tensors]
