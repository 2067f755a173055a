"""The part that trains a model with the product's own commands for the time that is left, and scores it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.gpu.setting import Setting

_ROOT = Path(__file__).resolve().parents[2]
_SHARE = 0.6
"""Of the time that is left, for training: the rest is for start and evaluation."""
_LAST_WORDS = 400


def model(setting: Setting) -> Iterator[dict[str, Any]]:
    """Yields the training of a model on the dataset, and its report on the valid split, with its baselines."""
    dataset = setting.dataset
    if dataset is None:
        dataset = setting.work / "dataset"
        sample = _ROOT / "data" / "trembl_sample.fasta.gz"
        prepared = _run("prep", str(sample), "--out", str(dataset), "--valid-fraction", "0.05", "--force")
        yield {"command": "prep", **prepared}
        _check(prepared)
    run, seconds = setting.work / "run", int(setting.seconds_left * _SHARE)
    hours, rest = divmod(max(5, seconds), 3600)
    options = ["--config", "tiny" if setting.is_tiny else "small", "--force"]
    if setting.is_tiny:
        options += ["--max-steps", "2", "--set", "train.checkpoint_every_steps=2"]
    else:
        options += ["--precision", "bf16-mixed", "--max-time", f"{hours:02}:{rest // 60:02}:{rest % 60:02}"]
    trained = _run("train", str(dataset), "--out", str(run), *options)
    yield {"command": "train", **trained, **_last_metrics(run / "metrics.csv")}
    _check(trained)
    report = setting.work / "report"
    scored = _run("eval", str(run), str(dataset), "--split", "valid", "--out", str(report), "--force")
    _check(scored)
    content = json.loads((report / "report.json").read_text(encoding="utf-8"))
    yield {"command": "eval", **scored, "report": content}


def _run(*words: str) -> dict[str, Any]:
    """Returns the status of a command of protlm and its last words."""
    ended = subprocess.run(
        [sys.executable, "-m", "protlm.cli.app", *words], capture_output=True, text=True, check=False
    )
    return {"status": ended.returncode, "told": (ended.stdout + ended.stderr)[-_LAST_WORDS:]}


def _check(ended: dict[str, Any]) -> None:
    if ended["status"]:
        sys.exit(f"error: {ended['told']}")


def _last_metrics(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    return {"metrics": dict(zip(header.split(","), rows[-1].split(","), strict=True))} if rows else {}
