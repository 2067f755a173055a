"""What protlm score refuses, each in one line that says where: tables of anyone, options, outputs."""

import gzip

import pytest

from protlm.cli.app import main
from protlm.workflows.score import inputs
from tests.e2e.conftest import write_fasta
from tests.e2e.test_fail_fast import assert_refused
from tests.e2e.test_score import PROTEIN, rows

TABLES = {
    "empty": (b"", "expected a table with the names of its columns in the first line, got none"),
    "blank": (b"\n\n", "expected a table with the names"),
    "header only": (b"mutant\n", "no usable mutant; nothing to score"),
    "another column": (b"mutation,x\nM1A,1\n", "expected a column mutant or mutated_sequence, got 'mutation', 'x'"),
    "a column twice": (b"mutant,mutant\nM1A,K2A\n", "expected columns of different names, got 'mutant' twice"),
    "too few fields": (b"mutant,x\nM1A\n", "t.csv:2: expected 2 fields, as in the first line, got 1"),
    "too many fields": (b"mutant,x\nM1A,1\nM1A,1,2\n", "t.csv:3: expected 2 fields, as in the first line, got 3"),
    "an empty mutant": (b"mutant,x\n,1\n", "t.csv:2: expected a mutant such as 'A42G', got ''"),
    "no mutant": (b"mutant\nwild type\n", "t.csv:2: expected a mutation such as 'A42G' or 'A42G:K51E'"),
    "a wrong letter": (b"mutant\nM1A\nK1A\n", "t.csv:3: 'K1A': the protein has M at position 1, not K"),
    "outside": (b"mutant\nM99A\n", "t.csv:2: 'M99A': position 99 is outside the protein, whose residues have"),
    "a stop": (b"mutant\nM1*\n", "t.csv:2: expected a mutation such as"),
    "a wrong sequence": (b"mutant,mutated_sequence\nM1A,MKV\n", "t.csv:2: its mutated_sequence is not the protein"),
    "no sequence": (b"mutated_sequence\nMK1\n", "t.csv:2: illegal character '1' at position 3"),
    "an indel": (b"mutated_sequence\nMKV\n", "t.csv:2: has insertions or deletions, which only --strategy"),
    "no number": (b"mutant,DMS_score\nM1A,high\n", "t.csv:2: DMS_score: expected a number, or nothing, got 'high'"),
    "a huge number": (b"mutant,DMS_score\nM1A,1.7e308\n", "t.csv:2: DMS_score: expected a number"),
    "infinite": (b"mutant,DMS_score\nM1A,inf\n", "t.csv:2: DMS_score: expected a number"),
    "no class": (b"mutant,DMS_score,DMS_score_bin\nM1A,1,2\n", "t.csv:2: DMS_score_bin: expected 0 or 1, got '2'"),
    "not UTF-8": ("mutant\nM1A\nä\n".encode("latin-1"), "t.csv:3: this is no UTF-8 text"),
    "UTF-16": ("mutant\nM1A\n".encode("utf-16"), "t.csv:1: this is no UTF-8 text"),
    "old Mac": (b"mutant\rM1A\rK2A\r", "t.csv: line ends of old Macs"),
    "binary": (b"mutant\nM1\0A\n", "t.csv: a binary file; expected a table as text"),
    "a huge field": (b"mutant,x\nM1A," + b"x" * 200_000 + b"\n", "t.csv:2: no row of a table: field larger than"),
    "a huge line": (b"mutant" + b"," * (5 << 20), "t.csv:1: a line of 4,194,304 bytes and more"),
    "taken": (b"mutant,score\nM1A,1\n", "has a column score already; name another one with --column"),
    "an open quote": (b'mutant,x\nM1A,a\nM1A,"b\nK2A,c\n', "t.csv:3: no row of a table: unexpected end of data"),
    "a row of many lines": (b'mutant,x\nM1A,"' + b"\n" * 2000 + b'"\n', "t.csv:2: no row of a table: it has more than"),
    "damaged": (gzip.compress(b"mutant\nM1A\n" * 1000)[:-20], "t.csv: "),
}  # fmt: skip


@pytest.fixture
def protein(tmp_path):
    return write_fasta(tmp_path / "protein.fasta", [("wt", PROTEIN)])


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_table_is_one_line(name, run_dir, protein, tmp_path, failure):
    content, message = TABLES[name]
    (tmp_path / "t.csv").write_bytes(content)
    line = failure("score", run_dir, protein, "--mutations", tmp_path / "t.csv", "--out", tmp_path / "s.csv")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["protein.fasta", "t.csv"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfmutant,x\r\nM1A,1\r\nK2A,2\r\n",
        b"mutant\tx\nM1A\t1\n\nK2A\t2",
        b"x;mutant\n1;M1A\n2; K2A \n",
        b'"mutant","x"\n"M1A","a\nline"\nK2A,\n',
        gzip.compress(b"mutant,x\nM1A,1\nK2A,2\n"),
    ],
    ids=["byte order mark and CRLF", "TSV", "semicolons", "quotes", "gzip"],
)
def test_tables_as_programs_write_them_are_read(content, run_dir, protein, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    out = tmp_path / "s.csv"
    assert main(["score", *map(str, (run_dir, protein, "--mutations", tmp_path / "t.csv", "--out", out))]) == 0
    assert [row["mutant"].strip() for row in rows(out)] == ["M1A", "K2A"]


def test_bad_rows_can_be_skipped_and_are_counted(run_dir, protein, tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(b"mutant,x\nM1A,1\nK1A,2\nM1A\nK2A,4\n")
    words = (run_dir, protein, "--mutations", tmp_path / "t.csv", "--out", tmp_path / "s.csv")
    assert main(["score", *map(str, words), "--on-bad-record", "skip"]) == 0
    assert "warning: skipped bad_row: 1, malformed_row: 1" in capsys.readouterr().err
    assert [row["x"] for row in rows(tmp_path / "s.csv")] == ["1", "4"]


def test_wrong_proteins_alignments_and_references_are_one_line(run_dir, protein, tmp_path, failure):
    two = write_fasta(tmp_path / "two.fasta", [("a", PROTEIN), ("b", PROTEIN)])
    mutations, alignment, reference = (tmp_path / name for name in ("m.csv", "a.a3m", "r.csv"))
    mutations.write_text("mutant\nM1A\n")
    out = ("--out", tmp_path / "s.csv")
    assert "expected one protein, got more; name the one" in failure(
        "score", run_dir, two, "--mutations", mutations, *out
    )
    assert "expected a record 'c'" in failure("score", run_dir, two, "--wild-type", "c", *out)
    assert "expected a record 'c'" in failure("score", run_dir, two, "--all-singles", "--wild-type", "c", *out)
    line = failure("score", run_dir, two, "--all-singles", "--heat-map", tmp_path / "h.png", *out)
    assert "--heat-map: expected one protein, got several" in line
    dna = write_fasta(tmp_path / "dna.fasta", [("d", "ACGT" * 50)])
    assert "is a nucleic acid" in failure("score", run_dir, dna, "--all-singles", *out)
    for text, message in (
        (">q\n" + "W" * 99 + "\n", "a.a3m:1: the first sequence has 99 residues, and the protein 28"),
        (">q\nWWW\n", "the first sequence of the alignment, of 3 residues, is not in the protein"),
        (">q\nA\n", "is several times in the protein"),
        (">q\nMKV\n>b\nMK\n", "a.a3m:3: expected 3 aligned letters, as in the first sequence, got 2"),
        ("MKV\n", "a.a3m:1: expected a line that begins with '>'"),
        (">q\n---\n", "a.a3m:1: expected an aligned protein as the first sequence"),
        ("", "a.a3m:1: expected an alignment in A3M, got no sequence"),
    ):
        alignment.write_text(text)
        words = ("score", run_dir, protein, "--mutations", mutations, "--alignment", alignment, *out, "--force")
        assert message in failure(*words)
    assay = tmp_path / "assay.csv"
    assay.write_text("mutant,mutated_sequence\nM1A,A" + PROTEIN[1:] + "\n")
    for text, message in (
        ("DMS_id\nx\n", "expected a column DMS_filename, got 'DMS_id'"),
        ("DMS_filename,UniProt_ID,coarse_selection_type\na.csv,,x\n", "r.csv:2: expected a UniProt_ID"),
        ("DMS_filename,UniProt_ID,coarse_selection_type\na,A,x\na,A,x\n", "r.csv:3: expected each DMS_filename once"),
        ("DMS_filename,UniProt_ID,coarse_selection_type,target_seq\na,A,x,M1\n", "r.csv:2: target_seq: illegal"),
        ("DMS_filename,UniProt_ID,coarse_selection_type,DMS_binarization_cutoff\na,A,x,high\n", "r.csv:2: DMS_bin"),
    ):
        reference.write_text(text)
        assert message in failure("score", run_dir, assay, "--reference", reference, *out, "--force")
    (tmp_path / "no.csv").write_text("mutant\nM1A\n")
    assert "the protein does not follow from this table" in failure("score", run_dir, tmp_path / "no.csv", *out)
    assert not (tmp_path / "s.csv").exists()


def test_an_output_of_something_else_is_not_replaced(run_dir, protein, tmp_path, failure):
    out = tmp_path / "out"
    out.write_text("mine")
    words = ("score", run_dir, protein, "--all-singles", "--out", out)
    assert "exists already; choose another --out, or replace it with --force" in failure(*words)
    assert "no table of scores, so --force does not replace it" in failure(*words, "--force")
    assert out.read_text() == "mine"
    out.unlink()
    for _ in range(2):
        assert main([str(word) for word in (*words, "--force")]) == 0
    out.unlink()
    out.mkdir()
    assert "no table of scores, so --force does not replace it" in failure(*words, "--force")
    assays = tmp_path / "assays"
    assays.mkdir()
    (assays / "a.csv").write_text("mutant,mutated_sequence\nM1A,A" + PROTEIN[1:] + "\n")
    (out / "notes.txt").write_text("mine")
    assert "no folder of scores, so --force" in failure("score", run_dir, assays, "--out", out, "--force")
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    out.rmdir()
    words = ("score", run_dir, assays, "--out", out, "--force")
    assert main([str(word) for word in words]) == 0
    (tmp_path / "notes.txt").rename(out / "scores" / "notes.txt")
    assert "no folder of scores, so --force" in failure(*words)
    assert (out / "scores" / "notes.txt").read_text() == "mine"


def test_a_picture_of_something_else_is_not_replaced(run_dir, protein, tmp_path, failure):
    picture = tmp_path / "h.svg"
    picture.write_text("mine")
    words = ("score", run_dir, protein, "--all-singles", "--strategy", "wt-marginals", "--heat-map", picture)
    first, second = ((*words, "--out", tmp_path / name) for name in ("a.csv", "b.csv"))
    assert "no picture of protlm, so --force does not replace it" in failure(*first, "--force")
    picture.write_text("<svg><!-- mine --></svg>")
    assert "no picture of protlm, so --force does not replace it" in failure(*first, "--force")
    assert "exists already; choose another --heat-map" in failure(*first, "--resume")
    assert picture.read_text() == "<svg><!-- mine --></svg>"
    below = ("--heat-map", picture / "h.png", "--out", tmp_path / "c.csv")
    assert f"{picture} is no folder; choose another --heat-map" in failure(*words, *below)
    picture.unlink()
    assert main([str(word) for word in (*first, "--resume")]) == 0
    assert "exists already; choose another --heat-map" in failure(*second, "--resume")
    assert main([str(word) for word in (*second, "--force")]) == 0


def test_a_run_of_too_many_positions_is_refused(run_dir, protein, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(inputs, "_MOST_SITES", 500)
    words = ("score", run_dir, protein, "--all-singles", "--out", tmp_path / "s.csv")
    assert main([str(word) for word in words]) == 0
    words = (*words, "--force")
    for more in ((), ("--dry-run",)):
        line = failure(*words, "--strategy", "pseudo-perplexity", *more)
        assert "more than 500 positions to compute; give fewer variants at a time, or --strategy masked" in line
    monkeypatch.setattr(inputs, "_MOST_SITES", len(PROTEIN) - 1)
    assert failure(*words, "--strategy", "wt-marginals").rstrip().endswith("give fewer variants at a time")


def test_a_causal_model_and_too_long_windows_and_proteins_are_refused(dataset, protein, tmp_path, failure, run_dir):
    from tests.e2e.train_tools import train

    assert train(dataset, tmp_path / "causal", "--set", "model.causal=true", "--max-steps", 1) == 0
    line = failure("score", tmp_path / "causal", protein, "--all-singles", "--out", tmp_path / "s.csv")
    assert "a causal model, which predicts the next residue" in line
    learned = ["--set", "model.positions=learned", "--set", "model.max_positions=22", "--set", "data.max_length=20"]
    assert train(dataset, tmp_path / "learned", *learned, "--max-steps", 1) == 0
    words = ["score", tmp_path / "learned", protein, "--all-singles", "--out", tmp_path / "s.csv"]
    assert "the positions of this model reach 20; score long proteins in windows with --window 20" in failure(*words)
    assert "the positions of this model reach 20 residues; lower --window" in failure(*words, "--window", 21)
    assert main([str(word) for word in (*words, "--window", 20)]) == 0
    variants = write_fasta(tmp_path / "v.fasta", [("wt", PROTEIN[:20]), ("long", PROTEIN[:21]), ("v", PROTEIN[1:20])])
    words = ["score", tmp_path / "learned", variants, "--wild-type", "wt", "--strategy", "pseudo-perplexity"]
    line = failure(*words, "--out", tmp_path / "v.csv")
    assert "v.fasta:3: record 'long' has 21 residues, and the positions of this model reach 20" in line
    skipping = ["--out", tmp_path / "v.csv", "--on-bad-record", "skip"]
    assert main([str(word) for word in (*words, *skipping)]) == 0
    assert [row["id"] for row in rows(tmp_path / "v.csv")] == ["v"]


def test_wrong_usage_and_missing_files_are_told_before_torch_is_loaded(run_dir, tmp_path):
    protein = write_fasta(tmp_path / "protein.fasta", [("wt", PROTEIN)])
    (tmp_path / "assays").mkdir()
    out, existing = ("--out", tmp_path / "new.csv"), tmp_path / "existing.csv"
    existing.write_text("mine")
    singles = ("score", run_dir, protein, "--all-singles", *out)
    assert_refused(
        [
            (("score", run_dir, protein, *out), "say what to score of them"),
            (("score", run_dir, "nosuch.fasta", "--all-singles", *out), "nosuch.fasta: no such file"),
            (("score", "nosuch", protein, "--all-singles", *out), "nosuch"),
            (("score", run_dir, protein, "--mutations", "no.csv", *out), "no.csv: no such file"),
            ((*singles, "--mutations", protein), "give one of them"),
            ((*singles, "--alignment", "no.a3m"), "no.a3m: no such file"),
            ((*singles, "--reference", protein), "--reference is for assays"),
            ((*singles, "--heat-map", "map.pdf"), "ends in .png or .svg"),
            ((*singles, "--column", "blosum62"), "--column"),
            ((*singles, "--column", "a\nb"), "--column: expected a name of printable characters"),
            ((*singles, "--strategy", "best"), "--strategy"),
            ((*singles, "--window", 1), "--window"),
            (("score", run_dir, "-", "--wild-type", "x", *out), "no pipe or standard input"),
            (("score", run_dir, tmp_path / "assays", "--all-singles", *out), "a folder; expected a protein file"),
            (("score", run_dir, tmp_path / "assays", *out, "--heat-map", "map.png"), "--heat-map is for one protein"),
            (("score", run_dir, protein, "--all-singles", "--out", protein), "is an input"),
            (("score", run_dir, protein, "--all-singles", "--out", existing), "exists already"),
        ],
        tmp_path,
    )


def test_an_output_that_is_an_input_or_names_a_column_twice_is_refused(run_dir, protein, tmp_path, capsys):
    picture, table = tmp_path / "protein.png", tmp_path / "s.csv"
    picture.write_bytes(protein.read_bytes())
    before = protein.read_bytes()
    refused = {
        "--out: ": (protein, "--out", protein, "--force"),
        "--heat-map: ": (picture, "--out", table, "--heat-map", picture, "--force"),
        "--column: the output has a column mutant already": (protein, "--out", table, "--column", "mutant"),
    }
    for message, words in refused.items():
        assert main([str(word) for word in ("score", run_dir, *words, "--all-singles")]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"Error: Invalid value: {message}")
    assert picture.read_bytes() == protein.read_bytes() == before


def test_assays_that_differ_in_their_suffix_only_are_refused(run_dir, tmp_path, failure):
    assays = tmp_path / "assays"
    assays.mkdir()
    for name in ("x.csv", "X.tsv"):
        separator = "," if name.endswith("csv") else "\t"
        mutated = f"A{PROTEIN[1:]}"
        (assays / name).write_text(
            f"mutant{separator}mutated_sequence{separator}DMS_score\n{PROTEIN[0]}1A{separator}{mutated}{separator}1\n"
        )
    line = failure("score", run_dir, assays, "--out", tmp_path / "out")
    assert "but for its suffix; rename one of them" in line


def test_the_folder_of_a_picture_is_made(run_dir, protein, tmp_path):
    picture = tmp_path / "new" / "folder" / "map.png"
    words = ["score", run_dir, protein, "--all-singles", "--strategy", "wt-marginals", "--out", tmp_path / "s.csv"]
    assert main([*map(str, words), "--heat-map", str(picture)]) == 0
    assert picture.stat().st_size > 1000
