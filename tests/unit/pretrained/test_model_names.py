"""MODEL as users write it. The cache of the hub is made by hand: nothing here uses a network."""

import sys

import pytest
import torch

from protlm.config import ModelConfig
from protlm.errors import ModelError
from protlm.inference.protein_model import load_model
from protlm.model.performer import Performer
from protlm.pretrained import hub
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import save_model
from protlm.pretrained.model_files import description_of, short_name
from protlm.pretrained.model_names import read_named_model
from protlm.vocabulary import RESIDUES
from tests.foreign_checkpoint import esm_tensors, write_checkpoint

EMPTY = {"seed": 0, "residue_counts": dict.fromkeys(RESIDUES, 0), "dataset_hash": ""}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("facebook/esm2_t6_8M_UR50D", ("facebook/esm2_t6_8M_UR50D", None)),
        ("lab/model@main", ("lab/model", "main")),
        ("hf:lab/model@refs/pr/1", ("lab/model", "refs/pr/1")),
        ("model", None),
        ("./lab/model", None),
        ("/lab/model", None),
        ("lab/model/deeper", None),
        ("../model", None),
    ],
)
def test_a_name_on_the_hub_has_an_owner(text, expected):
    assert hub.hub_name(text) == expected


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "source")


def save_ours(folder):
    """Writes a model directory of protlm."""
    model = Performer(ModelConfig(attention="positive", num_layers=1, model_dim=16, num_heads=2, num_features=8))
    model.reset(0)
    save_model(folder, model, ModelDescription(model=model.config, mask_rate=0.15, step=250, **EMPTY))


@pytest.fixture
def cache(tmp_path, monkeypatch, folder):
    """The cache of the hub with one model, offline, and a working directory without it."""
    pytest.importorskip("huggingface_hub", reason="the library of the hub is not installed")
    from huggingface_hub import constants

    root = tmp_path / "hub"
    repository = root / "models--lab--esm"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(snapshot / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return snapshot


@pytest.mark.parametrize("name", ["lab/esm", "hf:lab/esm", "lab/esm@main", f"lab/esm@{COMMIT}"])
def test_a_model_in_the_cache_is_read_by_its_name_with_its_commit(cache, name):
    network, description = read_named_model(name)
    assert network.config.num_layers == 2
    assert (description.origin.source, description.origin.revision) == ("lab/esm", COMMIT)
    assert short_name(name) == "esm"
    assert description_of(name) is None


def test_load_model_takes_the_revision_apart_from_the_name(cache):
    (vectors,) = load_model("lab/esm", revision="main", local_files_only=True).embed(["MKTAYIAK"])
    assert vectors["mean"].shape == (16,)
    with pytest.raises(ModelError, match="lab/esm@other: no such path"):
        load_model("lab/esm", revision="other")


def test_an_existing_path_wins_and_hf_passes_over_it(cache, tmp_path):
    save_ours(tmp_path / "work" / "lab" / "esm")
    assert read_named_model("lab/esm")[1].origin is None
    assert read_named_model("hf:lab/esm")[1].origin.source == "lab/esm"


@pytest.mark.parametrize("name", ["lab/other", "lab/esm@v2", f"lab/esm@{'f' * 40}"])
def test_what_the_cache_lacks_is_refused_with_a_way_to_fetch_it(cache, name):
    with pytest.raises(ModelError, match="hf download lab/") as caught:
        description_of(name)
    assert "out of reach" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "word"), [("config.json", "no config.json"), ("model.safetensors", "got none of them")]
)
def test_a_snapshot_that_lacks_a_file_is_refused(cache, file, word):
    (cache / file).unlink()
    with pytest.raises(ModelError, match=word):
        read_named_model("lab/esm")


def test_a_pickle_in_the_cache_is_read_where_there_are_no_safetensors(cache):
    (cache / "model.safetensors").unlink()
    torch.save(esm_tensors(), cache / "pytorch_model.bin")
    assert list(read_named_model("lab/esm")[1].origin.files) == ["config.json", "pytorch_model.bin"]


def test_without_the_library_one_line_says_how_to_get_it_and_the_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pip install 'protlm\[hub\]', or download its files elsewhere"):
        read_named_model("lab/never")


def test_a_directory_of_transformers_and_one_of_ours_are_told_apart(folder, tmp_path):
    assert read_named_model(folder)[1].origin.family == "esm"
    assert short_name(folder) == folder.name
    save_ours(tmp_path / "run" / "model")
    assert read_named_model(tmp_path / "run")[1].origin is None
    assert description_of(folder) is None
    assert description_of(tmp_path / "run").step == 250
    assert short_name(tmp_path / "run") == "run"


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"expected a folder, or a checkpoint \.pt"):
        read_named_model(tmp_path / "model.safetensors")


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    for read in (read_named_model, description_of):
        with pytest.raises(ModelError, match="no such directory"):
            read(tmp_path / "absent")


def test_the_users_own_esm2_has_the_published_embedding(monkeypatch):
    """With PROTLM_TEST_ESM2=1 and facebook/esm2_t6_8M_UR50D in the cache of the hub; otherwise skipped."""
    import os

    if os.environ.get("PROTLM_TEST_ESM2") != "1":
        pytest.skip("PROTLM_TEST_ESM2 is not 1")
    transformers = pytest.importorskip("transformers")
    name, sequence = "facebook/esm2_t6_8M_UR50D", "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG"
    (mine,) = load_model(name, local_files_only=True).embed([sequence], ("per-residue",))
    source = transformers.AutoModelForMaskedLM.from_pretrained(name, local_files_only=True).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)(sequence, return_tensors="pt")
    with torch.no_grad():
        expected = source(**tokens, output_hidden_states=True).hidden_states[-1][0, 1:-1]
    assert torch.allclose(torch.from_numpy(mine["per-residue"]), expected, atol=1e-4)
