"""Times of attention on a GPU beside other implementations: which those are, and how a time is measured."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protlm.gpu_check.parity import first_line
from protlm.gpu_check.roofline import PEAKS, Shape, floor_seconds
from protlm.ops import draw_projection, favor_attention, local_attention
from protlm.ops.favor import Backend
from protlm.ops.local import LocalBackend

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

LENGTHS = tuple(512 << i for i in range(8))
_AT_THE_FLOOR = ("favor triton", "favor torch")
"""The implementations whose operations and bytes the roofline counts: only they have a share of it."""
TOKENS = 65_536
"""Number of tokens of a call: shorter lengths have larger batches."""


def measure(
    lengths: tuple[int, ...], device: str, gpu_name: str, repeats: int, tokens: int, *, compiles: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields a row for each length and implementation, with median and range in milliseconds and roofline share.

    With `compiles` torch.compile is one of them, which takes half a minute for every length.
    """
    peak = PEAKS.get(gpu_name)
    for length in lengths:
        shape = Shape(max(1, tokens // length), 8, length, 64, 256)
        for has_backward in (False, True):
            floor = max(floor_seconds(shape, peak, has_backward=has_backward).values()) if peak else None
            for name, outcome in _measure_one(shape, device, has_backward, repeats, compiles).items():
                row = {"length": length, "batch": shape.batch, "backward": has_backward, "name": name}
                if isinstance(outcome, str):
                    yield {**row, "fault": outcome}
                    continue
                median = statistics.median(outcome)
                share = floor * 1e3 / median if floor and name in _AT_THE_FLOOR else None
                spread = {"median_ms": median, "min_ms": min(outcome), "max_ms": max(outcome)}
                yield {**row, **spread, "share_of_roofline": share}


def _measure_one(
    shape: Shape, device: str, has_backward: bool, repeats: int, compiles: bool
) -> dict[str, list[float] | str]:
    """Returns the milliseconds of each implementation, measured in turns, or the fault of one that does not run."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)
    q, k, v, out_grad = (torch.randn(size, generator=generator).to(device, torch.bfloat16) for _ in range(4))
    projection = draw_projection(shape.features, shape.head_dim, generator=generator).to(device)
    outcomes: dict[str, list[float] | str] = {}
    running: dict[str, Callable[[], None]] = {}
    for name, attention in _implementations(projection, compiles).items():
        run = _runner(attention, (q, k, v), out_grad, has_backward)
        try:
            for _ in range(3):
                run()
            running[name], outcomes[name] = run, []
        except Exception as error:  # out of memory, or an error of a compiler: the others must still run
            outcomes[name] = first_line(error)
    for _ in range(repeats):
        for name, run in running.items():
            times = outcomes[name]
            assert isinstance(times, list)
            times.append(_milliseconds(run, device))
    return outcomes


def _implementations(projection: Tensor, compiles: bool) -> dict[str, Attention]:
    def favor(backend: Backend, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Attention:
        return lambda q, k, v: favor_attention(
            q.to(dtype), k.to(dtype), v.to(dtype), projection, backend=backend, **options
        )

    def local(backend: LocalBackend) -> Attention:
        return lambda q, k, v: local_attention(q, k, v, window=32, backend=backend)

    chosen = {
        "favor triton": favor("triton"),
        "favor torch": favor("torch"),
        "favor triton, float32": favor("triton", torch.float32),
        "favor causal triton": favor("triton", causal=True),
        "favor causal torch": favor("torch", causal=True),
        "near-far triton": favor("triton", near_block=32),
        "near-far torch": favor("torch", near_block=32),
        "local triton": local("triton"),
        "local torch": local("torch"),
        "exact, SDPA": F.scaled_dot_product_attention,
        "exact causal, SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if compiles:
        # Compiled anew for each shape: compilers do best with one static shape.
        torch.compiler.reset()
        compiled = torch.compile(_formula, dynamic=False)
        chosen["formula, torch.compile"] = lambda q, k, v: compiled(q, k, v, projection.to(q.dtype))
    return chosen


def _formula(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Returns the textbook formula: features of the whole length, one maximum, no epsilon."""
    scale = q.shape[-1] ** -0.25
    key_scores = (k @ projection.T).float() * scale - k.float().square().sum(-1, keepdim=True) * (scale * scale / 2)
    query_scores = (q @ projection.T).float() * scale
    key_features = torch.exp(key_scores - key_scores.amax((-1, -2), keepdim=True)).to(q.dtype)
    query_features = torch.exp(query_scores - query_scores.amax(-1, keepdim=True)).to(q.dtype)
    context = key_features.transpose(-1, -2) @ v
    sums = query_features @ key_features.sum(-2).unsqueeze(-1)
    return (query_features @ context) / sums


def _runner(
    attention: Attention, inputs: tuple[Tensor, ...], out_grad: Tensor, has_backward: bool
) -> Callable[[], None]:
    leaves = [x.detach().requires_grad_(has_backward) for x in inputs]

    def run() -> None:
        out = attention(*leaves)
        if has_backward:
            torch.autograd.grad(out, leaves, out_grad)

    return run


def _milliseconds(run: Callable[[], None], device: str) -> float:
    if torch.device(device).type != "cuda":
        import time

        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(stop))
