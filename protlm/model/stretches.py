"""Work on every token by itself: hides that it is done a stretch of tokens at a time where no gradients are needed."""

from collections.abc import Callable

import torch
from torch import Tensor

STRETCH_TOKENS = 1024
"""Tokens of a stretch: many enough for fast matrix products, few enough for what is made of them to stay in the cache
and in memory that is used again."""


def in_stretches(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns what a function gives that treats every token, a row of each tensor, by itself.

    On a CPU and without gradients it gets a stretch of tokens at a time, so that the wide tensors inside it are never
    of the whole row. Otherwise one call is faster, or all is kept anyway.
    """
    length = len(tensors[0])
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or tensors[0].device.type != "cpu"
        or length <= STRETCH_TOKENS
    ):
        return function(*tensors)
    outs: tuple[Tensor, ...] = ()
    for start in range(0, length, STRETCH_TOKENS):
        tokens = slice(start, start + STRETCH_TOKENS)
        parts = function(*(tensor[tokens] for tensor in tensors))
        outs = outs or tuple(part.new_empty((length, *part.shape[1:])) for part in parts)
        for out, part in zip(outs, parts, strict=True):
            out[tokens] = part
    return outs
