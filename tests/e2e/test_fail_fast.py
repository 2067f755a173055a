"""What is wrong with a command is told before torch and Lightning are loaded, which takes seconds."""

import json
import os
import subprocess
import sys

import pytest

from tests.foreign_checkpoint import CONFIG

SCRIPT = """
import contextlib, io, json, sys
from protlm.cli.app import main

told = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    loaded = [name for name in ("torch", "pytorch_lightning", "lightning_fabric") if name in sys.modules]
    told.append((status, out.getvalue(), err.getvalue(), loaded))
    if loaded:
        break
json.dump(told, sys.stdout)
"""


def run_all(commands, folder):
    """Runs commands, one after the other, in one new process; returns status, output, errors and what was loaded."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "LOCAL_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=words, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for command, (_, _, _, loaded) in zip(commands, told, strict=False):
        assert not loaded, (loaded, command)
    assert len(told) == len(commands)
    return told


def assert_refused(commands, folder):
    """Checks that each command fails with a line that has the words beside it, without loading torch."""
    told = run_all([command for command, _ in commands], folder)
    for (command, word), (status, _, err, _) in zip(commands, told, strict=True):
        assert status in (1, 2), (command, err)
        assert word in err, (command, err)
        assert len([line for line in err.splitlines() if line.lower().startswith("error: ")]) == 1, (command, err)


@pytest.fixture(scope="module")
def existing(tmp_path_factory):
    """A folder with a file of somebody in it."""
    folder = tmp_path_factory.mktemp("existing")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_train_refuses_at_once(dataset, run_dir, fasta, existing, tmp_path):
    new = ("--out", tmp_path / "new")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**CONFIG, "model_type": "t5"}))
    assert_refused(
        [
            (("train", "nosuch", *new), "nosuch"),
            (("train", fasta, *new), str(fasta)),
            (("train", existing, *new), str(existing)),
            (("train", run_dir, *new), str(run_dir)),
            (("train", dataset, *new, "--config", "nosuch"), "no such configuration"),
            (("train", dataset, *new, "--set", "train.lrr=1"), "train.lrr: unknown key"),
            (("train", dataset, *new, "--set", "train.lr=fast"), "train.lr"),
            (("train", dataset, *new, "--set", "train"), "SECTION.KEY=VALUE"),
            (("train", dataset, *new, "--set", 'train.freeze=["nothing"]'), "which matches none"),
            (("train", dataset, *new, "--set", "model.model_dim=65536", "--set", "model.num_layers=900"), "memory"),
            (("train", dataset, *new, "--devices", 3), "train.accumulate=3"),
            (("train", dataset, *new, "--max-time", "soon"), "HH:MM:SS"),
            (("train", dataset, "--out", run_dir), "exists already"),
            (("train", dataset, "--out", existing), "exists already"),
            (("train", dataset, "--out", dataset / "run"), "lie inside each other"),
            (("train", dataset, "--out", run_dir, "--resume", "--set", "model.num_heads=4"), "cannot become 4"),
            (("train", dataset, *new, "--init", "nosuch"), "nosuch"),
            (("train", dataset, *new, "--init", existing), "no config.json"),
            (("train", dataset, *new, "--init", other), "relative positions"),
            (("train", dataset, *new, "--dry-run", "--for", "h999"), "h100"),
            (("train", dataset, *new, "--dry-run", "--for", "h100x3"), "train.accumulate=3"),
            (("train", dataset, *new, "--for", "h100"), "--dry-run"),
        ],
        tmp_path,
    )
    assert not (tmp_path / "new").exists()


def test_stages_are_refused_at_once(dataset, run_dir, tmp_path):
    """The model of `run_dir` has one layer with random features; it is no estimator of exact attention."""
    new = ("train", dataset, "--out", tmp_path / "new")
    stage, teacher, init = ("--stage", "transfer"), ("--teacher", run_dir), ("--init", run_dir)
    small, exact, other = tmp_path / "small", tmp_path / "exact", tmp_path / "other"
    content = json.loads((run_dir / "model" / "config.json").read_text())
    for folder, changes in (
        (small, {"num_heads": 4}), (exact, {"attention": "softmax"}), (other, {"positions": "learned"}),
    ):  # fmt: skip
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**content, "model": {**content["model"], **changes}}))
    estimator = ("--set", "model.estimator=true")
    three = (*estimator, "--set", "model.attention=positive")
    assert_refused(
        [
            ((*new, *init, *stage), "belong together"),
            ((*new, *init, *teacher), "belong together"),
            ((*new, *stage, *teacher), "--init"),
            ((*new, *init, *teacher, "--stage", "nosuch"), "nosuch"),
            ((*new, *init, "--set", "train.stage=transfer"), "without --teacher"),
            ((*new, "--set", "train.stage=transfer"), "--init"),
            ((*new, *init, *stage, "--teacher", "nosuch"), "nosuch"),
            (
                (*new, *init, *stage, "--teacher", small),
                "model.num_heads: expected 2 as in the model that is trained, got 4",
            ),
            (
                (*new, *init, *stage, "--teacher", other),
                "expected 'rotary' as in the model that is trained, got 'learned'",
            ),
            ((*new, "--init", exact, *stage, *teacher), "nothing to recover"),
            ((*new, *init, *stage, *teacher), "the model that is trained itself, which teaches nothing"),
            ((*new, *init, *stage, *teacher, "--set", "train.redraw_every_steps=5"), "train.redraw_every_steps"),
            ((*new, *init, *stage, *teacher, "--set", "train.compile=true"), "train.compile"),
            ((*new, *init, *stage, *teacher, "--set", "train.convert_layers=5"), "train.convert_layers"),
            ((*new, *init, "--set", "train.convert_layers=5"), "without model.estimator"),
            ((*new, *three, "--set", "train.convert_layers=5", "--max-steps", 10), "after 10 updates"),
            ((*new, *three, "--set", "train.convert_layers=5", "--set", "train.compile=true"), "train.compile"),
            (("train", dataset, "--out", run_dir, "--resume", *teacher), "without --stage"),
            (("train", dataset, "--out", run_dir, "--resume", *stage), "cannot become 'transfer'"),
        ],
        tmp_path,
    )
    assert not (tmp_path / "new").exists()


def test_a_model_of_another_program_does_not_hide_a_wrong_key(dataset, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    words = ("train", dataset, "--out", tmp_path / "run", "--init", source)
    assert_refused([((*words, "--set", "train.lrr=1"), "train.lrr: unknown key")], tmp_path)


def test_eval_refuses_at_once(dataset, run_dir, fasta, existing, tmp_path):
    new = ("--out", tmp_path / "new")
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.json").write_text("{}")
    assert_refused(
        [
            (("eval", "nosuch", dataset, *new), "nosuch"),
            (("eval", run_dir, "nosuch", *new), "nosuch"),
            (("eval", dataset, run_dir, *new), str(run_dir)),
            (("eval", run_dir, fasta, *new), str(fasta)),
            (("eval", run_dir, dataset, *new, "--split", "ood"), "ood"),
            (("eval", run_dir, dataset, "--out", report), "exists already"),
            (("eval", run_dir, dataset, "--out", run_dir), "choose another --out"),
            (("eval", "--compare", run_dir, dataset, *new), "at least two"),
            (("eval", "--compare", run_dir, "nosuch", dataset, *new), "nosuch"),
            (("eval", "--compare", report, report, *new), str(report)),
            (("eval", "--compare", run_dir, run_dir / "model", dataset, *new, "--split", "ood"), "ood"),
        ],
        tmp_path,
    )


def test_embed_refuses_at_once(dataset, run_dir, fasta, existing, tmp_path):
    new = ("--out", tmp_path / "new.h5")
    there = tmp_path / "there.h5"
    there.write_bytes(b"mine")
    unfinished = tmp_path / "half.h5.partial"
    unfinished.mkdir()
    (unfinished / "work.json").write_text('{"format": "protlm-embed", "format_version": 1}')
    assert_refused(
        [
            (("embed", "nosuch", fasta, *new), "nosuch"),
            (("embed", fasta, fasta, *new), str(fasta)),
            (("embed", run_dir, "nosuch.fasta", *new), "nosuch.fasta"),
            (("embed", run_dir, existing, *new), str(existing)),
            (("embed", run_dir, dataset, *new), "--split"),
            (("embed", run_dir, dataset, *new, "--split", "ood"), "ood"),
            (("embed", run_dir, fasta, *new, "--split", "test"), "--split"),
            (("embed", run_dir, fasta, *new, "--layers", "9"), "layer"),
            (("embed", run_dir, fasta, *new, "--window", 9, "--truncate", 9), "--window"),
            (("embed", run_dir, fasta, *new, "--layout", "npz"), "npz"),
            (("embed", run_dir, fasta, *new, "--layout", "uniprot", "--include", "mean,cls"), "uniprot"),
            (("embed", run_dir, fasta, "--out", there), "exists already"),
            (("embed", run_dir, fasta, "--out", there, "--force"), "holds no embeddings"),
            (("embed", run_dir, fasta, "--out", tmp_path / "half.h5"), "--resume"),
            (("embed", run_dir, fasta, "--out", there, "--dry-run"), "exists already"),
        ],
        tmp_path,
    )
    assert there.read_bytes() == b"mine"
    assert not (tmp_path / "new.h5").exists()


def test_convert_prep_inspect_and_config_refuse_at_once(dataset, run_dir, fasta, existing, tmp_path):
    new = ("--out", tmp_path / "new")
    assert_refused(
        [
            (("convert", "nosuch", *new), "nosuch"),
            (("convert", existing, *new), "no config.json"),
            (("convert", fasta, *new), str(fasta)),
            (("convert", run_dir, "--out", existing), "exists already"),
            (("convert", run_dir, "--out", existing, "--force"), "notes.txt"),
            (("convert", run_dir, "--out", run_dir / "model"), "exists already"),
            (("convert", run_dir / "model", "--out", run_dir), "the model itself"),
            (("prep", "nosuch.fasta", *new), "nosuch.fasta"),
            (("prep", fasta, "--out", dataset), "exists already"),
            (("prep", fasta, *new, "--split", "cluster"), "cluster"),
            (("prep", fasta, *new, "--clusters", "nosuch.tsv"), "nosuch.tsv"),
            (("prep", existing, *new), str(existing)),
            (("inspect", "nosuch"), "nosuch"),
            (("inspect", existing), str(existing)),
            (("config", "nosuch"), "no such configuration"),
        ],
        tmp_path,
    )


def test_what_needs_no_torch_is_done_without_it(dataset, run_dir, tmp_path):
    dry = ("train", dataset, "--out", tmp_path / "run", "--dry-run", "--set", "train.accumulate=8")
    (first, second) = run_all([(*dry, "--for", "h100x8"), (*dry, "--for", "h100x8", "--json")], tmp_path)
    assert first[0] == second[0] == 0
    for word in ("parameters", "an epoch", "the run", "8 × h100", "not measured: 30% of 67 TFLOP/s", "80.00 GiB"):
        assert word in first[1]
    report = json.loads(second[1])
    assert report["on_devices"]["num_devices"] == 8
    assert report["num_parameters"] == report["memory"]["parameters"]


def test_a_dry_run_prints_the_size_before_torch_is_loaded(dataset, run_dir, fasta, tmp_path):
    """Seen from where torch would be loaded: the output so far."""
    out = tmp_path / "out"
    for words, expected in (
        (["train", str(dataset), "--out", str(tmp_path / "run"), "--dry-run"], "parameters"),
        (["embed", str(run_dir), str(fasta), "--out", str(tmp_path / "e.h5"), "--dry-run"], "residues to compute"),
    ):
        code = f"import sys; sys.modules['torch'] = None; from protlm.cli.app import main; main({words!r})"
        with out.open("w") as file:
            done = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE, text=True)
        assert "import of torch halted" in done.stderr
        assert expected in out.read_text()
