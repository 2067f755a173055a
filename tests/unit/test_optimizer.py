import copy
import math

import pytest
import torch
from torch import nn

from protlm.config import ModelConfig, TrainConfig
from protlm.model.performer import Performer
from protlm.workflows.optimizer import Joined, Muon, build_optimizer, learning_rate_factor, orthogonalise
from tests.conftest import TOLERANCE, relative_error

SHAPES = ((8, 8), (8, 8), (24, 8), (8, 40))


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def test_muon_equals_torchs_to_the_precision_of_torchs():
    ours, theirs = parameters(), parameters()
    start = [tensor.detach().clone() for tensor in ours]
    muon = Muon([{"params": ours, "lr": 0.02, "weight_decay": 0.1}])
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        muon.step()
        peer.step()
    for before, a, b in zip(start, ours, theirs, strict=True):
        # Of the way gone, not of where it is: the start is the larger part and would hide a difference.
        assert relative_error(a - before, b - before) < TOLERANCE[torch.bfloat16]


def test_a_parameter_without_gradient_stays():
    tensors = parameters()
    set_gradients(tensors[1:], 0)
    before = tensors[0].detach().clone()
    Muon([{"params": tensors, "lr": 0.02, "weight_decay": 0.1}]).step()
    assert torch.equal(tensors[0], before)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 32, 8), (2, 8, 32), (1, 1, 5)])
def test_orthogonalise_moves_singular_values_near_one_and_keeps_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices)
    assert found.dtype == torch.float32
    assert found.shape == shape
    for matrix, result in zip(matrices, found, strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        new_values = (left.mT @ result @ right.mT).diagonal()
        sure = values > 0.05 * values.max()
        assert new_values[sure].min() > 0.6
        assert new_values.max() < 1.3
        assert relative_error(left @ torch.diag(new_values) @ right, result) < 1e-3


def test_orthogonalise_does_not_depend_on_scale_or_batch_mates_and_keeps_zero():
    matrices = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    matrices[1] = 0
    found = orthogonalise(matrices)
    assert not found[1].any()
    assert relative_error(found[2:], orthogonalise(1e-3 * matrices[2:])) < 1e-4


def build(optimizer="muon", **options):
    model = Performer(ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=24, num_features=8))
    model.reset(0)
    return model, build_optimizer(model, TrainConfig(optimizer=optimizer, **options))


def take_steps(model, optimizer, seeds):
    for seed in seeds:
        set_gradients(model.parameters(), seed)
        optimizer.step()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_state_dict_continues_as_if_nothing_had_happened(kind):
    model, optimizer = build(kind)
    take_steps(model, optimizer, range(3))
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    take_steps(model, optimizer, range(3, 6))
    resumed, resumed_optimizer = build(kind)
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    take_steps(resumed, resumed_optimizer, range(3, 6))
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_after_loading_the_groups_still_rule_the_parts():
    model, optimizer = build()
    take_steps(model, optimizer, range(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(model, optimizer, range(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_state_of_other_parts_is_refused():
    _, optimizer = build()
    with pytest.raises(ValueError, match="zip"):
        optimizer.load_state_dict({"parts": optimizer.state_dict()["parts"][:1]})


def test_joined_steps_call_the_closure_once_with_gradients_on():
    model, optimizer = build()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return 1.5

    set_gradients(model.parameters(), 0)
    assert optimizer.step(closure) == 1.5
    assert calls == [True]
    set_gradients(model.parameters(), 0)
    muon = optimizer.parts[0]
    assert muon.step(closure) == 1.5
    assert calls == [True, True]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_matrices_of_linear_layers_decay_and_nothing_else_does(kind):
    model, optimizer = build(kind, weight_decay=0.3, lr=0.01, muon_lr=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 7
    groups = optimizer.param_groups
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    plain = [names[id(parameter)] for group in groups if not group["weight_decay"] for parameter in group["params"]]
    assert decayed == linear
    assert set(plain) == set(names.values()) - linear
    assert len(plain) == len(names) - len(linear)
    assert {"embedding.weight", "head.bias"} <= set(plain)
    for group in groups:
        is_muons = kind == "muon" and bool(group["weight_decay"])
        assert group["lr"] == group["peak_lr"] == (0.05 if is_muons else 0.01)
    assert isinstance(optimizer, Joined if kind == "muon" else torch.optim.AdamW)


def test_weight_decay_shrinks_matrices_by_lr_times_decay():
    tensors = parameters()
    before = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    Muon([{"params": tensors, "lr": 0.5, "weight_decay": 0.2}]).step()
    assert all(torch.allclose(a, 0.9 * b) for a, b in zip(tensors, before, strict=True))


def test_the_schedule_warms_up_linearly_and_falls_along_a_cosine_to_a_tenth():
    config = TrainConfig(warmup_steps=10, max_steps=999, schedule_steps=110)
    factors = {step: learning_rate_factor(step, config) for step in (1, 5, 10, 35, 60, 110, 500)}
    assert factors == {
        1: 0.1,
        5: 0.5,
        10: 1.0,
        35: pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4))),
        60: pytest.approx(0.55),
        110: pytest.approx(0.1),
        500: pytest.approx(0.1),
    }


def test_the_horizon_is_max_steps_unless_it_is_set():
    whole = TrainConfig(warmup_steps=0, max_steps=100)
    frozen = TrainConfig(warmup_steps=0, max_steps=500, schedule_steps=100)
    assert [learning_rate_factor(step, whole) for step in (1, 50, 100)] == [
        learning_rate_factor(step, frozen) for step in (1, 50, 100)
    ]


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up():
    config = TrainConfig(warmup_steps=4, max_steps=100, schedule="constant")
    assert [learning_rate_factor(step, config) for step in (1, 4, 5, 100, 10_000)] == [0.25, 1.0, 1.0, 1.0, 1.0]


def test_a_run_shorter_than_its_warm_up_has_a_schedule():
    config = TrainConfig(warmup_steps=40, max_steps=3)
    assert [learning_rate_factor(step, config) for step in (1, 3)] == [1 / 40, 3 / 40]
    assert learning_rate_factor(41, config) == pytest.approx(0.1)
