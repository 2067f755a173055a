"""Whether a run that is still going on has a model that is of use: what must be finite before anything is kept."""

import math
from collections.abc import Iterable

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from protlm.data.batching.batches import Batch
from protlm.errors import ProtlmError
from protlm.model.performer import Performer
from protlm.runtime.devices import OtherProcessError
from protlm.workflows.train.optimizer import local_shard

ADVICE = (
    "Checkpoints from before are kept: go on from the last with --resume and a lower rate, such as --set train.lr=… or "
    "--set train.muon_lr=…, or begin anew with a lower model.max_temperature"
)


def diverged(step: int, message: str, rank: int) -> Exception:
    """Returns the error of a run whose numbers are not finite after `step` updates; only the first process tells it."""
    if rank:
        return OtherProcessError()
    return ProtlmError(f"step {step}: {message}; expected finite numbers. {ADVICE}")


def find_fault(trainer: pl.Trainer, model: Performer, batch: Batch) -> str | None:
    """Returns what is not finite after an update, in words; None if the model and its checkpoint are of use.

    Looked at are the weights, the state of the optimizer and the loss of a row: weights that are far too large are
    finite, and useless. All processes must call it together, and come to the same answer.

    Args:
        trainer: The trainer of the run.
        model: Its network.
        batch: The row, on the device of the network; one that was just trained on.
    """
    optimizer = trainer.optimizers[0]
    state = (value for values in optimizer.state.values() for value in values.values())
    is_finite = {
        "the weights are": _are_finite(model.state_dict().values()),
        "the state of the optimizer is": _are_finite(state),
        "the loss after the update is": _is_loss_finite(model, batch),
    }
    for name, here in is_finite.items():
        if not trainer.strategy.reduce_boolean_decision(here, all=True):
            return f"{name} not finite"
    return None


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether the numbers of tensors, as far as this process holds them, are finite."""
    flags = [local_shard(tensor).isfinite().all() for tensor in tensors]
    # One question to the device for all of them; where devices share tensors, some may hold none of a small one.
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(alike).all()) for alike in by_device.values())


def _is_loss_finite(model: Performer, batch: Batch) -> bool:
    was_training = model.training
    model.eval()
    try:
        # A compiled layer would be compiled again, for this call alone.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(batch.tokens, batch.cu_seqlens, batch.target_positions).float()
            targets = model.token_table.own(batch.targets)
            return math.isfinite(F.cross_entropy(logits, targets, reduction="sum").item())
    finally:
        model.train(was_training)
