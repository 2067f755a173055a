"""Measures the guarantees of FAVOR attention, and writes the results with their plots into a folder.

Unbiasedness, variance and convergence are tested against their theorems; time and memory are fitted against length.
The status is 1 if a guarantee fails. Time and memory are reported only: a busy machine changes them.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# As in protlm itself: waiting threads sleep, so that a busy machine costs no more than its share.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from scripts.environment import environment
from scripts.report import attention_sections, cost_section, kernel_sections, near_far_section, page
from scripts.report.page import Section
from scripts.report.plots import backend_of
from scripts.report.settings import Settings, quick_settings

SECTIONS: tuple[Callable[[Settings, Path], Section], ...] = (
    kernel_sections.unbiasedness,
    kernel_sections.variance,
    kernel_sections.kinds,
    attention_sections.uniform,
    attention_sections.outputs,
    attention_sections.layers,
    attention_sections.epsilon,
    near_far_section.near_far,
    cost_section.cost,
)


def write_report(settings: Settings, out: Path, command: str) -> list[Section]:
    """Measures all sections and writes the folder; nothing appears in `out` before all is done."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sections = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary)
        for number, measure in enumerate(SECTIONS, start=1):
            began = time.perf_counter()
            section = measure(settings, folder)
            sections.append(section)
            elapsed = time.perf_counter() - began
            section.numbers["wall_seconds"] = round(elapsed, 1)
            print(f"{section.verdict:8}  {number}. {section.title} ({elapsed:.0f} s)", flush=True)
        facts = {
            **environment(),
            "backend for float32": backend_of(torch.float32),
            "seed": settings.seed,
            "wall": f"{time.perf_counter() - started:.0f} s",
        }
        page.write(folder, sections, facts, command)
        out.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.replace(out / path.name)
    return sections


def main() -> None:
    """Makes the report that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md, results.json and the plots")
    parser.add_argument("--quick", action="store_true", help="fewer draws and short lengths, in some seconds")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--force", action="store_true", help="replace an earlier report in the folder")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        sys.exit(f"error: {out}: expected a folder, got a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        sys.exit(f"error: {out}: holds files already; replace a report with --force or choose another --out")
    settings = quick_settings(arguments.seed) if arguments.quick else Settings(arguments.seed)
    command = "python scripts/attention_report.py --out FOLDER" + (" --quick" if arguments.quick else "")
    sections = write_report(settings, out, command)
    print(f"report    {out / 'README.md'}")
    if failed := [section.title for section in sections if section.passed is False]:
        sys.exit(f"error: {len(failed)} of the guarantees failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
