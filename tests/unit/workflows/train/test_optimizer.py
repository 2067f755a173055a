import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType, fully_shard
from torch.distributed.tensor import distribute_tensor

from protlm.config import ModelConfig, TrainConfig
from protlm.model.performer import Performer
from protlm.workflows.train import optimizer as optimizer_module
from protlm.workflows.train.optimizer import (
    TrainingOptimizer,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate_factor,
    orthogonalise,
)
from tests import forked, process_groups
from tests.conftest import TOLERANCE, relative_error

SHAPES = ((8, 8), (8, 8), (24, 8), (8, 40))


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def muon(tensors, **settings):
    rest = {"rule": "muon", "lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, **settings}
    return TrainingOptimizer([{"params": [tensor], **rest} for tensor in tensors])


def set_gradients(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def test_muon_equals_torchs_to_the_precision_of_torchs():
    ours, theirs = parameters(), parameters()
    start = [tensor.detach().clone() for tensor in ours]
    optimizer = muon(ours, lr=0.02, weight_decay=0.1)
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        peer.step()
    for before, a, b in zip(start, ours, theirs, strict=True):
        # Errors relative to the distance moved: the start is much larger and would mask a difference.
        assert relative_error(a - before, b - before) < TOLERANCE[torch.bfloat16]


def test_a_parameter_without_gradient_stays():
    tensors = parameters()
    set_gradients(tensors[1:], 0)
    before = tensors[0].detach().clone()
    muon(tensors).step()
    assert torch.equal(tensors[0], before)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 32, 8), (2, 8, 32), (1, 1, 5)])
def test_orthogonalise_moves_singular_values_near_one_and_keeps_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    results = orthogonalise(matrices)
    assert results.dtype == torch.float32
    assert results.shape == shape
    for matrix, result in zip(matrices, results, strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        new_values = (left.mT @ result @ right.mT).diagonal()
        sure = values > 0.05 * values.max()
        assert new_values[sure].min() > 0.6
        assert new_values.max() < 1.3
        assert relative_error(left @ torch.diag(new_values) @ right, result) < 1e-3


def test_orthogonalise_does_not_depend_on_scale_or_batch_mates_and_keeps_zero():
    matrices = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    matrices[1] = 0
    results = orthogonalise(matrices)
    assert not results[1].any()
    assert relative_error(results[2:], orthogonalise(1e-3 * matrices[2:])) < 1e-4


def build(optimizer="muon", **options):
    model = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=16, num_heads=2, ffn_dim=24, num_features=8)
    )
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


def test_after_loading_the_groups_still_rule():
    model, optimizer = build()
    take_steps(model, optimizer, range(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(model, optimizer, range(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_state_of_another_model_is_refused():
    _, optimizer = build()
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**state, "param_groups": state["param_groups"][1:]})


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_states_are_numbered_as_the_models_parameters(kind):
    model, optimizer = build(kind)
    take_steps(model, optimizer, range(1))
    saved = optimizer.state_dict()
    parameters_in_order = list(model.parameters())
    assert [group["params"] for group in saved["param_groups"]] == [[n] for n in range(len(parameters_in_order))]
    for number, parameter in enumerate(parameters_in_order):
        for name, value in optimizer.state[parameter].items():
            assert saved["state"][number][name] is value


def test_a_step_calls_the_closure_once_with_gradients_on():
    model, optimizer = build()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return 1.5

    set_gradients(model.parameters(), 0)
    assert optimizer.step(closure) == 1.5
    assert calls == [True]


def test_adamw_equals_torchs_fused_one_bit_for_bit():
    (model, optimizer), (twin, _) = build("adamw", weight_decay=0.3, eps=1e-3, betas=(0.8, 0.9)), build("adamw")
    linear = {id(module.weight) for module in twin.modules() if isinstance(module, nn.Linear)}
    peer = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if id(p) in linear], "weight_decay": 0.3},
            {"params": [p for p in twin.parameters() if id(p) not in linear], "weight_decay": 0.0},
        ],
        lr=optimizer.param_groups[0]["lr"], betas=(0.8, 0.9), eps=1e-3, fused=True,
    )  # fmt: skip
    take_steps(model, optimizer, range(3))
    take_steps(twin, peer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_how_many_matrices_are_orthogonalised_at_once_changes_nothing(monkeypatch):
    (model, optimizer), (twin, other) = build(), build()
    take_steps(model, optimizer, range(2))
    monkeypatch.setattr(optimizer_module, "MOST_NUMBERS_AT_ONCE", 1)
    take_steps(twin, other, range(2))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(a, b) < TOLERANCE[torch.float32]


def test_the_norm_is_that_of_all_gradients_and_clipping_scales_them_to_it():
    tensors = parameters()
    for tensor in tensors[1:]:
        tensor.grad = torch.full_like(tensor, 2.0)
    num_numbers = sum(tensor.numel() for tensor in tensors[1:])
    norm = gradient_norm(tensors)
    assert norm.item() == pytest.approx(2 * num_numbers**0.5)
    clip_gradients(tensors, 10 * norm.item(), norm)
    assert gradient_norm(tensors).item() == norm.item()
    clip_gradients(tensors, 0.5, norm)
    assert gradient_norm(tensors).item() == pytest.approx(0.5, rel=1e-5)
    assert tensors[0].grad is None


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
        assert group["rule"] == ("muon" if is_muons else "adamw")


def test_weight_decay_shrinks_matrices_by_lr_times_decay():
    tensors = parameters()
    before = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    muon(tensors, lr=0.5, weight_decay=0.2).step()
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


def sharded_gradients(model, seed):
    """Gives every parameter its shard of the gradient that `set_gradients` makes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        whole = torch.randn(parameter.shape, generator=generator)
        parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def clipped_steps(model, optimizer, seeds, set_them):
    norms = []
    for seed in seeds:
        set_them(model, seed)
        norm = gradient_norm(model.parameters())
        clip_gradients(model.parameters(), 1.0, norm)
        optimizer.step()
        norms.append(norm.item())
    return norms


def whole_gradients(model, seed):
    set_gradients(model.parameters(), seed)


def shard(model):
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def compare_shards(rank, folder):
    """Compares, in each of two processes, updates in shards with whole ones, and loads either state into the other."""
    process_groups.join(rank, 2, folder)
    (whole, whole_optimizer), (sharded, _) = build(weight_decay=0.3), build(weight_decay=0.3)
    shard(sharded)
    optimizer = build_optimizer(sharded, TrainConfig(weight_decay=0.3))
    whole_norms = clipped_steps(whole, whole_optimizer, range(3), whole_gradients)
    norms = clipped_steps(sharded, optimizer, range(3), sharded_gradients)
    assert norms == pytest.approx(whole_norms, rel=1e-6)
    assert_same_weights(whole, sharded)

    # As Lightning saves under FSDP2: by name from all shards, then by the number of the parameter.
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(sharded, optimizer, options=full)
    weights = get_model_state_dict(sharded, options=full)
    if rank == 0:
        saved = FullyShardedDataParallel.rekey_optim_state_dict(saved, OptimStateKeyType.PARAM_ID, sharded)
        torch.save((weights, saved), f"{folder}/saved")
    torch.distributed.barrier()
    weights, saved = torch.load(f"{folder}/saved", weights_only=True)
    resumed, resumed_optimizer = build(weight_decay=0.3)
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(saved)

    # As Lightning loads under FSDP2 what one process saved: by the number of the parameter, then by name.
    plain = copy.deepcopy(whole_optimizer.state_dict())
    (again, _) = build(weight_decay=0.3)
    again.load_state_dict(whole.state_dict())
    shard(again)
    again_optimizer = build_optimizer(again, TrainConfig(weight_decay=0.3))
    set_optimizer_state_dict(
        again,
        again_optimizer,
        optim_state_dict=FullyShardedDataParallel.rekey_optim_state_dict(plain, OptimStateKeyType.PARAM_NAME, again),
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    clipped_steps(whole, whole_optimizer, range(3, 5), whole_gradients)
    clipped_steps(resumed, resumed_optimizer, range(3, 5), whole_gradients)
    clipped_steps(again, again_optimizer, range(3, 5), sharded_gradients)
    assert_same_weights(whole, again)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert relative_error(b, a) < 1e-6, name
    process_groups.leave()


def assert_same_weights(whole, sharded):
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert b.to_local().numel() < a.numel(), f"{name} is not sharded"
        assert relative_error(b.full_tensor(), a) < 1e-6, name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_shards_take_the_steps_of_the_whole_and_states_go_both_ways(tmp_path):
    forked.spawn(compare_shards, (str(tmp_path),), nprocs=2)
