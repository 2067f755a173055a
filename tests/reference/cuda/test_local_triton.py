"""`local_attention` on the Triton backend, under the interpreter, against the float64 twin."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

from protlm.ops import local_attention
from tests.reference.test_local import assert_equals_twin, bounds, differentiated, draw


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("window", [1, pytest.param(40, marks=pytest.mark.cuda), 200])
def test_output_and_gradients_equal_the_twin(window, causal):
    options = {"window": window, "causal": causal, "backend": "triton"}
    assert_equals_twin(*draw(2, 70, torch.float32), **options)
    sizes = (0, 1, 150, 3, 40)
    assert_equals_twin(*draw(1, sum(sizes), torch.float32, head_dim=16), cu_seqlens=bounds(*sizes), **options)


def test_padding_of_any_finite_content_changes_no_output_and_gets_no_gradient():
    q, k, v, grad = draw(2, 70, torch.float32)
    token_mask = torch.rand((2, 70), generator=torch.Generator().manual_seed(1)) > 0.3
    options = {"window": 9, "token_mask": token_mask, "backend": "triton"}
    quiet = differentiated(local_attention, q, k, v, grad, **options)
    filled = [x.masked_fill(~token_mask[:, None, :, None], 1e37) for x in (q, k, v)]
    loud = differentiated(local_attention, *filled, grad, **options)
    for a, b in zip(quiet, loud, strict=True):
        assert torch.equal(a, b)
        assert not b[~token_mask[:, None, :, None].expand_as(b)].any()


def test_short_floats_equal_the_twin_on_the_same_values():
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v, grad = draw(1, 70, dtype)
        actual = differentiated(local_attention, q, k, v, grad, window=9, backend="triton")
        right = differentiated(local_attention, *(x.double() for x in (q, k, v, grad)), window=9)
        for a, b in zip(actual, right, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).abs().max() <= 2e-2 * b.abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_later_tokens_of_any_content_change_no_bit_of_earlier_causal_outputs():
    q, k, v, _ = draw(1, 70, torch.float32)
    before = local_attention(q, k, v, window=20, causal=True, backend="triton")
    for x in (q, k, v):
        x[:, :, 33:] = torch.nan
    after = local_attention(q, k, v, window=20, causal=True, backend="triton")
    assert torch.equal(before[:, :, :33], after[:, :, :33])
