"""The models that the training-step benchmark compares: how each is built, given its loss and stepped."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import protlm.model.attention
from protlm.model.performer import Performer
from protlm.vocabulary import CLS, EOS, FIRST_RESIDUE, MASK, NUM_STANDARD_RESIDUES, PAD, VOCABULARY_SIZE
from scripts.bench import models
from scripts.bench.models import Sizes, building_a_peer, esm_config

PROTLM, PROTLM_CONVOLVED = "protlm", "protlm, conv_width 3"
CYCLE = "protlm, layers local, positive, local"
EXACT = "protlm, exact attention"
ATTENTION = {CYCLE: ("local", "positive", "local"), EXACT: ("softmax",)}
"""The attention of the layers of our models, where it is not FAVOR."""
HALF_SUFFIX = ", bf16-mixed"
HALF = {name: name + HALF_SUFFIX for name in (PROTLM, CYCLE, EXACT)}
"""What a model is called where it is trained in bfloat16, as by `protlm train --precision bf16-mixed`."""
NO_ATTENTION = "attention removed"
PERFORMER_PEER, ESM_PEER = "performer-pytorch PerformerLM", "transformers EsmForMaskedLM (SDPA)"
PEER_MODULES = {PERFORMER_PEER: "performer_pytorch", ESM_PEER: "transformers"}
MASK_RATE = 0.15
NO_TARGET = -100
"""The label that cross entropy leaves out."""
LEARNING_RATE = 1e-4
CHECKED_BATCH, CHECKED_LENGTH = 2, 64


@dataclass(frozen=True)
class Task:
    """Proteins of one length with hidden residues.

    Attributes:
        seen: int64 (batch, length), `<cls> residues <eos>` with `<mask>` at the targets.
        positions: int64 (targets,), the positions of the targets when the proteins are joined.
        targets: int64 (targets,), the true tokens there.
    """

    seen: Tensor
    positions: Tensor
    targets: Tensor

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 bounds of the proteins when they are joined."""
        batch, length = self.seen.shape
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (batch, length), the true token at the targets, NO_TARGET elsewhere."""
        labels = torch.full((self.seen.numel(),), NO_TARGET)
        labels[self.positions] = self.targets
        return labels.view_as(self.seen)


class Learner:
    """A model with its loss and an AdamW of its own, the same for all."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Task], Tensor]) -> None:
        self.model = model.train()
        self.loss = partial(loss, self.model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    @property
    def num_parameters(self) -> int:
        """Trained numbers; matrices that are used twice count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, task: Task) -> float:
        """Makes one update; returns the loss before it."""
        return self.update(self.loss(task))

    def update(self, loss: Tensor) -> float:
        """Makes one update from a loss; returns the loss as a number."""
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def draw_task(batch: int, length: int) -> Task:
    """Returns random proteins, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    last_residue = FIRST_RESIDUE + NUM_STANDARD_RESIDUES
    tokens = torch.randint(FIRST_RESIDUE, last_residue, (batch, length), generator=generator)
    is_target = torch.rand((batch, length), generator=generator) < MASK_RATE
    tokens[:, 0], tokens[:, -1] = CLS, EOS
    is_target[:, [0, -1]] = False
    is_target[:, 1] = True
    return Task(tokens.masked_fill(is_target, MASK), is_target.flatten().nonzero().squeeze(1), tokens[is_target])


def why_missing(name: str) -> str:
    """Returns why a model cannot take part; empty if it can."""
    return models.why_missing(PEER_MODULES[name]) if name in PEER_MODULES else ""


def build(name: str, sizes: Sizes, length: int) -> Learner:
    """Returns a freshly drawn model for proteins of up to this length."""
    if name == PERFORMER_PEER:
        return _performer_pytorch(sizes, length)
    if name == ESM_PEER:
        return _esm(sizes, length)
    conv_width = 3 if name == PROTLM_CONVOLVED else 0
    attention = ATTENTION.get(name.removesuffix(HALF_SUFFIX), ("positive",))
    model = models.performer(sizes, attention=attention, qk_norm=True, conv_width=conv_width)
    return Learner(model, LOSSES[name])


def check(names: list[str], sizes: Sizes) -> dict[str, int]:
    """Returns the parameters of each model; ends the program unless each has a loss and gradients to learn from."""
    counts, losses = {}, {}
    task = draw_task(CHECKED_BATCH, CHECKED_LENGTH)
    for name in names:
        learner = build(name, sizes, CHECKED_LENGTH)
        counts[name] = learner.num_parameters
        loss = learner.loss(task)
        losses[name] = loss.item()
        loss.backward()
        gradients = [parameter.grad for parameter in learner.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not (0 < losses[name] < float("inf") and 0 < norm < float("inf")):
            sys.exit(f"error: {name}: the loss is {losses[name]} and the gradient's norm {norm}; expected positive "
                     "finite numbers; nothing is timed")  # fmt: skip
    # The weights are the same: only the output of attention makes a difference.
    if NO_ATTENTION in losses and losses[NO_ATTENTION] == losses[PROTLM]:
        sys.exit(f"error: {NO_ATTENTION}: the loss is that of {PROTLM}, so attention is still there; nothing is timed")
    return counts


class _ValuesAlone(torch.autograd.Function):
    """Returns v, and gives q and k a gradient of zeros, so that the backward before them is still done."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *out_grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), out_grads[0]


def _values_alone(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, **options: Any) -> Tensor:
    """Takes the place of the op: returns v; q and k get gradients of zeros."""
    values: Tensor = _ValuesAlone.apply(q, k, v)
    return values


def loss_at_targets(model: Performer, task: Task) -> Tensor:
    """Returns the loss as `protlm train` has it: a packed row, and logits at the targets alone."""
    return F.cross_entropy(model(task.seen.flatten(), task.cu_seqlens, task.positions), task.targets)


def _loss_without_attention(model: Performer, task: Task) -> Tensor:
    with mock.patch.object(protlm.model.attention, "favor_attention", _values_alone):
        return loss_at_targets(model, task)


def _loss_in_half_precision(model: Performer, task: Task) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss_at_targets(model, task)


LOSSES: dict[str, Callable[[Performer, Task], Tensor]] = {
    PROTLM: loss_at_targets,
    PROTLM_CONVOLVED: loss_at_targets,
    CYCLE: loss_at_targets,
    EXACT: loss_at_targets,
    NO_ATTENTION: _loss_without_attention,
    **dict.fromkeys(HALF.values(), _loss_in_half_precision),
}
"""The losses of our models."""


def _performer_pytorch(sizes: Sizes, length: int) -> Learner:
    """Returns a PerformerLM with its author's defaults: rotary positions, tied to nothing, no biases in attention."""
    with building_a_peer():
        from performer_pytorch import PerformerLM

        model = PerformerLM(
            num_tokens=VOCABULARY_SIZE, max_seq_len=length, dim=sizes.model_dim, depth=sizes.num_layers,
            heads=sizes.num_heads, dim_head=sizes.model_dim // sizes.num_heads,
            ff_mult=sizes.ffn_dim // sizes.model_dim, nb_features=sizes.num_features,
        )  # fmt: skip
    # Its own way to keep the projections: a redraw would be time that ours does not spend.
    model.fix_projection_matrices_()

    def loss(model: Callable[[Tensor], Tensor], task: Task) -> Tensor:
        return F.cross_entropy(model(task.seen).flatten(0, 1), task.labels.flatten(), ignore_index=NO_TARGET)

    return Learner(model, loss)


def _esm(sizes: Sizes, length: int) -> Learner:
    """Returns ESM-2 as transformers has it; token_dropout stays off, which spares it a pass over the embedding."""
    with building_a_peer():
        from transformers import EsmForMaskedLM

        model = EsmForMaskedLM(esm_config(sizes, max_position_embeddings=length + PAD + 1))

    def loss(model: Callable[..., Any], task: Task) -> Tensor:
        mean: Tensor = model(input_ids=task.seen, labels=task.labels).loss
        return mean

    return Learner(model, loss)
