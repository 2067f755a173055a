"""Computations on single tokens, done a stretch of tokens at a time where no gradients are needed."""

from collections.abc import Callable

import torch
from torch import Tensor

STRETCH_TOKENS = 1024
"""Number of tokens of a stretch: enough for fast matrix products, and few enough that intermediate results stay in the
cache and in memory that is used again."""


def in_stretches(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the results of a function that computes each row of its tensors, one token, independently.

    On a CPU and without gradients the function gets a stretch of tokens at a time, so that its wide intermediate
    tensors never cover the whole row. Otherwise one call is faster, or everything is kept for the gradients anyway.
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
        results = function(*(tensor[tokens] for tensor in tensors))
        outs = outs or tuple(result.new_empty((length, *result.shape[1:])) for result in results)
        for out, result in zip(outs, results, strict=True):
            out[tokens] = result
    return outs
