"""The benchmark of the training step, made small: its ratios come from its times, and none after a wrong model."""

import json
from pathlib import Path
from statistics import median

import pytest
import torch

from protlm.model.performer import Performer
from protlm.runtime.devices import has_half_precision_units
from scripts.bench import train_step, train_step_figures, train_step_measurements, train_step_models
from scripts.bench.models import Sizes
from scripts.bench.train_step_models import (
    CYCLE,
    ESM_PEER,
    HALF,
    NO_ATTENTION,
    NO_TARGET,
    PERFORMER_PEER,
    PROTLM,
    PROTLM_CONVOLVED,
)
from scripts.measuring import can_measure_memory

ROOT = Path(__file__).parents[2]
SIZES = Sizes(num_layers=1, model_dim=16, num_heads=2, ffn_dim=32, num_features=8)
TINY = ["--layers", "1", "--model-dim", "16", "--heads", "2", "--ffn", "32", "--features", "8", "--batch", "2",
        "--length", "64", "--long-length", "96", "--data-steps", "3", "--threads", "1"]  # fmt: skip
HAS_PERFORMER, HAS_ESM = (not train_step_models.why_missing(name) for name in (PERFORMER_PEER, ESM_PEER))
DATA = {"residues among the slots of tokens_per_batch", "residues among the tokens of the rows",
        "time that a step waits for its row"}  # fmt: skip
OWN = {f"share of the speed with {NO_ATTENTION}, {PROTLM}", f"time of {CYCLE} / {PROTLM}"}
HAS_UNITS = has_half_precision_units("bf16")
if HAS_UNITS:
    OWN |= {f"{name}: time in float32 / bf16-mixed" for name in HALF}


def expected_figures():
    figures = DATA | OWN
    if HAS_ESM:
        figures |= {f"tokens/s of {PROTLM} / {ESM_PEER}"}
    if HAS_PERFORMER:
        ratios = [f"tokens/s of {ours} / {PERFORMER_PEER}" for ours in (PROTLM, PROTLM_CONVOLVED)]
        figures |= {f"{ratio}{suffix}" for ratio in ratios for suffix in ("", ", tuned malloc")}
        if can_measure_memory():
            for base in ("with weights and optimizer", "above weights and optimizer"):
                names = (PROTLM, PERFORMER_PEER, f"{PROTLM} / {PERFORMER_PEER}")
                figures |= {f"peak memory {base}, {name}" for name in names}
    return figures


@pytest.fixture
def in_this_process(monkeypatch):
    """New processes would take longer than all else, and the peaks of an old process mean nothing."""

    def run(_, function, **arguments):
        if function is train_step_measurements.peaks_here:
            return {"whole": 2**20 * (1 + len(arguments["name"])), "above": 2**20 * len(arguments["name"])}
        return function(**arguments)

    monkeypatch.setattr(train_step_measurements, "in_a_process", run)


def test_a_tiny_run_reports_every_figure_from_its_own_times(in_this_process, dataset, tmp_path, capsys):
    out = tmp_path / "figures.json"
    threads = torch.get_num_threads()
    train_step.main([*TINY, "--repeats", "5", "--rows", "--json", str(out), "--dataset", str(dataset)])
    assert torch.get_num_threads() == threads
    content = json.loads(out.read_text())
    figures = {(figure["measured"], figure["where"]): figure for figure in content["figures"]}
    assert {measured for measured, _ in figures} == expected_figures()
    measured = content["measured"]
    long = measured["ceiling"][1]["times"]
    share = figures[f"share of the speed with {NO_ATTENTION}, {PROTLM}", "B1 L96"]
    assert share["value"] == pytest.approx(100 * median(long[NO_ATTENTION]["step"]) / median(long[PROTLM]["step"]))
    if HAS_PERFORMER:
        times = measured["malloc"][0]["times"]
        ratio = figures[f"tokens/s of {PROTLM} / {PERFORMER_PEER}, tuned malloc", "B2 L64"]
        assert ratio["value"] == pytest.approx(median(times[PERFORMER_PEER]["step"]) / median(times[PROTLM]["step"]))
        assert ratio["note"].startswith(f"{2 * 64 / median(times[PROTLM]['step']):,.0f} and ")
    data = measured["data"]
    fill = figures["residues among the slots of tokens_per_batch", "tokens_per_batch 128"]
    assert fill["value"] == pytest.approx(100 * sum(data["residues"]) / (3 * 128))
    printed = capsys.readouterr().out.splitlines()
    assert all(name in printed for name in expected_figures())
    rows = [line.split(" | ") for line in printed if line.startswith("| ")]
    assert [row[4].split(f", {content['setup']}")[0] for row in rows] == list(
        dict.fromkeys(name for name, _ in figures)
    )
    for row in rows:
        texts = [f"{where}: {figure['value']:.{digits(figure)}f}{figure['unit']}" for (name, where), figure
                 in figures.items() if row[4].startswith(f"{name}, {content['setup']}")]  # fmt: skip
        assert all(text in row[5] for text in texts)
    header = next(line for line in (ROOT / "scripts/bench/RESULTS.md").read_text().splitlines() if "| date" in line)
    assert {len(row) for row in rows} == {len(header.split(" | "))}


def digits(figure):
    return {" MiB": 0, "%": 1}.get(figure["unit"], 2)


def test_a_measurement_without_its_peer_or_its_dataset_is_left_out_with_a_reason(monkeypatch, tmp_path, capsys):
    absent = {PERFORMER_PEER: "no_such_module", ESM_PEER: "no_such_module"}
    monkeypatch.setattr(train_step_models, "PEER_MODULES", absent)
    out = tmp_path / "figures.json"
    train_step.main([*TINY, "--repeats", "1", "--json", str(out)])
    content = json.loads(out.read_text())
    assert {figure["measured"] for figure in content["figures"]} == OWN
    lines = capsys.readouterr().err.splitlines()
    reason = "cannot be measured here: it needs no_such_module: No module named 'no_such_module'"
    assert lines == [
        *(f"{part}: {reason}" for part in ("performer", "malloc", "esm")),
        *([] if HAS_UNITS else ["half: cannot be measured here: it needs a processor with units for bfloat16"]),
        f"memory: {reason}",
        "data: cannot be measured here: it needs --dataset",
    ]


@pytest.mark.parametrize("fault", ["loss", "gradient", "attention"])
def test_a_wrong_model_ends_the_run_without_a_figure(fault, monkeypatch, capsys, tmp_path):
    reset = Performer.reset

    def wrong(model, seed):
        reset(model, seed)
        if fault == "loss":
            torch.nn.init.constant_(model.final_norm.weight, torch.nan)
        else:
            model.requires_grad_(False)
            model.head.bias.requires_grad_()
            model.head.bias.register_hook(torch.zeros_like)

    if fault == "attention":
        monkeypatch.setitem(train_step_models.LOSSES, NO_ATTENTION, train_step_models.LOSSES[PROTLM])
    else:
        monkeypatch.setattr(Performer, "reset", wrong)
    with pytest.raises(SystemExit) as ended:
        train_step.main([*TINY, "--only", "ceiling", "--json", str(tmp_path / "figures.json")])
    start, reason = {
        "loss": (PROTLM, "the loss is nan"),
        "gradient": (PROTLM, "the gradient's norm 0.0"),
        "attention": (NO_ATTENTION, "attention is still there"),
    }[fault]
    # A message as the code is printed, and the status is 1.
    assert str(ended.value.code).startswith(f"error: {start}: ")
    assert reason in str(ended.value.code)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_all_models_are_scored_at_the_same_positions():
    task = train_step_models.draw_task(3, 50)
    labels = task.labels.flatten()
    assert labels[task.positions].equal(task.targets)
    assert (labels != NO_TARGET).nonzero().squeeze(1).equal(task.positions)
    assert task.cu_seqlens.tolist() == [0, 50, 100, 150]
    hidden = (task.seen.flatten() == train_step_models.MASK).nonzero().squeeze(1)
    assert hidden.equal(task.positions)


def test_a_step_makes_the_loss_smaller_in_every_model():
    task = train_step_models.draw_task(2, 32)
    for name in (PROTLM, PROTLM_CONVOLVED, NO_ATTENTION, PERFORMER_PEER, ESM_PEER):
        if not train_step_models.why_missing(name):
            learner = train_step_models.build(name, SIZES, 32)
            losses = [learner.step(task) for _ in range(20)]
            assert losses[-1] < losses[0], name


def test_attention_is_removed_for_the_loss_alone_and_what_comes_before_it_keeps_its_backward():
    task = train_step_models.draw_task(2, 32)
    gradients, losses = {}, {}
    for name in (NO_ATTENTION, PROTLM):
        learner = train_step_models.build(name, SIZES, 32)
        loss = learner.loss(task)
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = learner.model.layers[0].attention.query.weight.grad
    assert losses[NO_ATTENTION] != losses[PROTLM]
    # Zeros, and not None: the backward of the queries was done.
    assert gradients[NO_ATTENTION].count_nonzero() == 0
    assert gradients[PROTLM].count_nonzero() > 0


@pytest.mark.slow
@pytest.mark.skipif(not can_measure_memory(), reason="this system cannot reset the peak of a process")
def test_a_peak_is_measured_in_a_new_process():
    sizes, length = Sizes(num_layers=2, model_dim=256, num_heads=4, ffn_dim=1024, num_features=16), 2048
    (peak,) = train_step_measurements.peak_bytes([PROTLM], sizes, length).values()
    # Weights and the optimizer's two moments stay; gradients and what the feed-forward keeps do not.
    numbers = train_step_models.build(PROTLM, sizes, length).num_parameters
    assert peak["whole"] - peak["above"] == pytest.approx(3 * 4 * numbers, rel=0.25)
    assert peak["above"] > 4 * sizes.num_layers * length * sizes.ffn_dim


def test_figures_are_ratios_of_medians_with_the_range_of_the_repeats():
    times = {PROTLM: {"step": [1.0, 2.0, 4.0]}, PERFORMER_PEER: {"step": [3.0, 3.0, 3.0]}}
    peaks = {PROTLM: {"whole": 4 * 2**20, "above": 2**20}, PERFORMER_PEER: {"whole": 8 * 2**20, "above": 4 * 2**20}}
    measured = {
        "performer": [{"batch": 4, "length": 100, "times": times}],
        "memory": {"length": 100, "peak_bytes": peaks},
        "data": {"tokens_per_batch": 100, "row_tokens": [80, 60], "residues": [72, 54], "waited": [1.0, 3.0],
                 "seconds": [10.0, 10.0]},
    }  # fmt: skip
    figures = {figure.measured: figure for figure in train_step_figures.figures(measured)}
    ratio = figures[f"tokens/s of {PROTLM} / {PERFORMER_PEER}"]
    assert (ratio.where, ratio.text) == ("B4 L100", "1.50× (0.75–3.00)")
    assert ratio.note == "200 and 133 tokens/s"
    assert figures[f"peak memory with weights and optimizer, {PROTLM} / {PERFORMER_PEER}"].text == "0.50×"
    assert figures[f"peak memory above weights and optimizer, {PROTLM} / {PERFORMER_PEER}"].text == "0.25×"
    assert [figures[name].text for name in sorted(DATA)] == ["63.0%", "90.0%", "20.0%"]
    assert figures["residues among the tokens of the rows"].note == "2 rows of training, each 90.0–90.0 %"
