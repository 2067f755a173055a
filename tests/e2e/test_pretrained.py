"""Models of other programs in every command: embed, eval, train."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import protlm
from protlm.cli.app import main
from protlm.config_files import load_config
from protlm.pretrained import foreign
from protlm.pretrained.checkpoint_files import SafetensorsFiles, file_hash
from protlm.pretrained.foreign import read_folder
from protlm.pretrained.model_directory import read_model
from protlm.workflows.train.run_folder import CONFIG_NAME
from tests.e2e.train_tools import rows
from tests.foreign_checkpoint import CONFIG, change, write_checkpoint

WITHOUT_X = ("<pad>", "<unk>", "<mask>", "<cls>", "<eos>", *"LAGVSERTIDPKQNFYMHWC")
SHORT = ["--set", "data.tokens_per_batch=1024", "--set", "train.warmup_steps=0", "--set", "train.schedule=constant"]


@pytest.fixture
def source(tmp_path):
    """A directory of transformers."""
    return write_checkpoint(tmp_path / "source")


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def manifest(dataset):
    return json.loads((dataset / "manifest.json").read_text())["splits"]


@pytest.fixture
def without_x(source):
    """The model with a vocabulary of 25 tokens, and no X among them."""
    tensors = load_file(source / "model.safetensors")
    embedding, bias = tensors["esm.embeddings.word_embeddings.weight"], tensors["lm_head.bias"]
    change(source, esm__embeddings__word_embeddings__weight=embedding[:25].clone(), lm_head__bias=bias[:25].clone())
    (source / "vocab.txt").write_text("\n".join(WITHOUT_X))
    (source / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 25}))
    return source


def test_embed_counts_what_the_model_lacks_and_what_is_longer_than_its_training(without_x, tmp_path, capsys):
    fasta = tmp_path / "long.fasta"
    fasta.write_text(f">a\nMKXB\n>b\n{'MK' * 60}U\n>c\nMK\n")
    words = ("embed", without_x, fasta, "--include", "logits")
    status, out, _ = run(capsys, *words, "--out", tmp_path / "a.h5")
    assert status == 0
    assert "1 proteins longer than any that the model was trained on (98 residues)" in out
    assert "<unk>: 3 residues that the model lacks (X, B, U, Z, O)" in out
    status, out, _ = run(capsys, *words, "--out", tmp_path / "b.h5", "--truncate", 98, "--json")
    report = json.loads(out)
    assert (report["num_beyond_training"], report["num_lacked"], report["num_truncated"]) == (0, 2, 1)
    status, out, _ = run(capsys, *words, "--out", tmp_path / "c.h5", "--window", 90, "--json")
    assert json.loads(out)["num_beyond_training"] == 0
    logits = protlm.open_embeddings(tmp_path / "a.h5", kind="logits")["a"]
    assert logits.shape == (4, 33)
    # A row for each residue, X and B alike; no number where the model has no token.
    lacked = [token not in WITHOUT_X for token in protlm.vocabulary.TOKENS]
    assert np.array_equal(np.isneginf(logits), np.broadcast_to(lacked, (4, 33)))
    model, _ = read_folder(without_x, "x")
    row = torch.tensor([[0, 20, 15, 24, 25, 2]])
    with torch.no_grad():
        expected = model(row[0], torch.tensor([0, 6], dtype=torch.int32))[1:-1]
    columns = [WITHOUT_X.index(token) for token in protlm.vocabulary.TOKENS if token in WITHOUT_X]
    assert np.allclose(logits[:, ~np.array(lacked)], expected[:, columns], rtol=1e-5, atol=1e-5)


def test_eval_scores_a_model_beside_the_frequencies_of_the_dataset(without_x, dataset, tmp_path, capsys):
    status, _, _ = run(capsys, "eval", without_x, dataset, "--out", tmp_path / "report")
    assert status == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["model_name"] == "source"
    assert report["training_dataset_hash"] is None
    counts = manifest(dataset)["test"]["residue_counts"]
    assert report["splits"]["test"]["num_lacked"] == sum(counts[residue] for residue in "XBUZO")
    # Random weights know nothing; the frequencies of the training split do.
    assert report["empirical"]["perplexity"] < 20 < report["model"]["perplexity"]
    assert "training split, since those of" in (tmp_path / "report" / "report.html").read_text()


def test_training_goes_on_from_a_converted_model_with_its_settings(without_x, dataset, tmp_path, capsys):
    assert run(capsys, "convert", without_x, "--out", tmp_path / "model")[0] == 0
    out = tmp_path / "run"
    words = ["--max-steps", 2, "--set", "train.lr=1e-3", "--set", "train.optimizer=adamw", *SHORT]
    frozen = ["--set", 'train.freeze=["embedding.*", "layers.0.*"]']
    assert run(capsys, "train", dataset, "--init", tmp_path / "model", "--out", out, *words, *frozen)[0] == 0
    before, description = read_model(tmp_path / "model")
    after, trained = read_model(out)
    assert after.config == before.config
    assert load_config(out / CONFIG_NAME).model == before.config
    assert before.config.token_dropout
    assert (trained.step, trained.origin, description.step) == (2, None, None)
    assert (trained.trained_residues, description.trained_residues) == (None, 98)
    states = before.state_dict(), after.state_dict()
    moved = {name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}
    assert moved
    assert not any(name.startswith(("embedding.", "layers.0.", "rotary")) for name in moved)
    # What the first weights were trained on is not known: no evaluation may call the dataset the only one.
    assert run(capsys, "eval", out, dataset, "--out", tmp_path / "report")[0] == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["training_dataset_hash"] not in (None, report["dataset_hash"])
    assert "trained on" in run(capsys, "eval", out, dataset, "--out", tmp_path / "report", "--force")[1]
    # Straight from the directory of transformers the first loss is the same.
    again = tmp_path / "again"
    assert run(capsys, "train", dataset, "--init", without_x, "--out", again, *words, *frozen)[0] == 0
    assert rows(again)[0]["train/loss"] == rows(out)[0]["train/loss"]
    # Resuming needs the model no more, and the source of the first weights is known on.
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(out / "model")
    assert run(capsys, "train", dataset, "--out", out, "--resume", "--max-steps", 3)[0] == 0
    assert len(rows(out)) == 3
    assert trained.fine_tuned_from == description.origin
    assert read_model(out)[1].fine_tuned_from == description.origin
    assert "fine-tuned  source, esm, licence" in run(capsys, "inspect", out)[1]
    # A run that begins with these weights began with those too.
    assert run(capsys, "train", dataset, "--init", out, "--out", tmp_path / "third", "--max-steps", 1, *SHORT)[0] == 0
    assert read_model(tmp_path / "third")[1].fine_tuned_from == description.origin


def test_a_model_to_begin_with_is_read_once(source, dataset, tmp_path, monkeypatch):
    seen = []
    read = SafetensorsFiles.read
    monkeypatch.setattr(SafetensorsFiles, "read", lambda self, name: seen.append(name) or read(self, name))
    hashed = []
    monkeypatch.setattr(foreign, "file_hash", lambda path: hashed.append(path.name) or file_hash(path))
    words = ["train", dataset, "--init", source, "--out", tmp_path / "run", "--max-steps", 1, *SHORT]
    assert main([str(word) for word in words]) == 0
    assert seen
    assert len(seen) == len(set(seen))
    assert sorted(hashed) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.token_dropout=false", "model.token_dropout: expected True as in the saved one, got False"),
        ("model.norm_eps=1e-12", "model.norm_eps"),
        ("model.num_layers=3", "is missing in the saved one"),
        ('train.freeze=["nothing.*"]', "train.freeze"),
    ],
)
def test_settings_that_would_change_a_pretrained_model_are_refused(
    source, dataset, failure, tmp_path, setting, message
):
    words = ["train", dataset, "--init", source, "--out", tmp_path / "run", "--max-steps", 1, *SHORT, "--set", setting]
    assert message in failure(*words)
    assert not (tmp_path / "run").exists()


def test_learned_positions_refuse_longer_proteins_unless_they_are_cut(source, tmp_path, capsys):
    (source / "config.json").write_text(json.dumps({**CONFIG, "position_embedding_type": "absolute"}))
    fasta = tmp_path / "long.fasta"
    fasta.write_text(f">a\n{'MK' * 60}\n")
    status, _, err = run(capsys, "embed", source, fasta, "--out", tmp_path / "a.h5")
    assert status == 1
    assert "has 120 residues, and the positions of this model reach 98" in err
    for option in ("--window", "--truncate"):
        assert run(capsys, "embed", source, fasta, "--out", tmp_path / f"{option}.h5", option, 98)[0] == 0


def test_an_interrupted_embedding_goes_on_only_with_the_same_weights(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "proteins.fasta").write_text(">a\nMKTAYIAKQR\n")
    words = ("embed", source, tmp_path / "proteins.fasta", "--out", tmp_path / "a.h5")
    with monkeypatch.context() as patch:
        patch.setattr("protlm.workflows.embed.embed.assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(capsys, *words)[0] == 130
    change(source, lm_head__bias=torch.zeros(33))
    status, _, err = run(capsys, *words, "--resume")
    assert status == 1
    assert "model" in err


@pytest.mark.filterwarnings("ignore")
def test_the_layout_esm_holds_what_fair_esm_extracts(tmp_path, capsys):
    """The files of esm-extract: the lines of its script on its own model, loader and batches."""
    esm = pytest.importorskip("esm")
    source_model = esm.ESM2(num_layers=3, embed_dim=48, attention_heads=4).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in source_model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    names = source_model.state_dict().items()
    state = {("encoder." if name[:2] == "lm" else "encoder.sentence_encoder.") + name: x for name, x in names}
    arguments = argparse.Namespace(
        encoder_layers=3, encoder_embed_dim=48, encoder_attention_heads=4, token_dropout=True
    )
    path, fasta = tmp_path / "esm2_t3_random.pt", tmp_path / "proteins.fasta"
    torch.save({"cfg": {"model": arguments}, "model": state}, path)
    torch.save({"model": {}}, tmp_path / "esm2_t3_random-contact-regression.pt")
    fasta.write_text(">sp|P1|A\nMKTAYIAKQRX\n>b\nMKVLAAGIVGLCAKAYEDUB\n>c\nM\n")
    words = [
        "--layout",
        "esm",
        "--layers",
        "0,1,-1",
        "--include",
        "mean",
        "--include",
        "per-residue",
        "--include",
        "cls",
    ]
    assert main(["embed", str(path), str(fasta), "--out", str(tmp_path / "out"), *words]) == 0
    capsys.readouterr()
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded, alphabet = esm.pretrained.load_model_and_alphabet_local(path)
    data = esm.FastaBatchedDataset.from_file(fasta)
    labels, strings, tokens = alphabet.get_batch_converter(1022)([data[number] for number in range(len(data))])
    with torch.no_grad():
        states = loaded.eval()(tokens, repr_layers=[0, 1, 3])["representations"]
    for number, (label, sequence) in enumerate(zip(labels, strings, strict=True)):
        written = torch.load(tmp_path / "out" / f"{label}.pt", weights_only=True)
        residues = {layer: state[number, 1 : len(sequence) + 1] for layer, state in states.items()}
        expected = {
            "representations": residues,
            "mean_representations": {layer: rows.mean(0) for layer, rows in residues.items()},
            "bos_representations": {layer: state[number, 0] for layer, state in states.items()},
        }
        assert written["label"] == label
        assert written.keys() == {"label", *expected}
        for title, by_layer in expected.items():
            assert written[title].keys() == by_layer.keys()
            for layer, numbers in by_layer.items():
                assert torch.allclose(written[title][layer], numbers, rtol=1e-4, atol=1e-5 * float(numbers.abs().max()))


def test_a_pretrained_model_is_compared_and_inspected_like_one_of_ours(without_x, run_dir, dataset, tmp_path, capsys):
    assert run(capsys, "convert", without_x, "--out", tmp_path / "model")[0] == 0
    status, shown, _ = run(capsys, "inspect", tmp_path / "model")
    assert status == 0
    assert "origin" in shown
    assert "licence" in shown
    for model, out in ((tmp_path / "model", "a"), (without_x, "b")):
        assert run(capsys, "eval", "--compare", run_dir, model, dataset, "--out", tmp_path / out)[0] == 0
    assert (tmp_path / "b" / "comparison.html").is_file()
