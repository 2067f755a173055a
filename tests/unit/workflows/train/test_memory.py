import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from protlm.config import Config, DataConfig, ModelConfig, TrainConfig
from protlm.config_files import load_config
from protlm.errors import ConfigError
from protlm.model.performer import Performer
from protlm.workflows.train.memory import check_can_be_built, check_fits, estimate_memory
from protlm.workflows.train.optimizer import build_optimizer

ROOT = Path(__file__).parents[4]
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Makes the C library give back what is freed: memory that stays in its heap would mask a peak."""

STEP = """
import json, sys, torch
from pathlib import Path
from protlm.config_files import load_config
from protlm.model.performer import Performer
from protlm.workflows.train.optimizer import build_optimizer

torch.set_num_threads(2)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def step(config, num_tokens):
    model = Performer(config.model)
    model.reset(0)
    model.checkpoint_activations = config.train.activation_checkpointing
    optimizer = build_optimizer(model, config.train)
    tokens = torch.randint(4, 24, (num_tokens,))
    bounds = torch.arange(0, num_tokens + 1, num_tokens // 8, dtype=torch.int32)
    targets = torch.arange(0, num_tokens, 7)
    # As in every update but the first, the optimizer's state exists before.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    logits = model(tokens, bounds, targets)
    torch.nn.functional.cross_entropy(logits, tokens[targets], reduction="sum").backward()
    optimizer.step()

config = load_config(sys.argv[1], sys.argv[2:])
# The first step also makes the allocations that libraries make only once.
step(config, 64)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
step(config, config.data.tokens_per_batch)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset a process's peak")
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tiny", []),
        ("tiny", ["train.activation_checkpointing=true", "model.num_layers=12"]),
        pytest.param("small", [], marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_close_to_the_peak_of_a_real_step(name, overrides):
    config = load_config(name, overrides)
    result = subprocess.run(
        [sys.executable, "-c", STEP, name, *overrides],
        cwd=ROOT, env={**os.environ, **RETURN_FREED_MEMORY}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert estimate_memory(config).total == pytest.approx(json.loads(result.stdout), rel=0.35)


def saved_bytes(model, num_tokens, short):
    """Returns the bytes of all tensors, except weights, that autograd keeps of one row."""
    own = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.arange(num_tokens) % 20 + 4
    bounds = torch.tensor([0, num_tokens // 3, num_tokens], dtype=torch.int32)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=short),
    ):
        model(tokens, bounds, torch.arange(0, num_tokens, 7))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_width": 0},
        {"conv_width": 5},
        {"conv_width": 0, "qk_norm": False},
        {"conv_width": 0, "positions": "none"},
        {"conv_width": 0, "rescale_qk": True},
        {"conv_width": 0, "ffn": "swiglu"},
        {"conv_width": 0, "attention": "softmax"},
        {"conv_width": 0, "attention": "local"},
        {"conv_width": 0, "causal": True, "layer_norm": "post"},
    ],
    ids=lambda options: ",".join(map(str, options.values())) or "default",
)
def test_the_activations_of_a_layer_are_those_that_autograd_saves(short, options):
    num_tokens, shape = 768, {"model_dim": 128, "num_heads": 4, "ffn_dim": 384, "num_features": 16}
    shape |= {"attention": "positive", **options}
    sizes = []
    for num_layers in (1, 3):
        model = Performer(ModelConfig(num_layers=num_layers, **shape))
        model.reset(0)
        # Gradients that a pass works with, and the head, are the same for both depths.
        config = Config(
            data=DataConfig(tokens_per_batch=num_tokens),
            model=model.config,
            train=TrainConfig(precision="bf16-mixed" if short else "32"),
        )
        sizes.append((saved_bytes(model, num_tokens, short), estimate_memory(config).activations_bytes))
    (shallow, shallow_estimate), (deep, deep_estimate) = sizes
    assert deep_estimate - shallow_estimate == pytest.approx(deep - shallow, rel=0.08)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_and_the_optimizers_state_are_counted_exactly(kind):
    config = load_config("tiny", [f"train.optimizer={kind}"])
    model = Performer(config.model)
    model.reset(0)
    optimizer = build_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    memory = estimate_memory(config)
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    assert memory.optimizer_bytes == sum(tensor.nbytes for tensor in states)
    assert memory.gradients_bytes == sum(parameter.grad.nbytes for parameter in model.parameters())
    assert memory.weights_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert memory.projections == sum(buffer.numel() for buffer in model.buffers())
    assert memory.total == memory.state_bytes + memory.activations_bytes


def test_biased_logits_are_counted_for_a_protein_that_fills_the_row():
    exact = ["model.attention=softmax", "data.tokens_per_batch=700"]
    plain, biased = (estimate_memory(load_config("tiny", [*exact, f"model.local_bias={bias}"])) for bias in (0, 3))
    # Two matrices of float32 for each of 3 layers and 4 heads, and a bias for each head.
    assert biased.activations_bytes - plain.activations_bytes == pytest.approx(2 * 4 * 3 * 4 * 700**2)
    assert biased.parameters - plain.parameters == 3 * 4


def test_checkpointing_keeps_little_more_than_a_layer_and_a_gpu_more_than_a_cpu():
    deep = ["model.num_layers=24"]
    whole = estimate_memory(load_config("tiny", deep))
    checkpointed = estimate_memory(load_config("tiny", [*deep, "train.activation_checkpointing=true"]))
    assert checkpointed.activations_bytes < whole.activations_bytes / 5
    assert checkpointed.state_bytes == whole.state_bytes
    assert estimate_memory(load_config("tiny"), in_place=False).total > estimate_memory(load_config("tiny")).total


def test_short_numbers_take_less():
    short = load_config("small", ["train.precision=bf16-mixed"])
    assert estimate_memory(short, in_place=False).total < estimate_memory(load_config("small"), in_place=False).total


def test_a_run_that_certainly_does_not_fit_is_an_error_with_the_numbers_and_the_settings_to_lower():
    config = load_config("small")
    needed = estimate_memory(config).state_bytes
    check_fits(estimate_memory(config), needed)
    with pytest.raises(ConfigError) as caught:
        check_fits(estimate_memory(config), needed - 1)
    message = str(caught.value)
    assert "\n" not in message
    for words in (f"{estimate_memory(config).parameters:,}", f"{needed / 1e9:.1f} GB", "num_layers", "fsdp"):
        assert words in message


def test_a_model_whose_weights_the_machine_cannot_hold_is_refused_whatever_the_devices():
    memory = estimate_memory(load_config("small"))
    check_can_be_built(memory, memory.weights_bytes)
    with pytest.raises(ConfigError, match=r"weights need 0\.0 GB of memory, expected at most the 0\.0 GB"):
        check_can_be_built(memory, memory.weights_bytes - 1)


def test_the_largest_model_that_settings_can_ask_for_is_estimated_and_refused():
    widest = {"model_dim": 2**16, "num_heads": 2**15, "ffn_dim": 2**20, "num_features": 2**20, "num_layers": 2}
    widest["attention"] = "positive"
    memory = estimate_memory(Config(model=ModelConfig(**widest)))
    with pytest.raises(ConfigError, match=r"weights need 1,803\.9 GB"):
        check_can_be_built(memory, 2**40)
