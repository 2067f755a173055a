"""Imported models give the numbers of their source, in every layer."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from protlm.pretrained.foreign import read_file, read_folder
from protlm.vocabulary import MASK, RESIDUES, encode
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import bounds

FLOAT32 = TOLERANCE[torch.float32]


def rows(*lengths, letters=RESIDUES, seed=0):
    """Returns proteins as rows of data's tokens, a fifth of their residues masked."""
    generator = np.random.default_rng(seed)
    members = []
    for length in lengths:
        residues = encode("".join(generator.choice(list(letters), length)).encode()).copy()
        residues[generator.random(length) < 0.2] = MASK
        members.append(torch.tensor([0, *residues.tolist(), 2]))
    return members


def assert_equal(model, source, members):
    """Checks hidden states and logits in a packed row, alone, and beside others."""
    from tests.unit.pretrained.foreign_models import outputs

    own = [model.token_table.own(member) for member in members]
    states, logits = outputs(source, own)
    sizes = [len(member) for member in members]
    last = model.config.num_layers
    with torch.no_grad():
        packed = model.hidden_states(torch.cat(members), bounds(*sizes), range(last + 1))
        actual = model(torch.cat(members), bounds(*sizes))
        alone = torch.cat([model(member, bounds(len(member))) for member in members])
    for number in range(last + 1):
        assert relative_error(packed[number], states[number]) < FLOAT32, number
    assert relative_error(actual, logits) < FLOAT32
    assert relative_error(alone, logits) < FLOAT32


@pytest.mark.parametrize("family", ["esm2", "esm2-wide", "esm2-deep", "esm1b", "esm1v", "esmc", "bert", "roberta"])
def test_every_layer_and_the_logits_are_those_of_transformers(family, tmp_path):
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    source = foreign_models.build(family)
    model, description = read_folder(foreign_models.save(source, tmp_path / "source", family), "lab/source")
    assert not model.training
    letters = RESIDUES[:20] if family in ("bert", "roberta") else RESIDUES
    assert_equal(model, source, rows(37, 12, 90, letters=letters))
    assert description.origin.source == "lab/source"
    assert set(description.origin.files) >= {"config.json", "model.safetensors"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rotary_frequencies_that_were_rounded_to_16_bits_are_kept(tmp_path):
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    source = foreign_models.build("esm2", max_position_embeddings=1026)
    with torch.no_grad():
        frequencies = source.esm.rotary_embeddings.inv_freq
        frequencies.copy_(frequencies.half().float())
    folder = foreign_models.save(source, tmp_path / "source")
    members = rows(1000)
    assert_equal(read_folder(folder, "x")[0], source, members)
    # As transformers saved them until version 5, once in every layer.
    tensors = load_file(folder / "model.safetensors")
    (stored,) = [tensors.pop(name) for name in list(tensors) if name.endswith("inv_freq")]
    for layer in range(3):
        tensors[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = stored.half()
    save_file(tensors, folder / "model.safetensors")
    assert_equal(read_folder(folder, "x")[0], source, members)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_become_float32(dtype, tmp_path):
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    source = foreign_models.build("esm1b").to(dtype)
    model, _ = read_folder(foreign_models.save(source, tmp_path / "source"), "x")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_equal(model, source.float(), rows(30, 40))


def test_a_checkpoint_in_shards_is_the_whole(tmp_path):
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    source = foreign_models.build("esm2")
    folder = foreign_models.save(source, tmp_path / "source", max_shard_size="200kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_equal(read_folder(folder, "x")[0], source, rows(30, 40))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_of_tensors_is_read_where_there_are_no_safetensors(tmp_path, is_zip):
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    source = foreign_models.build("bert")
    folder = foreign_models.save(source, tmp_path / "source", "bert")
    (folder / "model.safetensors").unlink()
    torch.save(source.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    assert_equal(read_folder(folder, "x")[0], source, rows(30, 40, letters=RESIDUES[:20]))


def test_the_masked_loss_of_a_batch_is_that_of_transformers(tmp_path):
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    source = foreign_models.build("bert")
    model, _ = read_folder(foreign_models.save(source, tmp_path / "source", "bert"), "x")
    (member,) = rows(60, letters=RESIDUES[:20])
    positions = (member == MASK).nonzero().squeeze(1)
    targets = torch.randint(4, 24, (len(positions),), generator=torch.Generator().manual_seed(0))
    labels = torch.full((1, len(member)), -100)
    labels[0, positions] = model.token_table.own(targets)
    with torch.no_grad():
        expected = source(input_ids=model.token_table.own(member)[None], labels=labels).loss
        logits = model(member, bounds(len(member)), positions)
    actual = torch.nn.functional.cross_entropy(logits, model.token_table.own(targets))
    assert relative_error(actual, expected) < FLOAT32


def test_protbert_reads_rare_residues_as_x(tmp_path):
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    folder = foreign_models.save(foreign_models.build("bert"), tmp_path / "source", "bert")
    vocabulary = read_folder(folder, "x")[0].token_table.vocabulary
    assert (vocabulary.lacked, vocabulary.stand_in) == ("BUZO", "X")


# fair-esm's own code, and the numbers that were computed of real models.


@pytest.mark.parametrize("version", ["esm2", "esm1b", "esm1v"])
def test_checkpoints_of_fair_esm_give_its_numbers(version, tmp_path):
    esm = pytest.importorskip("esm")
    foreign_models = pytest.importorskip("tests.unit.pretrained.foreign_models")
    source, content = fair_esm_model(esm, version)
    foreign_models.randomise(source)
    inner, outer = ("encoder.sentence_encoder.", "encoder.")
    tensors = source.state_dict().items()
    state = {(outer if name.startswith("lm_head") else inner) + name: tensor for name, tensor in tensors}
    torch.save({**content, "model": state}, tmp_path / f"{version}.pt")
    if version != "esm2":
        # So does fair-esm as it loads such a checkpoint.
        source.embed_tokens.weight.data[MASK] = 0.0
    model, description = read_file(tmp_path / f"{version}.pt")
    assert model.config.positions == ("rotary" if version == "esm2" else "learned")
    members = rows(40, 25)
    for member in members:
        with torch.no_grad():
            expected = source(member[None], repr_layers=range(4))
            states = model.hidden_states(member, bounds(len(member)), range(4))
            logits = model(member, bounds(len(member)))
        for layer, state in states.items():
            assert relative_error(state, expected["representations"][layer][0]) < FLOAT32
        assert relative_error(logits, expected["logits"][0]) < FLOAT32
    assert description.origin.family == "fairseq"


def fair_esm_model(esm, version):
    """Returns a model of fair-esm, and what its checkpoints hold beside the weights."""
    if version == "esm2":
        source = esm.ESM2(num_layers=3, embed_dim=64, attention_heads=4)
        arguments = argparse.Namespace(
            encoder_layers=3, encoder_embed_dim=64, encoder_attention_heads=4, token_dropout=True
        )
        return source.eval(), {"cfg": {"model": arguments}}
    sizes = {"layers": 3, "embed_dim": 64, "attention_heads": 4, "ffn_embed_dim": 96}
    arguments = argparse.Namespace(
        arch="roberta_large", max_positions=100, token_dropout=True, **{f"encoder_{k}": v for k, v in sizes.items()}
    )
    local = argparse.Namespace(
        **vars(arguments), **sizes, emb_layer_norm_before=version == "esm1b", final_bias=True, logit_bias=True
    )
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    return esm.ProteinBertModel(local, alphabet).eval(), {"args": arguments}


@pytest.mark.parametrize("chain", ["vh", "vl"])
def test_sapiens_gives_the_numbers_of_its_reference(chain, tmp_path, shared_data):
    tensors = load_file(shared_data / "models" / f"sapiens_{chain}.safetensors")
    arguments = argparse.Namespace(
        arch="roberta_small", encoder_layers=4, encoder_embed_dim=128, encoder_attention_heads=8, activation_fn="gelu"
    )
    torch.save({"args": arguments, "model": tensors}, tmp_path / "checkpoint.pt")
    (tmp_path / "dict.txt").write_text("".join(f"{letter} 1\n" for letter in "ACDEFGHIKLMNPQRSTVWY"))
    model, _ = read_file(tmp_path / "checkpoint.pt")
    assert_reference(model, shared_data, chain)


@pytest.mark.slow
def test_antiberty_gives_the_numbers_of_its_reference(antiberty, shared_data):
    assert_reference(read_folder(antiberty, "antiberty")[0], shared_data, "antiberty")


@pytest.fixture
def antiberty(tmp_path):
    """The folder of the real model, from its package on PyPI."""
    import subprocess
    import sys
    import zipfile

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "antiberty==0.1.3", "-d", str(tmp_path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("antiberty cannot be downloaded")
    (wheel,) = tmp_path.glob("*.whl")
    folder = tmp_path / "model"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in ("AntiBERTy_md_smooth/config.json", "AntiBERTy_md_smooth/pytorch_model.bin", "vocab.txt"):
            content = archive.read(f"antiberty/trained_models/{name}")
            (folder / name.rpartition("/")[2]).write_bytes(content)
    return folder


def assert_reference(model, shared_data, name):
    reference = np.load(shared_data / "models" / "reference_outputs_numpy.npz")
    own = torch.tensor(reference[f"{name}_ids"])
    # Back to the tokens of data, from which the model makes its own.
    vocabulary = model.token_table.vocabulary
    tokens = torch.tensor([vocabulary.columns.tolist().index(token) for token in own.tolist()])
    assert torch.equal(model.token_table.own(tokens), own)
    last = model.config.num_layers
    with torch.no_grad():
        state = model.hidden_states(tokens, bounds(len(tokens)), (last,))[last]
        logits = model(tokens, bounds(len(tokens)))
    assert relative_error(state, torch.tensor(reference[f"{name}_hidden"])) < FLOAT32
    assert relative_error(logits, torch.tensor(reference[f"{name}_logits"])) < FLOAT32
