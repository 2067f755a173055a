"""The parts about whole models: the speed of a training step, and of embedding."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from protlm.config_files import load_config
from protlm.gpu_check.parity import first_line
from protlm.model.half_precision import halve
from protlm.model.performer import Performer
from protlm.vocabulary import RESIDUES
from scripts.bench import embed_models, train_step_models
from scripts.bench.models import Sizes
from scripts.bench.train_step_models import ESM_PEER, Learner, Task
from scripts.gpu.setting import Setting, peak_bytes, synchronise

_LENGTH, _BATCH = 512, 32
_REPEATS = 10
_SHAPES = {"8M": Sizes(6, 320, 20, 1280, 128), "150M": Sizes(30, 640, 20, 2560, 128)}
_TITIN_RESIDUES = 34_350
_TINY = Sizes(1, 32, 2, 64, 16)


def steps(setting: Setting) -> Iterator[dict[str, Any]]:
    """Yields for each configuration the steps of ours and of transformers' ESM of its shape, in bfloat16, in turns.

    The share is of the rate that products of large matrices reach on this device; counted are six operations for every
    token and weight of a linear layer, so the products of attention are left out.
    """
    rate = _matrix_rate(setting)
    yield {"name": "matrix rate", "flops_per_second": rate}
    for config in ("tiny",) if setting.is_tiny else ("small", "base"):
        if setting.is_over:
            return
        yield from _steps_of(config, rate, setting)


def _steps_of(config: str, rate: float, setting: Setting) -> Iterator[dict[str, Any]]:
    model = load_config(config).model
    if setting.is_tiny:
        model = model.model_copy(update={"num_layers": 1})
    sizes = Sizes(model.num_layers, model.model_dim, model.num_heads, model.ffn_dim, model.num_features)
    batch, length = (2, 32) if setting.is_tiny else (_BATCH, _LENGTH)
    task = train_step_models.draw_task(batch, length)
    task = Task(*(x.to(setting.device) for x in (task.seen, task.positions, task.targets)))
    builders: dict[str, Callable[[], Learner]] = {
        "protlm": partial(_ours, model, compiles=False),
        ESM_PEER: partial(train_step_models.build, ESM_PEER, sizes, length),
    }
    if not setting.is_tiny:
        builders["protlm, compiled"] = partial(_ours, model, compiles=True)
    for name, build in builders.items():
        row = {"config": config, "name": name, "batch": batch, "length": length}
        try:
            yield {**row, **_measured_step(build, task, rate, setting)}
        except Exception as error:  # no transformers, or out of memory: the others must still run
            yield {**row, "fault": first_line(error)}


def _ours(config: Any, *, compiles: bool) -> Learner:
    model = Performer(config)
    model.reset(0)
    if compiles:
        model.compile_layers()
    return Learner(model, train_step_models.loss_at_targets)


def _measured_step(build: Callable[[], Learner], task: Task, rate: float, setting: Setting) -> dict[str, Any]:
    peak_bytes(setting.device)
    learner = build()
    learner.model.to(setting.device)

    def step() -> None:
        with torch.autocast(setting.device.partition(":")[0], torch.bfloat16):
            loss = learner.loss(task)
        learner.update(loss)

    milliseconds = _times(step, setting)
    seconds = statistics.median(milliseconds) / 1e3
    flops = 6 * task.seen.numel() * _linear_weights(learner.model)
    return {
        "parameters": learner.num_parameters,
        "median_ms": seconds * 1e3, "min_ms": min(milliseconds), "max_ms": max(milliseconds),
        "tokens_per_second": task.seen.numel() / seconds,
        "share_of_matrix_rate": flops / seconds / rate,
        "peak_bytes": peak_bytes(setting.device),
    }  # fmt: skip


def _linear_weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def _matrix_rate(setting: Setting) -> float:
    """Returns operations per second of bfloat16 products of large matrices."""
    size = 128 if setting.is_tiny else 8192
    a = torch.randn(size, size, device=setting.device, dtype=torch.bfloat16)
    milliseconds = _times(lambda: torch.mm(a, a), setting)
    return 2.0 * size**3 / (statistics.median(milliseconds) / 1e3)


def _times(call: Callable[[], object], setting: Setting) -> list[float]:
    """Returns milliseconds of some calls, after three that are not counted."""
    for _ in range(1 if setting.is_tiny else 3):
        call()
    milliseconds = []
    for _ in range(1 if setting.is_tiny else _REPEATS):
        synchronise(setting.device)
        started = time.perf_counter()
        call()
        synchronise(setting.device)
        milliseconds.append(1e3 * (time.perf_counter() - started))
        if setting.is_over:
            break
    return milliseconds


def embedding(setting: Setting) -> Iterator[dict[str, Any]]:
    """Yields residues per second of the shapes of ESM-2, exact and FAVOR, and of one protein as long as titin.

    Beside them transformers' ESM, one protein at a time.
    """
    shapes = {"tiny": _TINY} if setting.is_tiny else _SHAPES
    generator = np.random.default_rng(0)
    letters = np.frombuffer("".join(RESIDUES).encode(), dtype=np.uint8)
    lengths = [30, 50] if setting.is_tiny else np.clip(generator.lognormal(5.7, 0.7, 2000), 30, 2000).astype(int)
    proteins = [bytes(generator.choice(letters, length)).decode() for length in lengths]
    titin = bytes(generator.choice(letters, 100 if setting.is_tiny else _TITIN_RESIDUES)).decode()
    for shape, sizes in shapes.items():
        for kind, attention in (("exact", "softmax"), ("FAVOR", "positive")):
            for name, sequences in (("proteins", proteins), ("titin", [titin])):
                if setting.is_over:
                    return
                row = {"shape": shape, "name": f"protlm, {kind}, bfloat16", "of": name}
                try:
                    yield {**row, **_measured(_ours_embedding(sizes, attention, setting), sequences, setting)}
                except Exception as error:  # out of memory, or a driver's word: the others must still run
                    yield {**row, "fault": first_line(error)}
        row = {"shape": shape, "name": f"{embed_models.ESM_PEER}, bfloat16", "of": "proteins"}
        yield {**row, **_peer(sizes, proteins, setting)}


def _ours_embedding(sizes: Sizes, attention: str, setting: Setting) -> Callable[[list[str]], Iterator[Tensor]]:
    model = embed_models.performer(sizes, attention)
    halve(model, torch.bfloat16)
    model.to(setting.device)
    return embed_models.Packed(model, 65_536, setting.device)


def _peer(sizes: Sizes, proteins: list[str], setting: Setting) -> dict[str, Any]:
    if reason := embed_models.why_missing(embed_models.ESM_PEER):
        return {"fault": reason}
    try:
        peer = embed_models.transformers_esm(sizes, device=setting.device, dtype=torch.bfloat16)
        return _measured(peer, proteins[:200], setting)
    except Exception as error:  # out of memory, or another version of transformers: ours must still be measured
        return {"fault": first_line(error)}


def _measured(embed: Callable[[list[str]], Iterator[Tensor]], sequences: list[str], setting: Setting) -> dict[str, Any]:
    peak_bytes(setting.device)

    def run() -> None:
        for _ in embed(sequences):
            pass

    milliseconds = _times(run, setting)
    seconds = statistics.median(milliseconds) / 1e3
    return {
        "residues": sum(map(len, sequences)), "seconds": seconds,
        "residues_per_second": sum(map(len, sequences)) / seconds, "peak_bytes": peak_bytes(setting.device),
    }  # fmt: skip
