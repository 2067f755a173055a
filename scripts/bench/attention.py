"""Times FAVOR attention against exact attention, the plain formula and performer-pytorch, by length.

The implementations take turns within each repeat; medians and ranges of all repeats are printed with the machine, the
threads, the versions and the commit. Nothing is reported unless FAVOR first equals its float64 twin. performer-pytorch
takes part where it is installed (`pip install -e '.[bench]'`).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from protlm.ops import draw_projection, favor_attention, kernel_features, reference
from scripts.environment import environment

HEADS, HEAD_DIM, FEATURES = 8, 64, 256
PASSES = ("forward", "forward + backward")


def plain_formula(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Returns FAVOR attention with all features in memory: safe only for small norms."""
    q_features = kernel_features(q, projection)
    k_features = kernel_features(k, projection)
    totals = q_features @ k_features.sum(2).unsqueeze(-1)
    return (q_features @ (k_features.transpose(-1, -2) @ v)) / totals


def exact(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Returns softmax attention; the projection is not used."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def implementations() -> dict[str, Attention]:
    """Returns what is compared, by name; the first one is what the others are compared with."""
    found: dict[str, Attention] = {
        "favor": favor_attention,
        "favor causal": partial(favor_attention, causal=True),
        "favor relu": partial(favor_attention, feature_map="relu"),
        "plain formula": plain_formula,
        "exact (SDPA)": exact,
    }
    try:
        import performer_pytorch
    except ImportError:
        print("performer-pytorch is not installed and takes no part", file=sys.stderr)
        return found
    for name, is_relu in (("performer-pytorch", False), ("performer-pytorch relu", True)):
        module = performer_pytorch.FastAttention(HEAD_DIM, FEATURES, generalized_attention=is_relu)
        # It has a projection of its own.
        found[name] = lambda q, k, v, _, module=module: module(q, k, v)
    return found


def check_values() -> None:
    """Ends the program unless the op equals its twin."""
    q, k, v = (torch.randn(1, 2, 300, HEAD_DIM) for _ in range(3))
    projection = draw_projection(FEATURES, HEAD_DIM, num_heads=2)
    for options in ({}, {"causal": True}, {"feature_map": "relu"}):
        expected = reference.favor_attention(q, k, v, projection, **options)
        error = (favor_attention(q, k, v, projection, **options) - expected).abs().max() / expected.abs().max()
        if not error < 1e-5:
            sys.exit(f"error: favor_attention {options} differs from its float64 twin by {error:.1e}; nothing is timed")


def time_once(function: Attention, inputs: list[Tensor]) -> tuple[float, float]:
    """Returns the seconds of one forward, and of forward and backward together."""
    *qkv, projection, out_grad = inputs
    started = time.perf_counter()
    out = function(*qkv, projection)
    forward = time.perf_counter() - started
    out.backward(out_grad)
    both = time.perf_counter() - started
    for tensor in qkv:
        tensor.grad = None
    return forward, both


def measure(length: int, repeats: int, functions: dict[str, Attention]) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of every repeat, by implementation and pass."""
    shape = (1, HEADS, length, HEAD_DIM)
    qkv = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    inputs = [*qkv, draw_projection(FEATURES, HEAD_DIM, num_heads=HEADS), torch.randn(shape)]
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in PASSES} for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            elapsed = time_once(function, inputs)
            if repeat:
                for what, seconds in zip(PASSES, elapsed, strict=True):
                    times[name][what].append(seconds)
    return times


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    check_values()
    functions = implementations()
    results = {length: measure(length, arguments.repeats, functions) for length in arguments.lengths}
    if arguments.json:
        print(json.dumps({"environment": environment(), "seconds": results}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(f"B1 H{HEADS} d{HEAD_DIM} M{FEATURES} float32, ms: median (range), and time / that of favor")
    for length, times in results.items():
        for what in PASSES:
            print(f"length {length}, {what}")
            ours = statistics.median(times["favor"][what])
            for name, seconds in times.items():
                median = statistics.median(seconds[what])
                spread = f"{min(seconds[what]) * 1e3:.1f}–{max(seconds[what]) * 1e3:.1f}"
                print(f"  {name:22}  {median * 1e3:8.1f} ({spread})  {median / ours:5.2f}×")


if __name__ == "__main__":
    main()
