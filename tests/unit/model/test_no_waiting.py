"""A row goes through a model without the host reading one number: on the device `meta` there are none to read.

There torch computes no attention of ours, so how its launches are prepared is tried by itself.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from protlm.data.batching.batches import Batch
from protlm.ops import favor_triton
from protlm.ops.inputs import AttentionInputs, LocalInputs
from protlm.workflows.train.row_losses import language_loss
from tests.unit.model.small_models import bounds, build

KINDS = {
    "local and FAVOR": {"attention": ("local", "positive")},
    "near-far": {"attention": "near-far"},
    "causal": {"attention": ("local", "positive"), "causal": True},
    "relu": {"attention": "relu"},
    "learned positions": {"attention": "positive", "positions": "learned", "max_positions": 64},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_reads_no_number(kind):
    model = build(**KINDS[kind]).to("meta")
    batch = Batch(
        torch.zeros(30, dtype=torch.int64, device="meta"), bounds(12, 18).to("meta"),
        torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"), 0, 26,
    )  # fmt: skip
    row = language_loss(model, batch)
    row.loss.backward()
    assert row.loss.device.type == row.nll.device.type == row.num_correct.device.type == "meta"
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


class _OnDeviceAlone(TorchDispatchMode):
    """Fails where a number is read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def _copies(*_, **options):
    raise AssertionError("a tensor of numbers of the host is copied to the device, for which the host waits")


def _inputs(**options):
    q, k, v = (torch.empty(1, 2, 300, 16, device="meta", dtype=torch.bfloat16) for _ in range(3))
    rows = torch.empty(2, 24, 16, device="meta")
    return AttentionInputs(q, k, v, rows, None, bounds(100, 200).to("meta"), **options)


CALLS = {
    "near-far": {"near_block": 32, "feature_bias": torch.empty(2, 24, device="meta")},
    "causal": {"causal": True, "feature_map": "oprf", "oprf_a": torch.empty(2, device="meta")},
    "plain": {},
}


@pytest.mark.parametrize("kind", CALLS)
def test_launches_are_prepared_on_the_device_alone(kind, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be launched")
    from protlm.ops.cuda.call import Call
    from protlm.ops.cuda.unit_call import UnitCall
    from protlm.ops.local_triton import near_call

    inputs = _inputs(**CALLS[kind])
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _copies)
    with _OnDeviceAlone():
        sums = torch.empty(1, 2, 300, device="meta")
        out, inner, grads = inputs.v.new_empty(inputs.v.shape), torch.empty_like(sums), [torch.empty_like(inputs.q)] * 3
        if kind == "plain":
            # Local attention, and FAVOR without units.
            call = Call(inputs, 90)
            call.fold(*(x.new_empty(x.shape) for x in favor_triton.empty_states(inputs)))
            near_call(LocalInputs(inputs.q, inputs.k, inputs.v, None, inputs.cu_seqlens, 8, 8), 90).forward(out, sums)
            return
        call = UnitCall(inputs, 90)
        call.forward(out, sums)
        call.of_queries(out, out, sums, None, inner, grads[0])
        call.of_keys(out, sums, inner, (grads[1], grads[2]))


def test_a_number_that_is_read_is_seen():
    with pytest.raises(RuntimeError):
        torch.zeros(3, device="meta").sum().item()
    with pytest.raises(AssertionError), _OnDeviceAlone():
        torch.zeros(3).sum().item()
