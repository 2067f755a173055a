"""The loss of one row: of language modelling, and of the stages in which a converted model learns from a teacher.

A teacher is a whole copy on every device, also where devices share the model, and part of no checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from protlm.config import Config
from protlm.data.batching.batches import Batch
from protlm.model.performer import Performer
from protlm.model.segments import Segments
from protlm.workflows.train.stage import layers_with_features


@dataclass(frozen=True)
class RowLoss:
    """The loss of a row, and its scores, which stay on the device: the host need not wait for them.

    Attributes:
        loss: What gradients are of; an update adds it up over its rows, and divides the sum by that of the weights.
        nll: Sum of the negative log likelihoods of the targets; 0 in `transfer`, which predicts nothing.
        num_correct: Number of targets that the model ranks first; likewise.
        weight: 1 for a row with a teacher, else the number of targets.
    """

    loss: Tensor
    nll: Tensor
    num_correct: Tensor
    weight: int


RowLossFunction = Callable[[Performer, Batch], RowLoss]
"""Computes the loss of a network on a row of its device."""


def row_loss_of(settings: Config, teacher: Performer | None) -> RowLossFunction:
    """Returns the loss of a run.

    Args:
        settings: Those of the run.
        teacher: The teacher of its stage; None without a stage.
    """
    if settings.train.stage is None:
        return language_loss
    assert teacher is not None
    return TransferLoss(teacher, settings) if settings.train.stage == "transfer" else DistillLoss(teacher)


def language_loss(model: Performer, batch: Batch) -> RowLoss:
    """Returns the negative log likelihood of the targets of a row."""
    logits = model(batch.tokens, batch.cu_seqlens, batch.target_positions).float()
    nll, num_correct = _scores(model, logits, batch)
    return RowLoss(nll, nll.detach(), num_correct, len(batch.targets))


class TransferLoss:
    """The relative squared errors of the attention outputs of a model, added up over its layers with random features.

    Each layer gets the teacher's input of its attention: Σ‖y − t‖² / Σ‖t‖² over the tokens of the row, with the outputs
    y and t of the attention of model and teacher, after their output projections. So no layer sees another's errors.
    """

    def __init__(self, teacher: Performer, settings: Config) -> None:
        self._teacher = _Teacher(teacher)
        self._layers = [number + 1 for number in layers_with_features(settings.model)]

    def __call__(self, model: Performer, batch: Batch) -> RowLoss:
        """Returns the loss of a row."""
        calls = self._teacher.attention_calls(batch)
        first = calls[self._layers[0]]
        inputs = {number: calls[number].x for number in self._layers}
        outputs = model.attention_outputs(inputs, first.segments, first.rotary)
        errors = [relative_error(outputs[number], calls[number].out) for number in self._layers]
        loss = torch.stack(errors).sum()
        nothing = torch.zeros_like(loss)
        return RowLoss(loss, nothing, nothing, 1)


class DistillLoss:
    """The divergence of a model's predictions from its teacher's, and the relative error of its last hidden state.

    It is the mean over all tokens of the row of KL(teacher ‖ model) = Σ p·log(p / q) over the model's tokens, plus the
    mean over the targets of the row alone, plus Σ‖h − t‖² / Σ‖t‖² with the last hidden states h and t.
    """

    def __init__(self, teacher: Performer) -> None:
        self._teacher = _Teacher(teacher)

    def __call__(self, model: Performer, batch: Batch) -> RowLoss:
        """Returns the loss of a row."""
        teacher_state, teacher_logits = self._teacher.last_state_and_logits(batch)
        state, logits = _last_state_and_logits(model, batch)
        divergences = kl_divergence(teacher_logits, logits)
        at_targets = divergences.index_select(0, batch.target_positions)
        loss = divergences.mean() + at_targets.sum() / max(1, len(at_targets)) + relative_error(state, teacher_state)
        with torch.no_grad():
            nll, num_correct = _scores(model, logits.float().index_select(0, batch.target_positions), batch)
        return RowLoss(loss, nll, num_correct, 1)


def relative_error(
    x: Float[Tensor, "length model_dim"], expected: Float[Tensor, "length model_dim"]
) -> Float[Tensor, ""]:
    """Returns Σ‖x − expected‖² / Σ‖expected‖² in float32."""
    x, expected = x.float(), expected.float()
    return (x - expected).square().sum() / expected.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def kl_divergence(
    expected: Float[Tensor, "length model_tokens"], logits: Float[Tensor, "length model_tokens"]
) -> Float[Tensor, " length"]:
    """Returns KL(expected ‖ logits) of every token, of the distributions that logits stand for, in float32."""
    logs, expected_logs = (x.float().log_softmax(-1) for x in (logits, expected))
    return (expected_logs.exp() * (expected_logs - logs)).sum(-1)


@dataclass(frozen=True)
class _Call:
    """A call of the attention of a layer."""

    x: Tensor
    segments: Segments
    rotary: tuple[Tensor, Tensor] | None
    out: Tensor


class _Teacher:
    """A network that is asked without gradients, on the device of the row."""

    def __init__(self, network: Performer) -> None:
        self._network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def attention_calls(self, batch: Batch) -> dict[int, _Call]:
        """Returns the call of the attention of every layer, by the number of the layer, from 1."""
        calls: dict[int, _Call] = {}

        def keep(attention: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
            x, segments, rotary = arguments[:3]
            calls[len(calls) + 1] = _Call(x, segments, rotary, out)

        network = self._on(batch.tokens.device)
        handles = [layer.attention.register_forward_hook(keep) for layer in network.encoder_layers()]
        try:
            network.hidden_states(batch.tokens, batch.cu_seqlens, ())
        finally:
            for handle in handles:
                handle.remove()
        return calls

    @torch.no_grad()
    def last_state_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the last hidden state and the logits at all tokens."""
        return _last_state_and_logits(self._on(batch.tokens.device), batch)

    def _on(self, device: torch.device) -> Performer:
        if self._network.embedding.weight.device != device:
            self._network.to(device)
        return self._network


def _last_state_and_logits(model: Performer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the last hidden state and the logits of a network at all tokens, by one call of its forward.

    Devices that share the network have its weights complete during that call alone.
    """
    states: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    try:
        logits = model(batch.tokens, batch.cu_seqlens)
    finally:
        handle.remove()
    return states[0], logits


def _scores(model: Performer, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the sum of the negative log likelihoods of the targets, and how many of them are ranked first."""
    targets = model.token_table.own(batch.targets)
    nll = F.cross_entropy(logits, targets, reduction="sum")
    return nll, (logits.detach().argmax(-1) == targets).sum()
