"""protlm score by its real command: what the table holds, what is told of it, and what is refused."""

import csv
import io
import json
import math
import os
import re

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

import protlm
from protlm.cli.app import main
from protlm.data.mutations import mutated, parse_mutant
from protlm.inference.blosum import blosum62_score
from protlm.vocabulary import RESIDUES
from tests.e2e.conftest import write_fasta

PROTEIN = "MKVLAAGHWQEDRSTYPFNICMKVLAAG"
ASSAYS = {
    # Two assays of one function of one protein, and one of another function.
    "A_first.csv": ("A", "Stability", PROTEIN),
    "A_second.csv": ("A", "Stability", PROTEIN),
    "B_third.csv": ("B", "Binding", "MSTNPKPQRKTKRNTNRRPQDVKFPGGGQI"),
}


@pytest.fixture(scope="module")
def model(run_dir):
    return protlm.load_model(run_dir)


@pytest.fixture
def protein(tmp_path):
    return write_fasta(tmp_path / "protein.fasta", [("wt", PROTEIN)])


def score(*arguments):
    return main(["score", *map(str, arguments)])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path, columns, values, separator=","):
    path.write_text("\n".join(separator.join(map(str, row)) for row in [columns, *values]) + "\n")
    return path


def some_mutants(protein, number, seed=0):
    generator = np.random.default_rng(seed)
    places = generator.integers(len(protein), size=number)
    letters = generator.choice(list(RESIDUES[:20]), size=number)
    return [f"{protein[p]}{p + 1}{letter}" for p, letter in zip(places, letters, strict=True)]


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals", "pseudo-perplexity"])
def test_the_table_keeps_the_columns_and_adds_the_scores_of_the_library(strategy, model, run_dir, protein, tmp_path):
    mutants = ["M24A", "K25R:A28C", "M24A", "A50W"]
    given = table(tmp_path / "m.tsv", ["note", "mutant", "x"], [[f"n {m}", m, 1] for m in mutants], "\t")
    out = tmp_path / "s.csv"
    options = ["--strategy", strategy, "--offset", 23, "--tokens-per-batch", 70]
    assert score(run_dir, protein, "--mutations", given, "--out", out, *options) == 0
    written = rows(out)
    assert list(written[0]) == ["note", "mutant", "x", "score", "blosum62"]
    assert [row["note"] for row in written] == [f"n {m}" for m in mutants]
    expected = model.score(PROTEIN, mutants, strategy, offset=23)
    np.testing.assert_allclose([float(row["score"]) for row in written], expected, atol=2e-5)
    baseline = [blosum62_score(parse_mutant(mutant, PROTEIN, 23)) for mutant in mutants]
    assert [float(row["blosum62"]) for row in written] == baseline
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_every_single_mutant_of_every_protein_and_a_picture(model, run_dir, protein, tmp_path, capsys):
    out, picture = tmp_path / "s.csv", tmp_path / "s.svg"
    assert score(run_dir, protein, "--all-singles", "--out", out, "--heat-map", picture, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    written = rows(out)
    assert report["num_variants"] == len(written) == 19 * len(PROTEIN)
    assert report["num_passes"] == len(PROTEIN)
    assert picture.read_text().startswith("<?xml")
    assert len({row["mutant"] for row in written}) == len(written)
    expected = model.score(PROTEIN, [row["mutant"] for row in written])
    np.testing.assert_allclose([float(row["score"]) for row in written], expected, atol=2e-5)
    agreement = scipy.stats.spearmanr(expected, [float(row["blosum62"]) for row in written])[0]
    assert report["assays"][0]["agreement"]["blosum62"] == pytest.approx(agreement, abs=1e-3)
    two = write_fasta(tmp_path / "two.fasta", [("a", PROTEIN), ("a", PROTEIN[:5] + "X")])
    assert score(run_dir, two, "--all-singles", "--strategy", "wt-marginals", "--out", tmp_path / "two.csv") == 0
    by_id = [row["id"] for row in rows(tmp_path / "two.csv")]
    assert (by_id.count("a"), by_id.count("a#2")) == (19 * len(PROTEIN), 19 * 5)
    captured = capsys.readouterr()
    assert "left out positions whose residue is none of the 20 standard ones: 1" in captured.err


def test_mutants_from_or_to_an_unknown_residue_are_counted_and_warned_of(run_dir, tmp_path, capsys):
    protein = write_fasta(tmp_path / "p.fasta", [("wt", "MKXVL")])
    given = table(tmp_path / "m.csv", ["mutant"], [["X3A"], ["M1A"], ["M1U"]])
    assert score(run_dir, protein, "--mutations", given, "--out", tmp_path / "s.csv") == 0
    captured = capsys.readouterr()
    assert "warning: some mutants replace, or put in, a residue such as X" in captured.err
    assert "from or to a residue other than the 20 standard ones: 2" in captured.out
    assert score(run_dir, protein, "--mutations", table(given, ["mutant"], [["M1A"]]), "--out", tmp_path / "t.csv") == 0
    assert capsys.readouterr().err == ""


def test_a_table_that_was_scored_can_be_scored_by_another_model(run_dir, protein, tmp_path, capsys):
    given = table(tmp_path / "m.csv", ["mutant", "DMS_score"], [[f"M1{letter}", n] for n, letter in enumerate("ACDE")])
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    assert score(run_dir, protein, "--mutations", given, "--out", first) == 0
    words = [run_dir, protein, "--mutations", first, "--out", second, "--column", "second", "--json"]
    capsys.readouterr()
    assert score(*words) == 0
    # What is told of the baseline follows from it, and not from the column of that name.
    assert "blosum62" in json.loads(capsys.readouterr().out)["assays"][0]["metrics"]
    assert list(rows(second)[0]) == ["mutant", "DMS_score", "score", "blosum62", "second"]
    kept = [[row[name] for name in ("score", "blosum62")] for row in rows(second)]
    assert kept == [[row[name] for name in ("score", "blosum62")] for row in rows(first)]
    assert [row["second"] for row in rows(second)] == [row["score"] for row in rows(first)]


def test_most_rows_decide_on_the_protein_of_a_table(run_dir, tmp_path, failure, capsys):
    good = [
        [f"{letter}{place}W", PROTEIN[: place - 1] + "W" + PROTEIN[place:]] for place, letter in ((1, "M"), (2, "K"))
    ]
    bad = ["L4A", "MKVWA"]
    path = table(tmp_path / "a.csv", ["mutant", "mutated_sequence"], [["", PROTEIN[:9]], bad, *good])
    words = (run_dir, path, "--out", tmp_path / "s.csv")
    assert "a.csv:2: has insertions or deletions" in failure("score", *words)
    assert score(*words, "--on-bad-record", "skip") == 0
    assert "skipped bad_row: 2" in capsys.readouterr().err
    assert [row["mutant"] for row in rows(tmp_path / "s.csv")] == ["M1W", "K2W"]


def test_tables_that_are_no_assays_are_left_out_of_a_benchmark_if_that_is_asked_for(assays, run_dir, tmp_path, capsys):
    folder, _ = assays
    table(folder / "foreign.csv", ["id", "x"], [["a", 1]])
    (folder / "nothing.csv").write_bytes(b"")
    table(folder / "no_protein.csv", ["mutant", "DMS_score"], [["M1A", 1]])
    out = tmp_path / "out"
    assert score(run_dir, folder, "--out", out) == 1
    assert "foreign.csv: expected a column mutant or mutated_sequence" in capsys.readouterr().err
    assert score(run_dir, folder, "--out", out, "--on-bad-record", "skip", "--json") == 0
    captured = capsys.readouterr()
    left_out = [line for line in captured.err.splitlines() if line.endswith("; left out")]
    assert sorted(re.search(r"\w+\.(csv|txt)", line)[0] for line in left_out) == [
        "foreign.csv", "no_protein.csv", "notes.txt", "nothing.csv",
    ]  # fmt: skip
    assert [assay["name"] for assay in json.loads(captured.out)["assays"]] == list(ASSAYS)


def test_ids_and_mutants_of_any_length_and_fields_of_any_content_are_kept(run_dir, tmp_path):
    # Longer than the fields that the CSV reader of Python takes.
    sequence = PROTEIN * 800
    name = "x" * 140_000
    given = write_fasta(tmp_path / "v.fasta", [("wt", sequence), (name, sequence[1:] + sequence[:1])])
    out = tmp_path / "s.csv"
    csv.field_size_limit(10_000_000)
    try:
        assert score(run_dir, given, "--wild-type", "wt", "--strategy", "wt-marginals", "--out", out) == 0
        (row,) = rows(out)
    finally:
        csv.field_size_limit(131_072)
    assert row["id"] == name
    assert row["mutant"].count(":") > 18_000
    protein = write_fasta(tmp_path / "p.fasta", [("wt", PROTEIN)])
    table = tmp_path / "m.csv"
    table.write_bytes(b'mutant,note\nM1A,"a\rb"\nM1C,"c\nd"\nM1D,"e""f,g"\n')
    assert score(run_dir, protein, "--mutations", table, "--out", tmp_path / "t.csv") == 0
    with (tmp_path / "t.csv").open(newline="") as file:
        assert [row["note"] for row in csv.DictReader(file)] == ["a\rb", "c\nd", 'e"f,g']


def test_a_name_that_is_no_utf8_is_written_as_escapes(assays, run_dir, tmp_path):
    folder, _ = assays
    try:
        (folder / "A_first.csv").rename(os.fsdecode(bytes(folder) + b"/\xff.csv"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert score(run_dir, folder, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "scores" / "\\xff.csv").exists()


def test_a_scan_of_one_id_takes_the_first_record_of_it(run_dir, tmp_path, capsys):
    two = write_fasta(tmp_path / "two.fasta", [("b", "MKV"), ("a", "MK"), ("a", PROTEIN)])
    words = ["--all-singles", "--wild-type", "a", "--out", tmp_path / "s.csv", "--heat-map", tmp_path / "h.png"]
    assert score(run_dir, two, *words) == 0
    assert len(rows(tmp_path / "s.csv")) == 38


def test_no_picture_is_made_of_multiple_mutants_alone(run_dir, protein, tmp_path, capsys):
    given = table(tmp_path / "m.csv", ["mutant"], [["M1A:K2A"]])
    words = [run_dir, protein, "--mutations", given, "--out", tmp_path / "s.csv", "--heat-map", tmp_path / "h.png"]
    assert score(*words) == 0
    assert "h.png: not made, as no row is a single substitution" in capsys.readouterr().err
    assert not (tmp_path / "h.png").exists()


def test_a_type_of_function_without_a_metric_is_printed(assays, run_dir, tmp_path, capsys):
    folder, reference = assays
    # Fewer than ten variants have no NDCG.
    path = folder / "B_third.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:9]) + "\n")
    assert score(run_dir, folder, "--reference", reference, "--out", tmp_path / "out") == 0
    assert "model, Binding" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmark"]["by_function"]["Binding"]["model"]["ndcg"] is None
    assert summary["benchmark"]["by_function"]["Stability"]["model"]["ndcg"] is not None


def test_the_seed_is_that_of_the_intervals(run_dir, tmp_path, capsys):
    generator = np.random.default_rng(1)
    path, _, _ = proteingym_file(tmp_path, "a.csv", PROTEIN, lambda m: generator.standard_normal(len(m)), size=60)
    told = []
    for seed in (0, 0, 1):
        assert score(run_dir, path, "--out", tmp_path / "s.csv", "--seed", seed, "--force", "--json") == 0
        told.append(json.loads(capsys.readouterr().out)["assays"][0]["metrics"]["model"]["spearman"])
    assert told[0] == told[1] != told[2]
    assert told[0]["value"] == told[2]["value"]


def test_variants_in_a_protein_file_with_insertions_and_deletions(model, run_dir, tmp_path, failure):
    sequences = [("first", PROTEIN[:3] + "W" + PROTEIN[4:]), ("wt", PROTEIN), ("gone", PROTEIN[:9] + PROTEIN[10:]),
                 ("more", PROTEIN[:9] + "GG" + PROTEIN[9:]), ("same", PROTEIN)]  # fmt: skip
    given = write_fasta(tmp_path / "v.fasta", sequences)
    out = tmp_path / "s.csv"
    line = failure("score", run_dir, given, "--wild-type", "wt", "--out", out)
    assert "v.fasta:5: record 'gone' has insertions or deletions, which only --strategy pseudo-perplexity" in line
    assert score(run_dir, given, "--wild-type", "wt", "--out", out, "--strategy", "pseudo-perplexity") == 0
    written = rows(out)
    assert [(row["id"], row["mutant"]) for row in written] == [
        ("first", "L4W"), ("gone", ""), ("more", ""), ("same", ""),
    ]  # fmt: skip
    wild_type, *others = (
        math.log(value) for value in model.pseudo_perplexity([PROTEIN, *(s for n, s in sequences if n != "wt")])
    )
    expected = [wild_type - each for each in others]
    np.testing.assert_allclose([float(row["score"]) for row in written], expected, atol=2e-5)
    assert [row["blosum62"] for row in written] == ["-6", "", "", "0"]
    assert score(run_dir, given, "--wild-type", "wt", "--out", out, "--on-bad-record", "skip", "--force") == 0
    assert [row["id"] for row in rows(out)] == ["first", "same"]


def test_what_is_skipped_in_a_file_that_is_read_twice_is_counted_once(run_dir, tmp_path, capsys):
    given = tmp_path / "v.fasta"
    given.write_text(f">bad\nM1\n>wt\n{PROTEIN.lower()}\n>v\nA{PROTEIN[1:]}\n")
    words = (run_dir, given, "--wild-type", "wt", "--out", tmp_path / "s.csv", "--on-bad-record", "skip", "--json")
    assert score(*words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rejects"], report["repairs"]) == ({"illegal_character": 1}, {"lower_case": len(PROTEIN)})


def proteingym_file(folder, name, protein, measured, size=40, seed=0):
    """Writes an assay as the benchmark has them; `measured` gives the measurements of its mutants."""
    mutants = [m for m in some_mutants(protein, size, seed) if m[0] != m[-1]]
    mutants = list(dict.fromkeys(mutants))
    values = np.asarray(measured(mutants))
    is_fit = (values > np.median(values)).astype(int)
    sequences = [mutated(protein, parse_mutant(mutant, protein)) for mutant in mutants]
    columns = ["mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"]
    return table(folder / name, columns, zip(mutants, sequences, values, is_fit, strict=True)), mutants, values


def test_an_assay_of_a_known_function_has_the_known_spearman(model, run_dir, tmp_path, capsys):
    """The measurement is the model's own score cubed, with the sign turned: Spearman −1."""
    path, mutants, _ = proteingym_file(tmp_path, "a.csv", PROTEIN, lambda m: -(model.score(PROTEIN, m) ** 3))
    assert score(run_dir, path, "--out", tmp_path / "s.csv", "--json") == 0
    (assay,) = json.loads(capsys.readouterr().out)["assays"]
    # Scores that differ by rounding may change places.
    assert assay["metrics"]["model"]["spearman"]["value"] == pytest.approx(-1, abs=1e-3)
    assert assay["metrics"]["model"]["auc"]["value"] == pytest.approx(0, abs=1e-2)
    assert assay["num_measured"] == assay["num_variants"] == len(mutants)
    assert assay["fit_by"] == "DMS_score_bin"
    assert assay["protein"] == "a"


def test_the_best_baseline_is_told_when_it_wins(run_dir, tmp_path, capsys):
    def by_blosum(mutants):
        return [blosum62_score(parse_mutant(mutant, PROTEIN)) for mutant in mutants]

    path, _, _ = proteingym_file(tmp_path, "a.csv", PROTEIN, by_blosum, size=200)
    assert score(run_dir, path, "--out", tmp_path / "s.csv") == 0
    out = capsys.readouterr().out
    assert "The model predicts the measurements worse than BLOSUM62 does: a Spearman of " in out
    assert re.search(r"^BLOSUM62 +1\.000 ", out, re.MULTILINE)


@pytest.fixture
def assays(tmp_path):
    """Three assays by hand, two types of function; returns the folder, and the reference file."""
    folder = tmp_path / "assays"
    folder.mkdir()
    generator = np.random.default_rng(3)
    for number, (name, (_, _, protein)) in enumerate(ASSAYS.items()):
        proteingym_file(folder, name, protein, lambda m: generator.standard_normal(len(m)).round(3), 60, number)
    (folder / "notes.txt").write_text("mine")
    reference = tmp_path / "reference.csv"
    columns = ["DMS_id", "DMS_filename", "UniProt_ID", "target_seq", "coarse_selection_type"]
    table(
        reference, columns, [(name[:-4], name, *ASSAYS[name][:1], ASSAYS[name][2], ASSAYS[name][1]) for name in ASSAYS]
    )
    return folder, reference


def test_a_folder_of_assays_aggregates_by_the_rule_of_the_benchmark(assays, run_dir, model, tmp_path, capsys):
    folder, reference = assays
    out = tmp_path / "out"
    assert score(run_dir, folder, "--reference", reference, "--out", out, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "notes.txt: no table .csv or .tsv; left out" in captured.err
    spearmans = {}
    for name, (_, _, protein) in ASSAYS.items():
        given = rows(folder / name)
        scores = model.score(protein, [row["mutant"] for row in given])
        spearmans[name] = scipy.stats.spearmanr(scores, [float(row["DMS_score"]) for row in given])[0]
        np.testing.assert_allclose([float(row["score"]) for row in rows(out / "scores" / name)], scores, atol=2e-5)
    first, second, third = spearmans.values()
    # Both assays of protein A first, then the types of function.
    expected = ((first + second) / 2 + third) / 2
    assert report["benchmark"]["rule"] == "types"
    assert report["benchmark"]["metrics"]["model"]["spearman"]["value"] == pytest.approx(expected, abs=1e-3)
    assert report["benchmark"]["by_function"]["Binding"]["model"]["spearman"] == pytest.approx(third, abs=1e-3)
    assert {path.name for path in out.iterdir()} == {"scores", "assays.csv", "summary.json"}
    assert json.loads((out / "summary.json").read_text()) == report
    listed = rows(out / "assays.csv")
    assert [row["assay"] for row in listed] == list(ASSAYS)
    assert [float(row["model/spearman"]) for row in listed] == pytest.approx(list(spearmans.values()), abs=1e-3)
    # Without the reference file each assay counts once, and its protein follows from its rows.
    assert score(run_dir, folder, "--out", out, "--force", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"]["rule"] == "assays"
    mean = np.mean(list(spearmans.values()))
    assert report["benchmark"]["metrics"]["model"]["spearman"]["value"] == pytest.approx(mean, abs=1e-3)


def test_only_assays_of_the_reference_file_are_scored(assays, run_dir, tmp_path, capsys):
    folder, reference = assays
    reference.write_text("".join(reference.read_text().splitlines(keepends=True)[:3]))
    assert score(run_dir, folder, "--reference", reference, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "B_third.csv: not in " in captured.err
    assert "mean over types of function" in captured.out
    assert "A_second.csv" in captured.out


def test_an_alignment_gives_a_second_baseline(run_dir, protein, tmp_path):
    stretch = PROTEIN[3:12]
    others = [stretch[:2] + "W" + stretch[3:], "-" * 4 + "aaa" + stretch[4:], stretch.lower() + "." + stretch]
    alignment = tmp_path / "a.a3m"
    alignment.write_text("#A3M#\n>q\n" + stretch + "\n" + "".join(f">{n}\n{s}\n" for n, s in enumerate(others)))
    given = table(tmp_path / "m.csv", ["mutant"], [["A6W"], ["M1A"], ["A6W:V3A"], ["L4X"]])
    out = tmp_path / "s.csv"
    assert score(run_dir, protein, "--mutations", given, "--alignment", alignment, "--out", out) == 0
    written = [row["site_frequencies"] for row in rows(out)]
    # Of three aligned letters two are A and one is W, each count plus one; outside the alignment nothing is known.
    assert [float(value) for value in written[:3]] == pytest.approx([math.log(2 / 3), 0, math.log(2 / 3)], abs=1e-5)
    assert written[3] == ""


def test_a_dry_run_tells_and_makes_nothing(run_dir, protein, tmp_path, capsys):
    given = table(tmp_path / "m.csv", ["mutant"], [["M1A"], ["M1C:G28A"]])
    before = sorted(tmp_path.iterdir())
    words = [run_dir, protein, "--mutations", given, "--out", tmp_path / "s.csv", "--dry-run"]
    assert score(*words, "--json") == 0
    estimate = json.loads(capsys.readouterr().out)
    assert (estimate["num_variants"], estimate["num_sites"], estimate["num_passes"]) == (2, 2, 2)
    assert estimate["num_computed_residues"] == 2 * len(PROTEIN)
    # A pass of 28 residues takes milliseconds.
    assert 0 < estimate["seconds"] < 5
    assert estimate["passes_per_second"] == pytest.approx(2 / estimate["seconds"])
    assert score(*words, "--strategy", "pseudo-perplexity") == 0
    assert f"passes                           {3 * len(PROTEIN)}" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_in_windows_as_the_library_does(model, run_dir, protein, tmp_path):
    out = tmp_path / "s.csv"
    assert score(run_dir, protein, "--all-singles", "--window", 11, "--out", out) == 0
    expected = model.score(PROTEIN, [row["mutant"] for row in rows(out)], window=11)
    np.testing.assert_allclose([float(row["score"]) for row in rows(out)], expected, atol=2e-5)


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals", "pseudo-perplexity"])
def test_the_protein_itself_scores_nothing(strategy, run_dir, tmp_path):
    given = write_fasta(tmp_path / "v.fasta", [("wt", PROTEIN), ("same", PROTEIN), ("again", PROTEIN.lower() + "*")])
    out = tmp_path / "s.csv"
    assert score(run_dir, given, "--wild-type", "wt", "--strategy", strategy, "--out", out) == 0
    assert [row["score"] for row in rows(out)] == ["0", "0"]


def test_proteins_may_come_through_the_standard_input(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b">a\nmkv\n>b\nM1\n")))
    out = tmp_path / "s.csv"
    assert score(run_dir, "-", "--all-singles", "--out", out, "--on-bad-record", "skip", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_variants"], report["rejects"]) == (57, {"illegal_character": 1})
    assert report["repairs"] == {"lower_case": 3}


def test_progress_tells_all_that_is_computed(run_dir, protein, tmp_path):
    from protlm.workflows.score.request import ScoreRequest
    from protlm.workflows.score.score import score as workflow

    for number, options in enumerate(({}, {"window": 11}, {"strategy": "wt-marginals", "window": 11})):
        stages = {}

        def start(stage, size, stages=stages, **_):
            stages[stage] = [size, 0]

            def advance(amount):
                stages[stage][1] += amount

            return advance

        request = ScoreRequest(
            model=run_dir,
            input=protein,
            out=tmp_path / f"{number}.csv",
            all_singles=True,
            tokens_per_batch=100,
            **options,
        )
        workflow(request, start_progress=start)
        assert list(stages) == ["read", "score", "write"]
        assert all(size == done > 0 for size, done in stages.values()), stages


def test_fit_variants_are_told_by_the_threshold_of_the_reference_file_or_by_the_median(
    run_dir, model, tmp_path, capsys
):
    path, mutants, values = proteingym_file(tmp_path, "a.csv", PROTEIN, lambda m: np.arange(len(m)) % 11)
    given = [{name: row[name] for name in ("mutant", "mutated_sequence", "DMS_score")} for row in rows(path)]
    table(path, list(given[0]), [row.values() for row in given])
    columns = ["DMS_filename", "UniProt_ID", "coarse_selection_type", "DMS_binarization_cutoff"]
    reference = table(tmp_path / "r.csv", columns, [["a.csv", "A", "Binding", 7.5]])
    scores = model.score(PROTEIN, mutants)
    for options, fit_by, is_fit in (
        (["--reference", reference], "threshold", values > 7.5),
        ([], "median", values > np.median(values)),
    ):
        assert score(run_dir, path, "--out", tmp_path / "s.csv", "--force", "--json", *options) == 0
        (assay,) = json.loads(capsys.readouterr().out)["assays"]
        assert assay["fit_by"] == fit_by
        expected = sklearn.metrics.roc_auc_score(is_fit, scores)
        assert assay["metrics"]["model"]["auc"]["value"] == pytest.approx(expected, abs=1e-3)


def test_rows_without_a_measurement_are_scored_and_not_counted(run_dir, protein, tmp_path, capsys):
    given = table(tmp_path / "m.csv", ["mutant", "DMS_score"], [["M1A", 1], ["K2A", ""], ["V3A", "NaN"], ["L4A", 2]])
    assert score(run_dir, protein, "--mutations", given, "--out", tmp_path / "s.csv", "--json") == 0
    (assay,) = json.loads(capsys.readouterr().out)["assays"]
    assert (assay["num_variants"], assay["num_measured"]) == (4, 2)
    assert all(row["score"] for row in rows(tmp_path / "s.csv"))
    assert assay["metrics"]["model"]["spearman"] == {"value": None, "low": None, "high": None}
    assert assay["verdict"].startswith("There is no Spearman correlation: fewer than three")


def test_a_benchmark_tells_what_it_lacks(assays, run_dir, tmp_path, capsys):
    folder, reference = assays
    name = list(ASSAYS)[-1]
    lines = (folder / name).read_text().splitlines()
    mutant, _, _ = lines[1].partition(",")
    unknown = f"{mutant[:-1]}X"
    protein = ASSAYS[name][2]
    place = int(mutant[1:-1]) - 1
    header = lines[0].split(",")
    values = {
        "mutant": unknown,
        "mutated_sequence": f"{protein[:place]}X{protein[place + 1 :]}",
        "DMS_score": "0.5",
        "DMS_score_bin": "1",
    }
    (folder / name).write_text("\n".join([*lines, ",".join(values.get(column, "") for column in header)]) + "\n")
    (folder / next(iter(ASSAYS))).unlink()
    assert score(run_dir, folder, "--reference", reference, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert f"1 of the 3 assays of {reference} are not in {folder}, such as {next(iter(ASSAYS))}" in captured.err
    assert f"no mean of BLOSUM62, which has no score for variants of {name}" in captured.out
    assert "NDCG" in captured.out
