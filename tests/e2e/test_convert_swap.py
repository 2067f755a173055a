"""protlm convert --attention by its real command: what it writes and reports, who takes that, and what it refuses."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import protlm
from protlm.cli.app import main
from protlm.config import ModelConfig
from protlm.inference.replaced_attention import exact_attention
from protlm.model.performer import Performer
from protlm.pretrained import model_names
from protlm.pretrained.model_description import ModelDescription, Origin
from protlm.pretrained.model_directory import read_model, save_model
from protlm.workflows.convert import cost
from protlm.workflows.convert import proteins as convert_proteins
from protlm.workflows.convert.proteins import sample_proteins
from tests.e2e.conftest import SMALL, write_fasta
from tests.e2e.test_fail_fast import assert_refused
from tests.e2e.train_tools import train
from tests.foreign_checkpoint import write_checkpoint

EXACT = ("--set", "model.attention=softmax", "--max-steps", 2)


@pytest.fixture(scope="module")
def exact_run(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("exact") / "run"
    assert train(dataset, run, *EXACT) == 0
    return run


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("proteins")
    return [
        write_fasta(
            folder / name,
            [(f"p{n}", "".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60))) for n in range(40)],
        )
        for name in ("some.fasta", "others.fasta")
    ]


@pytest.fixture(autouse=True)
def _short_proteins_for_the_cost(monkeypatch):
    monkeypatch.setattr(cost, "LENGTHS", (20, 50))


def convert(*words):
    return main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def swapped(exact_run, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("swapped") / "model"
    words = ("--attention", "positive", "--num-features", 32, "--near-block", 8, "--calibrate", samples[0])
    assert convert(exact_run, "--out", out, *words) == 0
    return out


def test_the_report_has_every_part_and_the_model_says_what_it_was_made_of(
    exact_run, samples, swapped, tmp_path, capsys
):
    out = tmp_path / "model"
    words = ["--attention", "positive", "--num-features", 32, "--near-block", 8, "--calibrate", samples[0]]
    assert convert(exact_run, "--out", out, *words, "--report", samples[1], "--json") == 0
    report = json.loads(capsys.readouterr().out)["swap"]
    assert (report["calibrated_on"], report["measured_on"], report["num_shared"]) == (40, 40, 0)
    assert [each["name"] for each in report["scores"]] == ["exact", "swapped", "near only", "far only"]
    assert len({each["kl"] for each in report["scores"]}) == 4
    grid = {(each["num_features"], each["near_block"]) for each in report["grid"]}
    assert grid == {(m, w) for m in (16, 32, 64) for w in (0, 4, 8, 16)} - {(32, 8)}
    for costs in (report["exact_costs"], report["costs"]):
        assert [each["length"] for each in costs] == [20, 50]
        assert all(0 < each["seconds"] < 30 for each in costs)
    assert re.match(r"The swapped model keeps \d+\.\d% \(95 % interval .* near field alone keeps", report["verdict"])
    # The proteins of the report do not change the model.
    first, second = (folder / "model.safetensors" for folder in (out, swapped))
    assert first.read_bytes() == second.read_bytes()
    _, description = read_model(out)
    assert description.swap.model_dump() == {
        "weights_hash": read_model(exact_run)[1].weights_hash, "attention": "positive", "num_features": 32,
        "near_block": 8, "balance": "dense", "num_proteins": 40, "seed": 0,
    }  # fmt: skip
    assert description.valid is None
    card = (out / "README.md").read_text()
    assert "made of a model with exact attention by `protlm convert`" in card
    assert "32 of the map `positive` beside the exact weights of near tokens (blocks of 8)" in card
    assert f"`{description.swap.weights_hash}`" in card


def test_the_summary_has_tables_and_a_verdict(exact_run, samples, tmp_path, capsys):
    words = ["--attention", "hyperbolic", "--near-block", 0, "--calibrate", samples[0], "--report", samples[0]]
    assert convert(exact_run, "--out", tmp_path / "model", *words) == 0
    out = capsys.readouterr().out
    assert re.search(r"^attention +features +block +accuracy", out, re.MULTILINE)
    assert re.search(r"^swapped +256 +0 +\d\.\d{3} ", out, re.MULTILINE)
    assert re.search(r"^one pass +exact, s +MiB +swapped, s +MiB$", out, re.MULTILINE)
    assert "Hidden residues, proteins: 40; of these in the calibration: 40." in out
    assert "near field alone" not in out


def test_weights_stay_but_for_the_balance(exact_run, samples, tmp_path):
    words = ["--attention", "oprf", "--balance", "none"]
    assert convert(exact_run, "--out", tmp_path / "model", *words) == 0
    (exact, _), (model, description) = read_model(exact_run), read_model(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in exact.state_dict().items())
    assert description.swap.num_proteins == 0
    protein = protlm.load_model(tmp_path / "model")
    with exact_attention(protein._model):
        (again,) = protein.logits(["MKVLAAGHWQ"])
    (expected,) = protlm.load_model(exact_run).logits(["MKVLAAGHWQ"])
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-5)


def test_every_command_takes_the_result(swapped, dataset, samples, tmp_path, capsys, failure):
    out = tmp_path / "out"
    assert (
        main([str(word) for word in ("eval", swapped, dataset, "--split", "test", "--out", out, "--approximation")])
        == 0
    )
    report = json.loads((out / "report.json").read_text())
    approximation = report["approximation"]
    assert [each["name"] for each in approximation["swap"]] == ["exact", "swapped", "near only", "far only"]
    assert approximation["swap"][1]["kl"] > 0
    scores = approximation["scores"]
    assert approximation["swap"][0]["accuracy"]["value"] == pytest.approx(scores["exact"]["accuracy"])
    assert scores["near_only"]["perplexity"] != scores["far_only"]["perplexity"] != scores["saved"]["perplexity"]
    page = (out / "report.html").read_text()
    assert "the exact weights of near tokens alone" in page
    assert "the mean divergence of the predictions in nats" in page
    assert main([str(word) for word in ("embed", swapped, samples[1], "--out", tmp_path / "e.h5")]) == 0
    words = ("score", swapped, samples[1], "--wild-type", "p0", "--all-singles", "--strategy", "wt-marginals")
    assert main([str(word) for word in (*words, "--out", tmp_path / "s.csv")]) == 0
    tuned = tmp_path / "tuned"
    words = ("train", dataset, "--out", tuned, "--init", swapped, *SMALL_DATA, "--max-steps", 2)
    assert main([str(word) for word in words]) == 0
    _, description = read_model(tuned)
    assert description.swap == read_model(swapped)[1].swap
    assert "made of a model with exact attention" in (tuned / "model" / "README.md").read_text()
    assert main(["inspect", str(swapped)]) == 0
    assert "32 features, positive, near block 8, balance dense" in capsys.readouterr().out
    line = failure("convert", swapped, "--out", tmp_path / "hf", "--to", "hf")
    assert "attention = 'near-far'" in line
    line = failure("convert", swapped, "--out", tmp_path / "again", "--attention", "positive", "--balance", "none")
    assert "has no exact attention over whole proteins to swap, but near-far" in line


SMALL_DATA = [
    word
    for number, word in enumerate(SMALL)
    if not (word.startswith("model.") or (word == "--set" and SMALL[number + 1].startswith("model.")))
]


def test_a_model_of_another_program_keeps_origin_and_licence(samples, tmp_path):
    source = write_checkpoint(tmp_path / "source")
    words = ["--attention", "positive", "--balance", "diagonal", "--calibrate", samples[0]]
    assert convert(source, "--out", tmp_path / "model", *words) == 0
    _, description = read_model(tmp_path / "model")
    assert description.origin.source == "source"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "made of a model with exact attention" in card
    assert "but for rounding" not in card


def test_calibration_on_too_little_or_on_no_proteins_is_one_line(exact_run, tmp_path, failure, capsys):
    def refusal(content, *more):
        path = tmp_path / "c.fasta"
        path.write_text(content)
        words = ("convert", exact_run, "--out", tmp_path / "model", "--attention", "positive", "--calibrate", path)
        line = failure(*words, *more)
        assert not (tmp_path / "model").exists()
        return line

    assert "c.fasta:1: no records: expected protein FASTA" in refusal("\n")
    assert "c.fasta:2: record 'a': illegal character" in refusal(">a\nM1K\n")
    assert "c.fasta:1: record 'd' is a nucleic acid" in refusal(">d\n" + "ACGT" * 50 + "\n")
    assert "c.fasta: 3 residues are too few to balance heads of" in refusal(">a\nMKV\n")
    one = write_fasta(tmp_path / "one.fasta", [("a", "MKVLAAGHWQEDRSTYPFNICMKVLAAG" * 4)])
    words = ("--attention", "positive", "--calibrate", one)
    assert convert(exact_run, "--out", tmp_path / "model", *words) == 0
    assert "warning: proteins of the calibration: 1, fewer than 32" in capsys.readouterr().err
    other = tmp_path / "r.fasta"
    other.write_text("\n")
    line = failure("convert", exact_run, "--out", tmp_path / "m", *words, "--report", other)
    assert "r.fasta:1: no records" in line
    assert not (tmp_path / "m").exists()


def test_proteins_that_the_model_cannot_read_are_one_line_and_nothing_kept_is_said(tmp_path, failure, capsys):
    tokens = ("<cls>", "<pad>", "<eos>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>")
    model = Performer(ModelConfig(attention="softmax", num_layers=1, vocabulary=tokens))
    model.reset(0)
    origin = Origin(source="lab", family="test", files={})
    save_model(tmp_path / "exact", model, ModelDescription(model=model.config, mask_rate=0.15, origin=origin))
    unknown = write_fasta(tmp_path / "x.fasta", [("a", "MK" + "X" * 90), ("b", "X" * 50)])
    good = write_fasta(tmp_path / "good.fasta", [("a", "MKVLAAGHWQEDRSTYPFNIC" * 9)])
    words = ("convert", tmp_path / "exact", "--out", tmp_path / "model", "--attention", "positive", "--calibrate")
    assert "x.fasta: the model has no token for 140 of the 142 residues" in failure(*words, unknown)
    assert "x.fasta: the model has no token for 140" in failure(*words, good, "--report", unknown)
    assert not (tmp_path / "model").exists()
    # A single hidden residue that is not predicted: there is nothing to keep, and the JSON is strict.
    few = [write_fasta(tmp_path / f"{letter}.fasta", [("a", letter)]) for letter in "ACDEFGHIKLMNPQRSTVWY"]
    capsys.readouterr()
    reports = []
    for path in few[:3]:
        assert main([str(word) for word in (*words, good, "--report", path, "--json", "--force")]) == 0
        reports.append(json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["swap"])
    (unknown, *_) = (each for each in reports if each["scores"][0]["accuracy"]["value"] == 0)
    assert unknown["scores"][1]["kept"] is None
    assert unknown["verdict"] == (
        "Exact attention is right at none of the hidden residues, so there is nothing to keep."
    )


def test_long_proteins_are_cut_and_the_grid_ends_where_models_do(exact_run, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_proteins, "_LONGEST", 40)
    words = ["--attention", "positive", "--near-block", 10_000, "--num-features", 8, "--calibrate", samples[0]]
    assert convert(exact_run, "--out", tmp_path / "model", *words, "--report", samples[1]) == 0
    out = capsys.readouterr().out
    assert "Of longer proteins only the beginning was taken: 80." in out
    assert re.search(r"^swapped +16 +5000 ", out, re.MULTILINE)
    assert " 20000 " not in out


def test_models_without_exact_attention_and_wrong_numbers_are_one_line(run_dir, exact_run, tmp_path, failure):
    words = ("--out", tmp_path / "model", "--attention", "positive", "--balance", "none")
    assert "to swap, but local,positive,local" in failure("convert", run_dir, *words)
    line = failure("convert", exact_run, *words, "--num-features", 10**7)
    assert "num_features: input should be less than or equal to" in line
    assert "got 10000000" in line


def test_wrong_usage_is_told_before_torch_is_loaded(exact_run, samples, tmp_path):
    out = ("--out", tmp_path / "model")
    swap = ("convert", exact_run, *out, "--attention", "positive")
    assert_refused(
        [
            ((*swap,), "--calibrate: give proteins of the kind"),
            ((*swap, "--balance", "none", "--calibrate", samples[0]), "of no use with --balance none"),
            ((*swap, "--calibrate", "no.fasta"), "no.fasta: no such file"),
            ((*swap, "--calibrate", samples[0], "--report", tmp_path), "a folder; expected a protein file"),
            ((*swap, "--calibrate", "-", "--report", "-"), "can be read only once"),
            ((*swap, "--calibrate", samples[0], "--to", "hf"), "leave --to hf out"),
            ((*swap, "--balance", "full"), "--balance"),
            ((*swap, "--near-block", -1), "--near-block"),
            (("convert", exact_run, *out, "--calibrate", samples[0]), "--calibrate is for a swap of the attention"),
            (("convert", exact_run, *out, "--report", samples[0]), "--report is for a swap of the attention"),
            (("convert", exact_run, *out, "--attention", "relu"), "--attention"),
            *(
                (("convert", exact_run, *out, *words), f"{words[0]} is for a swap of the attention")
                for words in (("--balance", "none"), ("--num-features", 8), ("--near-block", 4))
            ),
        ],
        tmp_path,
    )


def test_every_protein_is_as_likely_to_be_in_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_proteins, "MOST_PROTEINS", 5)
    path = write_fasta(tmp_path / "p.fasta", [(f"p{n}", "M" * (n + 1)) for n in range(20)])

    def sample(seed):
        return sample_proteins(path, "--calibrate", None, seed, lambda *_: lambda _: None)

    counts = np.zeros(20)
    for seed in range(400):
        chosen = sample(seed)
        assert (len(chosen), chosen.num_read, chosen.num_cut) == (5, 20, 0)
        # In the order of the file, without repetition.
        assert (np.diff(chosen.lengths) > 0).all()
        counts[chosen.lengths - 1] += 1
    # Binomial with mean 100 and standard deviation 8.7.
    assert 60 < counts.min() < counts.max() < 140
    assert sample(3).lengths.tolist() == sample(3).lengths.tolist()
    cut = sample_proteins(path, "--calibrate", 4, 0, lambda *_: lambda _: None)
    assert cut.lengths.max() == 4
    assert cut.num_cut == (sample(0).lengths > 4).sum()


def test_a_pass_that_does_not_end_is_not_waited_for(exact_run, monkeypatch):
    monkeypatch.setattr(cost, "MOST_SECONDS", 0)
    (first, _) = cost.measure_costs(exact_run, None)
    assert (first.length, first.outcome, first.seconds, first.peak_bytes) == (20, "time", None, None)


def test_a_pass_that_lacks_memory_is_told_as_that(exact_run, monkeypatch):
    calls, sent = [], []

    def network(tokens, cu_seqlens):
        calls.append(len(tokens))
        if len(tokens) > 100:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model_names, "read_named_model", lambda _: (network, None))
    cost._measure(SimpleNamespace(send=sent.append), "model", 500)
    assert (calls, sent) == ([66, 502], ["loaded", None])
    answers = iter(sent)

    class Context:
        def Pipe(self, *, duplex):  # noqa: N802  as multiprocessing has it
            return SimpleNamespace(poll=lambda _: True, recv=lambda: next(answers)), SimpleNamespace(close=list)

        def Process(self, **_):  # noqa: N802  likewise
            return SimpleNamespace(start=list, kill=list, join=list)

    monkeypatch.setattr(cost.multiprocessing, "get_context", lambda _: Context())
    assert cost._cost("model", 500) == cost.Cost(length=500, outcome="memory", seconds=None, peak_bytes=None)
