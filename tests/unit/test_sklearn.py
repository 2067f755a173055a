import copy
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from protlm.config import ModelConfig
from protlm.errors import ModelError
from protlm.inference.protein_model import load_model
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import save_model
from protlm.sklearn import ProteinEmbedder
from protlm.vocabulary import RESIDUES

SEQUENCES = ["MKTAYIAKQR", "W", "ACDEFGHIKLMNPQRSTVWY", "GGGG", "MKTAYIAKQR", "AAAAAAAA"]


def save(folder, seed=0):
    model = Performer(
        ModelConfig(attention="positive", num_layers=2, model_dim=16, num_heads=2, ffn_dim=16, num_features=8)
    )
    model.reset(seed)
    description = ModelDescription(
        model=model.config, mask_rate=0.15, redraw_every_steps=0, seed=0, step=1, dataset_hash="",
        residue_counts=dict.fromkeys(RESIDUES, 1),
    )  # fmt: skip
    save_model(folder, model, description)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model")


@pytest.mark.parametrize(("kind", "layer"), [("mean", -1), ("cls", 0), ("mean", 1)])
def test_vectors_are_those_of_the_model_in_order(folder, kind, layer):
    vectors = ProteinEmbedder(folder, kind=kind, layer=layer).fit_transform(SEQUENCES)
    expected = [one[kind] for one in load_model(folder).embed(SEQUENCES, (kind,), layer=layer)]
    assert (vectors.shape, vectors.dtype) == ((6, 16), np.float32)
    np.testing.assert_allclose(vectors, expected, rtol=1e-6, atol=1e-7)


def test_any_column_of_sequences_is_the_same(folder):
    embedder = ProteinEmbedder(folder).fit(SEQUENCES)
    expected = embedder.transform(SEQUENCES)
    column = np.array(SEQUENCES, dtype=object)

    class Series:
        """As pandas hands one over: an index that is not its order, and values as an array."""

        index = range(6, 0, -1)

        def __array__(self, dtype=None, copy=None):
            return column

    for same in (tuple(SEQUENCES), np.array(SEQUENCES), column, column[:, None], Series()):
        np.testing.assert_array_equal(embedder.transform(same), expected)


def test_a_pandas_series_and_a_table_of_one_column_are_columns_too(folder):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = pandas.DataFrame({"sequence": SEQUENCES}, index=range(6, 0, -1))
    embedder = ProteinEmbedder(folder).fit(table["sequence"])
    for same in (table["sequence"], table[["sequence"]]):
        np.testing.assert_array_equal(embedder.transform(same), embedder.transform(SEQUENCES))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("MKTAYIAKQR", "got str; put a single one into a list"),
        ({"MKT": 1}, "got dict"),
        ({"MKT"}, "got set"),
        ((sequence for sequence in SEQUENCES), "got generator"),
        (np.array([["MKT", "W"]], dtype=object), r"got ndarray of shape \(1, 2\)"),
        (["MKT", None], r"X\[1\]: expected a sequence as str, got None"),
        (["MKT", "W", b"MK"], r"X\[2\]: expected a sequence as str, got bytes"),
        (["MKT", "MK1T"], r"X\[1\]: illegal character '1' at position 3"),
        (["", "MKT"], r"X\[0\]: expected at least one residue"),
    ],
)
def test_what_is_no_column_of_sequences_is_refused_before_anything_is_computed(folder, wrong, message):
    with pytest.raises(ValueError, match=message):
        ProteinEmbedder(folder).fit(wrong)
    with pytest.raises(ValueError, match=message):
        ProteinEmbedder(folder).fit(SEQUENCES).transform(wrong)


def test_no_sequences_are_nothing_to_fit_and_have_no_vectors(folder):
    with pytest.raises(ValueError, match="at least one sequence"):
        ProteinEmbedder(folder).fit([])
    assert ProteinEmbedder(folder).fit(SEQUENCES).transform([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "per-residue"}, "kind"), ({"layer": 3}, "layer"), ({"tokens_per_batch": 0}, "tokens_per_batch")],
)
def test_settings_that_do_not_exist_are_refused_in_fit(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        ProteinEmbedder(folder, **settings).fit(SEQUENCES)


def test_a_missing_model_is_told_in_fit_and_not_before(tmp_path):
    embedder = ProteinEmbedder(tmp_path / "none")
    with pytest.raises(ModelError):
        embedder.fit(SEQUENCES)
    with pytest.raises(NotFittedError):
        embedder.transform(SEQUENCES)


def test_clones_are_unfitted_with_equal_settings_and_share_a_loaded_model(folder):
    model = load_model(folder)
    first = ProteinEmbedder(model, kind="cls", layer=1, tokens_per_batch=100).fit(SEQUENCES)
    second = clone(first)
    assert second.get_params() == first.get_params()
    assert second.model is model
    with pytest.raises(NotFittedError):
        second.transform(SEQUENCES)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_pickling_changes_no_vector_and_takes_the_weights_along_only_if_they_were_given(folder, is_loaded):
    embedder = ProteinEmbedder(load_model(folder) if is_loaded else folder).fit(SEQUENCES)
    content = pickle.dumps(embedder)
    assert (len(content) > (folder / "model.safetensors").stat().st_size) == is_loaded
    expected = embedder.transform(SEQUENCES)
    for same in (pickle.loads(content), copy.deepcopy(embedder)):
        np.testing.assert_array_equal(same.transform(SEQUENCES), expected)


def test_another_model_than_that_of_fit_is_refused(folder, tmp_path):
    embedder = ProteinEmbedder(folder).fit(SEQUENCES)
    content = pickle.dumps(embedder)
    save(folder, seed=1)
    with pytest.raises(ModelError, match="another model than in fit"):
        pickle.loads(content).transform(SEQUENCES)
    embedder.set_params(model=save(tmp_path / "other", seed=2))
    with pytest.raises(ModelError, match="another model than in fit"):
        embedder.transform(SEQUENCES)
    assert embedder.fit(SEQUENCES).transform(SEQUENCES).shape == (6, 16)


def test_names_of_the_features_are_as_many_as_the_model_is_wide(folder):
    names = ProteinEmbedder(folder).fit(SEQUENCES).get_feature_names_out()
    assert names.tolist() == [f"proteinembedder{number}" for number in range(16)]


def test_it_is_a_step_of_a_pipeline_and_layers_can_be_searched(folder, tmp_path):
    generator = np.random.default_rng(0)
    rich, poor = "LIVFMW", "DEKRNQ"
    sequences = ["".join(generator.choice(list(letters), 30)) for letters in (rich, poor) for _ in range(12)]
    labels = np.repeat(["membrane", "soluble"], 12)
    pipeline = make_pipeline(ProteinEmbedder(folder), LogisticRegression(C=1e4), memory=str(tmp_path / "memory"))
    search = GridSearchCV(pipeline, {"proteinembedder__layer": [0, 1, 2]}, cv=3, error_score="raise")
    search.fit(sequences, labels)
    # Composition alone tells these classes apart, and layer 0 holds nothing else.
    assert search.cv_results_["mean_test_score"][0] == 1
    assert search.predict(["LIVFMWLIVF", "DEKRNQDEKR"]).tolist() == ["membrane", "soluble"]
