"""Half-precision weights of the linear layers, for inference: hides where a model changes its number type.

A linear layer holds its weights in bfloat16 or float16, multiplies in it, and hands its result on in it: attention gets
q, k and v in half precision, and the convolution before it works on them so. The residual stream, all norms, the sums
inside attention and the logits are float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protlm.model.performer import Performer


class HalfLinear(nn.Linear):
    """A linear layer without gradients whose weights are held in half precision, whatever its input has."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Takes the weights of a linear layer, rounded to a half-precision type."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the result in the type of the weights."""
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def halve(model: Performer, dtype: torch.dtype) -> None:
    """Gives every linear layer of a model half-precision weights, in place; it cannot be trained any more.

    The weights of embeddings, norms, convolutions, random features and of the decoder of the head stay float32.

    Args:
        model: The model, in float32.
        dtype: `torch.bfloat16` or `torch.float16`.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, HalfLinear(child, dtype))
