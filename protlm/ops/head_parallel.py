"""Near-far attention over a length that is split over processes: every rank computes some heads for all tokens.

A near block may lie on several ranks, so that states alone are not enough. Heads do not depend on each other: the ranks
exchange their tokens of all heads for all tokens of their heads, compute these as one process does, and exchange the
results back. A message is as large as the tensors of the rank that sends it.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from protlm.ops.blocks import read_bounds
from protlm.ops.inputs import AttentionInputs
from protlm.ops.process_groups import group_of


def forward_by_heads(backend: ModuleType, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output, empty states and references, and the log-normalisers of this rank's tokens."""
    shares = _Shares.of(inputs)
    out, states, references, log_normalisers = backend.forward(shares.inputs_of_heads(inputs))
    return shares.to_tokens(out), states, references, shares.to_tokens(log_normalisers.unsqueeze(-1)).squeeze(-1)


def backward_by_heads(
    backend: ModuleType,
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    log_normalisers: Tensor,
    sums_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v of this rank's tokens; `sums_grad` is that of the log-normalisers."""
    shares = _Shares.of(inputs)
    along = [out_grad, out, log_normalisers.unsqueeze(-1)]
    along += [] if sums_grad is None else [sums_grad.unsqueeze(-1)]
    out_grad, out, log_normalisers, *further = (shares.to_heads(x) for x in along)
    grads = backend.backward(
        shares.inputs_of_heads(inputs), out_grad, out, states, references, log_normalisers.squeeze(-1),
        further[0].squeeze(-1) if further else None,
    )  # fmt: skip
    q_grad, k_grad, v_grad = (shares.to_tokens(grad) for grad in grads)
    return q_grad, k_grad, v_grad


@dataclass(frozen=True)
class _Shares:
    """What each rank of a group holds of the length, and which heads it computes.

    Attributes:
        group: The group.
        lengths: Tokens of every rank.
        heads: Bounds of the heads of every rank.
    """

    group: ProcessGroup
    lengths: list[int]
    heads: list[int]

    @classmethod
    def of(cls, inputs: AttentionInputs) -> "_Shares":
        """Returns the shares, by a collective.

        Raises:
            ValueError: Bounds that do not fit this rank's own tokens.
        """
        if inputs.cu_seqlens is not None:
            read_bounds(inputs.cu_seqlens, inputs.q.shape[2])
        group, num_heads, length = group_of(inputs.group_name), inputs.q.shape[1], inputs.q.shape[2]
        ranks = group.size()
        lengths = [int(x) for x in _gathered(torch.tensor([length], device=inputs.q.device), group)]
        return cls(group, lengths, [num_heads * rank // ranks for rank in range(ranks + 1)])

    @property
    def own_heads(self) -> slice:
        """The heads that this rank computes; none if there are more ranks than heads."""
        rank = self.group.rank()
        return slice(self.heads[rank], self.heads[rank + 1])

    def to_heads(self, x: Tensor) -> Tensor:
        """Returns (batch, own heads, length of all ranks, …) from (batch, heads, own length, …)."""
        num_own = self.own_heads.stop - self.own_heads.start
        sent = [x[:, start:stop] for start, stop in zip(self.heads, self.heads[1:], strict=False)]
        shapes = [(x.shape[0], num_own, length, *x.shape[3:]) for length in self.lengths]
        return torch.cat(self._exchanged(sent, shapes), 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Returns (batch, heads, own length, …) from (batch, own heads, length of all ranks, …)."""
        own_length = self.lengths[self.group.rank()]
        shapes = [
            (x.shape[0], stop - start, own_length, *x.shape[3:])
            for start, stop in zip(self.heads, self.heads[1:], strict=False)
        ]
        return torch.cat(self._exchanged(list(torch.split(x, self.lengths, 2)), shapes), 1)

    def inputs_of_heads(self, inputs: AttentionInputs) -> AttentionInputs:
        """Returns the inputs of this rank's heads for the tokens of all ranks."""
        return replace(
            inputs.of_heads(self.own_heads),
            q=self.to_heads(inputs.q),
            k=self.to_heads(inputs.k),
            v=self.to_heads(inputs.v),
            token_mask=self._whole_mask(inputs),
            cu_seqlens=self._whole_bounds(inputs),
            group_name="",
        )

    def _whole_mask(self, inputs: AttentionInputs) -> Tensor | None:
        mask = inputs.token_mask
        if mask is None:
            return None
        # Collectives take parts of one size.
        padded = mask.new_zeros((len(mask), max(self.lengths)), dtype=torch.uint8)
        padded[:, : mask.shape[1]] = mask
        parts = _gathered(padded, self.group)
        return torch.cat([part[:, :length] for part, length in zip(parts, self.lengths, strict=True)], 1).bool()

    def _whole_bounds(self, inputs: AttentionInputs) -> Tensor | None:
        bounds = inputs.cu_seqlens
        if bounds is None:
            return None
        sizes = torch.stack(_gathered(bounds.diff(), self.group)).sum(0)
        return torch.cat((bounds[:1], sizes.cumsum(0))).to(bounds.dtype)

    def _exchanged(self, sent: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Returns one tensor from each rank, which sends one to each."""
        buffer = torch.cat([x.flatten() for x in sent])
        sizes = [torch.Size(shape).numel() for shape in shapes]
        received = buffer.new_empty(sum(sizes))
        dist.all_to_all_single(received, buffer, sizes, [x.numel() for x in sent], group=self.group)
        return [part.view(shape) for part, shape in zip(torch.split(received, sizes), shapes, strict=True)]


def _gathered(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group)
    return parts
