"""Whether the host waits for the GPU inside a training step: torch raises an error where it does."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from protlm.config import ModelConfig
from protlm.data.batching.batches import Batch
from protlm.gpu_check.parity import Outcome, first_line
from protlm.model.performer import Performer
from protlm.vocabulary import FIRST_RESIDUE
from protlm.workflows.train.row_losses import language_loss

_SIZES = (300, 40, 1, 171)


@dataclass(frozen=True)
class Step:
    """A training step that is tried.

    Attributes:
        name: In the report.
        model: The model.
        dtype: That of autocast; float32 for none.
    """

    name: str
    model: ModelConfig
    dtype: torch.dtype


def steps() -> list[Step]:
    """Returns a step for each kind of attention that a configuration may have."""
    shape = ModelConfig(num_layers=3, model_dim=128, num_heads=2, ffn_dim=256, num_features=64)
    kinds: dict[str, dict[str, Any]] = {
        "the cycle": {"attention": ("local", "positive", "local")},
        "exact": {"attention": "softmax"},
        "near-far": {"attention": "near-far"},
        "causal": {"attention": ("local", "positive"), "causal": True},
        "learned positions": {"attention": "positive", "positions": "learned", "max_positions": 512},
    }
    models = {name: ModelConfig.model_validate({**shape.model_dump(), **options}) for name, options in kinds.items()}
    bfloat16 = [Step(name, model, torch.bfloat16) for name, model in models.items()]
    return [*bfloat16, replace(bfloat16[0], dtype=torch.float32)]


def try_steps(chosen: list[Step], device: str) -> Iterator[Outcome]:
    """Yields for each step whether the host waited for the device, or for another fault."""
    for step in chosen:
        dtype = str(step.dtype).removeprefix("torch.")
        fault = None
        try:
            _try(step, device)
        except Exception as error:  # drivers and compilers raise anything, and the other steps must still run
            fault = first_line(error)
        yield Outcome(f"no waiting in a step, {step.name} {dtype}", "model", {}, fault)


def _try(step: Step, device: str) -> None:
    model = Performer(step.model)
    model.reset(0)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = _batch(device)
    # Kernels are compiled in the first step, and memory is taken.
    _step(model, optimizer, batch, step.dtype, device)
    with _errors_where_the_host_waits(device):
        _step(model, optimizer, batch, step.dtype, device)


def _step(model: Performer, optimizer: torch.optim.Optimizer, batch: Batch, dtype: torch.dtype, device: str) -> None:
    has_autocast = dtype != torch.float32
    with torch.autocast(torch.device(device).type, dtype) if has_autocast else contextlib.nullcontext():
        row = language_loss(model, batch)
    row.loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _batch(device: str) -> Batch:
    length = sum(_SIZES)
    tokens = FIRST_RESIDUE + torch.arange(length) % 20
    bounds = torch.tensor([0, *torch.tensor(_SIZES).cumsum(0)], dtype=torch.int32)
    places = torch.arange(0, length, 7)
    tensors = [x.to(device) for x in (tokens, bounds, places, tokens[places])]
    return Batch(tensors[0], tensors[1], tensors[2], tensors[3], 0, length)


@contextlib.contextmanager
def _errors_where_the_host_waits(device: str) -> Iterator[None]:
    if torch.device(device).type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
