"""The optimizers and the learning-rate schedule: hides which rule updates which parameter.

Muon is written here rather than taken from torch because torch's version orthogonalises in bfloat16 always, which a CPU
without native bfloat16 does a hundred times slower than in float32.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from protlm.config import TrainConfig

_FINAL_SHARE = 0.1
"""Share of the peak learning rate that the cosine schedule ends at."""

# Quintic Newton–Schulz coefficients, momentum and number of iterations of Keller Jordan's Muon, as in torch.optim.Muon.
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Returns the share of the peak learning rate that update number `step` (from 1) is made with."""
    horizon = config.schedule_steps or config.max_steps
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, horizon - config.warmup_steps))
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimizer of a run; every parameter group keeps its peak learning rate as `peak_lr`.

    Matrices of linear layers decay, and are Muon's where it is wanted. Embeddings, biases, norms,
    temperatures and convolutions do not decay.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = [parameter for parameter in model.parameters() if id(parameter) in linear]
    others = [parameter for parameter in model.parameters() if id(parameter) not in linear]
    plain = {"params": others, "weight_decay": 0.0, "lr": config.lr, "peak_lr": config.lr}
    decayed = {"params": matrices, "weight_decay": config.weight_decay, "lr": config.lr, "peak_lr": config.lr}
    if config.optimizer == "adamw":
        return torch.optim.AdamW([decayed, plain], betas=config.betas)
    muon = Muon([{**decayed, "lr": config.muon_lr, "peak_lr": config.muon_lr}])
    return Joined([muon, torch.optim.AdamW([plain], betas=config.betas)])


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices: the algorithm of `torch.optim.Muon`.

    Float32 on a CPU, bfloat16 elsewhere; matrices of one shape are orthogonalised as one batch.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.02, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one update with Nesterov momentum; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = orthogonalise(torch.stack([self._momentum(parameter) for parameter in parameters]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)
        return loss

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        grad = parameter.grad
        assert grad is not None
        state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        return grad.lerp(state["momentum"], _MOMENTUM)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Returns matrices (batch, rows, columns) with their singular values moved near 1, by Newton–Schulz iteration."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Joined(torch.optim.Optimizer):
    """Several optimizers that step as one, so that a trainer sees a single one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one update with every part; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the states of the parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Loading gave the parts new group objects.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
