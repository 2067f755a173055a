"""What is no model that protlm runs is refused in one line that names the culprit. No test here needs transformers."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from protlm.errors import ModelError
from protlm.pretrained import checkpoint_files
from protlm.pretrained.foreign import describe, read_file, read_folder
from tests.foreign_checkpoint import CONFIG, DIM, change, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "source")


def configure(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def assert_refused(path, *words, read=None):
    with pytest.raises(ModelError) as caught:
        (read or (lambda folder: read_folder(folder, "x")))(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert all(word in message for word in words), message


def test_known_left_overs_are_dropped_and_facts_kept(folder):
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# ESM-2\n")
    model, description = read_folder(folder, "lab/esm", "abc")
    assert description.origin.licence == "mit"
    assert (description.origin.source, description.origin.revision) == ("lab/esm", "abc")
    assert (description.max_residues, description.trained_residues) == (None, 98)
    assert model.config.vocabulary == ()
    # The frequencies are not in the file: they are those that transformers computes.
    assert torch.equal(model.rotary_frequencies, 1 / 10000 ** (torch.arange(0, 8, 2) / 8))
    other = read_folder(folder, "lab/esm")[1]
    assert other.weights_hash == description.weights_hash
    change(folder, lm_head__bias=torch.ones(33))
    assert read_folder(folder, "lab/esm")[1].weights_hash != description.weights_hash


def test_a_tied_copy_must_be_equal(folder):
    copy = load_file(folder / "model.safetensors")["esm.embeddings.word_embeddings.weight"]
    change(folder, lm_head__decoder__weight=copy.clone())
    read_folder(folder, "x")
    copy[3, 3] += 1
    change(folder, lm_head__decoder__weight=copy)
    assert_refused(folder, "'lm_head.decoder.weight' differs from 'esm.embeddings.word_embeddings.weight'")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lm_head__bias": None}, "tensor 'lm_head.bias' is missing"),
        ({"esm__surprise": torch.zeros(1)}, "tensor 'esm.surprise' has no place"),
        ({"lm_head__bias": torch.zeros(32)}, "tensor 'lm_head.bias': expected shape (33,)"),
        ({"lm_head__bias": torch.full((33,), torch.nan)}, "'lm_head.bias' holds numbers that are not finite"),
        ({"lm_head__bias": torch.full((33,), -torch.inf)}, "'lm_head.bias' holds numbers that are not finite"),
        ({"lm_head__bias": torch.zeros(33, dtype=torch.int32)}, "expected floating-point numbers, got torch.int32"),
        ({"esm__encoder__layer__2__LayerNorm__bias": torch.zeros(DIM)}, "layer.2.LayerNorm.bias' has no place"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, tensors, words):
    change(folder, **tensors)
    assert_refused(folder, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5"}, "expected esm, esmc, bert, roberta, AMPLIFY, got 't5' (its encoder has relative"),
        ({"model_type": ["esm"]}, "model_type"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": 1000}, "tensor 'esm.encoder.layer.2."),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"hidden_size": 64}, "expected shape"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_attention_heads": 3}, "model_dim"),
        ({"num_attention_heads": 1000}, "model_dim"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"is_decoder": True}, "is_decoder"),
        ({"is_folding_model": True}, "is_folding_model"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"vocab_size": 446}, "vocabulary"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_a_config_that_no_model_of_the_family_has_is_refused(folder, changes, words):
    configure(folder, **changes)
    assert_refused(folder, words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000])
def test_a_config_that_is_no_config_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, "config.json")


def test_saprots_vocabulary_of_structures_is_refused(folder):
    tokens = [
        "<cls>",
        "<pad>",
        "<eos>",
        "<unk>",
        "<mask>",
        *(f"{a}{b}" for a in "LAGV" for b in "pynwrqhgdlvtmfsaeikc#"),
    ]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    configure(folder, vocab_size=len(tokens))
    assert_refused(folder, "structures")


def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(folder, str(path))


@pytest.mark.parametrize("size", [0, 7, 8, 300])
def test_a_file_of_which_only_the_beginning_came_is_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(folder, str(path))


def sharded(folder):
    """Cuts the checkpoint into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_shards_with_a_hole_are_refused(folder):
    whole = read_folder(folder, "x")[0].state_dict()
    index = sharded(folder)
    parts = read_folder(folder, "x")[0].state_dict()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    (folder / "model-00002-of-00002.safetensors").rename(folder / "kept")
    assert_refused(folder, "model-00002-of-00002.safetensors: missing")
    save_file(load_file(folder / "model-00001-of-00002.safetensors"), folder / "model-00002-of-00002.safetensors")
    assert_refused(folder, "is not where the index says")
    index_path = folder / "model.safetensors.index.json"
    (folder / "kept").rename(folder / "model-00002-of-00002.safetensors")
    index_path.write_text(json.dumps({"weight_map": {**index, "lost": "model-00001-of-00002.safetensors"}}))
    assert_refused(folder, "tensor 'lost' is missing")


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../b.safetensors"}, {"a": 3}, {"a": "/etc/passwd"}])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, weight_map):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(folder, "model.safetensors.index.json")


class Evil:
    """Says when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_asks_for_code_is_refused_and_the_culprit_named(folder, is_zip):
    (folder / "model.safetensors").unlink()
    torch.save(
        {"lm_head.bias": torch.zeros(3), "evil": Evil()}, folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=is_zip,
    )  # fmt: skip
    assert_refused(folder, "pytorch_model.bin: refused: its pickle asks for _pytest.outcomes")
    (folder / "model.pt").write_bytes((folder / "pytorch_model.bin").read_bytes())
    assert_refused(folder / "model.pt", "refused: its pickle asks for", read=read_file)


def test_namespaces_are_for_checkpoints_of_fairseq_only(folder):
    import argparse

    (folder / "model.safetensors").unlink()
    torch.save({"args": argparse.Namespace(x=1)}, folder / "pytorch_model.bin")
    assert_refused(folder, "argparse.Namespace")


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x80\x02junk", pickle.dumps(3), pickle.dumps([1] * 1000), b"PK\x03\x04"]
)
def test_junk_in_place_of_a_pickle_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert_refused(folder, "pytorch_model.bin")
    (folder / "model.pt").write_bytes(content)
    assert_refused(folder / "model.pt", "model.pt", read=read_file)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(folder):
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert_refused(folder, "compressed members")


def test_a_pickle_of_something_else_than_tensors_is_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.bias": [1.0, 2.0]}, folder / "pytorch_model.bin")
    assert_refused(folder, "expected tensors by name, got list for 'lm_head.bias'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"args": {"arch": "msa_transformer"}, "model": {}}, "the MSA Transformer, which reads alignments"),
        ({"args": {"arch": "gvp_transformer"}, "model": {}}, "structures"),
        ({"args": {"arch": "roberta_large"}, "model": {}}, "encoder_layers"),
        ({"model": {}}, "expected the arguments of fairseq"),
        ({"args": {}}, "expected a checkpoint of fairseq"),
        ([1], "expected a checkpoint of fairseq"),
    ],
)
def test_other_checkpoints_of_fairseq_are_refused(tmp_path, content, words):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    assert_refused(path, words, read=read_file)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "expected model.safetensors, its index with the shards, or pytorch_model.bin")


def test_a_model_that_was_read_can_be_trained_further(folder):
    model, _ = read_folder(folder, "x")
    stored = (folder / "model.safetensors").read_bytes()
    row = torch.tensor([0, 5, 32, 7, 2])
    model.train()(row, torch.tensor([0, 5], dtype=torch.int32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # What is mapped is not written back.
    assert (folder / "model.safetensors").read_bytes() == stored


@pytest.mark.parametrize(("device", "where"), [("cpu", "this machine"), ("cuda", "the GPU")])
def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_built(folder, monkeypatch, device, where):
    sizes = {"cpu": 10**12, "cuda": 10**12, device: 4000}
    monkeypatch.setattr(checkpoint_files, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(checkpoint_files, "memory_bytes", lambda device: sizes[device.type])
    monkeypatch.setattr("protlm.pretrained.families.name_map.skeleton", lambda config: pytest.fail("it is built"))
    assert_refused(folder, f"{folder}: to read this model needs 0.0 GB of memory, and {where} has 0.0 GB")
    assert_refused(folder, "to read this model needs", read=describe)


def test_a_config_that_asks_for_more_than_there_is_room_for_is_one_line(folder):
    configure(folder, intermediate_size=2**16, hidden_size=2**16, num_attention_heads=2**10)
    assert_refused(folder, "to read this model needs", "of memory")


def test_an_old_pickle_which_is_read_at_once_must_fit_into_memory(folder, monkeypatch):
    torch.save(load_file(folder / "model.safetensors"), folder / "old.pt", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(checkpoint_files, "memory_bytes", lambda device: 4000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it is read"))
    assert_refused(folder / "old.pt", "old.pt: to read this model needs", read=read_file)


def test_a_model_is_described_without_reading_its_tensors(folder, monkeypatch):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    description = read_folder(folder, "source")[1]
    monkeypatch.setattr(checkpoint_files.SafetensorsFiles, "read", lambda *_: pytest.fail("a tensor was read"))
    described = describe(folder)
    assert (described.model, described.trained_residues) == (description.model, description.trained_residues)
    assert described.origin == description.origin.model_copy(update={"files": {}})
    assert described.weights_hash == ""
    change(folder, esm__surprise=torch.zeros(1))
    assert_refused(folder, "tensor 'esm.surprise' has no place", read=describe)
