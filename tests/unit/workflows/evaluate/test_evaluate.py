import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset
from protlm.errors import ProtlmError, ShardError, UsageError
from protlm.inference import metrics
from protlm.model.performer import Performer
from protlm.pretrained.model_directory import read_model
from protlm.vocabulary import CLS, EOS, MASK
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.page import render_page
from tests.unit.workflows.evaluate.eval_cases import prepare, random_sequences, request, save_new_model

pytestmark = pytest.mark.usefixtures("quick_pictures")

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ" * times for times in (1, 2, 3)] + ["ACDEFGHIKL"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    proteins = [(str(number), sequence) for number, sequence in enumerate(SEQUENCES)]
    return prepare(tmp_path_factory.mktemp("evaluate"), {"test": proteins})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two splits of 20 proteins each, in clusters of two and families of five; without a training split."""
    proteins = [(f"p{number}", sequence) for number, sequence in enumerate(random_sequences(40))]
    folder = tmp_path_factory.mktemp("labelled")
    return prepare(
        folder, {"test": proteins[:20], "ood": proteins[20:]},
        clusters={name: f"c{number // 2}" for number, (name, _) in enumerate(proteins)},
        families={name: f"F{number // 5}" for number, (name, _) in enumerate(proteins)},
    )  # fmt: skip


@pytest.fixture
def report(dataset, tmp_path):
    """A function that evaluates a new model of a given shape; it returns the report and the content of report.json."""

    def run(description=None, shape=None, on=dataset, **options):
        model = save_new_model(tmp_path / "model", description=description, **(shape or {}))
        scored = evaluate(request(model, on, tmp_path / "report", force=True, **options))
        return scored, json.loads((tmp_path / "report" / "report.json").read_text())

    return run


def test_a_masked_model_is_scored_at_some_residues_all_hidden(report, dataset):
    scored, written = report()
    num_residues = open_dataset(dataset).split("test").lengths.sum()
    assert (scored.objective, scored.num_cut) == (written["objective"], written["num_cut"]) == ("masked", 0)
    assert (written["targets"], written["mask_rate"]) == ("hidden", 0.15)
    assert 0 < scored.num_targets < num_residues
    assert report({"mask_rate": 1.0})[0].num_targets == num_residues


def test_a_causal_model_is_scored_at_every_residue(report, dataset):
    scored, written = report(shape={"causal": True})
    for name in ("objective", "targets"):
        assert getattr(scored, name) == written[name] == "next-token"
    assert scored.num_targets == open_dataset(dataset).split("test").lengths.sum()


@pytest.mark.parametrize(
    "options", [{"num_masks": 2}, {"mask_rate": 0.5}, {"as_trained": True}, {"pseudo_perplexity": 1}], ids=str
)
def test_a_causal_model_refuses_what_is_about_masks(report, options):
    with pytest.raises(UsageError, match="predicts the next token and hides nothing"):
        report(shape={"causal": True}, **options)


def test_a_causal_model_takes_random_weights(report):
    scored, _ = report(shape={"causal": True}, random_weights=True)
    assert scored.splits["test"].scores["random_weights"]["perplexity"] > 1


def test_proteins_beyond_learned_positions_are_cut_and_counted(report):
    learned = {"positions": "learned", "max_positions": 32}
    scored, written = report({"mask_rate": 1.0}, learned, pseudo_perplexity=4)
    assert scored.num_cut == written["num_cut"] == 2
    assert scored.num_targets == 22 + 30 + 30 + 10
    # No protein is read beyond its limit, and a residue alone is hidden in whole proteins only.
    assert scored.splits["test"].pseudo_perplexity["num_proteins"] == 2
    assert scored.splits["test"].pseudo_perplexity["num_targets"] == 22 + 10


WINDOWS = {"mask_rate": 1.0, "data_mode": "concatenated", "window_tokens": 20}


def test_a_model_of_joined_proteins_is_scored_on_windows(report, dataset):
    scored, _ = report(WINDOWS, {"positions": "learned", "max_positions": 20})
    assert scored.num_cut == 0
    assert scored.num_targets == open_dataset(dataset).split("test").lengths.sum()
    assert scored.model != report({"mask_rate": 1.0}, {"positions": "learned", "max_positions": 200})[0].model


def test_a_model_of_joined_proteins_has_no_pseudo_perplexity(report):
    with pytest.raises(UsageError, match="takes proteins one by one"):
        report(WINDOWS, {"positions": "learned", "max_positions": 20}, pseudo_perplexity=1)


def test_more_masks_and_other_rates_change_the_number_of_targets(report, labelled):
    once, twice, dense = (report(on=labelled, **options)[0] for options in ({}, {"num_masks": 3}, {"mask_rate": 0.5}))
    assert (once.num_masks, twice.num_masks, dense.mask_rate) == (1, 3, 0.5)
    assert twice.num_targets == pytest.approx(3 * once.num_targets, rel=0.2)
    assert twice.num_targets % once.num_targets != 0, "other masks have other numbers of targets"
    assert dense.num_targets == pytest.approx(0.5 / 0.15 * once.num_targets, rel=0.2)


def test_the_pseudo_perplexity_of_a_report_is_that_of_a_loop_over_its_proteins(report, labelled, tmp_path):
    scored, _ = report(on=labelled, pseudo_perplexity=3)
    model, _ = read_model(tmp_path / "model")
    split = open_dataset(labelled).split("test")
    losses = {}
    for record in range(split.num_records):
        tokens, losses[record] = split.tokens(record), []
        for place, target in enumerate(tokens.tolist()):
            row = torch.tensor([CLS, *tokens.tolist(), EOS])
            row[place + 1] = MASK
            with torch.no_grad():
                logits = model(row, torch.tensor([0, len(row)], dtype=torch.int32))
            losses[record].append(-torch.log_softmax(logits[place + 1].double(), -1)[target].item())
    measured = scored.splits["test"].pseudo_perplexity
    candidates = {
        (a, b, c): np.concatenate([losses[a], losses[b], losses[c]])
        for a in range(20) for b in range(a) for c in range(b)
    }  # fmt: skip
    equal = [
        chosen for chosen, of_chosen in candidates.items()
        if len(of_chosen) == measured["num_targets"]
        and math.exp(of_chosen.mean()) == pytest.approx(measured["perplexity"], rel=1e-5)
    ]  # fmt: skip
    assert len(equal) == 1
    assert measured["num_proteins"] == 3
    # Three proteins are too few for an interval.
    assert measured["perplexity_stderr"] is None


def test_relatives_are_resampled_together_also_where_residues_are_hidden_alone(report, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "FEWEST_UNITS", 2)
    proteins = [(f"p{number}", sequence) for number, sequence in enumerate(random_sequences(6))]
    of_two = {name: f"c{number % 2}" for number, (name, _) in enumerate(proteins)}
    for clusters, has_interval in ((of_two, True), (dict.fromkeys(of_two, "c"), False)):
        folder = tmp_path / str(has_interval)
        folder.mkdir()
        scored, _ = report(on=prepare(folder, {"test": proteins}, clusters=clusters), pseudo_perplexity=6)
        for row in (scored.model, scored.splits["test"].pseudo_perplexity):
            assert (row["perplexity_stderr"] is not None) is has_interval


def test_the_rows_on_request_are_there_only_on_request(report, labelled):
    plain = {"model", "empirical", "uniform"}
    assert set(report(on=labelled)[0].splits["test"].scores) == plain
    scored, _ = report(on=labelled, as_trained=True, random_weights=True)
    assert set(scored.splits["test"].scores) == plain | {"random_weights", "model_as_trained", "copies"}
    scores = scored.splits["test"].scores
    # A new model has the weights of its seed, and so have random weights with the same one.
    assert scores["random_weights"] == scores["model"]
    assert scores["copies"]["accuracy"] > 1.5 * scores["empirical"]["accuracy"]
    assert scores["model_as_trained"]["perplexity"] != scores["model"]["perplexity"]


def test_random_weights_are_another_draw_of_the_same_architecture(report, labelled, tmp_path):
    scored, _ = report(on=labelled, random_weights=True, seed=5)
    twin = Performer(read_model(tmp_path / "model")[0].config)
    twin.reset(5)
    saved = save_new_model(tmp_path / "twin", weights=lambda model: model.load_state_dict(twin.state_dict()))
    alone = evaluate(request(saved, labelled, tmp_path / "other", seed=5))
    assert alone.model == scored.splits["test"].scores["random_weights"] != scored.model


@pytest.mark.parametrize("shape", [{}, {"causal": True}], ids=["masked", "causal"])
def test_rows_and_threads_change_nothing_beyond_rounding(report, labelled, shape):
    reports = []
    for tokens_per_batch, num_threads in ((512, 1), (16_384, 1), (512, 2)):
        torch.set_num_threads(num_threads)
        try:
            scored, _ = report(
                shape=shape, on=labelled, splits=(), tokens_per_batch=tokens_per_batch, random_weights=True,
                **({} if shape else {"as_trained": True, "pseudo_perplexity": 2, "num_masks": 2}),
            )  # fmt: skip
        finally:
            torch.set_num_threads(1)
        reports.append(scored.to_json())
    for other in reports[1:]:
        check_alike(other, reports[0])


def check_alike(value, expected, where=""):
    """Integers, names and keys are equal, and fractions to 1e-6."""
    assert type(value) is type(expected), where
    if isinstance(expected, dict):
        assert list(value) == list(expected), where
        for key in expected:
            check_alike(value[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(value) == len(expected), where
        for number, (entry, of_expected) in enumerate(zip(value, expected, strict=True)):
            check_alike(entry, of_expected, f"{where}.{number}")
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-6), where
    else:
        assert value == expected, where


def test_the_same_request_gives_the_same_bytes(report, labelled, tmp_path):
    options = {"splits": (), "as_trained": True, "num_masks": 2, "residues": True}
    contents = []
    for _ in range(2):
        report(on=labelled, **options)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / "report").iterdir())})
    assert contents[0] == contents[1]
    assert {"report.json", "residues.parquet"} <= set(contents[0])
    report(on=labelled, **options, seed=1)
    assert (tmp_path / "report" / "report.json").read_bytes() != contents[0]["report.json"]


def test_several_splits_stand_side_by_side_with_their_difference(report, labelled):
    scored, written = report(on=labelled, splits=("ood", "test", "ood"))
    assert list(written["splits"]) == ["ood", "test"]
    # The keys without a split are those of the first one.
    assert scored.split == "ood"
    assert scored.model == scored.splits["ood"].scores["model"]
    assert (scored.num_targets, scored.verdict) == (scored.splits["ood"].num_targets, scored.splits["ood"].verdict)
    alone = {name: report(on=labelled, splits=(name,))[0] for name in ("test", "ood")}
    for name, of_name in alone.items():
        assert of_name.to_json()["splits"][name] == written["splits"][name]
        assert of_name.differences == []
    for row in scored.differences:
        assert (row["first"], row["second"]) == ("ood", "test")
        assert row["difference"] == alone["ood"].model[row["metric"]] - alone["test"].model[row["metric"]]
        # Splits are independent: the variances add up.
        spreads = [of_name.model[f"{row['metric']}_stderr"] for of_name in alone.values()]
        if row["metric"] != "calibration_error":
            assert row["stderr"] == pytest.approx(math.hypot(*spreads), rel=0.15)
            assert row["low"] < row["difference"] < row["high"]
    assert list(report(on=labelled, splits=())[0].splits) == ["test", "ood"]


def test_breakdowns_sum_to_the_whole_also_over_several_masks(report, labelled):
    scored, _ = report(on=labelled, num_masks=3)
    breakdowns = scored.splits["test"].breakdowns
    for name in ("residues", "lengths", "from_n_terminus", "from_c_terminus"):
        check_whole(breakdowns[name], scored)
    # Every protein has one cluster and one family, so these partition the split as well.
    for kind, num_labels, num_proteins in (("cluster", 10, 2), ("family", 4, 5)):
        check_whole(breakdowns[kind]["rows"], scored)
        assert breakdowns[kind]["num_labels"] == num_labels
        assert {row["num_proteins"] for row in breakdowns[kind]["rows"]} == {num_proteins}
    assert "taxon" not in breakdowns
    assert np.sum(breakdowns["confusion"]["predictions"]) == scored.num_targets
    calibration = scored.splits["test"].calibration
    assert sum(row["num_targets"] for row in calibration) == scored.num_targets
    correct = sum(row["num_targets"] * row["accuracy"] for row in calibration)
    assert correct / scored.num_targets == pytest.approx(scored.model["accuracy"])


def check_whole(rows, scored):
    sizes = np.array([row["num_targets"] for row in rows])
    assert sizes.sum() == scored.num_targets
    accuracy = sizes @ [row["accuracy"] for row in rows] / sizes.sum()
    nll = sizes @ np.log([row["perplexity"] for row in rows]) / sizes.sum()
    assert accuracy == pytest.approx(scored.model["accuracy"])
    assert math.exp(nll) == pytest.approx(scored.model["perplexity"])


def test_a_diverged_model_gives_a_report_that_every_parser_reads(report, labelled, tmp_path):
    model = save_new_model(tmp_path / "far", weights=lambda model: model.head.bias.data[:1].fill_(1e6))
    scored = evaluate(request(model, labelled, tmp_path / "out"))
    assert scored.model["perplexity"] == math.inf
    content = (tmp_path / "out" / "report.json").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    written = json.loads(content, parse_constant=refuse)
    assert written["model"]["perplexity"] is None
    assert written["model"]["bits_per_residue"] == pytest.approx(1e6 / math.log(2), rel=1e-3)
    assert "does not beat" in written["verdict"]


def test_the_attention_of_a_diverged_model_is_left_out_and_the_verdict_says_why(labelled, tmp_path):
    model = save_new_model(tmp_path / "far", weights=lambda model: model.embedding.weight.data.fill_(1e38))
    scored = evaluate(request(model, labelled, tmp_path / "out", attention=("p0",), approximation=True))
    assert "has diverged" in scored.verdict
    assert scored.attention_maps is None
    assert scored.approximation is None
    assert "has diverged" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_says_over_what_its_intervals_are(report, labelled, tmp_path):
    scored, _ = report(on=labelled)
    assert scored.splits["test"].resampled == "clusters"
    assert "over the clusters of the dataset" in render_page(scored)
    plain = prepare(tmp_path, {"test": [(f"p{number}", text) for number, text in enumerate(random_sequences(3))]})
    scored, _ = report(on=plain)
    assert scored.splits["test"].resampled == "proteins"
    assert "since the dataset names no clusters" in render_page(scored)


def test_the_name_of_the_model_is_that_of_its_folder(labelled, tmp_path, monkeypatch):
    save_new_model(tmp_path / "my-run" / "model")
    for number, (place, path) in enumerate((("my-run", "model"), ("my-run/model", "."), (".", "my-run"))):
        monkeypatch.chdir(tmp_path / place)
        assert evaluate(request(Path(path), labelled, tmp_path / str(number))).model_name == "my-run"


def test_nothing_is_replaced_without_force_and_nothing_old_stays_with_it(report, labelled, tmp_path):
    out = tmp_path / "report"
    report(on=labelled, residues=True)
    model = tmp_path / "model"
    with pytest.raises(ProtlmError, match=r"report\.json: exists already; replace it with --force"):
        evaluate(request(model, labelled, out))
    (out / "report.json").unlink()
    with pytest.raises(ProtlmError, match=r"report\.html: exists already; replace it with --force"):
        evaluate(request(model, labelled, out))
    (out / "report.html").unlink()
    (out / "protlm_eval_mqc.json").unlink()
    with pytest.raises(ProtlmError, match=r"residues\.parquet: exists already; replace it with --force"):
        evaluate(request(model, labelled, out))
    evaluate(request(model, labelled, out, force=True))
    assert not (out / "residues.parquet").exists()


def test_what_cannot_be_written_or_read_is_said_before_anything_is_scored(dataset, tmp_path):
    model = save_new_model(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ProtlmError, match=r"expected a folder for report\.json, got something else"):
        evaluate(request(model, dataset, tmp_path / "file"))
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    with pytest.raises(ProtlmError, match=r"expected a folder for report\.json, got something else"):
        evaluate(request(model, dataset, tmp_path / "taken", force=True))
    for name in ("ood", "train"):
        with pytest.raises(ShardError, match=f"no records in split '{name}'; it has test$"):
            evaluate(request(model, dataset, tmp_path / "out", splits=("test", name)))
    assert not (tmp_path / "out").exists()


def test_the_progress_is_that_of_every_pass(labelled, tmp_path):
    stages = {}

    def start(stage, total):
        stages[stage] = [total]
        return stages[stage].append

    model = save_new_model(tmp_path / "model")
    options = {"num_masks": 2, "as_trained": True, "random_weights": True, "pseudo_perplexity": 2, "splits": ()}
    evaluate(request(model, labelled, tmp_path / "out", **options), start_progress=start)
    total, *steps = stages["eval"]
    assert sum(steps) == total


@pytest.mark.parametrize("stage", ["measure_split", "attention_of", "render_page"])
def test_an_interruption_leaves_nothing_that_was_not_there_before(dataset, tmp_path, monkeypatch, capsys, stage):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    model = save_new_model(tmp_path / "model")
    monkeypatch.setattr(f"protlm.workflows.evaluate.evaluate.{stage}", interrupt)
    command = ["eval", str(model), str(dataset), "--residues", "--out"]
    assert main([*command, str(tmp_path / "new" / "report")]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    assert main([*command, str(tmp_path / "mine")]) == 130
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_model_that_reaches_no_hidden_residue_is_refused(report):
    with pytest.raises(ProtlmError, match=r"no residue of test was scored: .* only the first 1 of each") as caught:
        report({"mask_rate": 1e-9}, {"positions": "learned", "max_positions": 3})
    assert "\n" not in str(caught.value)
