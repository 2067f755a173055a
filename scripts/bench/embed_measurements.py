"""The measurements of the embedding benchmark: hides what takes turns with what, and what needs its own process.

Run as a module it is that process.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from scripts.bench.attention_implementations import Times, take_turns
from scripts.bench.embed_models import FAVOR, Embedder, build, check, performer, save
from scripts.bench.train_step_models import Sizes
from scripts.report.cost import RETURN_FREED_MEMORY, ROOT, WARM_UP_LENGTH, reset_peak, status_bytes

SECONDS = "seconds"
LONG_FAVOR, LONG_REST, LONG_EXACT_LAYER = "FAVOR", "without attention", "exact attention of one layer"
COMMAND, BARE = "protlm embed", "bare forward passes"
GROWTH_SIZES = Sizes(num_layers=1, model_dim=64, num_heads=2, ffn_dim=128, num_features=16)
GROWTH_RESIDUES = 40


def speed(names: Sequence[str], sizes: Sizes, sequences: Sequence[str], tokens_per_batch: int, repeats: int) -> Times:
    """Returns the seconds in which each model embeds all the proteins; the models take turns."""
    embedders = {name: build(name, sizes, tokens_per_batch) for name in names}
    check(embedders, sequences[:2], sizes.model_dim)
    return take_turns({name: partial(_timed, partial(_consume, embedders[name], sequences)) for name in names}, repeats)


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
    return take_turns({name: partial(_timed, call) for name, call in calls.items()}, repeats)


def peak_above_model(sizes: Sizes, sequence: str) -> int:
    """Returns the peak memory of embedding one protein by FAVOR, above the model, from a new process."""
    peak: int = in_a_process(RETURN_FREED_MEMORY, "peak", sizes=asdict(sizes), sequence=sequence)
    return peak


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

        return take_turns({COMMAND: partial(_timed, command), BARE: partial(_timed, bare_passes)}, repeats)


def growth(sequences: Sequence[str], counts: Sequence[int], repeats: int) -> dict[int, list[int]]:
    """Returns the peaks of memory of `protlm embed`, mean only, by number of proteins, each from a new process.

    The proteins are short stretches of real ones, and the model is small: what grows with their number does not hide.
    """
    found: dict[int, list[int]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        save(performer(GROWTH_SIZES, "positive"), Path(folder) / "model")
        for count in counts:
            write_fasta(Path(folder) / f"{count}.fasta", list(_stretches(sequences, count)))
        for _ in range(repeats):
            for count, peaks in found.items():
                peaks.append(in_a_process({}, "growth", folder=folder, count=count))
    return found


def write_fasta(path: Path, sequences: Sequence[str]) -> None:
    """Writes proteins with a number as id."""
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)), encoding="ascii")


def embed_command(model: Path, fasta: Path, out: Path, options: Sequence[str]) -> None:
    """Runs `protlm embed` as a user does; what it prints goes to standard error."""
    with redirect_stdout(sys.stderr):
        status = protlm_command(["embed", str(model), str(fasta), "--out", str(out), "--force", *options])
    if status:
        sys.exit(f"error: protlm embed ended with status {status}; nothing is told")


def in_a_process(variables: Mapping[str, str], what: str, **job: Any) -> Any:
    """Returns the result of `run` under these environment variables, with as many threads as here."""
    job |= {"what": what, "threads": torch.get_num_threads()}
    result = subprocess.run(
        [sys.executable, "-m", "scripts.bench.embed_measurements"], cwd=ROOT, env={**os.environ, **variables},
        input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


def run(job: Mapping[str, Any]) -> int:
    """Returns the result of what a process of its own is asked for: a peak in bytes."""
    if job["what"] == "growth":
        folder = Path(job["folder"])
        embed_command(folder / "model", folder / f"{job['count']}.fasta", folder / "out.h5", ["--include", "mean"])
        return status_bytes("VmHWM")
    sizes, sequence = Sizes(**job["sizes"]), job["sequence"]
    # A small model before it pays what libraries allocate once.
    _consume(build(FAVOR, replace(sizes, num_layers=1), 1), [sequence[:WARM_UP_LENGTH]])
    gc.collect()
    embed = build(FAVOR, sizes, 1)
    before = status_bytes("VmRSS")
    reset_peak()
    _consume(embed, [sequence])
    return status_bytes("VmHWM") - before


def _consume(embed: Embedder, sequences: Sequence[str]) -> None:
    for _ in embed(sequences):
        pass


def _timed(call: Callable[[], None]) -> dict[str, float]:
    started = time.perf_counter()
    call()
    return {SECONDS: time.perf_counter() - started}


def _values(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, **options: Any) -> Tensor:
    """Stands where attention was."""
    return v


def _stretches(sequences: Sequence[str], count: int) -> Iterable[str]:
    """Returns as many stretches of proteins as asked for, others in each round until the proteins are used up."""
    long = [sequence for sequence in sequences if len(sequence) >= GROWTH_RESIDUES] or list(sequences)

    def stretch(number: int, sequence: str) -> str:
        start = number // len(long) * 7 % max(len(sequence) - GROWTH_RESIDUES, 1)
        return sequence[start : start + GROWTH_RESIDUES]

    return map(stretch, range(count), islice(cycle(long), count))


def main() -> None:
    """Prints the result of the job that standard input describes."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    print(json.dumps(run(job)))


if __name__ == "__main__":
    main()
