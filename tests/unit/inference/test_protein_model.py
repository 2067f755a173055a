"""What a caller may pass as sequences, and how each wrong one is named."""

import math

import numpy as np
import pytest

from protlm.config import ModelConfig
from protlm.inference.protein_model import ProteinModel
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.vocabulary import RESIDUES


@pytest.fixture(scope="module")
def model():
    performer = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=16, num_heads=2, ffn_dim=16, num_features=8)
    )
    performer.reset(0)
    description = ModelDescription(
        model=performer.config, mask_rate=0.15, redraw_every_steps=0, seed=0, step=1, dataset_hash="",
        residue_counts=dict.fromkeys(RESIDUES, 1),
    )  # fmt: skip
    return ProteinModel(performer, description)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "expected a sequence as str, got None"),
        (math.nan, "expected a sequence as str, got nan"),
        (np.float32("nan"), "expected a sequence as str, got nan"),
        (7, "expected a sequence as str, got 7"),
        (b"MKV", r"expected a sequence as str, got bytes b'MKV'; decode it"),
        (bytearray(b"MKV"), r"expected a sequence as str, got bytearray .*; decode it"),
        (np.bytes_(b"MKV"), r"expected a sequence as str, got bytes_ .*; decode it"),
        (("sp|P1", "MKV"), r"expected a sequence as str, got tuple \('sp\|P1', 'MKV'\); pass the sequence alone"),
        (["MKV"], r"expected a sequence as str, got list \['MKV'\]; pass the sequence alone"),
        ("<cls>MKV<eos>", "expected residues only, got the special token '<cls>' at position 1"),
        ("MK<unk>", "expected residues only, got the special token '<unk>' at position 3; write X"),
        ("MK1T", "illegal character '1' at position 3; expected the letters of residues"),
        ("MK\udc80", "illegal character .* at position 3; expected the letters of residues"),
        ("MK*V", r"illegal character '\*' at position 3"),
        ("", "expected at least one residue, got ''"),
        (" -.*", r"expected at least one residue, got ' -\.\*'"),
    ],
)
def test_a_sequence_that_is_none_is_named_by_its_place_in_the_list(model, wrong, message):
    for compute in (model.embed, model.logits):
        for tokens_per_batch in (None, 3):
            with pytest.raises(ValueError, match=r"^sequences\[2\]: " + message):
                list(compute(["MKV", "W", wrong, "MK"], tokens_per_batch=tokens_per_batch))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("<cls>M<mask>", "expected residues and <mask> only, got the special token '<cls>' at position 1; write X"),
        ("M<mask>1", "illegal character '1' at position 8; expected the letters of residues"),
        ("M*<mask>K", r"illegal character '\*' at position 2"),
        ("M<mask>K*V", r"illegal character '\*' at position 9"),
    ],
)
def test_only_residues_and_masks_stand_in_a_masked_sequence(model, wrong, message):
    with pytest.raises(ValueError, match=r"^sequences\[1\]: " + message):
        list(model.logits(["M<mask>", wrong]))


def test_only_logits_take_masked_residues(model):
    with pytest.raises(ValueError, match=r"^sequences\[0\]: expected residues only, got the special token '<mask>'"):
        list(model.embed(["MK<mask>V"]))


def test_the_place_counts_those_of_a_generator_too(model):
    with pytest.raises(ValueError, match=r"^sequences\[300\]: expected a sequence as str, got None"):
        list(model.embed(None if number == 300 else "MKV" for number in range(400)))


@pytest.mark.parametrize("wrong", [None, math.nan, b"MKV", 5, "MKV", {"a": "MKV"}])
def test_what_is_no_series_of_sequences_is_refused_at_once(model, wrong):
    for compute in (model.embed, model.logits):
        with pytest.raises(ValueError, match="sequences: expected several, such as a list of str, got"):
            compute(wrong)


def test_every_kind_of_str_and_of_series_is_fine(model):
    expected = [one["mean"] for one in model.embed(["MKV", "WW"])]
    for given in (("MKV", "WW"), np.array(["MKV", "WW"]), np.array(["MKV", "WW"], dtype=object), iter(["mkv", "w-w*"])):
        np.testing.assert_array_equal([one["mean"] for one in model.embed(given)], expected)
