"""A model as transformers loads it, and back again."""

import json

import pytest
import torch

from protlm.config import ModelConfig
from protlm.errors import ModelError
from protlm.model.performer import Performer
from protlm.pretrained.export import export
from protlm.pretrained.foreign import read_folder
from protlm.pretrained.model_description import ModelDescription, Origin
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import bounds, build, proteins

FLOAT32 = TOLERANCE[torch.float32]
EXACT = {"attention": "softmax", "qk_norm": False, "conv_width": 0}
SAPIENS = ("<s>", "<pad>", "</s>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>")
PROTBERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUZBO")
POST = {**EXACT, "layer_norm": "post", "positions": "learned", "max_positions": 60, "embedding_norm": True}
SETTINGS = {
    "esm2": {**EXACT, "stored_frequencies": True, "token_dropout": True},
    "ours": EXACT,
    "esm1b": {**EXACT, "positions": "learned", "max_positions": 60, "embedding_norm": True, "token_dropout": True},
    "roberta": {**POST, "vocabulary": SAPIENS},
    "bert": {**POST, "vocabulary": PROTBERT, "residues_as_x": "UZOB", "norm_eps": 1e-12},
    "roberta-with-our-tokens": POST,
}
NAMES = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "roberta-with-our-tokens": "RobertaForMaskedLM"}


def exported(model, folder):
    folder.mkdir()
    origin = Origin(source="lab/model", family="esm", licence="mit", files={})
    return export(model, ModelDescription(model=model.config, mask_rate=0.15, origin=origin), folder)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_exported_model_reads_back_with_equal_tensors(kind, tmp_path):
    model = build(**SETTINGS[kind])
    assert exported(model, tmp_path / "out") == NAMES.get(kind, "EsmForMaskedLM")
    back, description = read_folder(tmp_path / "out", "x")
    state = back.state_dict()
    if kind == "ours":
        # Rotary frequencies of ours are computed; in the directory they are data.
        assert relative_error(state.pop("rotary_frequencies"), 10000 ** (-torch.arange(0, 16, 2) / 16)) < FLOAT32
    assert sorted(state) == sorted(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert back.config.model_copy(update={"stored_frequencies": False}) == model.config.model_copy(
        update={"stored_frequencies": False, "max_positions": back.config.max_positions, "num_features": 128}
    )
    assert description.origin.licence == "mit"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["attention = 'positive'", "qk_norm = True", "conv_width = 3"]),
        ({**EXACT, "attention": ("local", "softmax")}, ["attention = 'local,softmax'"]),
        ({**EXACT, "local_bias": 3.0}, ["local_bias = 3.0"]),
        ({**EXACT, "ffn": "swiglu"}, ["ffn = 'swiglu'"]),
        ({**EXACT, "norm": "rms"}, ["norm = 'rms'"]),
        ({**EXACT, "causal": True}, ["causal = True"]),
        ({**EXACT, "head": "linear", "tied_head": False}, ["head = 'linear'", "tied_head = False"]),
        ({**EXACT, "vocabulary": SAPIENS}, ["vocabulary = ('<s>'"]),
        ({**EXACT, "positions": "none"}, ["positions = 'none'"]),
        ({**EXACT, "layer_norm": "post"}, ["embedding_norm = False", "positions = 'rotary'"]),
    ],
)
def test_what_transformers_has_not_is_named(changes, words, tmp_path):
    shape = {"attention": "positive", "num_layers": 1, "model_dim": 16, "num_heads": 2}
    model = Performer(ModelConfig(**{**shape, **changes}))
    with pytest.raises(ModelError, match="no architecture with") as caught:
        exported(model, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), caught.value
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_an_exported_model_whole_and_computes_the_same(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(**SETTINGS[kind])
    exported(model, tmp_path / "out")
    loaded, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert type(loaded).__name__ == NAMES.get(kind, "EsmForMaskedLM")
    (member,) = proteins(50)
    member[7] = 32
    with torch.no_grad():
        logits = loaded.eval()(input_ids=model.token_table.own(member)[None]).logits[0]
        assert relative_error(model(member, bounds(50)), logits) < FLOAT32


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_the_tokenizer_of_an_exported_model_makes_the_same_tokens(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(**SETTINGS[kind])
    exported(model, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    row = torch.tensor([0, 20, 15, 24, 26, 32, 11, 2])
    text = f"MKXU{tokenizer.mask_token}T"
    assert tokenizer(text)["input_ids"] == model.token_table.own(row).tolist()
    assert (
        tokenizer(" ".join(text.replace(tokenizer.mask_token, "M")))["input_ids"][1:3]
        == model.token_table.own(row)[1:3].tolist()
    )
    limit = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"]
    assert limit == (60 if model.config.positions == "learned" else 10**30)
