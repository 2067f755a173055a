"""One run: the swap, the training after it, and what is kept of both."""

import argparse
import csv
import gzip
import json
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from protlm import files
from protlm.errors import ProtlmError
from protlm.pretrained.model_names import read_named_model
from protlm.workflows.convert.convert import convert
from protlm.workflows.convert.request import ConvertRequest
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.request import EvalRequest
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare as prepare_dataset
from protlm.workflows.train.request import TrainRequest
from protlm.workflows.train.train import train
from scripts.conversion.plan import ARMS, FORMAT_VERSION, SEQUENCES_PER_STEP, SUBJECTS, Arm, Run, Subject
from scripts.conversion.sequences import vh_sequences
from scripts.environment import environment
from scripts.measuring import using_threads

_CROSS_ENTROPY = (
    "train.optimizer=adamw", "train.lr=5e-4", "train.warmup_steps=10", "train.weight_decay=0.01",
    "train.clip_norm=1.0",
)  # fmt: skip
"""Settings of updates on hidden residues."""
_POINTS = 25
"""Updates between two points of a curve."""
_TEACHING = (
    "model.num_layers=6", "model.attention=softmax", "model.qk_norm=false", "model.conv_width=0",
    "train.max_steps=653", "train.schedule_steps=1500", "train.optimizer=adamw", "train.lr=1e-3",
    "data.tokens_per_batch=4096", "data.max_length=254",
)  # fmt: skip
"""Settings by which the rotary model with exact attention is trained, over those of tiny."""


@dataclass(frozen=True)
class Prepared:
    """What the runs of a subject share.

    Attributes:
        subject: The subject.
        model: The model with exact attention.
        dataset: What is trained on, with held-out proteins as its valid split.
        calibration: Proteins of its training split.
    """

    subject: Subject
    model: Path
    dataset: Path
    calibration: Path


def prepare(name: str, arguments: argparse.Namespace, work: Path) -> Prepared:
    """Returns the model and the dataset of a subject, made once in a folder.

    Raises:
        ProtlmError: A file that the command line has to name, or that is not there.
    """
    subject = SUBJECTS[name]
    dataset, calibration = work / "dataset", work / "calibration.fasta"
    if name == "rotary":
        model = _our_own(arguments.data, work)
    elif name == "sapiens":
        _make_antibodies(arguments.airr, work, subject.longest)
        model = _sapiens(arguments.data, work)
    else:
        _make_antibodies(arguments.airr, work, subject.longest)
        model = _antiberty(arguments.antiberty, work)
    return Prepared(subject, model, dataset, calibration)


def _make_antibodies(airr: Path | None, work: Path, longest: int) -> None:
    if (work / "dataset").exists():
        return
    if airr is None or not airr.exists():
        raise ProtlmError("--airr: name the file example_airr.tsv.gz of the R package alakazam")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "train.fasta").open("w") as trained, (work / "held.fasta").open("w") as held:
        for name, residues, is_held in vh_sequences(airr):
            if len(residues) <= longest:
                (held if is_held else trained).write(f">{name}\n{residues}\n")
    shutil.copyfile(work / "train.fasta", work / "calibration.fasta")
    prepare_dataset(
        PrepRequest(inputs=[work / "train.fasta"], valid_inputs=[work / "held.fasta"], out=work / "dataset")
    )


def _sapiens(data: Path, work: Path) -> Path:
    """Returns a checkpoint of fairseq with the weights of sapiens VH and the dictionary of its package."""
    path = work / "sapiens_vh" / "checkpoint.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = argparse.Namespace(
            arch="roberta_small", encoder_layers=4, encoder_embed_dim=128, encoder_attention_heads=8,
            activation_fn="gelu",
        )  # fmt: skip
        letters = "".join(f"{letter} 1\n" for letter in "ACDEFGHIKLMNPQRSTVWY")
        (path.parent / "dict.txt").write_text(letters, encoding="ascii")
        torch.save({"args": settings, "model": load_file(data / "models" / "sapiens_vh.safetensors")}, path)
    return path


def _antiberty(wheel: Path | None, work: Path) -> Path:
    """Returns the folder of AntiBERTy, out of its wheel."""
    folder = work / "model"
    if not folder.exists():
        if wheel is None or not wheel.exists():
            raise ProtlmError("--antiberty: name the wheel of antiberty 0.1.3, as `pip download` fetches it")
        folder.mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in ("AntiBERTy_md_smooth/config.json", "AntiBERTy_md_smooth/pytorch_model.bin", "vocab.txt"):
                content = archive.read(f"antiberty/trained_models/{name}")
                (folder / name.rpartition("/")[2]).write_bytes(content)
    return folder


def _our_own(data: Path, work: Path) -> Path:
    """Returns a model with rotary positions and exact attention, briefly trained on families of Swiss-Prot."""
    families = data / "families"
    if not (work / "dataset").exists():
        work.mkdir(parents=True, exist_ok=True)
        sources = {name: families / f"{name}.fasta.gz" for name in ("train", "iid")}
        prepare_dataset(PrepRequest(inputs=[sources["train"]], valid_inputs=[sources["iid"]], out=work / "dataset"))
        shutil.copyfile(sources["train"], work / "calibration.fasta")
    if not (work / "run" / "model").exists():
        train(
            TrainRequest(
                dataset_paths=[work / "dataset"], run_dir=work / "run", config="tiny", overrides=[*_TEACHING],
                force=True,
            )
        )  # fmt: skip
    return work / "run"


def perform(run: Run, prepared: Prepared, work: Path) -> dict[str, Any]:
    """Swaps and trains a model, and returns the result; what a stopped run left in the folder is replaced.

    Args:
        run: The run.
        prepared: What the runs of its subject share.
        work: Folder for its models.

    Raises:
        ProtlmError: As the commands of which it is made.
    """
    shutil.rmtree(work, ignore_errors=True)
    began = time.process_time()
    arm = ARMS[run.arm]
    with using_threads(1):
        exact = _accuracy(prepared.model, prepared.dataset, work / "exact")
        result: dict[str, Any] = {"exact": exact, "swap": None, "curve": []}
        model: Path | None = None
        if arm.balance is not None:
            model, result["swap"] = _swapped(run, arm, prepared, work / "swapped")
            result["curve"].append({"step": 0, "stage": "swap", **_accuracy(model, prepared.dataset, work / "before")})
        done = 0
        for number, (learning, steps) in enumerate(run.stages):
            out = work / f"stage{number}"
            _train(run, prepared, model, learning, steps, out)
            result["curve"] += [
                {"step": done + point["step"], "stage": learning, **{k: point[k] for k in ("accuracy", "perplexity")}}
                for point in _points(out / "metrics.csv")
            ]
            model, done = out, done + steps
    return {
        "format_version": FORMAT_VERSION, "subject": run.subject, "arm": run.arm, "seed": run.seed,
        "seconds": round(time.process_time() - began, 1), **result, "environment": environment(),
    }  # fmt: skip


def _swapped(run: Run, arm: Arm, prepared: Prepared, out: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the swapped model, and what it keeps on the valid split before any training."""
    subject = prepared.subject
    assert arm.balance is not None
    report = convert(
        ConvertRequest(
            model=prepared.model, out=out, attention="positive", num_features=subject.num_features,
            near_block=subject.near_block if arm.has_near_field else 0, balance=arm.balance,
            calibrate=None if arm.balance == "none" else prepared.calibration, seed=run.seed,
        )
    )  # fmt: skip
    assert report.swap is not None
    return out, {"calibrated_on": report.swap.calibrated_on}


def _train(run: Run, prepared: Prepared, model: Path | None, learning: str, steps: int, out: Path) -> None:
    subject = prepared.subject
    points = _POINTS if steps <= 1000 else steps // 40
    overrides = [
        f"train.seed={run.seed}", f"train.max_steps={steps}", f"train.valid_every_steps={points}",
        "train.checkpoint_every_steps=1000000", "train.health_every_steps=0", f"data.max_length={subject.longest}",
        f"data.tokens_per_batch={SEQUENCES_PER_STEP * (_typical_length(prepared) + 2)}",
    ]  # fmt: skip
    is_stage = learning != "cross-entropy"
    overrides += [f"train.stage={learning}"] if is_stage else _CROSS_ENTROPY
    if model is None:
        overrides += ["train.lr=1e-3", *_shape_of(prepared)]
    report = train(
        TrainRequest(
            dataset_paths=[prepared.dataset], run_dir=out, init=model, overrides=overrides,
            teacher=prepared.model if is_stage else None, force=True,
        )
    )  # fmt: skip
    assert report is not None
    if report.interrupted:
        raise KeyboardInterrupt


def _shape_of(prepared: Prepared) -> list[str]:
    """Returns the settings of a model of the shape of the exact one, with FAVOR attention of our own."""
    _, description = read_named_model(prepared.model)
    config = description.model
    names = ("num_layers", "model_dim", "num_heads", "ffn_dim", "layer_norm", "positions", "max_positions",
             "norm_eps", "embedding_norm")  # fmt: skip
    shape = [f"model.{name}={getattr(config, name)}" for name in names]
    return [*(each.replace("=True", "=true").replace("=False", "=false") for each in shape),
            "model.attention=positive", f"model.num_features={prepared.subject.num_features}"]  # fmt: skip


def _typical_length(prepared: Prepared) -> int:
    lengths = sorted(
        len(line.strip()) for line in _lines(prepared.calibration) if line.strip() and not line.startswith(">")
    )
    return lengths[len(lengths) // 2]


def _lines(path: Path) -> list[str]:
    """Returns the lines of a FASTA file, plain or gzipped."""
    content = path.read_bytes()
    return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode().splitlines()


def _accuracy(model: Path, dataset: Path, out: Path) -> dict[str, float]:
    report = evaluate(EvalRequest(model=model, dataset=dataset, splits=("valid",), out=out, force=True))
    row = report.splits["valid"].scores["model"]
    return {name: round(float(row[name] or 0.0), 5) for name in ("accuracy", "perplexity")}


def _points(path: Path) -> list[dict[str, Any]]:
    """Returns the measurements on the valid split."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {
                "step": int(row["step"]),
                "accuracy": round(float(row["valid/accuracy"]), 5),
                "perplexity": round(float(row["valid/perplexity"]), 4),
            }
            for row in csv.DictReader(file)
            if row["valid/accuracy"]
        ]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes the file of a run, which appears complete or not at all."""
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
