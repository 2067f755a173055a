"""float32 as three products of tf32, imitated in the interpreter, which multiplies float32 as it is."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from protlm.ops import local_attention
from tests.conftest import TOLERANCE, relative_error
from tests.reference import cases, test_local
from tests.reference.cases import Case
from tests.reference.cuda import test_units_triton

_LOST_BITS = 13
"""Of the 23 bits of a float32 after the point, tf32 has 10."""


def rounded(x):
    """Returns float32 rounded to tf32, halves away from zero as the conversion of the hardware does."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    half, mask = np.uint32(1 << (_LOST_BITS - 1)), np.uint32((1 << _LOST_BITS) - 1)
    return ((bits + half) & ~mask).view(np.float32)


def dot(num_products):
    """Returns the product of matrices that stands for the one of the tensor cores."""

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        assert input_precision is not None
        high = [rounded(x.data) for x in (a, b)]
        low = [rounded(x.data - part) for x, part in zip((a, b), high, strict=True)]
        total = np.matmul(high[0], high[1])
        if num_products == 3:
            total = total + (np.matmul(high[0], low[1]) + np.matmul(low[0], high[1]))
        return TensorHandle((total + d.data).astype(d.data.dtype), d.dtype.scalar)

    return create_dot


def worst_error():
    """Returns the largest error of an output or gradient over FAVOR, near-far and local attention."""
    case = Case(segments=(60, 0, 17), padding="some", head_dim=32, num_features=40)
    plain, near_far = cases.draw(case, torch.float32), test_units_triton.drawn("near-far", case)
    pairs = [
        *zip(cases.computed_of(plain, "triton"), cases.expected_of(*plain), strict=True),
        *zip(test_units_triton.computed(*near_far), test_units_triton.expected(*near_far), strict=True),
    ]
    errors = [relative_error(actual, right) for actual, right in pairs]
    tensors = test_local.draw(1, 70, torch.float32, head_dim=32)
    actual = test_local.differentiated(local_attention, *tensors, window=9, backend="triton")
    right = test_local.differentiated(local_attention, *(x.double() for x in tensors), window=9, backend="torch")
    return max(*errors, *(relative_error(a, b) for a, b in zip(actual, right, strict=True)))


def test_three_products_are_as_exact_as_float32(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot(3))
    assert worst_error() < TOLERANCE[torch.float32]


@pytest.mark.cuda
def test_one_product_is_not(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot(1))
    assert worst_error() > 10 * TOLERANCE[torch.float32]
