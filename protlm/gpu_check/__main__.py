"""The command: checks, measures, prints a table and writes a JSON to attach to an issue."""

import argparse
import itertools
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protlm.gpu_check.parity import Case
    from protlm.gpu_check.waiting import Step

FORMAT_VERSION = 1


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if every case was right, 1 if one was not or there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m protlm.gpu_check",
        description="Checks the CUDA kernels on the GPU at hand, times them, and writes a JSON to send in.",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the JSON to write")
    parser.add_argument("--device", default="cuda:0", help="the GPU")
    parser.add_argument("--parity-only", action="store_true", help="take no times")
    parser.add_argument("--repeats", type=int, default=20, help="of each time")
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile, which takes minutes")
    parser.add_argument("--force", action="store_true", help="replace the JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    if options.out.is_dir():
        return _fail(f"{options.out} is a folder; give another --out")
    if options.out.exists() and not options.force:
        return _fail(f"{options.out} is there already; give another --out, or --force")
    if not options.out.absolute().parent.is_dir():
        return _fail(f"{options.out.parent} is not a folder; make it, or give another --out")
    import torch

    from protlm.ops import backends
    from protlm.ops.cuda.launch import capability_of
    from protlm.ops.cuda.tiles import MIN_CAPABILITY

    if not torch.cuda.is_available():
        return _fail("PyTorch sees no CUDA device; run this where `torch.cuda.is_available()` is true")
    if options.device not in (there := [f"cuda:{index}" for index in range(torch.cuda.device_count())]):
        return _fail(f"--device: expected one of {', '.join(there)}, got {options.device}")
    if (description := backends()["triton"]).startswith("not available"):
        return _fail(f"the backend triton is {description}")
    if capability_of(torch.device(options.device).index) < MIN_CAPABILITY:
        return _fail(f"--device: the kernels need compute capability {MIN_CAPABILITY / 10}, {options.device} is older")
    from protlm.gpu_check import parity, ranks, timing, waiting

    lengths = () if options.parity_only else timing.LENGTHS
    work = Work(
        parity.cases(), ranks.cases(), waiting.steps(), lengths, options.repeats, timing.TOKENS, not options.no_compile
    )
    with torch.cuda.device(options.device):
        return report(options.out, options.device, "triton", work)


@dataclass(frozen=True)
class Work:
    """The work of one run.

    Attributes:
        cases: Comparisons on one process.
        rank_cases: The same on several.
        steps: Training steps in which the host must not wait.
        lengths: Lengths of timed calls.
        repeats: Of each time.
        tokens: Of each timed call.
        compiles: Whether torch.compile is timed too.
    """

    cases: "list[Case]"
    rank_cases: "list[Case]"
    steps: "list[Step]"
    lengths: tuple[int, ...]
    repeats: int
    tokens: int
    compiles: bool


def report(out: Path, device: str, backend: str, work: Work) -> int:
    """Runs all checks and measurements on a device, prints and writes the results, and returns the exit status."""
    from protlm.gpu_check import parity, ranks, timing, waiting
    from protlm.gpu_check.roofline import PEAKS

    environment = _environment(device)
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "environment": environment, "parity": [], "times": []}
    try:
        _write(out, content)
    except OSError as error:
        return _fail(f"{out} cannot be written: {error.strerror}; give another --out")
    print(f"{environment['gpu']}, capability {environment['capability']}, torch {environment['torch']}")
    outcomes = []
    on_one_process = parity.compare_cases(work.cases, device, backend)
    on_several = ranks.compare_cases(work.rank_cases, device, backend)
    for outcome in itertools.chain(on_one_process, on_several, waiting.try_steps(work.steps, device)):
        errors = " ".join(f"{name} {error:.1e}" for name, error in outcome.errors.items())
        head = f"{'ok  ' if outcome.fault is None else 'FAIL'} {outcome.computed_by:6} {outcome.case}:"
        print(f"{head} {errors} {outcome.fault or ''}".rstrip(), flush=True)
        outcomes.append(vars(outcome))
        # A run that is stopped leaves what it has.
        _write(out, {**content, "parity": outcomes})
    failed = sum(outcome["fault"] is not None for outcome in outcomes)
    # The outcomes are kept even if no times can be measured.
    content["parity"] = outcomes
    _write(out, content)
    if work.lengths:
        measured: list[dict[str, Any]] = []
        rows = timing.measure(
            work.lengths, device, environment["gpu"], work.repeats, work.tokens, compiles=work.compiles
        )
        try:
            for row in rows:
                measured.append(row)
                _write(out, {**content, "times": measured})
        except Exception as error:  # a kernel that failed can leave a GPU on which nothing runs
            return _fail(f"no times can be taken ({parity.first_line(error)}); {out} has the cases: please attach it")
        _print_times(measured)
        if environment["gpu"] not in PEAKS:
            print(f"no shares: the peaks of {environment['gpu']} are not in protlm/gpu_check/roofline.py")
    print(f"{len(outcomes) - failed} of {len(outcomes)} cases are right; wrote {out}: please attach it to an issue")
    return 1 if failed else 0


def _write(out: Path, content: dict[str, Any]) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def _print_times(times: list[dict[str, Any]]) -> None:
    print(
        f"{'length':>7} {'batch':>6} {'':16} {'implementation':24} {'median ms':>10} {'range':>19} {'of roofline':>12}"
    )
    for row in times:
        passes = "forward+backward" if row["backward"] else "forward"
        head = f"{row['length']:7d} {row['batch']:6d} {passes:16} {row['name']:24}"
        if "fault" in row:
            print(f"{head} {'–':>10} {row['fault']}")
            continue
        share = "–" if row["share_of_roofline"] is None else f"{row['share_of_roofline']:.0%}"
        print(f"{head} {row['median_ms']:10.3f} {row['min_ms']:9.3f}–{row['max_ms']:<9.3f} {share:>12}")


def _environment(device: str) -> dict[str, Any]:
    import importlib.metadata

    import torch

    import protlm

    is_cuda = torch.device(device).type == "cuda"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "CPU",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if is_cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton,
        "protlm": protlm.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
