"""Compiles named cases for one GPU and prints what became of them, as JSON: a process without `TRITON_INTERPRET`.

python -m tests.machine_code.compile 90                    every case, for compute capability 9.0
python -m tests.machine_code.compile 90 NAME...            some of them
python -m tests.machine_code.compile --write-budgets       counts instructions anew, for all capabilities
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.machine_code.gpus import GPUS

ROOT = Path(__file__).parents[2]
BUDGETS_PATH = Path(__file__).with_name("budgets.json")
CASES = "tests.machine_code.cases"


def compiled_elsewhere(capability: int, module: str = CASES, names: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what a process of its own prints, which compiles whatever this process interprets.

    Args:
        capability: One of `GPUS`.
        module: The module whose function `cases` gives the cases.
        names: Which of them; all by default.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.machine_code.compile", str(capability), *names, "--cases", module]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr[-4000:]}")
    content: dict[str, Any] = json.loads(process.stdout)
    return content


def compiled_here(capability: int, module: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns the machine code of each case, or the error that its compilation ended with."""
    from tests.machine_code.compiler import compile_launch

    cases = importlib.import_module(module).cases(capability)
    if unknown := set(names) - set(cases):
        sys.exit(f"error: {sorted(unknown)}: expected some of {sorted(cases)}")
    results: dict[str, Any] = {}
    for name in names or cases:
        try:
            results[name] = compile_launch(cases[name].launch, capability).to_json()
        except Exception as error:  # the compiler raises whatever it likes, and the other cases shall be seen
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    return results


def write_budgets() -> None:
    """Counts the instructions of all kernels and writes them to where the tests read them."""
    from tests.machine_code.compiler import MachineCode
    from tests.machine_code.expectations import counts

    budgets: dict[str, dict[str, dict[str, int]]] = {}
    for capability in GPUS:
        budgets[str(capability)] = {}
        for name, content in compiled_elsewhere(capability).items():
            if "error" in content:
                sys.exit(f"error: {name} for {capability}: {content['error']}")
            budgets[str(capability)][name] = counts(MachineCode.from_json(content))
    BUDGETS_PATH.write_text(json.dumps(budgets, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, nargs="?", choices=list(GPUS))
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--cases", default=CASES, metavar="MODULE", help="has a function cases(capability)")
    parser.add_argument("--write-budgets", action="store_true")
    arguments = parser.parse_args()
    if arguments.write_budgets == (arguments.capability is not None):
        parser.error("expected either a capability or --write-budgets")
    if arguments.write_budgets:
        write_budgets()
    else:
        print(json.dumps(compiled_here(arguments.capability, arguments.cases, arguments.names), indent=1))


if __name__ == "__main__":
    main()
