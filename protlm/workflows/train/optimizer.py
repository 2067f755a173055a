"""The optimizer and the learning-rate schedule: which rule updates which parameter, whole or in shards.

Muon is written here rather than taken from torch because torch's version always orthogonalises in bfloat16, which is a
hundred times slower than float32 on a CPU without native bfloat16.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

from protlm.config import TrainConfig

_FINAL_SHARE = 0.1
"""Final learning rate of the cosine schedule, as a fraction of the peak."""

# Quintic Newton–Schulz coefficients, momentum and number of iterations of Keller Jordan's Muon, as in torch.optim.Muon.
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95

STATE_OF_RULE = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum",)}
"""What the optimizer keeps of a parameter, by its rule: tensors like it, but for `step`, a number of updates."""

MOST_NUMBERS_AT_ONCE = 2**25
"""Entries in a batch of matrices that are orthogonalised together: it bounds the memory for whole matrices."""


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of update number `step` (from 1), as a fraction of the peak."""
    horizon = config.schedule_steps or config.max_steps
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, horizon - config.warmup_steps))
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, config: TrainConfig) -> "TrainingOptimizer":
    """Returns the optimizer of a run; every parameter group keeps its peak learning rate as `peak_lr`.

    Matrices of linear layers decay, and are updated by Muon if the settings ask for it. Embeddings, biases, norms,
    temperatures and convolutions do not decay.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups = []
    for parameter in model.parameters():
        is_matrix = id(parameter) in linear
        is_muons = is_matrix and config.optimizer == "muon"
        lr = config.muon_lr if is_muons else config.lr
        groups.append(
            {
                "params": [parameter],
                "rule": "muon" if is_muons else "adamw",
                "lr": lr,
                "peak_lr": lr,
                "weight_decay": config.weight_decay if is_matrix else 0.0,
                "betas": config.betas,
                "eps": config.eps,
            }
        )
    return TrainingOptimizer(groups)


class TrainingOptimizer(torch.optim.Optimizer):
    """Fused AdamW, and Muon for the groups whose rule is "muon"; every parameter is a group of its own.

    A `state_dict` numbers its states by the groups, and so does torch.distributed.checkpoint, while Lightning under
    FSDP2 numbers them by the model's parameters. With one group per parameter, in the order of the parameters, all
    three agree: a state saved whole loads into shards, and the other way round.

    Muon is momentum with an orthogonalised update: the algorithm of `torch.optim.Muon`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """Takes groups of one parameter each, with `rule` ("adamw" or "muon") and all settings of the rule."""
        # On loading, torch moves the step counts of groups with "fused" to the device of their parameter.
        super().__init__(groups, {"fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one update; returns the loss that the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for group in self.param_groups:
            (parameter,) = group["params"]
            if parameter.grad is not None:
                settings = (group["rule"], group["lr"], group["weight_decay"], *group["betas"], group["eps"])
                alike.setdefault(settings, []).append(parameter)
        for (rule, lr, weight_decay, beta1, beta2, eps), parameters in alike.items():
            if rule == "muon":
                self._step_muon(parameters, lr, weight_decay)
            else:
                self._step_adamw(parameters, lr, weight_decay, (beta1, beta2), eps)
        return loss

    def _step_adamw(
        self, parameters: list[Tensor], lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        # AdamW works entry by entry, so each device updates the shard that it holds.
        adamw(
            [local_shard(parameter) for parameter in parameters],
            [local_shard(_gradient(parameter)) for parameter in parameters],
            [local_shard(state["exp_avg"]) for state in states],
            [local_shard(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )

    def _step_muon(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, alike in by_shape.items():
            rate = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            num_at_once = max(1, MOST_NUMBERS_AT_ONCE // shape.numel())
            for start in range(0, len(alike), num_at_once):
                batch = alike[start : start + num_at_once]
                directions = orthogonalise(torch.stack([_whole(self._momentum(parameter)) for parameter in batch]))
                for parameter, direction in zip(batch, directions, strict=True):
                    own_shard = local_shard(_like(parameter, direction))
                    local_shard(parameter).mul_(1 - lr * weight_decay).sub_(own_shard, alpha=rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = _gradient(parameter)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(state["momentum"], _MOMENTUM)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Returns matrices (batch, rows, columns) with singular values moved close to 1 by Newton–Schulz iteration."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Returns the norm of the whole gradient, whose shards may lie on several devices, as the same scalar on each."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return _whole(torch.nn.utils.get_total_norm(gradients))


def clip_gradients(parameters: Iterable[Tensor], largest_norm: float, norm: Tensor) -> None:
    """Scales the gradients, whose norm is given, so that it becomes at most largest_norm."""
    torch.nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def local_shard(tensor: Tensor) -> Tensor:
    """Returns the shard of a tensor that this process holds, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor whole; all processes that share it must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(sharded: Tensor, whole: Tensor) -> Tensor:
    """Returns a tensor that every process has whole, sharded like another, without communication."""
    if not isinstance(sharded, DTensor):
        return whole
    mesh = sharded.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=sharded.placements)
