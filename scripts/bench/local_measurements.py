"""The calls of the benchmark of local and near-far attention: their inputs, values, times and peak memory."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from protlm.ops import compiled, draw_projection, favor_attention, local_attention, reference
from scripts.attention_calls import BOTH, FORWARD
from scripts.measuring import WARM_UP_LENGTH, peak_during, resident_bytes, timed

HEADS, HEAD_DIM, NUM_FEATURES = 8, 32, 128
LOCAL, NEAR_FAR = "local attention", "near-far attention"
TORCH, EXACT, FAVOR = "its torch backend", "exact (SDPA)", "FAVOR"
SUBJECTS = {"local": LOCAL, "near-far": NEAR_FAR}

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementations(subject: str, window: int) -> dict[str, Call]:
    """Returns what takes turns, by name; the subject is the first. `window` is near_block of near-far attention."""
    if subject == LOCAL:
        of_subject: Callable[..., Tensor] = partial(local_attention, window=window)
        others: dict[str, Call] = {}
    else:
        projection = _projection()
        of_subject = partial(favor_attention, projection=projection, near_block=window)
        others = {FAVOR: partial(favor_attention, projection=projection)}
    calls: dict[str, Call] = {subject: of_subject, EXACT: scaled_dot_product_attention, **others}
    if compiled.why_not() is None:
        calls[TORCH] = partial(of_subject, backend="torch")
    return calls


def _projection() -> Tensor:
    return draw_projection(NUM_FEATURES, HEAD_DIM, num_heads=HEADS, generator=torch.Generator().manual_seed(1))


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


def check_values(subject: str, window: int) -> None:
    """Ends the program if the subject differs from its float64 twin."""
    tensors = draw(300)
    twins = {
        LOCAL: partial(reference.softmax_attention, window=window),
        NEAR_FAR: partial(reference.favor_attention, projection=_projection().double(), near_block=window),
    }
    expected = outputs(twins[subject], [x.detach().double().requires_grad_() for x in tensors], BOTH)
    for name, call in implementations(subject, window).items():
        pairs = zip(outputs(call, tensors, BOTH), expected, strict=True)
        error = max(((actual - wanted).abs().max() / wanted.abs().max()).item() for actual, wanted in pairs)
        if name in (subject, TORCH) and not error < 1e-5:
            raise SystemExit(f"{name}: differs from the float64 twin by {error:.1e}; nothing is reported")


def peak_here(subject: str, window: int, length: int) -> int:
    """Returns the peak of one forward and backward in this process, in bytes above inputs and outputs."""
    call = implementations(subject, window)[subject]
    outputs(call, draw(WARM_UP_LENGTH), BOTH)
    tensors = draw(length)
    before = resident_bytes()
    peak, results = peak_during(lambda: outputs(call, tensors, BOTH))
    return peak - before - sum(result.nbytes for result in results)
