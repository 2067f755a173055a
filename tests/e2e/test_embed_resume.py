"""A killed run goes on to the same bytes, in every layout that is written in place and in those that are not."""

import functools
import json
import resource
import signal
import time

import pytest

import protlm
from protlm import files
from protlm.cli.app import main
from protlm.inference.row_embeddings import RowEmbedder
from protlm.workflows.embed import assembly as embed_assembly
from protlm.workflows.embed import portions as embed_portions
from tests.e2e.conftest import SMALL, write_fasta
from tests.forked import TIMEOUT_SECONDS, Forked

# Rows of one protein, and so several portions.
MANY_PORTIONS = ["--tokens-per-batch", "60"]
LAYOUTS = {
    "protlm": ["--include", "per-residue", "--include", "mean", "--include", "logits", "--layers", "0,-1"],
    "uniprot": ["--include", "per-residue"],
    "bio-embeddings": [],
    "biotrainer": ["--include", "per-residue"],
    "esm": ["--include", "per-residue", "--include", "mean"],
    "npz": ["--include", "per-residue"],
    "parquet": [],
    "npy": [],
}


class Killed(BaseException):
    """Ends a command where it stands, as a signal would that nobody can answer."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, proteins):
    """Proteins with repeated ids and, far apart, repeated sequences."""
    some = proteins[:40]
    repeated = [(f"again-{number}", sequence) for number, (_, sequence) in enumerate(some[:3])]
    return write_fasta(tmp_path_factory.mktemp("inputs") / "proteins.fasta", [*some, *repeated, *some[5:7]])


def embed(run_dir, fasta, out, layout="protlm", *arguments):
    return main(["embed", str(run_dir), str(fasta), "--out", str(out), "--layout", layout, *MANY_PORTIONS,
                 *LAYOUTS[layout], *map(str, arguments)])  # fmt: skip


def read(fasta):
    return [(record.id, record.sequence) for record in protlm.read_records(fasta)]


def content(folder):
    """Everything in a folder: names and bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(run_dir, inputs, tmp_path_factory):
    """The content of the output of uninterrupted runs, by layout."""
    contents = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp(layout)
        assert embed(run_dir, inputs, folder / "out", layout) == 0
        contents[layout] = content(folder)
    return contents


def kill_at(monkeypatch, owner, name, call):
    """Ends the process at the call of that number."""
    original, calls = getattr(owner, name), iter(range(call))

    def counted(*arguments, **options):
        if next(calls, None) is None:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


MOMENTS = {
    "computing": (embed_portions.PortionRow, "compute", 25),
    "writing a portion": (embed_portions.PortionWriter, "_check_finite", 25),
    "putting together": (embed_assembly._Portions, "embeddings", 30),
    "between a note and its portion": (embed_portions, "contents_of", 2),
    "putting in place": (files, "publish", 0),
    "removing": (files, "remove_at_once", 0),
}


@pytest.mark.parametrize(
    ("layout", "moment"),
    [*(("protlm", moment) for moment in MOMENTS), *((layout, "putting together") for layout in [*LAYOUTS][1:])],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    layout, moment, run_dir, inputs, expected, tmp_path, monkeypatch
):
    owner, name, call = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            embed(run_dir, inputs, tmp_path / "out", layout)
    assert (tmp_path / "out.partial").is_dir()
    assert embed(run_dir, inputs, tmp_path / "out", layout, "--resume") == 0
    assert content(tmp_path) == expected[layout]


def test_what_is_finished_is_not_computed_again(run_dir, inputs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, embed_portions.PortionRow, "compute", 25)
        with pytest.raises(Killed):
            embed(run_dir, inputs, tmp_path / "out")
    finished = list((tmp_path / "out.partial" / "parts").glob("*.h5"))
    assert finished
    # Each of them is a file of embeddings that can be read.
    ids = {name for path in finished for name in protlm.open_embeddings(path)}
    computed = []
    original = embed_portions.PortionRow.compute
    monkeypatch.setattr(
        embed_portions.PortionRow,
        "compute",
        lambda row, embedder: computed.append(row.portion) or original(row, embedder),
    )
    assert embed(run_dir, inputs, tmp_path / "out", "protlm", "--resume") == 0
    assert computed
    assert not {int(path.stem) for path in finished} & set(computed)
    assert ids < set(protlm.open_embeddings(tmp_path / "out"))


def test_portions_go_while_the_output_grows(run_dir, inputs, tmp_path, monkeypatch):
    """Otherwise the disk would have to hold everything twice."""
    held = []
    original = embed_assembly._Portions.embeddings

    def watched(portions, record, record_id):
        held.append(len(list((tmp_path / "out.partial" / "parts").glob("*.h5"))))
        return original(portions, record, record_id)

    monkeypatch.setattr(embed_assembly._Portions, "embeddings", watched)
    assert embed(run_dir, inputs, tmp_path / "out") == 0
    assert held == sorted(held, reverse=True)
    assert held[-1] < held[0] / 2


def test_a_process_that_is_killed_in_the_middle_goes_on(run_dir, inputs, expected, tmp_path):
    out = tmp_path / "out"
    process = Forked("embed", run_dir, inputs, "--out", out, "--layout", "protlm", *MANY_PORTIONS, *LAYOUTS["protlm"])
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and not list(tmp_path.glob("out.partial/parts/*.h5")):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert embed(run_dir, inputs, out, "protlm", "--resume") == 0
    assert content(tmp_path) == expected["protlm"]


def test_ctrl_c_keeps_what_is_finished_and_says_so(run_dir, inputs, tmp_path, monkeypatch, capsys):
    original, calls = embed_portions.PortionRow.compute, iter(range(25))

    def interrupted(row, embedder):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(row, embedder)

    monkeypatch.setattr(embed_portions.PortionRow, "compute", interrupted)
    assert embed(run_dir, inputs, tmp_path / "out") == 130
    assert "--resume" in capsys.readouterr().err
    assert list((tmp_path / "out.partial" / "parts").glob("*.h5"))


@pytest.fixture
def unfinished(run_dir, inputs, tmp_path, monkeypatch):
    """A run that was killed after some portions."""
    with monkeypatch.context() as patch:
        kill_at(patch, embed_portions.PortionRow, "compute", 25)
        with pytest.raises(Killed):
            embed(run_dir, inputs, tmp_path / "out")
    return tmp_path / "out"


def test_only_the_same_run_goes_on(run_dir, inputs, proteins, unfinished, failure, tmp_path):
    before = content(tmp_path)
    command = ["embed", run_dir, inputs, "--out", unfinished, "--resume", *MANY_PORTIONS, *LAYOUTS["protlm"]]
    assert "--dtype float32, not float16" in failure(*command, "--dtype", "float16")
    assert "--window" in failure(*command, "--window", 50)
    assert "--layers" in failure(*command, "--layers", "0")
    assert "--tokens-per-batch 60, not 70" in failure(*command, "--tokens-per-batch", 70)
    other = write_fasta(tmp_path / "other.fasta", proteins[:41])
    assert "other inputs" in failure("embed", run_dir, other, *command[3:])
    other.unlink()
    assert "--resume" in failure(*[word for word in command if word != "--resume"])
    assert content(tmp_path) == before
    # The same proteins may come from elsewhere.
    copy = write_fasta(tmp_path / "copy.fasta", read(inputs))
    assert embed(run_dir, copy, unfinished, "protlm", "--resume") == 0


def test_another_model_does_not_go_on(run_dir, dataset, inputs, unfinished, failure, tmp_path):
    other = tmp_path / "other"
    words = ["train", str(dataset), "--out", str(other), "--config", "tiny", "--max-steps", "1", "--seed", "5"]
    assert main([*words, *SMALL]) == 0
    message = failure("embed", other, inputs, "--out", unfinished, "--resume", *MANY_PORTIONS, *LAYOUTS["protlm"])
    assert "another model" in message


def test_force_starts_afresh_and_a_foreign_folder_is_left_alone(
    run_dir, inputs, unfinished, expected, failure, tmp_path
):
    assert embed(run_dir, inputs, unfinished, "protlm", "--force") == 0
    assert content(tmp_path) == expected["protlm"]
    unfinished.unlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    assert "in the way" in failure("embed", run_dir, inputs, "--out", unfinished, "--force")
    assert (tmp_path / "out.partial" / "mine").read_text() == "precious"


def test_a_run_that_replaces_an_output_goes_on_and_replaces_it(run_dir, inputs, expected, tmp_path, monkeypatch):
    for layout in ("protlm", "esm"):
        folder = tmp_path / layout
        folder.mkdir()
        assert embed(run_dir, inputs, folder / "out", layout, "--truncate", 20) == 0
        before = content(folder)
        with monkeypatch.context() as patch:
            kill_at(patch, embed_portions.PortionRow, "compute", 25)
            with pytest.raises(Killed):
                embed(run_dir, inputs, folder / "out", layout, "--force")
        assert {name: digest for name, digest in content(folder).items() if ".partial" not in name} == before
        assert embed(run_dir, inputs, folder / "out", layout, "--force", "--resume") == 0
        assert content(folder) == expected[layout]


def test_two_runs_at_once_do_not_disturb_each_other(run_dir, inputs, unfinished, failure):
    from protlm.workflows.embed.folder import EmbedFolder

    with EmbedFolder(unfinished).locked():
        message = failure("embed", run_dir, inputs, "--out", unfinished, "--resume", *MANY_PORTIONS, *LAYOUTS["protlm"])
    assert "another run" in message


def test_a_full_disk_keeps_what_is_written(run_dir, inputs, expected, tmp_path, monkeypatch, failure):
    original, calls = embed_portions.PortionWriter._check_finite, iter(range(25))

    def full(writer, record, embeddings):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device", str(tmp_path / "out.partial"))
        return original(writer, record, embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(embed_portions.PortionWriter, "_check_finite", full)
        message = failure("embed", run_dir, inputs, "--out", tmp_path / "out", *MANY_PORTIONS, *LAYOUTS["protlm"])
    assert "No space left on device" in message
    assert "--resume" in message
    for path in (tmp_path / "out.partial" / "parts").glob("*.h5"):
        assert len(protlm.open_embeddings(path))
    assert embed(run_dir, inputs, tmp_path / "out", "protlm", "--resume") == 0
    assert content(tmp_path) == expected["protlm"]


def test_what_lacked_memory_before_a_kill_is_embedded_where_there_is_some(
    run_dir, inputs, expected, tmp_path, monkeypatch
):
    def without_memory(self, row, cores=None):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RowEmbedder, "__call__", without_memory)
        # Between the note of what was skipped in the second portion and that portion.
        kill_at(patch, embed_portions, "contents_of", 1)
        with pytest.raises(Killed):
            embed(run_dir, inputs, tmp_path / "out")
    assert list(tmp_path.glob("out.partial/parts/*.skipped.json"))
    assert embed(run_dir, inputs, tmp_path / "out", "protlm", "--resume") == 0
    assert content(tmp_path) == expected["protlm"]


def test_an_output_without_any_protein_is_none(run_dir, inputs, expected, tmp_path, monkeypatch, failure):
    def without_memory(self, row, cores=None):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RowEmbedder, "__call__", without_memory)
        message = failure("embed", run_dir, inputs, "--out", tmp_path / "out", *MANY_PORTIONS, *LAYOUTS["protlm"])
    assert "no protein fits into memory" in message
    assert not (tmp_path / "out").exists()
    assert embed(run_dir, inputs, tmp_path / "out", "protlm", "--resume") == 0
    assert content(tmp_path) == expected["protlm"]


@pytest.mark.parametrize("layout", ["protlm", "esm"])
def test_what_came_to_the_place_of_a_finished_output_stays(
    layout, run_dir, inputs, expected, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_at(patch, files, "publish", 0)
        with pytest.raises(Killed):
            embed(run_dir, inputs, out, layout)
    if layout == "esm":
        out.mkdir()
    mine = out / "thesis.txt" if layout == "esm" else out
    mine.write_text("precious")
    for options in (["--resume"], ["--resume", "--force"]):
        assert embed(run_dir, inputs, out, layout, *options) == 1
        assert "in the way of the finished output" in capsys.readouterr().err
        assert mine.read_text() == "precious"
    mine.unlink()
    if layout == "esm":
        out.rmdir()
    assert embed(run_dir, inputs, out, layout, "--resume") == 0
    assert content(tmp_path) == expected[layout]


def test_an_output_that_was_taken_away_is_made_again(run_dir, inputs, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, files, "remove_at_once", 0)
        with pytest.raises(Killed):
            embed(run_dir, inputs, tmp_path / "out")
    (tmp_path / "out").unlink()
    assert embed(run_dir, inputs, tmp_path / "out", "protlm", "--resume") == 0
    assert content(tmp_path) == expected["protlm"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("moment", "pattern", "damage"),
    [
        *(
            (moment, pattern, damage)
            for moment in ("computing", "putting together")
            for pattern, damage in (
                ("parts/*.h5", truncate),
                ("parts/*.h5", lambda path: path.write_bytes(b"")),
                ("proteins/*.bin", lambda path: path.unlink()),
            )
        ),
        ("putting together", "output/out", truncate),
        ("putting together", "assembled.json", lambda path: path.write_text("{}")),
        ("putting together", "assembled.json", lambda path: path.write_text('{"num_parts": 9999}')),
    ],
)
def test_what_was_damaged_meanwhile_is_made_again(
    pattern, damage, moment, run_dir, inputs, expected, tmp_path, monkeypatch
):
    owner, name, call = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            embed(run_dir, inputs, tmp_path / "out")
    damaged = list((tmp_path / "out.partial").glob(pattern))
    assert damaged
    for path in damaged:
        damage(path)
    assert embed(run_dir, inputs, tmp_path / "out", "protlm", "--resume") == 0
    assert content(tmp_path) == expected["protlm"]


def test_a_note_that_cannot_be_read_is_one_line(run_dir, inputs, unfinished, failure):
    note = unfinished.with_name("out.partial") / "work.json"
    command = ["embed", run_dir, inputs, "--out", unfinished, "--resume", *MANY_PORTIONS, *LAYOUTS["protlm"]]
    about = json.loads(note.read_text())
    note.write_text(json.dumps(about | {"options": about["options"] | {"unknown": 1}}))
    assert "other options" in failure(*command)
    note.write_text("{")
    assert "remove it" in failure(*command)


def test_what_others_left_beside_the_output_stays(run_dir, inputs, tmp_path):
    names = (".out.notes.partial", ".out.b.1234abcd.partial", ".out.partial.mine")
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".out.1234abcd.partial").mkdir()
    assert embed(run_dir, inputs, tmp_path / "out", "esm") == 0
    assert embed(run_dir, inputs, tmp_path / "out", "esm", "--force") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*names, "out"))


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="files have no largest size here")
@pytest.mark.parametrize(
    ("layout", "kilobytes"),
    [
        *((layout, kilobytes) for layout in ("protlm", "uniprot") for kilobytes in (20, 150)),
        ("bio-embeddings", 20), ("biotrainer", 20), ("parquet", 3), ("npz", 20), ("npy", 3), ("esm", 3),
    ],
)  # fmt: skip
def test_a_disk_that_is_full_at_any_place_is_one_line(layout, kilobytes, run_dir, inputs, expected, tmp_path):
    """A largest size of a file fails like a full disk: in the middle of any write, also in those that HDF5 makes."""
    process = Forked(
        "embed", run_dir, inputs, "--out", tmp_path / "out", "--layout", layout, *MANY_PORTIONS, *LAYOUTS[layout],
        prepare=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1024 * kilobytes,) * 2),
    )  # fmt: skip
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert "File too large" in errors
    begin = ["--resume"] if (tmp_path / "out.partial").exists() else []
    assert embed(run_dir, inputs, tmp_path / "out", layout, *begin) == 0
    assert content(tmp_path) == expected[layout]
