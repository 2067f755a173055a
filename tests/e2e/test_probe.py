"""`protlm probe` by its command line: every format of labels, planted answers, and what it refuses."""

import errno
import gzip
import json
import re
import tempfile

import numpy as np
import pytest

from protlm.cli.app import main
from protlm.config import ModelConfig
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import save_model
from protlm.vocabulary import RESIDUES
from protlm.workflows.probe import features as features_module
from tests.e2e.conftest import write_fasta
from tests.e2e.test_fail_fast import assert_refused

QUICK = ("--seeds", "1", "--layers", "0,-1")


@pytest.fixture(scope="session")
def labelled(proteins):
    """Proteins with a class that their composition tells: whether leucine is more frequent than in most."""
    shares = [sequence.count("L") / len(sequence) for _, sequence in proteins]
    return [(name, sequence, "high" if share > np.median(shares) else "low")
            for (name, sequence), share in zip(proteins, shares, strict=True)]  # fmt: skip


def write_table(path, rows, header="id,sequence,label"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def probe(capsys, *words):
    """Runs a probe and returns its JSON."""
    capsys.readouterr()
    assert main(["probe", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def value(report, name, metric="accuracy"):
    return report["scores"][name][metric]["value"]


def test_a_table_of_classes(run_dir, labelled, tmp_path, capsys):
    table = write_table(tmp_path / "labels.csv", labelled)
    report = probe(capsys, run_dir, table, *QUICK, "--out", tmp_path / "out")
    assert (report["task"], report["label"], report["labels"]) == ("classification", "label", "labels.csv")
    assert list(report["scores"]) == ["model", "layer_0", "layer_3", "composition", "dipeptides", "random_weights",
                                      "constant"]  # fmt: skip
    # What the label is made of; the model has no more to say.
    assert value(report, "composition") > 0.75
    assert value(report, "constant") < 0.6
    assert report["num_tested"] == report["num_proteins"] == len(labelled)
    assert not report["verdict"].startswith("The model knows more")
    for score in report["scores"].values():
        assert set(score) == {"accuracy", "macro_f1", "mcc"}
    accuracy = report["scores"]["composition"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert sum(report["chosen"].values()) == 5
    assert json.loads((tmp_path / "out" / "probe.json").read_text()) == report
    page = (tmp_path / "out" / "probe.html").read_text()
    assert report["verdict"].replace("'", "&#39;") in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["probe.html", "probe.json"]


def test_the_printed_table_has_what_the_report_has(run_dir, labelled, tmp_path, capsys):
    table = write_table(tmp_path / "labels.csv", labelled)
    report = probe(capsys, run_dir, table, *QUICK)
    assert main(["probe", str(run_dir), str(table), *QUICK]) == 0
    out, err = capsys.readouterr()
    accuracy = report["scores"]["dipeptides"]["accuracy"]
    expected = rf"composition and dipeptides +{accuracy['value']:.3f} ± {accuracy['stderr']:.3f} "
    assert re.search(expected, out)
    assert report["verdict"] in out
    assert "relatives of a tested one may be fitted" in err
    assert out.index("model ") < out.index("layer 0") < out.index("composition ") < out.index("random weights")


def test_two_runs_give_the_same_report_and_other_seeds_another(run_dir, labelled, tmp_path, capsys):
    table = write_table(tmp_path / "labels.csv", labelled)
    first, again, other = (probe(capsys, run_dir, table, *QUICK, "--seed", seed) for seed in (0, 0, 1))
    assert first == again
    assert first["scores"] != other["scores"]


def test_labels_that_the_sequence_does_not_tell_are_found_by_nothing(run_dir, labelled, tmp_path, capsys):
    random = np.random.default_rng(0)
    rows = [(name, sequence, random.choice(["yes", "no"])) for name, sequence, _ in labelled]
    report = probe(capsys, run_dir, write_table(tmp_path / "labels.csv", rows), *QUICK)
    for score in report["scores"].values():
        assert 0.3 < score["accuracy"]["value"] < 0.7
    assert not report["verdict"].startswith("The model knows more")


def test_numbers_are_regression(run_dir, labelled, tmp_path, capsys):
    rows = [(sequence, sequence.count("K") / len(sequence)) for _, sequence, _ in labelled]
    table = write_table(tmp_path / "labels.csv", rows, "sequence,target")
    report = probe(capsys, run_dir, table, *QUICK, "--out", tmp_path / "out")
    assert (report["task"], report["label"]) == ("regression", "target")
    assert value(report, "composition", "spearman") > 0.95
    assert value(report, "composition", "r2") > 0.95
    assert value(report, "constant", "spearman") == 0
    assert report["classes"] == []


def test_headers_as_biotrainer_and_flip_write_them(run_dir, labelled, tmp_path, capsys):
    fasta, table = tmp_path / "labels.fasta.gz", tmp_path / "labels.csv"
    splits = [("train", "False"), ("train", "True"), ("train", "False"), ("test", "None")]
    of_each = [splits[number % 4] for number in range(len(labelled))]
    lines = [f">{name} TARGET={label} leucine SET={split} VALIDATION={is_valid}\n{sequence}\n"
             for (name, sequence, label), (split, is_valid) in zip(labelled, of_each, strict=True)]  # fmt: skip
    fasta.write_bytes(gzip.compress("".join(lines).encode()))
    rows = [(name, sequence, f"{label} leucine", split, is_valid)
            for (name, sequence, label), (split, is_valid) in zip(labelled, of_each, strict=True)]  # fmt: skip
    write_table(table, rows, "id,sequence,target,set,validation")
    of_fasta, of_table = (probe(capsys, run_dir, path, *QUICK) for path in (fasta, table))
    assert (of_fasta["split"], of_fasta["num_tested"], of_fasta["num_folds"]) == ("given", 30, 1)
    assert {row["class"] for row in of_fasta["classes"]} == {"high leucine", "low leucine"}
    for name in ("labels", "label"):
        of_fasta.pop(name), of_table.pop(name)
    assert of_fasta == of_table


def test_label_strings_beside_the_sequences_as_in_flip(run_dir, labelled, tmp_path, capsys):
    chosen = labelled[:40]
    sequences = write_fasta(tmp_path / "sequences.fasta", [(name, sequence) for name, sequence, _ in reversed(chosen)])
    strings, mask = tmp_path / "sampled.fasta", tmp_path / "mask.fasta"
    kinds = {letter: "AB"[number % 2] for number, letter in enumerate("ACDEFGHIKLMNPQRSTVWYX")}
    text, masks = "", ""
    for number, (name, sequence, _) in enumerate(chosen):
        letters = "".join(kinds[letter] for letter in sequence)
        # What is masked is wrong.
        text += (
            f">{name} SET={'test' if number % 4 == 0 else 'train'} VALIDATION=False\nC{letters[1:20]}\n{letters[20:]}\n"
        )
        masks += f">{name}\n0{'1' * (len(sequence) - 1)}\n"
    strings.write_text(text)
    mask.write_text(masks)
    words = (run_dir, strings, "--sequences", sequences, *QUICK)
    report = probe(capsys, *words, "--mask", mask, "--out", tmp_path / "out")
    assert (report["task"], report["split"]) == ("per-residue", "given")
    assert [row["class"] for row in report["classes"]] in (["A", "B"], ["B", "A"])
    # The label is a function of the residue alone.
    assert value(report, "residue") == 1
    assert value(report, "window") > 0.98
    assert value(report, "model") > 0.9
    assert report["num_tested"] == sum(len(sequence) - 1 for _, sequence, _ in chosen[::4])
    assert report["num_units"] == 10
    assert report == probe(capsys, *words, "--ignore", "C")
    assert report["warnings"] == ["left out residues by --mask or --ignore: 40"]


def test_a_column_of_label_strings_is_found_to_be_one(run_dir, labelled, tmp_path, capsys):
    rows = [(sequence, re.sub("[^KR]", "-", sequence), "1" * len(sequence)) for _, sequence, _ in labelled[:30]]
    table = write_table(tmp_path / "labels.csv", rows, "sequence,label,mask")
    report = probe(capsys, run_dir, table, *QUICK, "--most-rows", "500")
    assert report["task"] == "per-residue"
    assert report["num_fitted"] == 500
    assert report["num_tested"] == sum(len(sequence) for sequence, _, _ in rows)


def test_variants_of_one_protein_have_a_one_hot_baseline(run_dir, labelled, tmp_path, capsys):
    sequence, random = labelled[0][1], np.random.default_rng(0)
    rows = []
    for _ in range(60):
        letters = list(sequence)
        letters[3], letters[7] = random.choice(list("AVLIK")), random.choice(list("DEGSP"))
        rows.append(("".join(letters), f"{'AVLIK'.index(letters[3]) ** 2 - 'DEGSP'.index(letters[7]):.1f}"))
    report = probe(capsys, run_dir, write_table(tmp_path / "labels.csv", rows, "sequence,label"), *QUICK)
    assert value(report, "one_hot", "spearman") > 0.95
    # The same variant twice is one unit.
    assert report["num_units"] == len({sequence for sequence, _ in rows})


def test_a_long_protein_is_computed_in_windows(run_dir, labelled, tmp_path, capsys):
    rows = [(name, sequence * (20 if number == 0 else 1), label) for number, (name, sequence, label) in
            enumerate(labelled)]  # fmt: skip
    table = write_table(tmp_path / "labels.csv", rows)
    whole, cut = (probe(capsys, run_dir, table, *QUICK, *words) for words in ((), ("--window", "100")))
    assert whole["scores"]["composition"] == cut["scores"]["composition"]
    assert whole["scores"]["layer_3"] != cut["scores"]["layer_3"]


def test_existing_reports_are_replaced_only_if_asked(run_dir, labelled, tmp_path, failure, capsys):
    table = write_table(tmp_path / "labels.csv", labelled[:40])
    words = (run_dir, table, *QUICK, "--out", tmp_path / "out")
    probe(capsys, *words)
    before = (tmp_path / "out" / "probe.json").read_text()
    assert "probe.json: exists already; replace it with --force" in failure("probe", *words)
    probe(capsys, *words, "--force", "--seed", "3")
    assert (tmp_path / "out" / "probe.json").read_text() != before


def test_what_is_left_out_is_told(run_dir, labelled, tmp_path, capsys):
    rows = [("rare", "MKVAA", "rare"), ("none", "MKVLA", ""), *labelled]
    table = write_table(tmp_path / "labels.csv", rows)
    words = [str(run_dir), str(table), *QUICK, "--min-class-size", "5"]
    assert main(["probe", *words]) == 0
    err = capsys.readouterr().err
    # The others keep their own features.
    assert value(probe(capsys, *words), "composition") > 0.75
    assert "warning: left out proteins without a label: 1\n" in err
    assert "warning: left out classes of fewer than 5 proteins: 1, with 1 proteins\n" in err


def test_equal_sequences_with_other_labels_and_shared_ones_are_told(run_dir, labelled, tmp_path, capsys):
    rows = [(*row, "test" if number % 3 == 0 else "train") for number, row in enumerate(labelled)]
    rows.append(("again", rows[0][1], "low" if rows[0][2] == "high" else "high", "train"))
    table = write_table(tmp_path / "labels.csv", rows, "id,sequence,label,split")
    report = probe(capsys, run_dir, table, *QUICK)
    assert any("whose very sequence is also in train or valid: 1;" in line for line in report["warnings"])
    assert "proteins whose label differs from that of an equal sequence: 1" in report["warnings"]


ROWS = "".join(
    f"p{number},{'MKVLA' * 3}{'ACDE'[number % 4] * (number + 1)},{'ab'[number % 2]}\n" for number in range(20)
)
REFUSED = {
    "empty": ("", "expected a table with the names of its columns"),
    "no label column": ("id,sequence\np,MKV\n", "t.csv: expected a column label or target, got 'id', 'sequence'; name"),
    "no sequence column": ("id,label\np,x\n", "t.csv: expected a column sequence or protein"),
    "no rows": ("id,sequence,label\n", "t.csv: no label; nothing to probe"),
    "no labels": ("id,sequence,label\np,MKV,\nq,MKV,nan\n", "t.csv: no label among 2 proteins; nothing to probe"),
    "no residues": ("id,sequence,label\np,MK1,x\n", "t.csv:2: its sequence: illegal character '1'"),
    "an empty sequence": ("id,sequence,label\np,,x\n", "t.csv:2: expected a sequence, got none"),
    "too few fields": ("id,sequence,label\np,MKV\n", "t.csv:2: expected 3 fields"),
    "DNA": ("id,sequence,label\np," + "ACGT" * 20 + ",x\n", "t.csv:2: record 'line 2' is a nucleic acid"),
    "an odd validation": (
        "sequence,label,set,validation\nMKV,x,train,perhaps\n", "t.csv:2: validation: expected True or False"
    ),
    "a huge line of names": ("x" * 200_000 + "\n", "t.csv:1: no names of columns: field larger than"),
    "labels without a letter": (">p label= SET=train\nMKV\n", "t.csv: no label among 1 proteins; nothing to probe"),
    "an unknown split": ("sequence,label,split\nMKV,x,fold1\n", "t.csv:2: expected train, valid or test as its split"),
    "a split for some": ("sequence,label,split\nMKV,x,train\nMKL,x,\n", "t.csv:3: expected a split for 'line 3' too"),
    "no test": ("sequence,label,split\nMKV,x,train\nMKL,y,train\n", "expected proteins of the splits train and test"),
    "constant labels": ("sequence,label\nMKV,x\nMKL,x\n", "t.csv: every label is 'x', so there is nothing to learn"),
    "a mask of another length": ("sequence,label,mask\nMKV,HHH,10\n", "the mask of 'line 2': expected 3 times 0 or 1"),
    "another length": ("sequence,label,mask\nMKV,HH,101\n", "t.csv:2: the labels of 'line 2': expected 3 letters"),
    "a header without labels": (">p\nMKV\n", "t.csv: expected label=… or target=… in the headers, got none"),
    "another key": (">p family=x\nMKV\n", "in the headers, got family; name the key of the labels with --label"),
    "a test class": (
        "id,sequence,label,split\n" + ROWS.replace(",a\n", ",a,train\n").replace(",b\n", ",b,test\n"),
        "t.csv: expected different labels to fit, got 'a' alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_labels_that_cannot_be_used_are_one_line(name, run_dir, tmp_path, failure):
    content, message = REFUSED[name]
    (tmp_path / "t.csv").write_text(content)
    assert message in failure("probe", run_dir, tmp_path / "t.csv", "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_labels_and_sequences_that_do_not_meet(run_dir, labelled, tmp_path, failure):
    sequences = write_fasta(tmp_path / "s.fasta", [(name, sequence) for name, sequence, _ in labelled[:5]])
    (name, sequence, _), *_ = labelled
    strings = tmp_path / "l.fasta"
    words = ("probe", run_dir, strings, "--sequences", sequences)
    cases = {
        f">{name}\n{'H' * len(sequence)}\n>gone\nHHH\n": "l.fasta:3: labels without sequences: 1, the first of 'gone'",
        f">{name}\n{'H' * (len(sequence) - 1)}\n": f"expected {len(sequence):,} letters, one for each residue, got",
        f">{name}\nHHH\n>{name}\nHHH\n": f"l.fasta:3: a second label of '{name}'",
        f">{name}\n>other\nHHH\n": "l.fasta:1: expected a letter for each residue",
        ">\nHHH\n": "l.fasta:1: expected an id behind `>`",
        f"HHH\n>{name}\n": "l.fasta: expected ",
    }
    for content, message in cases.items():
        strings.write_text(content)
        assert message in failure(*words)
    strings.write_text(f">{name}\n{'H' * len(sequence)}\n")
    mask = tmp_path / "mask.fasta"
    for content, message in {
        ">other\n1\n": f"mask.fasta: expected a mask of '{name}', got none",
        f">{name}\n12\n": "mask.fasta:1: expected 0 and 1 alone",
        f">{name}\n1\n>{name}\n1\n": f"mask.fasta:3: a second mask of '{name}'",
        "": f"mask.fasta: expected a mask of '{name}', got none",
        f">{name}\n11\n": f"expected {len(sequence):,} times 0 or 1",
    }.items():
        mask.write_text(content)
        assert message in failure(*words, "--mask", mask)


def test_a_tab_ends_an_id_and_a_mask_has_no_split(run_dir, labelled, tmp_path, capsys):
    chosen = labelled[:12]
    sequences = write_fasta(tmp_path / "s.fasta", [(name, sequence) for name, sequence, _ in chosen])
    strings, mask = tmp_path / "l.fasta", tmp_path / "m.fasta"
    strings.write_text("".join(
        f">{name}\tSET={'train' if number % 3 else 'test'}\n{''.join('HE'[ord(letter) % 2] for letter in sequence)}\n"
        for number, (name, sequence, _) in enumerate(chosen)
    ))  # fmt: skip
    mask.write_text("".join(f">{name} SET=0\n{'1' * len(sequence)}\n" for name, sequence, _ in chosen) + ">other\n1\n")
    report = probe(capsys, run_dir, strings, "--sequences", sequences, "--mask", mask, *QUICK)
    assert report["split"] == "given"
    assert "masks of proteins without a label: 1" in report["warnings"]


def test_clusters_that_do_not_know_all_proteins_are_told(run_dir, labelled, tmp_path, capsys):
    table, clusters = write_table(tmp_path / "labels.csv", labelled), tmp_path / "clusters.tsv"
    clusters.write_text("".join(f"c{n // 3}\t{name}\n" for n, (name, _, _) in enumerate(labelled[:90])))
    report = probe(capsys, run_dir, table, *QUICK, "--clusters", clusters)
    assert (report["resampled"], report["num_units"], report["num_unclustered"]) == ("clusters", 60, 30)
    assert [line.partition(";")[0] for line in report["warnings"]] == ["proteins without a cluster: 30"]


def test_classes_that_look_like_values_are_told(run_dir, labelled, tmp_path, capsys):
    rows = [(name, sequence, 1 + len(sequence) % 4) for name, sequence, _ in labelled]
    table = write_table(tmp_path / "labels.csv", rows)
    report = probe(capsys, run_dir, table, *QUICK, "--min-class-size", "2")
    assert report["task"] == "regression"
    assert any(line.startswith("whole numbers of 4 kinds are taken as values") for line in report["warnings"])
    assert any(line.startswith("--min-class-size is for classes") for line in report["warnings"])
    report = probe(capsys, run_dir, table, *QUICK, "--task", "classification")
    assert sorted(row["class"] for row in report["classes"]) == ["1", "2", "3", "4"]


def test_a_protein_beyond_the_positions_of_a_model_is_named(labelled, tmp_path, failure):
    network = Performer(
        ModelConfig(positions="learned", max_positions=300, num_layers=1, model_dim=16, num_heads=2, ffn_dim=16)
    )
    network.reset(0)
    description = ModelDescription(
        model=network.config, mask_rate=0.15, redraw_every_steps=0, seed=0, step=1, dataset_hash="",
        residue_counts=dict.fromkeys(RESIDUES, 1),
    )  # fmt: skip
    save_model(tmp_path / "model", network, description)
    table = write_table(
        tmp_path / "labels.csv", [*(row for row in labelled if len(row[1]) < 290), ("long", "MKV" * 200, "low")]
    )
    line = failure("probe", tmp_path / "model", table, *QUICK)
    assert (
        "'long': has 600 residues, and the positions of this model reach 298; compute long proteins in windows" in line
    )
    assert main(["probe", str(tmp_path / "model"), str(table), *QUICK, "--window", "200"]) == 0


def test_nothing_is_left_in_the_folder_for_temporary_files(run_dir, labelled, tmp_path, monkeypatch, capsys):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    probe(capsys, run_dir, write_table(tmp_path / "labels.csv", labelled[:40]), *QUICK)
    assert not list((tmp_path / "tmp").iterdir())


def test_too_little_disk_is_told_before_anything_is_computed(run_dir, labelled, tmp_path, failure, monkeypatch):
    monkeypatch.setattr(features_module.files, "free_bytes", lambda _: 1000)
    line = failure("probe", run_dir, write_table(tmp_path / "labels.csv", labelled[:40]), *QUICK)
    assert "expected 10,240 free bytes for the embeddings, got 1,000 or a quota below that; name fewer --layers" in line


def test_a_disk_that_fills_up_meanwhile_is_told_too(run_dir, labelled, tmp_path, failure, monkeypatch):
    codes = [errno.ENOSPC]

    def refuse(*_):
        raise OSError(codes[-1], "refused")

    monkeypatch.setattr(features_module.os, "posix_fallocate", refuse, raising=False)
    table = write_table(tmp_path / "labels.csv", labelled[:40])
    assert "expected 10,240 free bytes for the embeddings" in failure("probe", run_dir, table, *QUICK)
    codes.append(errno.EOPNOTSUPP)
    assert main(["probe", str(run_dir), str(table), *QUICK]) == 0


def test_options_are_refused_at_once(run_dir, fasta, tmp_path):
    table = write_table(tmp_path / "labels.csv", [("p", "MKV", "x")])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").mkdir()
    for link in (tmp_path / "dangling", tmp_path / "linked" / "probe.json"):
        link.symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder" / "manifest.json").write_text("{}")
    assert_refused(
        [
            (("probe", "nosuch", table), "nosuch"),
            (("probe", run_dir, "nosuch.csv"), "nosuch.csv: no such file"),
            (("probe", run_dir, "-"), "expected a file"),
            (("probe", run_dir, tmp_path), "no folder, pipe or device"),
            (("probe", run_dir, table, "--label", " "), "expected the name of a column"),
            (("probe", run_dir, table, "--sequences", "nosuch.fasta"), "nosuch.fasta: no such file"),
            (("probe", run_dir, table, "--layers", "9"), "--layers: layer: expected -4 to 3, got 9"),
            (("probe", run_dir, table, "--layers", "last"), "expected numbers by comma"),
            (("probe", run_dir, table, "--folds", "2"), "--folds"),
            (("probe", run_dir, table, "--task", "classification", "--ignore", "X"), "--ignore"),
            (("probe", run_dir, table, "--out", tmp_path / "file"), "no folder; choose another --out"),
            (("probe", run_dir, table, "--out", tmp_path / "file" / "sub"), "no folder; choose another --out"),
            (("probe", run_dir, table, "--out", tmp_path / "dangling"), "dangling: no folder"),
            (("probe", run_dir, table, "--out", tmp_path / "linked"), "probe.json: exists already"),
            (("probe", run_dir, table, "--out", tmp_path / "folder"), "holds manifest.json"),
        ],
        tmp_path,
    )
