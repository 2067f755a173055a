"""The commands and Python lines of the documents work: every one of them is run."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from protlm import read_records
from protlm.cli.app import app, main
from protlm.workflows.convert import cost as convert_cost
from protlm.workflows.train import dry_run as train_dry_run
from tests.e2e.conftest import write_fasta

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUM_PROTEINS = 60
# What is changed in a documented command: no reader waits for a test, so training ends after so many updates. They are
# updates of the documented configuration, on its documented rows. And nothing measures the time of updates or titin.
TRAINING_LIMIT = ["--max-steps", "3"]
# And one draw of folds stands for three.
PROBE_LIMIT = ["--seeds", "1"]

_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(?:\$ )?protlm (.*)$", re.MULTILINE)


def blocks(document: Path) -> list[tuple[str, str]]:
    """Returns (language, text) of the console and Python blocks, in order."""
    return _BLOCK.findall(document.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """Returns the words after `protlm` of each protlm command in a console block."""
    return [shlex.split(line, comments=True) for line in _COMMAND.findall(text)]


def public_commands() -> list[str]:
    return sorted(typer.main.get_command(app).commands)


def test_every_documented_command_and_python_line_works(tmp_path, monkeypatch, proteins):
    """One folder for all documents, the README first: a later one may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_dry_run, "_seconds_per_step", lambda *_: 1.0)
    # Nor that of a pass of titin.
    monkeypatch.setattr(convert_cost, "LENGTHS", (50,))
    chosen = sorted(proteins, key=lambda protein: len(protein[1]))[:NUM_PROTEINS]
    write_fasta(tmp_path / "my_proteins.fasta", chosen)
    for name, records in (("my_other_proteins.fasta", proteins[-5:]), ("my_test.fasta", proteins[-10:-5])):
        write_fasta(tmp_path / name, records)
    # What a reader is told to have for the splits: a label for each id.
    for name, labels, is_label_first in (
        ("my_clusters.tsv", ("c1", "c2", "c3", "c4", "c5", "c6"), True),
        ("my_families.tsv", ("PF00069.25", "PF00001", "PF00002", "PF00003", "PF00004", "PF00005"), False),
        ("my_splits.tsv", ("train", "train", "train", "train", "valid", "test"), False),
    ):
        rows = [(labels[number % 6], record_id) for number, (record_id, _) in enumerate(chosen)]
        lines = ["\t".join(row if is_label_first else row[::-1]) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    _write_mutants(tmp_path)
    _write_labels(tmp_path, chosen)
    for document in DOCUMENTS:
        names: dict[str, object] = {"__name__": "__main__"}
        for number, (language, text) in enumerate(blocks(document), start=1):
            if language == "python":
                # The file name shows in a traceback which block it was.
                exec(compile(text, f"{document.name}, block {number}", "exec"), names)
                continue
            for words in commands(text):
                limit = {"train": TRAINING_LIMIT, "probe": PROBE_LIMIT}.get(words[0], [])
                assert main([*words, *limit]) == 0, f"{document.name}: protlm {shlex.join(words)}"


def _write_labels(folder, proteins):
    """Writes what the page on probes tells a reader to have."""
    rows = [f"{record_id},{sequence},{'ab'[number % 2]},{number % 7 / 2}" for number, (record_id, sequence) in
            enumerate(proteins)]  # fmt: skip
    (folder / "my_labels.csv").write_text("\n".join(["id,sequence,label,stability", *rows]) + "\n")
    strings = [(record_id, "".join("HC?"[ord(letter) % 3] for letter in sequence)) for record_id, sequence in proteins]
    write_fasta(folder / "my_structures.fa", strings)


def _write_mutants(folder):
    """Writes what a reader has in a clone, and what the page on scoring tells them to have."""
    (folder / "data").symlink_to(ROOT / "data")
    (record,) = read_records(ROOT / "data" / "tem1.fasta")
    short = record.sequence[60:90]
    write_fasta(folder / "my_variants.fasta", [("P62593", short), ("gone", short[:5] + short[6:])])
    (folder / "assays").mkdir()
    lines = [f"{letter}{number}G,{short[:number - 1]}G{short[number:]},{number % 7}" for number, letter in
             enumerate(short, start=1) if letter != "G"]  # fmt: skip
    (folder / "assays" / "a.csv").write_text("\n".join(["mutant,mutated_sequence,DMS_score", *lines]))
    reference = "DMS_id,DMS_filename,UniProt_ID,coarse_selection_type\na,a.csv,A,Stability\n"
    (folder / "DMS_substitutions.csv").write_text(reference)


def test_the_attention_of_the_readme_is_a_good_estimate_with_the_error_it_names(capsys):
    (text,) = (
        text for language, text in blocks(ROOT / "README.md") if language == "python" and "favor_attention" in text
    )
    exec(compile(text, "README.md", "exec"), names := {})
    told = re.search(r"relative error (\S+); of the plain average of v (\S+)\n", capsys.readouterr().out)
    assert f"# {told[1]} and {told[2]}\n" in text
    assert names["error"] < 0.1 < 0.25 < names["of_average"]


def test_the_readme_shows_each_command_and_the_python_names():
    all_blocks = blocks(ROOT / "README.md")
    shown = {words[0] for language, text in all_blocks if language == "console" for words in commands(text)}
    assert shown == set(public_commands())
    code = "".join(text for language, text in all_blocks if language == "python")
    for name in ("load_model", "open_embeddings", "read_records", "favor_attention"):
        assert f"{name}(" in code


@pytest.mark.parametrize("command", public_commands())
def test_help_of_each_command_ends_its_text_with_examples_on_lines_of_their_own(command, capsys):
    assert main([command, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "Examples:" in lines
    assert lines[lines.index("Examples:") + 1].startswith(f"protlm {command} ")


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_relative_links_of_a_document_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []
