"""The measurements of the embedding benchmark: which calls take turns, and which need a process of their own."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

import protlm.model.attention
from protlm.cli.app import main as protlm_command
from protlm.model.performer import Performer
from protlm.pretrained.export import export
from protlm.pretrained.model_description import ModelDescription, Origin
from protlm.vocabulary import CLS, EOS
from scripts.bench.embed_models import EXACT, FAVOR, Embedder, build, check, performer, save
from scripts.bench.models import Sizes, building_a_peer
from scripts.measuring import (
    RETURN_FREED_MEMORY,
    ROOT,
    SECONDS,
    WARM_UP_LENGTH,
    Times,
    in_a_process,
    peak_bytes,
    peak_during,
    resident_bytes,
    take_turns,
    timed,
)

LOAD, LOAD_PEER, PEAK_BYTES, MODEL_BYTES = "protlm", "transformers", "peak_bytes", "model_bytes"
_RANDOM = Origin(source="random weights", family="esm", files={})
LONG_FAVOR, LONG_REST, LONG_EXACT_LAYER = "FAVOR", "without attention", "exact attention of one layer"
COMMAND, BARE = "protlm embed", "bare forward passes"
GROWTH_SIZES = Sizes(num_layers=1, model_dim=64, num_heads=2, ffn_dim=128, num_features=16)
GROWTH_RESIDUES = 40
EARLIER = ", earlier checkout"
COMPARED = {
    EXACT: {"attention": "softmax", "qk_norm": False}, FAVOR: {"attention": "positive", "qk_norm": False},
    f"{FAVOR}, qk_norm": {"attention": "positive", "qk_norm": True},
}  # fmt: skip
"""The models that two checkouts are compared by: those of the shape of ESM-2, and FAVOR as protlm trains it."""
_TIMED_EMBEDDING = """
import json, sys
from pathlib import Path

import torch

import protlm
from protlm.ops import backends
from scripts.bench.embed_models import Packed
from scripts.bench.models import Sizes, performer
from scripts.measuring import timed

assert Path(protlm.__file__).parents[1] == Path.cwd(), f"protlm comes from {protlm.__file__}"
assert not backends()["cpp"].startswith("not available"), backends()["cpp"]
job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
embed = Packed(performer(Sizes(**job["sizes"]), **job["model"]).eval(), job["tokens_per_batch"])

def embed_all():
    for _ in embed(job["sequences"]):
        pass

embed_all()
print(json.dumps(timed(embed_all)))
"""


def speed(names: Sequence[str], sizes: Sizes, sequences: Sequence[str], tokens_per_batch: int, repeats: int) -> Times:
    """Returns the seconds in which each model embeds all the proteins; the models take turns."""
    embedders = {name: build(name, sizes, tokens_per_batch) for name in names}
    check(embedders, sequences[:2], sizes.model_dim)
    return take_turns({name: partial(timed, partial(_consume, embedders[name], sequences)) for name in names}, repeats)


def against_checkout(
    checkout: Path, sizes: Sizes, sequences: Sequence[str], tokens_per_batch: int, repeats: int
) -> Times:
    """Returns the seconds in which our models embed all the proteins, here and as another checkout of protlm has them.

    They take turns, each in a new process, which embeds once before it is timed.
    """
    job = {
        "sizes": asdict(sizes), "sequences": list(sequences), "tokens_per_batch": tokens_per_batch,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    calls = {
        name + suffix: partial(timed_in, tree, job | {"model": {"conv_width": 0, **model}})
        for name, model in COMPARED.items()
        for tree, suffix in ((ROOT, ""), (checkout, EARLIER))
    }
    return take_turns(calls, repeats)


def timed_in(tree: Path, job: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds of a job in a process that imports protlm and this benchmark from a checkout."""
    # The folder in which a program given as text runs comes before all that is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", _TIMED_EMBEDDING], cwd=tree, env=environment, input=json.dumps(job),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds: dict[str, float] = json.loads(result.stdout)
    return seconds


def long_protein(sizes: Sizes, sequence: str, repeats: int) -> Times:
    """Returns the seconds of one long protein: FAVOR, the same model without attention, exact attention of a layer."""
    embed = build(FAVOR, sizes, 1)
    shape = (1, len(sequence) + 2, sizes.num_heads, sizes.model_dim // sizes.num_heads)
    generator = torch.Generator().manual_seed(0)
    # As in the model: tokens first in memory.
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3))

    def without_attention() -> None:
        with mock.patch.object(protlm.model.attention, "favor_attention", _values):
            _consume(embed, [sequence])

    def exact_layer() -> None:
        with torch.inference_mode():
            functional.scaled_dot_product_attention(q, k, v)

    calls: dict[str, Callable[[], None]] = {
        LONG_FAVOR: partial(_consume, embed, [sequence]),
        LONG_REST: without_attention,
        LONG_EXACT_LAYER: exact_layer,
    }
    return take_turns({name: partial(timed, call) for name, call in calls.items()}, repeats)


def peak_above_model(sizes: Sizes, sequence: str) -> int:
    """Returns the peak memory of embedding one protein by FAVOR, above the model, from a new process."""
    peak: int = in_a_process(RETURN_FREED_MEMORY, peak_above_model_here, sizes=asdict(sizes), sequence=sequence)
    return peak


def peak_above_model_here(sizes: dict[str, int], sequence: str) -> int:
    """Returns the peak in this process; a small model before it pays what libraries allocate once."""
    shape = Sizes(**sizes)
    _consume(build(FAVOR, replace(shape, num_layers=1), 1), [sequence[:WARM_UP_LENGTH]])
    gc.collect()
    embed = build(FAVOR, shape, 1)
    before = resident_bytes()
    peak, _ = peak_during(partial(_consume, embed, [sequence]))
    return peak - before


def pipeline(sizes: Sizes, sequences: Sequence[str], tokens_per_batch: int, repeats: int) -> Times:
    """Returns the seconds of the whole command, float16 for each residue, and of bare forward passes on its rows."""
    rows: list[tuple[Any, ...]] = []
    forward = Performer.hidden_states

    def recorded(model: Performer, *arguments: Any) -> dict[int, Tensor]:
        rows.append(arguments)
        return forward(model, *arguments)

    with tempfile.TemporaryDirectory() as folder:
        model, fasta = Path(folder) / "model", Path(folder) / "proteins.fasta"
        save(performer(sizes, "positive"), model)
        write_fasta(fasta, sequences)
        options = ["--include", "per-residue", "--dtype", "float16", "--tokens-per-batch", str(tokens_per_batch)]
        command = partial(embed_command, model, fasta, Path(folder) / "out.h5", options)
        with mock.patch.object(Performer, "hidden_states", recorded):
            command()
        bare = performer(sizes, "positive")

        def bare_passes() -> None:
            with torch.inference_mode():
                for arguments in rows:
                    bare.hidden_states(*arguments)

        return take_turns({COMMAND: partial(timed, command), BARE: partial(timed, bare_passes)}, repeats)


def growth(sequences: Sequence[str], counts: Sequence[int], repeats: int) -> dict[int, list[int]]:
    """Returns the peaks of memory of `protlm embed`, mean only, by number of proteins, each from a new process.

    The proteins are short stretches of real ones, and the model is small, so that growth with their number shows.
    """
    peaks: dict[int, list[int]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        save(performer(GROWTH_SIZES, "positive"), Path(folder) / "model")
        for count in counts:
            write_fasta(Path(folder) / f"{count}.fasta", list(_stretches(sequences, count)))
        for _ in range(repeats):
            for count in counts:
                peaks[count].append(in_a_process({}, growth_here, folder=folder, count=count))
    return peaks


def growth_here(folder: str, count: int) -> int:
    """Returns the peak of this process after the command has run in it."""
    at = Path(folder)
    embed_command(at / "model", at / f"{count}.fasta", at / "out.h5", ["--include", "mean"])
    return peak_bytes()


def load(sizes: Sizes, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Returns seconds, and peak and size of the model in bytes, of reading a checkpoint and embedding a first protein.

    The checkpoint is a directory of transformers with random weights. Each repeat is a new process, so that none has
    what another read; the files are in the system's cache.
    """
    measured: dict[str, dict[str, list[float]]] = {LOAD: {}, LOAD_PEER: {}}
    with tempfile.TemporaryDirectory() as folder:
        in_a_process({}, write_checkpoint_here, folder=folder, sizes=asdict(sizes))
        for repeat in range(repeats + 1):
            for name, figures in measured.items():
                for quantity, value in in_a_process({}, load_here, folder=folder, name=name).items():
                    if repeat:
                        figures.setdefault(quantity, []).append(value)
    return measured


def write_checkpoint_here(folder: str, sizes: dict[str, int]) -> None:
    """Writes a model of the shape of ESM-2 as a directory of transformers."""
    model = performer(Sizes(**sizes), "softmax")
    export(model, ModelDescription(model=model.config, mask_rate=0.15, origin=_RANDOM), Path(folder))


def load_here(folder: str, name: str) -> dict[str, float]:
    """Returns what `load` measures, in this process; imports are not counted."""
    tokens = torch.tensor([CLS, *range(4, 24), EOS])
    if name == LOAD:
        from protlm.pretrained.model_names import read_named_model

        def call() -> torch.nn.Module:
            model, _ = read_named_model(folder)
            model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
            return model
    else:
        with building_a_peer():
            from transformers import EsmForMaskedLM

        def call() -> torch.nn.Module:
            model: torch.nn.Module = EsmForMaskedLM.from_pretrained(folder)
            model(input_ids=tokens[None])
            return model

    with torch.inference_mode(), redirect_stdout(sys.stderr):
        before, started = resident_bytes(), time.perf_counter()
        peak, model = peak_during(call)
        seconds = time.perf_counter() - started
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {SECONDS: seconds, PEAK_BYTES: peak - before, MODEL_BYTES: size}


def write_fasta(path: Path, sequences: Sequence[str]) -> None:
    """Writes proteins with a number as id."""
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)), encoding="ascii")


def embed_command(model: Path, fasta: Path, out: Path, options: Sequence[str]) -> None:
    """Runs `protlm embed` as a user does, with its output on standard error."""
    with redirect_stdout(sys.stderr):
        status = protlm_command(["embed", str(model), str(fasta), "--out", str(out), "--force", *options])
    if status:
        sys.exit(f"error: protlm embed ended with status {status}; nothing is reported")


def _consume(embed: Embedder, sequences: Sequence[str]) -> None:
    for _ in embed(sequences):
        pass


def _values(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, **options: Any) -> Tensor:
    """Takes the place of attention: returns v."""
    return v


def _stretches(sequences: Sequence[str], count: int) -> Iterable[str]:
    """Returns this many stretches of the proteins, different ones in each round over them."""
    long = [sequence for sequence in sequences if len(sequence) >= GROWTH_RESIDUES] or list(sequences)

    def stretch(number: int, sequence: str) -> str:
        start = number // len(long) * 7 % max(len(sequence) - GROWTH_RESIDUES, 1)
        return sequence[start : start + GROWTH_RESIDUES]

    return map(stretch, range(count), islice(cycle(long), count))
