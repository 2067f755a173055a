"""Which number type a model computes in, and what is said where the machine lacks it."""

import numpy as np
import pytest
import torch

from protlm import load_model
from protlm.errors import ProtlmError
from protlm.inference import precision as precision_module
from protlm.inference.precision import overflow_hint, set_precision, used_precision
from protlm.runtime import devices
from tests.unit.model.small_models import build


@pytest.fixture
def units(monkeypatch):
    """Sets which half precisions the machine has units for."""

    def have(*names):
        monkeypatch.setattr(precision_module, "has_half_precision_units", lambda name: name in names)

    return have


def test_on_a_cpu_auto_is_float32_whatever_it_has(units):
    units("bf16", "fp16")
    assert used_precision("auto", may_be_half=True) == "32"


def test_on_a_gpu_auto_is_bfloat16_where_it_may_be_and_the_gpu_has_it(units, monkeypatch):
    monkeypatch.setattr(precision_module, "best_device", lambda: torch.device("cuda"))
    units("bf16", "fp16")
    assert used_precision("auto", may_be_half=True) == "bf16"
    assert used_precision("auto", may_be_half=False) == "32"
    units("fp16")
    assert used_precision("auto", may_be_half=True) == "32"


@pytest.mark.parametrize(("name", "words"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_what_the_machine_would_emulate_is_refused(units, name, words):
    units()
    message = (
        f"precision {name}: as far as PyTorch can tell this processor has no units for {words}, .*; take precision 32"
    )
    with pytest.raises(ProtlmError, match=message):
        used_precision(name, may_be_half=True)
    assert used_precision("32", may_be_half=True) == "32"
    units(name)
    assert used_precision(name, may_be_half=False) == name


def test_units_are_those_that_torch_finds(monkeypatch):
    for bf16, amx, fp16 in ((False, False, False), (True, False, False), (False, True, False), (False, True, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=bf16: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda found=fp16: found)
        monkeypatch.setattr(devices, "best_device", lambda: torch.device("cpu"))
        assert devices.has_half_precision_units("bf16") == (bf16 or amx)
        assert devices.has_half_precision_units("fp16") == fp16


@pytest.mark.parametrize(
    ("capability", "bf16", "fp16"), [((6, 1), False, False), ((7, 5), False, True), ((8, 0), True, True)]
)
def test_units_of_gpus_are_those_of_their_generation(monkeypatch, capability, bf16, fp16):
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert devices.has_half_precision_units("bf16") == bf16
    assert devices.has_half_precision_units("fp16") == fp16


def test_a_precision_sets_the_weights():
    for name, dtype in (("32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        model = build()
        set_precision(model, name)
        assert model.layers[0].ffn_in.weight.dtype == dtype


def test_only_float16_has_a_range_to_leave():
    assert "65,504" in overflow_hint("fp16")
    assert overflow_hint("bf16") == overflow_hint("32") == "the model is of no use"


def test_a_loaded_model_computes_in_the_precision(units, tmp_path):
    from protlm.pretrained.model_description import ModelDescription
    from protlm.pretrained.model_directory import save_model
    from protlm.vocabulary import RESIDUES

    network = build()
    description = ModelDescription(
        model=network.config, mask_rate=0.15, redraw_every_steps=0, seed=0, step=1, dataset_hash="",
        residue_counts=dict.fromkeys(RESIDUES, 1),
    )  # fmt: skip
    save_model(tmp_path / "model", network, description)
    units("bf16")
    means = {
        name: next(load_model(tmp_path / "model", precision=name).embed(["MKVLAGG"]))["mean"]
        for name in ("auto", "32", "bf16")
    }
    assert means["bf16"].dtype == np.float32
    assert np.array_equal(means["auto"], means["32"])
    assert not np.array_equal(means["bf16"], means["32"])
    assert np.allclose(means["bf16"], means["32"], atol=0.03 * np.abs(means["32"]).max())
    units("fp16")
    with torch.no_grad():
        network.layers[0].ffn_in.weight.mul_(1e6)
    save_model(tmp_path / "large", network, description)
    large = load_model(tmp_path / "large", precision="fp16")
    for call in (
        lambda: list(large.embed(["MKVL", "MKVLAGG"])),
        lambda: list(large.logits(["MKVL"])),
        lambda: large.log_probabilities("MKVL"),
        lambda: large.score("MKVL", ["K2A"]),
        lambda: large.score("MKVL", ["K2A"], "pseudo-perplexity"),
        lambda: list(large.pseudo_perplexity(["MKVL"])),
    ):
        with pytest.raises(ProtlmError, match="its results are not finite; float16 ends at 65,504"):
            call()
    units()
    with pytest.raises(ProtlmError, match="precision bf16"):
        load_model(tmp_path / "model", precision="bf16")
    with pytest.raises(ValueError, match="precision: expected 'auto' or '32' or 'bf16' or 'fp16', got 'float16'"):
        load_model(tmp_path / "model", precision="float16")
