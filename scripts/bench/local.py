"""Times local attention against exact attention (SDPA) and its own torch backend; measures slope and memory.

The implementations take turns within each repeat; ratios of medians, with the ranges of the repeats, are printed with
the machine, the threads, the versions and the commit. Nothing is reported unless local attention first equals its
float64 twin. Exact attention computes all pairs: the ratio says what locality saves, not that both give the same.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from protlm.ops import backends, compiled, local_attention, reference
from scripts.attention_calls import BOTH, FORWARD
from scripts.bench import harness
from scripts.bench.harness import Figure, ratio
from scripts.measuring import (
    MEBIBYTE,
    RETURN_FREED_MEMORY,
    WARM_UP_LENGTH,
    Times,
    can_measure_memory,
    in_a_process,
    peak_during,
    resident_bytes,
    take_turns,
    timed,
    using_threads,
)
from scripts.report.approximation import log_log_slope

HEADS, HEAD_DIM = 8, 32
LOCAL, TORCH, EXACT = "local attention", "its torch backend", "exact (SDPA)"
MEASUREMENTS = ("speed", "slope", "memory")

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementations(window: int) -> dict[str, Call]:
    """Returns what takes turns, by name."""
    calls: dict[str, Call] = {LOCAL: partial(local_attention, window=window), EXACT: scaled_dot_product_attention}
    if compiled.why_not() is None:
        calls[TORCH] = partial(local_attention, window=window, backend="torch")
    return calls


def draw(length: int) -> list[Tensor]:
    """Returns q, k, v and the gradient of the output, of unit variance, with the heads of a token side by side."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn((1, length, HEADS, HEAD_DIM), generator=generator).transpose(1, 2) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


def outputs(call: Call, tensors: Sequence[Tensor], work: str) -> tuple[Tensor, ...]:
    """Returns the output, for `BOTH` with the gradients of q, k and v."""
    *leaves, grad = tensors
    if work == FORWARD:
        with torch.no_grad():
            return (call(*leaves),)
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def both_passes(call: Call, tensors: Sequence[Tensor]) -> dict[str, float]:
    """Returns the seconds of each pass."""
    return timed(partial(outputs, call, tensors, FORWARD), FORWARD) | timed(partial(outputs, call, tensors, BOTH), BOTH)


def check_values(window: int) -> None:
    """Ends the program if local attention differs from its float64 twin."""
    tensors = draw(300)
    expected = outputs(partial(reference.softmax_attention, window=window), [x.double() for x in tensors], FORWARD)[0]
    for name, call in implementations(window).items():
        error = (outputs(call, tensors, FORWARD)[0] - expected).abs().max() / expected.abs().max()
        if name != EXACT and not error < 1e-5:
            raise SystemExit(f"{name}: differs from the float64 twin by {error:.1e}; nothing is reported")


def peak_here(window: int, length: int) -> int:
    """Returns the peak of one forward and backward in this process, in bytes above inputs and outputs."""
    call = implementations(window)[LOCAL]
    outputs(call, draw(WARM_UP_LENGTH), BOTH)
    tensors = draw(length)
    before = resident_bytes()
    peak, results = peak_during(lambda: outputs(call, tensors, BOTH))
    return peak - before - sum(result.nbytes for result in results)


def measure(arguments: argparse.Namespace, wanted: Sequence[str]) -> dict[str, Any]:
    """Returns the results of the wanted measurements, by name."""
    calls, measured = implementations(arguments.window), {}
    if "speed" in wanted:
        measured["speed"] = {
            length: take_turns({name: partial(both_passes, call, draw(length)) for name, call in calls.items()},
                               arguments.repeats)
            for length in arguments.lengths
        }  # fmt: skip
    if "slope" in wanted:
        slopes = {str(length): partial(both_passes, calls[LOCAL], draw(length)) for length in arguments.slope_lengths}
        measured["slope"] = take_turns(slopes, arguments.repeats)
    if "memory" in wanted:
        length = arguments.memory_length
        peak = in_a_process(RETURN_FREED_MEMORY, peak_here, window=arguments.window, length=length)
        measured["memory"] = {"length": length, "peak_bytes": peak}
    return measured


def figures(measured: dict[str, Any]) -> list[Figure]:
    """Returns the figures of all that was measured."""
    rows: list[Figure] = []
    for length, times in measured.get("speed", {}).items():
        for name in times:
            if name != LOCAL:
                rows += [
                    ratio(f"{name} / {LOCAL}", f"L {length} {work}", times[name][work], times[LOCAL][work])
                    for work in (FORWARD, BOTH)
                ]
    if "slope" in measured:
        rows += [slope(measured["slope"], work) for work in (FORWARD, BOTH)]
    if memory := measured.get("memory"):
        size, where = memory["peak_bytes"] / MEBIBYTE, f"L {memory['length']} {BOTH}"
        rows.append(Figure("peak memory above inputs and outputs", where, size, size, size, " MiB", "in a new process"))
    return rows


def slope(times: Times, work: str) -> Figure:
    """Returns the log-log slope of time against length."""
    lengths, by_length = [float(length) for length in times], [seconds[work] for seconds in times.values()]
    of_repeats = [log_log_slope(lengths, seconds) for seconds in zip(*by_length, strict=True)]
    value = log_log_slope(lengths, [statistics.median(seconds) for seconds in by_length])
    where = f"L {min(lengths):.0f} to {max(lengths):.0f}, {work}"
    return Figure(
        f"log-log slope of time against length, {LOCAL}", where, value, min(of_repeats), max(of_repeats), "", ""
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__, MEASUREMENTS)
    parser.add_argument("--window", type=int, default=32, help="tokens on either side")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192], help="of `speed`")
    parser.add_argument("--slope-lengths", type=int, nargs="+", default=[2**power for power in range(11, 17)])
    parser.add_argument("--memory-length", type=int, default=34_350)
    return harness.parse(parser, words, repeats=7)


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with using_threads(arguments.threads):
        check_values(arguments.window)
        wanted = harness.possible(
            arguments.only, lambda name: [harness.NEEDS_LINUX] if name == "memory" and not can_measure_memory() else []
        )
        measured = measure(arguments, wanted)
        harness.Report(
            script="local.py", words=words, setup=f"B1 H{HEADS} d{HEAD_DIM} window {arguments.window} float32",
            figures=figures(measured), environment=harness.environment() | {"backends": backends()}, measured=measured,
        ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
