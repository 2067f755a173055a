"""How far the attention op may be from its float64 twin: one table, for the GPU check and for the tests on the CPU.

It imports nothing of protlm: tests read it before pytest adds the checks of annotations to the modules.
"""

import torch

NAMES = ("out", "q_grad", "k_grad", "v_grad")
"""The tensors that are compared: the output and its gradients."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest difference from the twin on the same values, relative to the largest number of the tensor.

It holds at unit variance and, in tests, up to length 1,024.
"""

LOOSER_IN_TESTS = {("trig", name): 10 for name in NAMES} | {("relu", "q_grad"): 10, ("relu", "k_grad"): 10}
"""Factors on the tolerance by map and tensor, for float32 and float64 on the CPU.

The renormaliser of `trig` is a sum of signed terms and up to a hundred thousand times smaller than they are: rounding
grows by as much. (From float32 it is computed in float64, where that does not show.) Features of `relu` have no signs,
but where a query and its only keys have few positive scores in common, these gradients nearly cancel over a small
renormaliser.
"""

LOOSER_ON_GPU = {("relu", "q_grad"): 5, ("relu", "k_grad"): 5}
"""The same for the GPU check, most of which is in bfloat16, at 2,000 times the tolerance of float32.

There the rounding of the output outweighs what cancels in `trig`, which needs no factor. Outputs of `relu` are means of
many values, much smaller than these: the rounding of its features weighs more than that of exponential maps.
"""
