"""A call of `local_attention` by the kernels under Triton's interpreter, and its parts as the twins take them."""

import torch

from protlm.ops import local_triton
from protlm.ops.inputs import LocalInputs
from tests.reference.cuda.unit_calls import BOUNDS, HEAD_DIM, HEADS

WINDOW = 20


class LocalDrawn:
    """A packed row with padding in float32, its output, and its gradients once `backward` has run."""

    def __init__(self, causal, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (1, HEADS, BOUNDS[-1], HEAD_DIM)
        self.q, self.k, self.v, self.out_grad = (torch.randn(shape, generator=generator) for _ in range(4))
        self.mask = torch.rand(1, BOUNDS[-1], generator=generator) < 0.8
        self.real = self.mask[0].nonzero().squeeze(1)
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        self.inputs = LocalInputs(self.q, self.k, self.v, self.mask, bounds, WINDOW, 0 if causal else WINDOW)
        self.out, self.query_sums = local_triton.forward(self.inputs)
        segments = torch.searchsorted(bounds, self.real, right=True)
        distances = self.real.unsqueeze(0) - self.real.unsqueeze(1)
        is_same = segments.unsqueeze(0) == segments.unsqueeze(1)
        self.visible = is_same & (distances >= -WINDOW) & (distances <= (0 if causal else WINDOW))

    def backward(self):
        """Returns the gradients of q, k and v."""
        return local_triton.backward(self.inputs, self.out_grad, self.out, self.query_sums)

    @property
    def inner(self):
        """The inner product of each output with its gradient."""
        return (self.out_grad * self.out).sum(-1)
