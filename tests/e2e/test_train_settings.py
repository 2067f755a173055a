"""Every objective, data mode and kind of model gets through the whole road: train, resume, eval, embed."""

import json
import shutil

import pytest

from protlm import load_model
from protlm.cli.app import main
from protlm.runtime.devices import has_half_precision_units
from protlm.workflows.train import start
from tests.e2e.conftest import write_fasta
from tests.e2e.train_tools import losses, rows, train

ROADS = {
    "next token": ["model.causal=true"],
    "next token, exact": ["model.causal=true", "model.attention=softmax"],
    "next token, oprf": ["model.causal=true", "model.attention=oprf"],
    "clipped": ["data.mode=clipped", "data.max_length=50", "train.mask_share=0.1", "train.random_share=0.8"],
    "concatenated": ["data.mode=concatenated", "data.window_tokens=256"],
    "concatenated, next token": ["data.mode=concatenated", "data.window_tokens=256", "model.causal=true"],
    "learned positions": ["model.positions=learned", "model.max_positions=128", "data.max_length=100"],
    "a plain Transformer": [
        "model.positions=sinusoidal", "model.layer_norm=post", "model.attention=softmax", "model.qk_norm=false",
        "model.conv_width=0", "train.optimizer=adamw",
    ],
    "swiglu, saving memory": ["model.ffn=swiglu", "train.activation_checkpointing=true", "model.dropout=0.1"],
    "bfloat16": ["train.precision=bf16-mixed"],
}  # fmt: skip


def words(settings):
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture
def without_length(monkeypatch):
    """The shared small settings bound the length, which a concatenated run has no use for."""
    from tests.e2e import train_tools

    small = train_tools.SMALL
    place = small.index("data.max_length=500")
    monkeypatch.setattr(train_tools, "SMALL", small[: place - 1] + small[place + 1 :])


def test_half_precision_that_the_processor_lacks_is_refused_and_planned(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "has_half_precision_units", lambda name: False)
    out, bfloat16 = tmp_path / "run", words(["train.precision=bf16-mixed"])
    assert train(dataset, out, "--max-steps", 1, *bfloat16) != 0
    told = capsys.readouterr().err
    assert "precision bf16-mixed: as far as PyTorch can tell this processor has no units for bfloat16" in told
    assert "take precision 32" in told
    assert train(dataset, out, "--max-steps", 1, *bfloat16, "--dry-run") == 0


@pytest.mark.usefixtures("without_length")
@pytest.mark.parametrize("settings", ROADS.values(), ids=ROADS)
def test_every_kind_of_run_resumes_to_the_bit_and_its_model_is_evaluated_and_embeds(settings, dataset, fasta, tmp_path):
    if "train.precision=bf16-mixed" in settings and not has_half_precision_units("bf16"):
        pytest.skip("this processor has no units for bfloat16")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(dataset, whole, "--max-steps", 5, *words(settings)) == 0
    assert train(dataset, parts, "--max-steps", 3, *words([*settings, "train.schedule_steps=5"])) == 0
    assert main(["train", str(dataset), "--out", str(parts), "--resume", "--max-steps", "5"]) == 0
    assert losses(whole) == losses(parts)
    assert len(set(losses(whole))) == 5
    for split in ("valid", "test"):
        assert main(["eval", str(whole), str(dataset), "--split", split, "--out", str(tmp_path / split)]) == 0
    report = json.loads((tmp_path / "valid" / "report.json").read_text())
    assert report["objective"] == ("next-token" if "model.causal=true" in settings else "masked")
    # eval measures what the run measured when it exported this model.
    valid = [row for row in rows(whole) if row["valid/loss"]]
    best = min(valid, key=lambda row: float(row["valid/perplexity"]))
    if "train.precision=bf16-mixed" not in settings:
        assert report["model"]["perplexity"] == pytest.approx(float(best["valid/perplexity"]), rel=1e-5)
    model = load_model(whole)
    embedding = next(iter(model.embed(["MKTAYIAKQR"])))["mean"]
    assert embedding.shape == (32,)


def test_a_next_token_run_scores_every_residue(dataset, tmp_path):
    assert train(dataset, tmp_path / "run", "--max-steps", 1, *words(["model.causal=true"])) == 0
    assert (
        main(["eval", str(tmp_path / "run"), str(dataset), "--split", "valid", "--out", str(tmp_path / "report")]) == 0
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert report["num_targets"] == manifest["splits"]["valid"]["num_residues"]


def test_several_datasets_are_mixed_and_a_run_knows_them_all(dataset, proteins, tmp_path, failure):
    other = tmp_path / "other"
    fasta = write_fasta(tmp_path / "other.fasta", [(name, sequence[:40]) for name, sequence in proteins[:30]])
    assert main(["prep", str(fasta), "--out", str(other), "--valid-fraction", "0.2", "--test-fraction", "0"]) == 0
    out = tmp_path / "run"
    mixed = ["train", dataset, other, "--out", out, "--set", "data.weights=[1, 3]", "--max-steps", 2]
    assert main([str(word) for word in mixed]) == 0
    description = json.loads((out / "run.json").read_text())
    assert [dataset["name"] for dataset in description["datasets"]] == ["dataset", "other"]
    # The order is part of the data.
    assert "another dataset" in failure("train", other, dataset, "--out", out, "--resume", "--max-steps", 3)
    assert "data.weights" in failure("train", dataset, "--out", tmp_path / "a", "--set", "data.weights=[1, 3]")
    assert not (tmp_path / "a").exists()


def test_clusters_are_sampled_where_there_are_some(dataset, proteins, fasta, tmp_path, failure):
    table = tmp_path / "clusters.tsv"
    table.write_text("".join(f"c{number // 3}\t{name}\n" for number, (name, _) in enumerate(proteins)))
    clustered = tmp_path / "clustered"
    assert main(["prep", str(fasta), "--out", str(clustered), "--clusters", str(table), "--split", "cluster"]) == 0
    assert train(clustered, tmp_path / "run", "--max-steps", 8, *words(["data.sample=clusters"])) == 0
    assert len(set(losses(tmp_path / "run"))) == 8
    # A third of the proteins make an epoch, so these updates go through more than one.
    assert int(rows(tmp_path / "run")[-1]["epoch"]) > 0
    message = failure("train", dataset, "--out", tmp_path / "a", "--set", "data.sample=clusters")
    assert "--clusters" in message
    assert not (tmp_path / "a").exists()


def test_a_run_starts_from_the_weights_of_a_model(dataset, tmp_path, failure):
    settings = words(["model.attention=softmax", "train.lr=1e-9", "train.muon_lr=1e-9"])
    exact, performer = tmp_path / "exact", tmp_path / "performer"
    assert train(dataset, exact, "--max-steps", 30, *words(["model.attention=softmax"])) == 0
    assert train(dataset, tmp_path / "again", "--max-steps", 1, *settings, "--init", exact) == 0
    trained = [float(row["valid/loss"]) for row in rows(exact) if row["valid/loss"]]
    (valid,) = [float(row["valid/loss"]) for row in rows(tmp_path / "again")]
    assert valid == pytest.approx(min(trained), rel=1e-4)
    # A run that began so, and was killed before its first checkpoint, goes on from the same weights or not at all.
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    resumed = ["train", dataset, "--out", tmp_path / "again", "--resume", "--max-steps", 2]
    assert "give the same --init" in failure(*resumed)
    assert main([str(word) for word in [*resumed, "--init", exact]]) == 0
    assert float(rows(tmp_path / "again")[0]["train/loss"]) < 3.2
    # A Performer takes the weights of a Transformer, and draws the projections that it lacks.
    assert train(dataset, performer, "--max-steps", 1, "--init", exact) == 0
    # With a configuration the architecture is its own; without one it is the model's.
    message = failure("train", dataset, "--config", "tiny", "--out", tmp_path / "b", "--init", exact)
    assert "model.num_heads" in message
    assert not (tmp_path / "b").exists()


def test_a_protein_beyond_learned_positions_is_cut_by_eval_and_refused_by_embed(dataset, fasta, tmp_path, failure):
    run, out = tmp_path / "run", tmp_path / "report"
    settings = ["model.positions=learned", "model.max_positions=62", "data.max_length=60"]
    assert train(dataset, run, "--max-steps", 1, *words(settings)) == 0
    assert main(["eval", str(run), str(dataset), "--split", "test", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["num_cut"] > 0
    message = failure("embed", run, fasta, "--out", tmp_path / "embeddings.h5")
    assert "reach 60" in message
    assert not (tmp_path / "embeddings.h5").exists()
