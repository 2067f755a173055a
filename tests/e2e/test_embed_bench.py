"""The benchmark of embedding, made small: its figures come from its own times, and none after a wrong model."""

import json
import subprocess
from pathlib import Path
from statistics import median

import pytest
import torch

from protlm.model.performer import Performer
from protlm.runtime.devices import has_half_precision_units
from protlm.vocabulary import CLS, EOS, encode
from scripts.bench import embed, embed_figures, embed_measurements, embed_models
from scripts.bench.embed_measurements import BARE, COMMAND, LONG_EXACT_LAYER, LONG_FAVOR, LONG_REST
from scripts.bench.embed_models import ESM_PEER, EXACT, EXACT_HALF, FAIR_PEER, FAVOR, HALF_PEER, PADDED_PEER
from scripts.bench.models import Sizes
from scripts.measuring import can_measure_memory

ROOT = Path(__file__).parents[2]
SIZES = Sizes(num_layers=2, model_dim=16, num_heads=2, ffn_dim=64, num_features=8)
TINY = ["--layers", "2", "--model-dim", "16", "--heads", "2", "--features", "8", "--num-proteins", "5",
        "--pipeline-proteins", "6", "--max-length", "300", "--favor-lengths", "50", "200", "--growth", "6", "9",
        "--tokens-per-batch", "400", "--threads", "1", "--load", "2", "16", "2"]  # fmt: skip
HAS_ESM, HAS_FAIR = (not embed_models.why_missing(name) for name in (ESM_PEER, FAIR_PEER))
PEAK = "peak memory of protlm embed, mean only, a tiny model"
OVERHEAD = f"time of {COMMAND} over that of {BARE}, float16 for each residue"
LOAD = "reading a checkpoint of transformers and embedding a first protein"
LONG = "time with exact SDPA / with FAVOR"


def expected_figures():
    figures = {LONG, OVERHEAD}
    if can_measure_memory():
        figures |= {PEAK, f"{PEAK}: growth", "peak memory above the model"}
    if HAS_ESM:
        figures |= {f"residues/s of {ours} / {ESM_PEER}" for ours in (EXACT, FAVOR)}
        figures |= {f"residues/s of {EXACT} / {PADDED_PEER}"}
        if has_half_precision_units("bf16"):
            figures |= {f"residues/s of {EXACT_HALF} / {peer}" for peer in (ESM_PEER, HALF_PEER)}
        if can_measure_memory():
            figures |= {f"{LOAD}: time of protlm / of transformers", f"{LOAD}: peak memory above the weights"}
    if HAS_FAIR:
        figures |= {f"residues/s of {EXACT} / {FAIR_PEER}"}
    return figures


@pytest.fixture
def in_this_process(monkeypatch):
    """New processes would take longer than all else, and the peaks of an old process mean nothing."""

    def run(_, function, **arguments):
        result = function(**arguments)
        if function is embed_measurements.load_here:
            return result
        return 2**20 * (7 if function is embed_measurements.growth_here else 3)

    monkeypatch.setattr(embed_measurements, "in_a_process", run)


@pytest.fixture
def long_fasta(tmp_path):
    path = tmp_path / "long.fasta"
    path.write_text(f">other\nMKV\n>giant\n{'MKVLAAGH' * 50}\n")
    return ["--long-fasta", str(path), "--long-id", "giant"]


def test_a_tiny_run_reports_every_figure_from_its_own_times(in_this_process, long_fasta, fasta, tmp_path, capsys):
    out = tmp_path / "figures.json"
    threads = torch.get_num_threads()
    embed.main([*TINY, *long_fasta, "--proteins", str(fasta), "--repeats", "5", "--rows", "--json", str(out)])
    assert torch.get_num_threads() == threads
    content = json.loads(out.read_text())
    figures = {figure["measured"]: figure for figure in content["figures"]}
    assert set(figures) == expected_figures()
    measured = content["measured"]
    times = {name: median(repeats["seconds"]) for name, repeats in measured["pipeline"]["times"].items()}
    assert figures[OVERHEAD]["value"] == pytest.approx(100 * times[COMMAND] / times[BARE] - 100)
    if HAS_ESM:
        times = {name: median(repeats["seconds"]) for name, repeats in measured["favor"]["times"].items()}
        ratio = figures[f"residues/s of {FAVOR} / {ESM_PEER}"]
        assert ratio["value"] == pytest.approx(times[ESM_PEER] / times[FAVOR])
        assert ratio["note"].startswith(f"{measured['favor']['residues'] / times[FAVOR]:,.0f} and ")
    assert figures[LONG]["where"] == "giant, 400 residues"
    printed = capsys.readouterr().out.splitlines()
    assert all(name in printed for name in expected_figures())
    rows = [line.split(" | ") for line in printed if line.startswith("| ")]
    assert [row[4].split(f", {content['setup']}")[0] for row in rows] == list(figures)
    header = next(line for line in (ROOT / "scripts/bench/RESULTS.md").read_text().splitlines() if "| date" in line)
    assert {len(row) for row in rows} == {len(header.split(" | "))}


def test_a_measurement_without_its_peer_or_its_protein_is_left_out_with_a_reason(monkeypatch, fasta, tmp_path, capsys):
    monkeypatch.setattr(embed_models, "PEER_MODULES", {ESM_PEER: "no_such_module", FAIR_PEER: "json"})
    monkeypatch.setitem(embed.MODELS, "load", ())
    out = tmp_path / "figures.json"
    only = ["--only", "exact", "extract", "favor", "long", "memory", "pipeline"]
    embed.main([*TINY, *only, "--proteins", str(fasta), "--repeats", "1", "--json", str(out)])
    assert [figure["measured"] for figure in json.loads(out.read_text())["figures"]] == [OVERHEAD]
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be measured" in line]
    missing = "cannot be measured here: it needs no_such_module: No module named 'no_such_module'"
    assert lines[:5] == [
        f"exact: {missing}",
        "extract: cannot be measured here: it needs fair-esm, and another package is called esm here",
        f"favor: {missing}",
        *(f"{part}: cannot be measured here: it needs --long-fasta" for part in ("long", "memory")),
    ]


def test_a_folder_that_is_no_checkout_is_not_timed(fasta, tmp_path, capsys):
    words = ["--only", "earlier", "pipeline", "--earlier", str(tmp_path), "--proteins", str(fasta), "--repeats", "1"]
    embed.main([*TINY, *words])
    told = "earlier: cannot be measured here: it needs --earlier, a checkout of protlm"
    assert told in capsys.readouterr().err.splitlines()


def test_another_checkout_is_timed_in_processes_that_import_it(monkeypatch, fasta, tmp_path):
    checkout, out = tmp_path / "checkout", tmp_path / "figures.json"
    checkout.mkdir()
    (checkout / "scripts").symlink_to(ROOT / "scripts")
    times = iter(range(1, 100))
    jobs = []

    def timed_in(tree, job):
        jobs.append((tree, job["model"]["attention"]))
        return {"seconds": next(times) * (2.0 if tree == checkout else 1.0)}

    job = {
        "model": {"attention": "positive"},
        "sizes": vars(SIZES),
        "sequences": ["MKV"],
        "tokens_per_batch": 100,
        "threads": 1,
    }
    assert embed_measurements.timed_in(ROOT, job)["seconds"] > 0
    # This one has no protlm of its own, and the installed one would be timed.
    with pytest.raises(subprocess.CalledProcessError):
        embed_measurements.timed_in(checkout, job)
    monkeypatch.setattr(embed_measurements, "timed_in", timed_in)
    words = ["--only", "earlier", "--earlier", str(checkout), "--proteins", str(fasta), "--repeats", "5"]
    embed.main([*TINY, *words, "--json", str(out)])
    assert jobs == [(tree, kind) for kind in ("softmax", "positive", "positive") for tree in (ROOT, checkout)] * 6
    content = json.loads(out.read_text())
    figures = {figure["measured"]: figure["value"] for figure in content["figures"]}
    seconds = {name: median(of["seconds"]) for name, of in content["measured"]["earlier"]["times"].items()}
    assert figures == {
        f"residues/s of {name} / {name}, earlier checkout": pytest.approx(
            seconds[f"{name}, earlier checkout"] / seconds[name]
        )
        for name in embed_measurements.COMPARED
    }


@pytest.mark.parametrize("fault", ["not finite", "too few"])
def test_a_wrong_model_ends_the_run_without_a_figure(fault, monkeypatch, fasta, tmp_path, capsys):
    right = Performer.hidden_states

    def wrong(*arguments):
        (layer, states), *_ = right(*arguments).items()
        return {layer: states[2:8] if fault == "too few" else states.log()}

    monkeypatch.setattr(Performer, "hidden_states", wrong)
    monkeypatch.setitem(embed.MODELS, "exact", (EXACT,))
    with pytest.raises(SystemExit) as ended:
        embed.main([*TINY, "--only", "exact", "--proteins", str(fasta), "--json", str(tmp_path / "figures.json")])
    assert str(ended.value.code).startswith(f"error: {EXACT}: expected finite hidden states")
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob("figures*"))


def test_every_model_embeds_every_protein_and_the_packed_rows_keep_to_their_budget():
    sequences = ["MKVL" * 9, "AC", "WYGHD" * 20, "MK"]
    for name in (EXACT, FAVOR, ESM_PEER, PADDED_PEER, FAIR_PEER):
        if not embed_models.why_missing(name):
            states = [state.reshape(-1, SIZES.model_dim) for state in embed_models.build(name, SIZES, 50)(sequences)]
            # Batches of several proteins hold padding too.
            num_tokens = sum(map(len, states))
            expected = sum(len(sequence) + 2 for sequence in sequences)
            assert num_tokens > expected if name in (FAIR_PEER, PADDED_PEER) else num_tokens == expected, name
            if name in (EXACT, FAVOR):
                assert list(map(len, states)) == [4 + 4 + 38, 102]


@pytest.mark.skipif(not HAS_ESM, reason="transformers is not installed")
def test_the_peer_computes_what_our_exact_model_computes_with_the_same_weights(monkeypatch):
    from transformers import EsmModel

    peers = []
    init = EsmModel.__init__

    def noting(peer, *arguments, **options):
        init(peer, *arguments, **options)
        peers.append(peer)

    monkeypatch.setattr(EsmModel, "__init__", noting)
    embed_peer = embed_models.build(ESM_PEER, SIZES, 1)
    model = embed_models.performer(SIZES, "softmax")
    unmatched = model.load_state_dict(weights_of(peers[0]), strict=False)
    assert all(name.startswith("head.") for name in unmatched.missing_keys)
    sequence = "MKVLAWYGHD"
    tokens = torch.tensor([CLS, *encode(sequence.encode()).tolist(), EOS])
    states = model.hidden_states(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), (2,))[2]
    (expected,) = embed_peer([sequence])
    assert (states - expected[0]).abs().max() < 1e-5 * expected.abs().max()


def weights_of(peer):
    """Returns the weights of an EsmModel under our names."""
    names = {
        "embeddings.word_embeddings": "embedding", "encoder.emb_layer_norm_after": "final_norm",
        "encoder.layer": "layers", "attention.self": "attention", "attention.output.dense": "attention.output",
        "attention.LayerNorm": "attention_norm", "intermediate.dense": "ffn_in", "output.dense": "ffn_out",
        "LayerNorm": "ffn_norm",
    }  # fmt: skip
    weights = {}
    for name, tensor in peer.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    return weights


def test_the_bare_passes_are_over_the_rows_of_the_command(monkeypatch, fasta):
    seen = {}
    forward = Performer.hidden_states

    def noting(model, tokens, *rest):
        seen.setdefault(id(model), []).append(tokens.tolist())
        return forward(model, tokens, *rest)

    monkeypatch.setattr(Performer, "hidden_states", noting)
    sequences = embed.drawn(embed.parse([*TINY, "--proteins", str(fasta)]), (1, 300), 8)
    embed_measurements.pipeline(SIZES, sequences, 400, 1)
    rows = list(seen.values())
    residues = sum(map(len, sequences))
    # Warm-up and one repeat of each; the command is warmed up once more, when its rows are noted.
    bare = max(rows, key=len)
    assert len(bare) % 2 == 0
    assert sum(map(len, bare)) == 2 * (residues + 2 * len(sequences))
    assert sorted(bare[: len(bare) // 2]) == sorted(rows[0])


@pytest.mark.skipif(not can_measure_memory(), reason="this system cannot reset the peak of a process")
def test_a_peak_is_measured_in_a_new_process_and_holds_what_the_protein_needs():
    sizes = Sizes(num_layers=2, model_dim=64, num_heads=4, ffn_dim=256, num_features=16)
    length = 20_000
    peak = embed_measurements.peak_above_model(sizes, "MKVLAWYGHD" * (length // 10))
    state = 4 * length * sizes.model_dim
    # The residual stream, q, k, v and what attention makes of them; no tensor as wide as the feed-forward layer.
    assert 4 * state < peak < 10 * state


def test_proteins_of_the_growth_are_as_many_and_as_long_as_asked_for_and_differ():
    proteins = list(embed_measurements._stretches(["MKVLAWYGHD" * 30, "ACDEFGHIKLMNPQRSTVWY" * 40, "short"], 12))
    assert [len(sequence) for sequence in proteins] == [embed_measurements.GROWTH_RESIDUES] * 12
    assert len(set(proteins)) > 6


def test_figures_are_ratios_of_medians_with_the_range_of_the_repeats():
    def seconds(**times):
        return {name: {"seconds": list(map(float, values))} for name, values in times.items()}

    measured = {
        "extract": {"where": "5 proteins", "residues": 600,
                    "times": seconds(**{EXACT: (1, 2, 4), FAIR_PEER: (9, 9, 9)})},
        "long": {"where": "giant", "times": seconds(**{LONG_FAVOR: (2, 2, 1), LONG_REST: (1, 1, 1),
                                                       LONG_EXACT_LAYER: (10, 12, 14)})},
        "memory": {"where": "giant", "peak_bytes": 5 * 2**20},
        "pipeline": {"where": "6 proteins", "times": seconds(**{COMMAND: (11, 12, 12), BARE: (10, 10, 8)})},
        "growth": {"peak_bytes": {"10000": [300 * 2**20, 302 * 2**20, 301 * 2**20],
                                  "40000": [305 * 2**20, 301 * 2**20, 303 * 2**20]}},
    }  # fmt: skip
    figures = {(figure.measured, figure.where): figure for figure in embed_figures.figures(measured, SIZES)}
    assert {key: figure.text for key, figure in figures.items()} == {
        (f"residues/s of {EXACT} / {FAIR_PEER}", "5 proteins"): "4.50× (2.25–9.00)",
        # 1 + 2 layers · 12, over 2.
        (LONG, "giant"): "12.50× (10.50–29.00)",
        ("peak memory above the model", "giant"): "5 MiB",
        (OVERHEAD, "6 proteins"): "20.0% (10.0–50.0)",
        (PEAK, "10,000 proteins"): "301 MiB (300–302)",
        (PEAK, "40,000 proteins"): "303 MiB (301–305)",
        (f"{PEAK}: growth", "from 10,000 to 40,000 proteins"): "2 MiB (-1–5)",
    }
    assert figures[f"residues/s of {EXACT} / {FAIR_PEER}", "5 proteins"].note == "300 and 67 residues/s"
