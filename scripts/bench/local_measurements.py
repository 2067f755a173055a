"""The calls of the benchmark of local attention, and what is measured of each."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from protlm.ops import compiled, local_attention, reference
from scripts.attention_calls import BOTH, FORWARD
from scripts.measuring import WARM_UP_LENGTH, peak_during, resident_bytes, timed

HEADS, HEAD_DIM = 8, 32
LOCAL, TORCH, EXACT = "local attention", "its torch backend", "exact (SDPA)"

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementations(window: int) -> dict[str, Call]:
    """Returns what takes turns, by name."""
    calls: dict[str, Call] = {LOCAL: partial(local_attention, window=window), EXACT: scaled_dot_product_attention}
    if compiled.why_not() is None:
        calls[TORCH] = partial(local_attention, window=window, backend="torch")
    return calls


def draw(length: int) -> list[Tensor]:
    """Returns q, k, v and the gradient of the output, of unit variance, with the heads of a token side by side."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn((1, length, HEADS, HEAD_DIM), generator=generator).transpose(1, 2) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


def outputs(call: Call, tensors: Sequence[Tensor], work: str) -> tuple[Tensor, ...]:
    """Returns the output, for `BOTH` with the gradients of q, k and v."""
    *leaves, grad = tensors
    if work == FORWARD:
        with torch.no_grad():
            return (call(*leaves),)
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def both_passes(call: Call, tensors: Sequence[Tensor]) -> dict[str, float]:
    """Returns the seconds of each pass."""
    return timed(partial(outputs, call, tensors, FORWARD), FORWARD) | timed(partial(outputs, call, tensors, BOTH), BOTH)


def check_values(window: int) -> None:
    """Ends the program if local attention differs from its float64 twin."""
    tensors = draw(300)
    expected = outputs(partial(reference.softmax_attention, window=window), [x.double() for x in tensors], FORWARD)[0]
    for name, call in implementations(window).items():
        error = (outputs(call, tensors, FORWARD)[0] - expected).abs().max() / expected.abs().max()
        if name != EXACT and not error < 1e-5:
            raise SystemExit(f"{name}: differs from the float64 twin by {error:.1e}; nothing is reported")


def peak_here(window: int, length: int) -> int:
    """Returns the peak of one forward and backward in this process, in bytes above inputs and outputs."""
    call = implementations(window)[LOCAL]
    outputs(call, draw(WARM_UP_LENGTH), BOTH)
    tensors = draw(length)
    before = resident_bytes()
    peak, results = peak_during(lambda: outputs(call, tensors, BOTH))
    return peak - before - sum(result.nbytes for result in results)
