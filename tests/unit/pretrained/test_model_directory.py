import json
import os
import pickle

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from protlm import files
from protlm.config import ModelConfig
from protlm.data.batching.masking import MaskRates, Objective
from protlm.errors import ModelError
from protlm.model.performer import Performer
from protlm.pretrained import checkpoint_files
from protlm.pretrained.initial_weights import find_initial_model, load_initial_weights
from protlm.pretrained.model_description import ModelDescription, Origin, ValidScore, dataset_hash_of
from protlm.pretrained.model_directory import read_model, save_model
from protlm.pretrained.model_files import find_model, remove_left_overs_of_model
from protlm.vocabulary import RESIDUES, TOKENS

VALID = ValidScore(
    targets="hidden", num_targets=1234, accuracy=0.4321, perplexity=5.6789, empirical_accuracy=0.0987,
    empirical_perplexity=17.8123,
)  # fmt: skip
TOKENS_OF_A_ROW = torch.tensor([0, 5, 6, 7, 2, 0, 9, 2])
BOUNDS = torch.tensor([0, 5, 8], dtype=torch.int32)


def describe(model, /, **changes):
    content = {
        "model": model.config,
        "mask_rate": 0.15,
        "redraw_every_steps": 0,
        "seed": 3,
        "step": 250,
        "residue_counts": dict.fromkeys(RESIDUES, 1000),
        "dataset_hash": "0123456789abcdef",
        "valid": VALID,
    }
    return ModelDescription(**{**content, **changes})


@pytest.fixture
def model():
    model = Performer(
        ModelConfig(attention="positive", num_layers=2, model_dim=16, num_heads=2, ffn_dim=24, num_features=8)
    )
    model.reset(0)
    return model.eval()


@pytest.fixture
def folder(model, tmp_path):
    save_model(tmp_path / "model", model, describe(model))
    return tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_weights(folder, content):
    """Puts other weights there, with a hash in config.json that fits them."""
    (folder / "model.safetensors").write_bytes(content)
    edit(folder, weights_hash=xxhash.xxh3_128_hexdigest(content))


def assert_refused(folder, *words):
    with pytest.raises(ModelError) as caught:
        read_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("kind", ["positive", "relu", "softmax"])
@torch.no_grad()
def test_a_saved_model_reads_back_with_equal_logits(kind, tmp_path):
    model = Performer(ModelConfig(num_layers=2, model_dim=16, num_heads=2, num_features=8, attention=kind))
    model.reset(1)
    save_model(tmp_path, model, describe(model))
    read, description = read_model(tmp_path)
    assert not read.training
    assert torch.equal(read(TOKENS_OF_A_ROW, BOUNDS), model.eval()(TOKENS_OF_A_ROW, BOUNDS))
    assert description.model_copy(update={"weights_hash": ""}) == describe(model)
    assert set(read.state_dict()) == set(model.state_dict())


def test_a_model_that_was_read_can_be_trained_further(folder):
    model, _ = read_model(folder)
    model.train()(TOKENS_OF_A_ROW, BOUNDS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_directory_holds_three_files_and_no_pickle(folder):
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert "head.bias" in load_file(folder / "model.safetensors")


def test_the_same_model_gives_the_same_bytes(folder, model, tmp_path):
    save_model(tmp_path / "again", model, describe(model))
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_replaces_what_was_there(folder, model):
    model.reset(9)
    save_model(folder, model, describe(model, step=500))
    assert read_model(folder)[1].step == 500
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("has_exchange", [True, False])
@pytest.mark.parametrize("name", ["replace_folder", "remove", "written_whole"])
def test_a_model_that_was_killed_while_it_was_replaced_is_the_old_or_the_new(
    folder, model, monkeypatch, name, has_exchange
):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    if not has_exchange:
        monkeypatch.setattr(files, "_exchanging_rename", lambda: None)
    (folder / "notes.txt").write_text("precious")
    with monkeypatch.context() as patch:
        # After a kill nothing is cleaned up, so the first call is the last.
        patch.setattr(files, name, die)
        try:
            save_model(folder, model, describe(model, step=500))
        except Killed:
            assert name != "written_whole"
    assert read_model(folder)[1].step in (250, 500)
    save_model(folder, model, describe(model, step=750))
    assert read_model(folder)[1].step == 750
    assert (folder / "notes.txt").read_text() == "precious"
    assert os.listdir(folder.parent) == [folder.name]


def test_a_replacement_that_was_killed_between_two_renames_is_undone(folder, model):
    folder.rename(files.replaced_path(folder))
    remove_left_overs_of_model(folder)
    assert read_model(folder)[1].step == 250
    assert os.listdir(folder.parent) == [folder.name]


def test_a_link_to_a_model_stays_a_link(folder, model, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    save_model(link, model, describe(model, step=500))
    assert link.is_symlink()
    assert read_model(folder)[1].step == 500


def test_the_model_card_has_the_hashes_and_the_measured_figures(folder):
    card = (folder / "README.md").read_text()
    _, description = read_model(folder)
    assert description.weights_hash == xxhash.xxh3_128_hexdigest((folder / "model.safetensors").read_bytes())
    for figure in ("0123456789abcdef", description.weights_hash, "0.4321", "5.679", "0.0987", "17.812", "1,234", "250"):
        assert figure in card, figure
    assert "| empirical baseline (residue frequencies of the training set) | 0.0987 | 17.812 |" in card


def test_the_model_card_says_where_nothing_was_measured_and_what_was_redrawn(model, tmp_path):
    save_model(tmp_path, model, describe(model, valid=None, redraw_every_steps=100))
    card = (tmp_path / "README.md").read_text()
    assert "No valid split" in card
    assert "every 100 steps" in card


def test_a_model_that_there_was_no_time_to_measure_is_marked_as_unmeasured(model, tmp_path):
    save_model(tmp_path, model, describe(model, valid=None, unmeasured=True))
    card = (tmp_path / "README.md").read_text()
    assert "unmeasured" in card
    assert "No valid split" not in card
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["valid"], content["unmeasured"]) == (None, True)
    assert read_model(tmp_path)[1].unmeasured


def test_a_run_stands_for_its_model(folder):
    assert find_model(folder.parent) == find_model(folder) == folder


def test_an_altered_byte_of_the_weights_is_refused(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert_refused(folder, str(path), "hash differs")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    assert_refused(folder, str(folder))


def test_a_missing_directory_and_a_run_without_a_model_are_refused(tmp_path):
    assert_refused(tmp_path / "absent", "no such directory")
    assert_refused(tmp_path, "no config.json")
    (tmp_path / "checkpoints").mkdir()
    assert_refused(tmp_path, "no model yet")


class Evil:
    """Says when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_in_place_of_the_weights_is_refused_and_never_loaded(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    assert_refused(folder, "hash differs")
    replace_weights(folder, pickle.dumps(Evil()))
    assert_refused(folder, "model.safetensors", "does not hold this model")


def test_a_torch_checkpoint_in_place_of_the_weights_is_refused(folder, tmp_path):
    torch.save({"evil": Evil()}, tmp_path / "evil.pt")
    replace_weights(folder, (tmp_path / "evil.pt").read_bytes())
    assert_refused(folder, "does not hold this model")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("head.bias"),
        lambda tensors: tensors.update(extra=torch.zeros(1)),
        lambda tensors: tensors.update({"head.bias": torch.zeros(34)}),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_of_another_model_are_refused(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    replace_weights(folder, (folder / "model.safetensors").read_bytes())
    assert_refused(folder, "does not hold this model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 7}, "expected format version 1 to 6, got 7"),
        ({"valid": {**VALID.model_dump(), "targets": "all"}}, "valid.targets"),
        ({"valid": {"num_targets": 3}}, "valid.targets"),
        ({"format_version": 2, "valid": {"num_targets": 3}}, "valid.accuracy"),
        ({"mask_share": 1.5}, "mask_share"),
        ({"data_mode": "concatenated"}, "window_tokens"),
        ({"window_tokens": 100}, "window_tokens"),
        ({"data_mode": "other"}, "data_mode"),
        ({"format": "other"}, "expected a protlm model"),
        ({"vocabulary": list(TOKENS[::-1])}, "another vocabulary"),
        ({"surprise": 1}, "surprise"),
        ({"model": {"num_layers": 0}}, "model.num_layers"),
        ({"model": {"unknown": 1}}, "model.unknown"),
        ({"step": -1}, "step"),
        ({"model": {"positions": "learned", "max_positions": 2}}, "max_positions: input should be greater than 2"),
        (
            {"model": {"positions": "learned", "max_positions": 9}, "data_mode": "concatenated", "window_tokens": 10},
            "window_tokens: expected at most 9, got 10",
        ),
        ({"data_mode": "concatenated", "window_tokens": 2**24 + 1}, "window_tokens: expected at most 16777216"),
        ({"step": 2**63}, "step: input should be less than 9223372036854775808"),
        ({"seed": 10**400}, "seed: input should be less than"),
        ({"residue_counts": dict.fromkeys(RESIDUES, 10**400)}, "residue_counts.L: input should be less than"),
        ({"format_version": "9" * 5000}, "expected format version 1 to 6, got '999"),
        ({"model": {"num_layers": 10**7}}, "model.num_layers: input should be less than or equal to 1024"),
        ({"step": None}, "step: expected a fact of the training"),
        ({"residue_counts": None}, "residue_counts: expected a fact"),
        ({"model": {"vocabulary": ["A", "A"]}}, "vocabulary: expected different tokens, got 'A' twice"),
        ({"origin": {"source": "x"}}, "origin.family"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder, changes, message):
    edit(folder, **changes)
    assert_refused(folder, "config.json", message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"format": "protlm-model"}'])
def test_a_description_that_is_no_description_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, "config.json")


def test_a_model_whose_perplexity_is_not_finite_reads_back(model, tmp_path):
    valid = VALID.model_copy(update={"perplexity": float("inf")})
    save_model(tmp_path / "model", model, describe(model, valid=valid))
    assert read_model(tmp_path / "model")[1].valid == valid


def test_a_description_nested_without_end_is_refused(folder):
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(ModelError):
        read_model(folder)


def test_weights_of_another_shape_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["embedding.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, weights_hash=xxhash.xxh3_128_hexdigest((folder / "model.safetensors").read_bytes()))
    with pytest.raises(ModelError, match=r"embedding\.weight"):
        read_model(folder)


@pytest.mark.parametrize("changes", [{"mask_rate": 5.0}, {"mask_rate": float("nan")}, {"residue_counts": {"L": 1}}])
def test_a_description_out_of_range_is_refused(folder, changes):
    edit(folder, **changes)
    with pytest.raises(ModelError):
        read_model(folder)


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensor: tensor.double(), "expected torch.float32"),
    (lambda tensor: torch.full_like(tensor, torch.nan), "not finite"),
])  # fmt: skip
def test_weights_of_another_kind_are_refused_in_one_short_line(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    tensors["head.dense.weight"] = change(tensors["head.dense.weight"])
    save_file(tensors, folder / "model.safetensors")
    edit(folder, weights_hash=xxhash.xxh3_128_hexdigest((folder / "model.safetensors").read_bytes()))
    with pytest.raises(ModelError, match=message) as caught:
        read_model(folder)
    assert len(str(caught.value)) < 400


def test_tensors_by_name_are_saved_like_the_network_they_are_of(folder, model, tmp_path):
    save_model(tmp_path / "again", dict(model.state_dict()), describe(model))
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_model_of_version_1_reads_as_packed_with_berts_masking(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key in ("mask_share", "random_share", "data_mode", "window_tokens"):
        del content[key]
    del content["valid"]["targets"]
    for key in ("ffn", "layer_norm", "positions", "max_positions", "causal"):
        del content["model"][key]
    path.write_text(json.dumps({**content, "format_version": 1}))
    read, description = read_model(folder)
    assert description.objective == Objective(causal=False, rates=MaskRates(0.15, 0.8, 0.1))
    assert (description.data_mode, description.window_tokens, description.max_residues) == ("packed", None, None)
    assert description.valid.targets == "mixture"
    assert read.config == ModelConfig(
        attention="positive", exact_temperature=0.0, num_layers=2, model_dim=16, num_heads=2, ffn_dim=24, num_features=8
    )


@pytest.mark.parametrize(
    ("changes", "causal", "targets"),
    [({}, False, "mixture"), ({"mask_share": 1.0, "random_share": 0.0}, False, "hidden"), ({}, True, "next-token")],
)
def test_a_model_of_version_2_was_measured_as_it_was_trained(changes, causal, targets, model, tmp_path):
    shape = model.config.model_copy(update={"causal": causal})
    save_model(tmp_path, model, describe(model, model=shape, **changes))
    old = {key: value for key, value in VALID.model_dump().items() if key != "targets"}
    edit(tmp_path, format_version=2, valid=old)
    read, description = read_model(tmp_path)
    assert description.valid == VALID.model_copy(update={"targets": targets})
    save_model(tmp_path / "again", read, description)
    assert read_model(tmp_path / "again")[1] == description
    edit(tmp_path, valid=None)
    assert read_model(tmp_path)[1].valid is None


def test_a_model_of_version_3_has_no_origin_and_the_settings_of_ours(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key in ("origin", "trained_residues"):
        del content[key]
    for key in (
        "norm", "norm_eps", "embedding_norm", "qk_layer_norm", "token_dropout", "stored_frequencies", "head",
        "tied_head", "vocabulary", "residues_as_x",
    ):  # fmt: skip
        del content["model"][key]
    path.write_text(json.dumps({**content, "format_version": 3}))
    read, description = read_model(folder)
    assert (description.origin, description.trained_residues) == (None, None)
    assert description.valid == VALID
    assert read.config == ModelConfig(
        attention="positive", exact_temperature=0.0, num_layers=2, model_dim=16, num_heads=2, ffn_dim=24, num_features=8
    )


def test_a_model_of_version_4_is_none_that_there_was_no_time_to_measure(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["unmeasured"]
    path.write_text(json.dumps({**content, "format_version": 4}))
    description = read_model(folder)[1]
    assert (description.valid, description.unmeasured) == (VALID, False)


def test_a_model_from_elsewhere_needs_no_facts_of_its_training_and_its_card_names_the_source(model, tmp_path):
    origin = Origin(source="lab/model", revision="abc", family="esm", licence="mit", files={"model.bin": "00ff"})
    description = ModelDescription(model=model.config, mask_rate=0.15, origin=origin, trained_residues=1022)
    save_model(tmp_path, model, description)
    assert read_model(tmp_path)[1].model_copy(update={"weights_hash": ""}) == description
    card = (tmp_path / "README.md").read_text()
    for word in ("lab/model", "revision abc", "Licence: mit", "`model.bin` (xxh3-128): `00ff`", "Longest protein: any"):
        assert word in card


def test_a_fine_tuned_model_names_the_source_of_its_first_weights(model, tmp_path):
    origin = Origin(source="lab/model", revision="abc", family="esm", licence="mit", files={"model.bin": "00ff"})
    description = describe(model, fine_tuned_from=origin)
    save_model(tmp_path, model, description)
    assert read_model(tmp_path)[1].fine_tuned_from == origin
    card = (tmp_path / "README.md").read_text()
    for word in (
        "Fine-tuned from lab/model (revision abc) for ",
        "- Fine-tuned from: lab/model (revision abc), a model of the family esm",
        "which these are made of: mit",
        "`model.bin` (xxh3-128): `00ff`",
    ):
        assert word in card
    save_model(tmp_path, model, describe(model))
    assert "Fine-tuned" not in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="fine_tuned_from"):
        ModelDescription(model=model.config, mask_rate=0.15, origin=origin, fine_tuned_from=origin)


def test_a_model_of_version_4_began_with_no_other_weights_that_are_known(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    assert content["format_version"] == 6
    del content["fine_tuned_from"]
    path.write_text(json.dumps({**content, "format_version": 4}))
    assert read_model(folder)[1].fine_tuned_from is None


def test_a_model_of_version_5_was_swapped_for_none(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["swap"], content["model"]["estimator"], content["model"]["qk_balance"]
    path.write_text(json.dumps({**content, "format_version": 5}))
    description = read_model(folder)[1]
    assert (description.swap, description.model.estimator) == (None, False)


def test_the_objective_is_that_of_training(model, tmp_path):
    causal = describe(model, model=model.config.model_copy(update={"causal": True}))
    assert causal.objective.causal
    save_model(tmp_path, model, describe(model, mask_rate=0.2, mask_share=0.1, random_share=0.7))
    assert read_model(tmp_path)[1].objective == Objective(causal=False, rates=MaskRates(0.2, 0.1, 0.7))


def test_learned_positions_reach_so_many_residues_and_others_any(model):
    config = model.config.model_copy(update={"positions": "learned", "max_positions": 50})
    assert describe(model, model=config).max_residues == 48
    assert describe(model).max_residues is None


def test_the_model_card_says_what_is_predicted_and_of_what_rows(model, tmp_path):
    save_model(tmp_path, model, describe(model))
    card = (tmp_path / "README.md").read_text()
    assert "masked residues: 15% of them, of which 80% were hidden and 10% replaced" in card
    causal = model.config.model_copy(update={"causal": True})
    valid = VALID.model_copy(update={"targets": "next-token"})
    save_model(
        tmp_path, model, describe(model, model=causal, data_mode="concatenated", window_tokens=8192, valid=valid)
    )
    card = (tmp_path / "README.md").read_text()
    assert "causal Performer" in card
    assert "next token" in card
    assert "8,192 tokens" in card
    assert "masked" not in card


def test_the_model_card_says_how_its_figures_were_measured_and_what_they_compare_with(model, tmp_path):
    def card(**changes):
        save_model(tmp_path, model, describe(model, **changes))
        return (tmp_path / "README.md").read_text()

    hidden = card()
    assert "On 1,234 hidden residues of its valid split (15% of all; each is replaced by `<mask>`):" in hidden
    assert "Compare these numbers only with numbers measured on hidden residues of the same split" in hidden
    assert "perplexity 25" in hidden
    mixture = card(valid=VALID.model_copy(update={"targets": "mixture"}))
    assert "masked as in training (80% of them hidden, 10% replaced by a random one, 10% visible):" in mixture
    assert "with the same mixture on the same split" in mixture
    shape = model.config.model_copy(update={"causal": True})
    causal = card(model=shape, valid=VALID.model_copy(update={"targets": "next-token"}))
    assert "On 1,234 residues of its valid split, each predicted from those before it:" in causal
    assert "of models that predict the next residue" in causal


def test_exact_attention_of_version_4_keeps_the_bound_of_its_temperature(tmp_path):
    exact = network(attention="softmax", exact_temperature=0.0)
    save_model(tmp_path, exact, describe(exact))
    content = json.loads((tmp_path / "config.json").read_text())
    for key in ("exact_temperature", "local_window", "local_bias"):
        del content["model"][key]
    (tmp_path / "config.json").write_text(json.dumps({**content, "format_version": 4}))
    read, _ = read_model(tmp_path)
    assert read.config == exact.config
    with torch.no_grad():
        assert torch.equal(read(TOKENS_OF_A_ROW, BOUNDS), exact(TOKENS_OF_A_ROW, BOUNDS))


def test_one_dataset_stands_for_itself_and_several_for_their_order():
    assert dataset_hash_of(["a" * 32]) == "a" * 32
    both = dataset_hash_of(["a" * 32, "b" * 32])
    assert both == xxhash.xxh3_128_hexdigest(b"a" * 32 + b"b" * 32)
    assert both != dataset_hash_of(["b" * 32, "a" * 32])


def network(seed=5, **changes):
    shape = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "ffn_dim": 24, "num_features": 8}
    shape["attention"] = "positive"
    model = Performer(ModelConfig(**{**shape, **changes}))
    model.reset(seed)
    return model.eval()


def saved(tmp_path, **changes):
    model = network(seed=1, **changes)
    save_model(tmp_path / "model", model, describe(model))
    return model


@torch.no_grad()
def test_the_same_network_starts_with_all_weights_of_the_saved_one(tmp_path):
    source, target = saved(tmp_path), network()
    assert load_initial_weights(target, find_initial_model(tmp_path)) == []
    assert torch.equal(target(TOKENS_OF_A_ROW, BOUNDS), source(TOKENS_OF_A_ROW, BOUNDS))


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ({"attention": "softmax"}, {}, ["projection", "temperature_logit"]),
        ({"attention": "softmax", "qk_norm": False}, {}, ["projection", "temperature_logit"]),
        ({"attention": "local"}, {}, ["projection", "temperature_logit"]),
        ({"attention": "local"}, {"attention": "softmax", "local_bias": 3.0}, ["local_bias"]),
        ({"num_features": 16}, {}, ["projection"]),
        ({"projection": "iid"}, {}, ["projection"]),
        ({"attention": "relu"}, {"attention": "hyperbolic"}, []),
    ],
)
def test_weights_start_another_kind_of_attention_that_keeps_its_own_draw(tmp_path, before, after, kept):
    source, target, fresh = saved(tmp_path, **before), network(**after), network(**after)
    names = load_initial_weights(target, find_initial_model(tmp_path))
    assert set(names) == {f"layers.{layer}.attention.{name}" for layer in range(2) for name in kept}
    for name, tensor in target.state_dict().items():
        origin = fresh if name in names else source
        assert torch.equal(tensor, origin.state_dict()[name]), name


ESTIMATOR = {"attention": "positive", "estimator": True}


@pytest.mark.parametrize(
    ("changes", "redrawn"),
    [({}, False), ({"projection": "iid"}, True), ({"num_features": 24}, True), ({"attention": "near-far"}, False)],
)
@torch.no_grad()
def test_other_rows_of_an_estimator_have_the_shift_of_the_saved_one(tmp_path, changes, redrawn):
    source = network(seed=1, **ESTIMATOR)
    for layer in source.layers:
        layer.attention.feature_shift.normal_()
        layer.attention.redraw(torch.Generator().manual_seed(3))
    save_model(tmp_path / "model", source, describe(source))
    target = network(**{**ESTIMATOR, **changes})
    names = load_initial_weights(target, find_initial_model(tmp_path))
    assert bool(names) == redrawn
    for mine, theirs in zip(target.layers, source.layers, strict=True):
        shift = mine.attention.feature_shift
        assert torch.equal(shift, theirs.attention.feature_shift)
        drawn = mine.attention.projection - shift.unsqueeze(1)
        expected = -(drawn * shift.unsqueeze(1)).sum(-1) - 0.5 * shift.square().sum(-1, keepdim=True)
        torch.testing.assert_close(mine.attention.feature_bias, expected, atol=1e-4, rtol=1e-4)


def test_an_exact_model_starts_an_estimator_and_the_other_way_round(tmp_path):
    saved(tmp_path, attention="softmax")
    kept = load_initial_weights(network(**ESTIMATOR), find_initial_model(tmp_path))
    assert {name.rpartition(".")[2] for name in kept} == {"projection", "feature_bias", "feature_shift"}
    saved(tmp_path, **ESTIMATOR, qk_balance=True)
    assert load_initial_weights(network(attention="softmax"), find_initial_model(tmp_path)) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"attention": "softmax"}),
        ({"attention": "softmax", "exact_temperature": 0.0}, {"attention": "softmax"}),
        ({"attention": "local", "exact_temperature": 1.2}, {}),
        ({"attention": "local", "exact_temperature": 1.2}, {"max_temperature": 5.0}),
    ],
)
def test_temperatures_are_translated_between_their_forms(tmp_path, before, after):
    source, target = saved(tmp_path, **before), network(**after)
    kept = load_initial_weights(target, find_initial_model(tmp_path))
    assert not [name for name in kept if "temperature" in name]
    for mine, theirs in zip(target.layers, source.layers, strict=True):
        actual, expected = mine.attention._temperature(), theirs.attention._temperature()
        assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"num_layers": 3}, r"tensor 'layers\.2\..*' is missing in the saved one"),
        ({"num_layers": 3}, {}, r"tensor 'layers\.2\..*' of the saved one has no place"),
        ({}, {"conv_width": 0}, r"tensor 'layers\.0\.attention\.convolution\.weight' of the saved one has no place"),
        ({}, {"conv_width": 5}, r"tensor 'layers\.0\.attention\.convolution\.weight': expected \(3, 48\) as in the"),
        ({}, {"ffn_dim": 32}, r"tensor 'layers\.0\.ffn_in\.weight': expected \(24, 16\) as in the saved one, got"),
        ({}, {"num_heads": 4}, "num_heads: expected 2 as in the saved one, got 4"),
    ],
)
def test_another_network_is_refused_and_left_as_it_is(tmp_path, before, after, message):
    saved(tmp_path, **before)
    target, fresh = network(**after), network(**after)
    with pytest.raises(ModelError, match=message):
        load_initial_weights(target, find_initial_model(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), fresh.parameters(), strict=True))


def test_a_model_that_does_not_fit_into_memory_is_refused_before_its_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    edit(folder, model={"attention": "positive", "num_layers": 2, "model_dim": 2**16, "num_features": 2**20})
    assert_refused(folder, f"{folder}: to read this model needs 704.9 GB of memory, and this machine has ")


def test_a_model_that_does_not_fit_into_the_gpu_is_refused(folder, monkeypatch):
    read_model(folder)
    sizes = {"cpu": 2**40, "cuda": 1000}
    monkeypatch.setattr(checkpoint_files, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(checkpoint_files, "memory_bytes", lambda device: sizes[device.type])
    assert_refused(folder, "to read this model needs 0.0 GB of memory, and the GPU has 0.0 GB")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "large", "loop"])
def test_what_is_no_regular_file_or_too_large_is_refused_at_once(folder, name, target):
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    with (folder / "large").open("wb") as file:
        file.truncate(1 << 40)
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    reason = {"large": "expected at most", "loop": "Too many levels"}.get(target, "expected a regular file")
    if name == "config.json" and target != "large":
        reason = "no config.json in it"
    assert_refused(folder, str(folder), reason)
