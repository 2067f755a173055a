"""Comparison of a fast computation with its plain formula, gradients included."""

import torch

from tests.conftest import TOLERANCE, relative_error


def differentiated(function, inputs, weights):
    """Returns what a function gives, and the gradients of the weighted sum of it."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_all_near(actual, expected, dtype):
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]
