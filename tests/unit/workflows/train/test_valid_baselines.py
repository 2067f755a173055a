import pytest

from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.mixture import Mixture
from protlm.inference.scoring import score_split
from protlm.pretrained.model_directory import read_model
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.train.valid_baselines import baseline_perplexities
from tests.unit.workflows.evaluate.eval_cases import prepare, random_sequences, request, save_new_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    sequences = random_sequences(60, letters="LAGV", longest=90)
    proteins = [(f"p{number}", sequence) for number, sequence in enumerate(sequences)]
    return prepare(tmp_path_factory.mktemp("dataset"), {"train": proteins[:45], "valid": proteins[45:]})


@pytest.mark.parametrize(
    "shape", [{}, {"causal": True}, {"positions": "learned", "max_positions": 22}], ids=["masked", "causal", "cut"]
)
def test_the_baselines_are_those_of_an_evaluation_of_the_valid_split(shape, dataset, tmp_path):
    opened = open_dataset(dataset)
    train, valid = (Mixture([opened.split(name)]) for name in ("train", "valid"))
    model = save_new_model(tmp_path / "model", train.residue_counts, **shape)
    measured = baseline_perplexities(train, valid, read_model(model)[1])
    scores = evaluate(request(model, dataset, tmp_path / "report", ("valid",))).splits["valid"].scores
    expected = {key: scores[key]["perplexity"] for key in ("empirical", "markov", "two_sided") if key in scores}
    assert ("two_sided" in expected) == (not shape.get("causal"))
    assert measured == pytest.approx(expected, rel=1e-6)


def test_the_empirical_one_is_that_of_the_measurements_during_training(dataset, tmp_path):
    opened = open_dataset(dataset)
    train, valid = (Mixture([opened.split(name)]) for name in ("train", "valid"))
    windows = {"data_mode": "concatenated", "window_tokens": 64}
    for number, options in enumerate(({}, windows)):
        folder = save_new_model(tmp_path / f"{number}", train.residue_counts, description=options)
        model, description = read_model(folder)
        sums = score_split(model, description, valid)
        measured = baseline_perplexities(train, valid, description)
        assert measured["empirical"] == pytest.approx(sums["empirical"].score().perplexity, rel=1e-9)
