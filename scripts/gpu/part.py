"""One part of the first run on a GPU: writes a JSON with a row for everything measured, as soon as it is measured.

`first_run.sh` runs all parts; each stands alone. One that is stopped leaves the rows it has.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PARTS = {
    "parity": ("scripts.gpu.kernels", "parity"),
    "times": ("scripts.gpu.kernels", "times"),
    "steps": ("scripts.gpu.speed", "steps"),
    "embed": ("scripts.gpu.speed", "embedding"),
    "model": ("scripts.gpu.training", "model"),
}
"""Module and function of each part, in their order."""
FORMAT_VERSION = 1


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write; it is replaced")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=120, help="after which nothing new is begun (%(default)s)")
    parser.add_argument("--dataset", type=Path, help="prepared dataset to train on; default: the shipped sample")
    parser.add_argument("--tiny", action="store_true", help="the sizes of a dry run")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the part that the command line names."""
    arguments = parse(words)
    deadline = time.monotonic() + arguments.seconds
    # Torch takes seconds to import: after all that can be wrong with the command line.
    from protlm import files
    from scripts.environment import environment
    from scripts.gpu.setting import Setting

    module, name = PARTS[arguments.part]
    with tempfile.TemporaryDirectory() as work:
        setting = Setting(arguments.device, arguments.tiny, deadline, arguments.dataset, Path(work))
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION, "part": arguments.part, "gpu": setting.gpu_name,
            "environment": environment(), "is_complete": False, "rows": [],
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)

        def write() -> None:
            text = json.dumps(content, indent=1) + "\n"
            files.write_each_whole(arguments.out.parent, {arguments.out.name: text})

        write()
        for row in getattr(importlib.import_module(module), name)(setting):
            content["rows"].append(row)
            print(json.dumps(row)[:300], flush=True)
            write()
            if setting.is_over:
                return
        content["is_complete"] = True
        write()


if __name__ == "__main__":
    main()
