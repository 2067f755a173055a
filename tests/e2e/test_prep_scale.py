"""The bytes of a dataset depend on neither workers, kills, parts nor the size of pieces."""

import errno
import gzip
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protlm.cli.app import main
from protlm.data.building import selection
from protlm.data.parsing import fasta, sources, text_pieces
from protlm.data.storage.dataset import open_dataset
from protlm.errors import ProtlmError
from protlm.workflows.prep import folder as prep_folder
from protlm.workflows.prep import reading as prep_reading
from protlm.workflows.prep.options import PrepRequest, PrepUsageError
from protlm.workflows.prep.prepare import prepare
from tests.e2e.prep_tools import SAMPLE, digests, error_line, ids, run_json

SMALL = {"shard_residues": 200_000, "valid_fraction": 0.1, "test_fraction": 0.1}
OPTIONS = ("--shard-residues", "200000", "--valid-fraction", "0.1", "--test-fraction", "0.1")


@pytest.fixture
def small_pieces(monkeypatch):
    # Some ten pieces for each of the plain files.
    monkeypatch.setattr(prep_reading, "PIECE_BYTES", 15_000)
    monkeypatch.setattr(sources, "_RAW_BLOCK_BYTES", 5_000)


@pytest.fixture
def files(tmp_path):
    """The sample in three files, one of them compressed, with bad records, repeats and short ones among them."""
    records = gzip.decompress(SAMPLE.read_bytes()).removeprefix(b">").rstrip(b"\n").split(b"\n>")[:900]
    texts = [b"".join(b">" + record + b"\n" for record in records[start::3]) for start in range(3)]
    texts[1] += b">bad\nMK1\n>" + records[0] + b"\n>short\nM\n"
    found = [tmp_path / f"{number}.fasta" for number in range(3)]
    for path, text in zip(found, texts, strict=True):
        path.write_bytes(text)
    found[2].write_bytes(gzip.compress(texts[2], mtime=0))
    return found


MORE = {**SMALL, "on_bad_record": "skip", "min_length": 2}


@pytest.fixture
def expected(files, tmp_path):
    prepare(PrepRequest(inputs=files, out=tmp_path / "expected", **MORE))
    return digests(tmp_path / "expected")


def test_the_number_of_workers_changes_no_byte(small_pieces, files, expected, tmp_path):
    for workers in (2, 3):
        prepare(PrepRequest(inputs=files, out=tmp_path / "out", workers=workers, force=True, **MORE))
        assert digests(tmp_path / "out") == expected
    assert len(expected) > 5


def test_the_size_of_pieces_and_of_the_ranges_compared_changes_no_byte(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "_COMPARED_AT_ONCE", 100)
    for piece_bytes in (1, 20_000):
        monkeypatch.setattr(prep_reading, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(sources, "_RAW_BLOCK_BYTES", 3_000)
        prepare(PrepRequest(inputs=files, out=tmp_path / "out", force=True, **MORE))
        assert digests(tmp_path / "out") == expected


def test_the_twin_in_python_makes_the_same_dataset_as_the_compiled_parser(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("protlm.data.compiled.is_available", lambda: False)
    prepare(PrepRequest(inputs=files, out=tmp_path / "out", **MORE))
    assert digests(tmp_path / "out") == expected


def test_parts_merged_are_the_dataset_of_one_run(files, expected, tmp_path):
    names = []
    for number in (2, 3, 1):
        names += prepare(PrepRequest(inputs=files, out=tmp_path / "out", part=(number, 3), **MORE)).files
        if number != 1:
            with pytest.raises(Exception, match="not read yet, or changed since"):
                prepare(PrepRequest(inputs=files, out=tmp_path / "out", merge=True, **MORE))
    assert sorted(names) == sorted(map(str, files))
    prepare(PrepRequest(inputs=files, out=tmp_path / "out", merge=True, **MORE))
    assert digests(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def test_parts_by_the_command(files, expected, tmp_path, capsys):
    command = ("prep", *files, "--out", tmp_path / "out", *OPTIONS, "--on-bad-record", "skip", "--min-length", "2")
    assert run_json(capsys, *command, "--part", "1/2")["num_records"] > 0
    assert "are missing" in error_line(capsys, *command, "--merge")
    assert main([*map(str, command), "--part", "2/2"]) == 0
    assert "records     " in capsys.readouterr().out
    assert main([*map(str, command), "--merge"]) == 0
    assert digests(tmp_path / "out") == expected
    assert main([*map(str, command), "--part", "4/4"]) == 0
    assert "this part has no file" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pieces/*", "sources/*", "dataset/*.h5"])
def test_a_run_killed_at_any_stage_goes_on_to_the_same_bytes(files, expected, tmp_path, stage):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from protlm.data.parsing import sources\n"
        "from protlm.workflows.prep import reading\n"
        "from protlm.workflows.prep.options import PrepRequest\n"
        "from protlm.workflows.prep.prepare import prepare\n"
        "reading.PIECE_BYTES, sources._RAW_BLOCK_BYTES = 15_000, 5_000\n"
        "replace = os.replace\n"
        "def die_after(source, target):\n"
        "    replace(source, target)\n"
        f"    if len(list(Path({str(out) + '.partial'!r}).glob({stage!r}))) >= 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = die_after\n"
        f"prepare(PrepRequest(inputs={list(map(str, files))!r}, out={str(out)!r}, **{MORE!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(Exception, match="an unfinished run for this dataset; go on with --resume"):
        prepare(PrepRequest(inputs=files, out=out, **MORE))
    prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE))
    assert digests(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.fasta", "1.fasta", "2.fasta", "expected", "out"]


def test_resuming_reads_no_finished_piece_again(small_pieces, files, expected, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []
    write_piece = prep_reading.write_piece

    def fail_at_the_tenth(path, *arguments, **options):
        if len(written) >= 10:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_piece(path, *arguments, **options)
        written.append(path)

    monkeypatch.setattr(prep_reading, "write_piece", fail_at_the_tenth)
    with pytest.raises(Exception, match=r"No space left on device; what is finished is kept in .*out\.partial: go on"):
        prepare(PrepRequest(inputs=files, out=out, **MORE))
    first, written[:] = list(written), []
    monkeypatch.setattr(prep_reading, "write_piece", lambda *a, **o: (write_piece(*a, **o), written.append(a[0])))
    prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE))
    assert digests(out) == expected
    assert set(first).isdisjoint(written)
    assert len(first) >= 10


def test_a_shard_that_cannot_be_written_leaves_the_finished_ones(files, expected, tmp_path, monkeypatch):
    from protlm.data.building import assembly

    out, write_shard, names = tmp_path / "out", assembly.write_shard, []

    def fail_at_the_third(folder, name, *arguments):
        if len(names) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / name))
        names.append(name)
        return write_shard(folder, name, *arguments)

    monkeypatch.setattr(assembly, "write_shard", fail_at_the_third)
    with pytest.raises(Exception, match="No space left on device"):
        prepare(PrepRequest(inputs=files, out=out, **MORE))
    assert sorted(path.name for path in (tmp_path / "out.partial" / "dataset").glob("*.h5")) == sorted(names)
    made = []
    monkeypatch.setattr(assembly, "write_shard", lambda *a: (made.append(a[1]), write_shard(*a))[1])
    prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE))
    assert digests(out) == expected
    assert set(made).isdisjoint(names)


def test_a_changed_file_is_read_again_on_resume(small_pieces, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(prep_folder, "_WORTH_KEEPING_BYTES", 1)
    monkeypatch.setattr(
        "protlm.workflows.prep.prepare.build_dataset", lambda *a, **o: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(PrepRequest(inputs=files, out=out, **MORE))
    monkeypatch.undo()
    files[0].write_bytes(files[0].read_bytes() + b">new\nMKVLAAGIV\n")
    prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE))
    prepare(PrepRequest(inputs=files, out=tmp_path / "afresh", **MORE))
    assert digests(out) == digests(tmp_path / "afresh")


def test_shards_of_a_file_that_changed_by_one_letter_are_made_again(files, tmp_path, monkeypatch):
    from protlm.data.building import assembly

    out, write_shard = tmp_path / "out", assembly.write_shard

    def fail_at_the_last(folder, name, *arguments):
        if name.startswith("test"):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / name))
        return write_shard(folder, name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "write_shard", fail_at_the_last)
        with pytest.raises(ProtlmError, match="No space left"):
            prepare(PrepRequest(inputs=files, out=out, **MORE))
    text = bytearray(files[0].read_bytes())
    place = text.index(b"\n") + 5
    text[place] = ord("W") if text[place] != ord("W") else ord("Y")
    files[0].write_bytes(text)
    prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE))
    prepare(PrepRequest(inputs=files, out=tmp_path / "afresh", **MORE))
    assert digests(out) == digests(tmp_path / "afresh")


def test_a_run_killed_after_its_dataset_was_put_in_place_is_finished_by_resume(files, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prep_folder.PrepFolder, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(PrepRequest(inputs=files, out=out, **MORE))
    assert (tmp_path / "out.partial").exists()
    assert prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE)).hash == open_dataset(out).hash
    assert digests(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_many_small_files_and_shards_want_few_files_open(files, tmp_path):
    records = gzip.decompress(SAMPLE.read_bytes()).removeprefix(b">").rstrip(b"\n").split(b"\n>")[:150]
    folder = tmp_path / "in"
    folder.mkdir()
    for number, record in enumerate(records):
        (folder / f"{number:04d}.fasta").write_bytes(b">" + record + b"\n")
    code = (
        "import resource, sys\n"
        "from protlm.cli.app import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        f"sys.exit(main(['prep', {str(folder)!r}, '--out', {str(tmp_path / 'out')!r}, '--shard-residues', '500',"
        " '--valid-fraction', '0.3', '--test-fraction', '0.3']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.h5"))) > 75


def test_parts_that_begin_at_once_share_one_folder(files, expected, tmp_path):
    out = tmp_path / "out"
    barrier = threading.Barrier(3)

    def read(number):
        barrier.wait()
        prepare(PrepRequest(inputs=files, out=out, part=(number, 3), **MORE))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(read, (1, 2, 3)))
    prepare(PrepRequest(inputs=files, out=out, merge=True, **MORE))
    assert digests(out) == expected


def test_a_file_that_changes_while_workers_read_it_is_an_error(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prep_reading, "_read_range", lambda path, start, num_bytes: b">" + b"M" * (num_bytes - 1))
    message = error_line(capsys, "prep", *files, "--out", tmp_path / "out", "--workers", "2")
    assert f"{files[0]}: changed while it was read" in message


def test_what_a_killed_run_left_half_written_is_removed_by_resume(files, expected, tmp_path):
    out = tmp_path / "out"
    prepare(PrepRequest(inputs=files, out=out, part=(1, 2), **MORE))
    half = tmp_path / "out.partial" / "pieces" / ".00000-000000.piece.0123.partial"
    half.write_bytes(b"half")
    prepare(PrepRequest(inputs=files, out=out, part=(2, 2), **MORE))
    # It could be that of another part.
    assert half.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "protlm.workflows.prep.prepare.build_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(ProtlmError, match="full; what is finished is kept"):
            prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE))
    assert not half.exists()
    prepare(PrepRequest(inputs=files, out=out, resume=True, **MORE))
    assert digests(out) == expected


def test_two_runs_do_not_share_a_folder_unless_they_are_parts(files, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(PrepRequest(inputs=files, out=out, part=(1, 2), **MORE))
    folder = prep_folder.PrepFolder(tmp_path / "out.partial", [])
    with folder.locked("part"):
        prepare(PrepRequest(inputs=files, out=out, part=(2, 2), **MORE))
        for option in ("--resume", "--force", "--merge"):
            message = error_line(capsys, "prep", *files, "--out", out, "--on-bad-record", "skip", option)
            assert "another run is at work here" in message
    prepare(PrepRequest(inputs=files, out=out, merge=True, **MORE))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    command = [sys.executable, "-m", "protlm.cli.app", "prep", str(path), str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    with path.open("wb") as pipe:
        pipe.write(b">a\nMKV\n")
    deadline = time.monotonic() + 20
    while len(children := _children(process.pid)) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    process.kill()
    process.wait()
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _children(parent):
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_other_options_may_follow_but_not_other_inputs(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(prep_folder, "_WORTH_KEEPING_BYTES", 1)
    message = error_line(capsys, "prep", *files, "--out", out, *OPTIONS)
    assert "1.fasta" in message
    assert "what is finished is kept in" in message
    assert "made with other inputs" in error_line(capsys, "prep", files[0], "--out", out, "--resume")
    assert main(["prep", *map(str, files), "--out", str(out), *OPTIONS, "--on-bad-record", "skip", "--resume"]) == 0
    assert open_dataset(out).manifest.rejects == {"illegal_character": 1}


def test_force_starts_afresh(files, expected, tmp_path):
    out = tmp_path / "out"
    prepare(PrepRequest(inputs=files, out=out, part=(1, 2), **MORE))
    prepare(PrepRequest(inputs=files, out=out, force=True, **MORE))
    assert digests(out) == expected


def test_what_is_in_the_way_is_never_removed(files, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.doc").write_text("precious")
    for option in ("--force", "--resume"):
        message = error_line(capsys, "prep", files[0], "--out", tmp_path / "out", option)
        assert "nothing that prep made" in message
    assert (tmp_path / "out.partial" / "thesis.doc").read_text() == "precious"


def test_a_worker_that_dies_is_one_error_line(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prep_reading.reader, "parse_piece", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    message = error_line(capsys, "prep", *files, "--out", tmp_path / "out", "--workers", "2")
    assert "a worker process died" in message


def test_an_error_in_a_worker_names_the_line_of_the_whole_file(small_pieces, tmp_path, capsys):
    path = tmp_path / "long.fasta"
    text = gzip.decompress(SAMPLE.read_bytes())
    line = text.count(b"\n") + 2
    path.write_bytes(text + b">bad\nM7\n")
    for workers in ("1", "2"):
        message = error_line(capsys, "prep", path, "--out", tmp_path / "out", "--workers", workers)
        assert f"{path}:{line}: record 'bad': illegal character '7'" in message


def test_an_interrupt_ends_workers_at_once_and_leaves_nothing_of_small_work(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    command = [
        sys.executable,
        "-m",
        "protlm.cli.app",
        "prep",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]
    # A shell that starts the tests in its background has its children ignore Ctrl-C.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with path.open("wb") as pipe:
        pipe.write(b">a\nMKV\n")
        pipe.flush()
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert told == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_an_interrupt_of_much_work_says_how_to_go_on(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prep_folder, "_WORTH_KEEPING_BYTES", 1)
    monkeypatch.setattr(
        "protlm.workflows.prep.prepare.build_dataset", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["prep", *map(str, files), "--out", str(tmp_path / "out"), "--on-bad-record", "skip"]) == 130
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"warning: what is finished is kept in {tmp_path / 'out.partial'}; go on with the same command and --resume",
        "interrupted",
    ]


def test_a_record_beyond_the_bound_is_an_error_in_bounded_memory_and_can_be_skipped(tmp_path, capsys, monkeypatch):
    for module in (fasta, text_pieces):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 3000)
    monkeypatch.setattr("protlm.data.parsing.compiled_fasta.MAX_RECORD_BYTES", 3000)
    monkeypatch.setattr(prep_reading, "PIECE_BYTES", 100)
    monkeypatch.setattr(sources, "_RAW_BLOCK_BYTES", 512)
    monkeypatch.setattr("protlm.data.parsing.text_pieces._HEAD_BYTES", 1024)
    path = tmp_path / "a.fasta"
    path.write_bytes(b">a\nMKV\n>huge one\n" + b"M" * 20_000 + b"\nMK\n>b\nMKW\n>c\nM1\n")
    message = error_line(capsys, "prep", path, "--out", tmp_path / "out")
    assert f"{path}:3: record 'huge' is longer than 3,000 bytes" in message
    arguments = ("prep", path, "--out", tmp_path / "out", "--on-bad-record", "skip")
    report = run_json(capsys, *arguments, "--valid-fraction", "0", "--test-fraction", "0")
    assert report["rejects"] == {"illegal_character": 1, "oversized": 1}
    assert ids(tmp_path / "out", "train") == ["a", "b"]
    rows = (tmp_path / "out" / "rejects.tsv").read_text().splitlines()
    assert rows == ["source\tline\tid\treason", "a.fasta\t3\thuge\toversized", "a.fasta\t9\tc\tillegal_character"]


def test_a_dry_run_makes_nothing_and_comes_close(tmp_path, capsys):
    found = run_json(capsys, "prep", SAMPLE, "--out", tmp_path / "out", "--dry-run")
    assert os.listdir(tmp_path) == []
    assert abs(found["num_records"] - 2500) < 25
    prepare(PrepRequest(inputs=[SAMPLE], out=tmp_path / "out"))
    assert found["num_residues"] == pytest.approx(1_160_000, rel=0.2)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.h5"))
    assert found["dataset_bytes"] == pytest.approx(size, rel=0.3)
    assert found["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert main(["prep", str(SAMPLE), "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    assert "seconds, about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dry_run": True, "split": "file"}, "split_file: wanted with split 'file'"),
        ({"dry_run": True, "part": (9, 2)}, "got 9/2"),
        ({"resume": True, "merge": True}, "only one of them"),
        ({"part": (0, 2)}, "expected i/n with i from 1 to n, got 0/2"),
        ({"part": (3, 2)}, "got 3/2"),
        ({"workers": 0}, "workers: expected 1 to"),
        ({"workers": 100_000}, "on this machine, got 100000"),
    ],
)
def test_options_of_scale_that_contradict_each_other_are_wrong_usage(tmp_path, options, message):
    with pytest.raises(PrepUsageError, match=message):
        prepare(PrepRequest(inputs=[SAMPLE], out=tmp_path / "out", **options))
    assert not Path(f"{tmp_path}/out.partial").exists()


@pytest.mark.parametrize("part", ["2", "a/b", "1/2/3", "-1/2"])
def test_a_part_of_another_form_is_wrong_usage(tmp_path, capsys, part):
    assert main(["prep", str(SAMPLE), "--out", str(tmp_path / "out"), f"--part={part}"]) == 2
    assert "expected i/n" in capsys.readouterr().err
