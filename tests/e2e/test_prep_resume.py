"""A run of prep that was killed, interrupted or failed goes on to the same bytes, and removes nothing of others."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protlm import files
from protlm.cli.app import main
from protlm.data.building import assembly
from protlm.data.storage.dataset import open_dataset
from protlm.errors import ProtlmError
from protlm.workflows.prep import folder as prep_folder
from protlm.workflows.prep import reading as prep_reading
from tests.e2e.prep_tools import SAMPLE_OPTIONS, SAMPLE_WORDS, digests, error_line, prepare_sample
from tests.forked import TIMEOUT_SECONDS


@pytest.mark.parametrize("stage", ["pieces-*/*", "sources-*/*", "dataset-*/*.h5"])
def test_a_run_killed_at_any_stage_goes_on_to_the_same_bytes(sample_files, sample_digests, tmp_path, stage):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from protlm.data.parsing.sources import SourceBlocks\n"
        "from protlm.workflows.prep import reading\n"
        "from protlm.workflows.prep.options import PrepRequest\n"
        "from protlm.workflows.prep.prepare import prepare\n"
        "reading.PIECE_BYTES, SourceBlocks.block_bytes = 15_000, 5_000\n"
        "replace = os.replace\n"
        "def die_after(source, target):\n"
        "    replace(source, target)\n"
        f"    if len(list(Path({str(out) + '.partial'!r}).glob({stage!r}))) >= 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = die_after\n"
        f"prepare(PrepRequest(inputs={list(map(str, sample_files))!r}, out={str(out)!r}, **{SAMPLE_OPTIONS!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(Exception, match="an unfinished run for this dataset; go on with --resume"):
        prepare_sample(sample_files, out)
    prepare_sample(sample_files, out, resume=True)
    assert digests(out) == sample_digests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.fasta", "1.fasta", "2.fasta", "out"]


def test_resuming_reads_no_finished_piece_again(small_pieces, sample_files, sample_digests, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []
    write_piece = prep_reading.write_piece

    def fail_at_the_tenth(path, *arguments, **options):
        if len(written) >= 10:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_piece(path, *arguments, **options)
        written.append(path)

    monkeypatch.setattr(prep_reading, "write_piece", fail_at_the_tenth)
    with pytest.raises(Exception, match=r"No space left on device; what is finished is kept in .*out\.partial: go on"):
        prepare_sample(sample_files, out)
    first, written[:] = list(written), []
    monkeypatch.setattr(prep_reading, "write_piece", lambda *a, **o: (write_piece(*a, **o), written.append(a[0])))
    prepare_sample(sample_files, out, resume=True)
    assert digests(out) == sample_digests
    assert set(first).isdisjoint(written)
    assert len(first) >= 10


def test_a_shard_that_cannot_be_written_leaves_the_finished_ones(sample_files, sample_digests, tmp_path, monkeypatch):
    out, write_shard, names = tmp_path / "out", assembly.write_shard, []

    def fail_at_the_third(folder, name, *arguments):
        if len(names) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / name))
        names.append(name)
        return write_shard(folder, name, *arguments)

    monkeypatch.setattr(assembly, "write_shard", fail_at_the_third)
    with pytest.raises(Exception, match="No space left on device"):
        prepare_sample(sample_files, out)
    assert sorted(path.name for path in (tmp_path / "out.partial").glob("dataset-*/*.h5")) == sorted(names)
    made = []
    monkeypatch.setattr(assembly, "write_shard", lambda *a: (made.append(a[1]), write_shard(*a))[1])
    prepare_sample(sample_files, out, resume=True)
    assert digests(out) == sample_digests
    assert set(made).isdisjoint(names)


def test_a_changed_file_is_read_again_on_resume(small_pieces, sample_files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(prep_folder.PrepFolder, "worth_keeping_bytes", 1)
    monkeypatch.setattr(
        "protlm.workflows.prep.prepare.build_dataset", lambda *a, **o: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        prepare_sample(sample_files, out)
    monkeypatch.undo()
    sample_files[0].write_bytes(sample_files[0].read_bytes() + b">new\nMKVLAAGIV\n")
    prepare_sample(sample_files, out, resume=True)
    prepare_sample(sample_files, tmp_path / "afresh")
    assert digests(out) == digests(tmp_path / "afresh")


def test_shards_of_a_file_that_changed_by_one_letter_are_made_again(sample_files, tmp_path, monkeypatch):
    out, write_shard = tmp_path / "out", assembly.write_shard

    def fail_at_the_last(folder, name, *arguments):
        if name.startswith("test"):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / name))
        return write_shard(folder, name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "write_shard", fail_at_the_last)
        with pytest.raises(ProtlmError, match="No space left"):
            prepare_sample(sample_files, out)
    text = bytearray(sample_files[0].read_bytes())
    place = text.index(b"\n") + 5
    text[place] = ord("W") if text[place] != ord("W") else ord("Y")
    sample_files[0].write_bytes(text)
    prepare_sample(sample_files, out, resume=True)
    prepare_sample(sample_files, tmp_path / "afresh")
    assert digests(out) == digests(tmp_path / "afresh")


def test_a_run_killed_after_its_dataset_was_put_in_place_is_finished_by_resume(
    sample_files, sample_digests, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "remove_at_once", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_sample(sample_files, out)
    assert (tmp_path / "out.partial").exists()
    assert prepare_sample(sample_files, out, resume=True).hash == open_dataset(out).hash
    assert digests(out) == sample_digests
    assert not (tmp_path / "out.partial").exists()


def test_what_a_killed_run_left_half_written_is_removed_by_resume(sample_files, sample_digests, tmp_path):
    out = tmp_path / "out"
    prepare_sample(sample_files, out, part=(1, 2))
    half = next((tmp_path / "out.partial").glob("pieces-*")) / ".00000-000000.piece.0123.partial"
    half.write_bytes(b"half")
    prepare_sample(sample_files, out, part=(2, 2))
    # It could be that of another part.
    assert half.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "protlm.workflows.prep.prepare.build_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(ProtlmError, match="full; what is finished is kept"):
            prepare_sample(sample_files, out, resume=True)
    assert not half.exists()
    prepare_sample(sample_files, out, resume=True)
    assert digests(out) == sample_digests


def test_two_runs_do_not_share_a_folder_unless_they_are_parts(sample_files, tmp_path, capsys):
    out = tmp_path / "out"
    prepare_sample(sample_files, out, part=(1, 2))
    folder = prep_folder.PrepFolder(tmp_path / "out.partial", [], "")
    with folder.locked("part"):
        prepare_sample(sample_files, out, part=(2, 2))
        for option in ("--resume", "--force", "--merge"):
            message = error_line(capsys, "prep", *sample_files, "--out", out, "--on-bad-record", "skip", option)
            assert "another run is at work here" in message
    prepare_sample(sample_files, out, merge=True)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    command = [sys.executable, "-m", "protlm.cli.app", "prep", str(path), str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    with path.open("wb") as pipe:
        pipe.write(b">a\nMKV\n")
    deadline = time.monotonic() + TIMEOUT_SECONDS
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


def test_other_options_may_follow_but_not_other_inputs(sample_files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(prep_folder.PrepFolder, "worth_keeping_bytes", 1)
    message = error_line(capsys, "prep", *sample_files, "--out", out, *SAMPLE_WORDS)
    assert "1.fasta" in message
    assert "what is finished is kept in" in message
    assert "made with other inputs" in error_line(capsys, "prep", sample_files[0], "--out", out, "--resume")
    assert (
        main(["prep", *map(str, sample_files), "--out", str(out), *SAMPLE_WORDS, "--on-bad-record", "skip", "--resume"])
        == 0
    )
    assert open_dataset(out).manifest.rejects == {"illegal_character": 1}


def test_force_starts_afresh(sample_files, sample_digests, tmp_path):
    out = tmp_path / "out"
    prepare_sample(sample_files, out, part=(1, 2))
    prepare_sample(sample_files, out, force=True)
    assert digests(out) == sample_digests


def test_what_is_in_the_way_is_never_removed(sample_files, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.doc").write_text("precious")
    for option in ("--force", "--resume"):
        message = error_line(capsys, "prep", sample_files[0], "--out", tmp_path / "out", option)
        assert "nothing that prep made" in message
    assert (tmp_path / "out.partial" / "thesis.doc").read_text() == "precious"


def test_a_worker_that_dies_is_one_error_line(sample_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prep_reading.reader, "parse_piece", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    message = error_line(capsys, "prep", *sample_files, "--out", tmp_path / "out", "--workers", "2")
    assert "a worker process died" in message


def test_an_interrupt_ends_workers_at_once_and_leaves_nothing_of_small_work(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    words = ["prep", str(path), "--out", str(tmp_path / "out"), "--workers", "2"]
    # A shell that starts the tests in its background has its children ignore Ctrl-C.
    process = subprocess.Popen(
        [sys.executable, "-m", "protlm.cli.app", *words], stderr=subprocess.PIPE, text=True, start_new_session=True,
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


def test_a_bad_record_ends_workers_that_are_at_other_files(sample_files, tmp_path, failure, monkeypatch):
    make_piece = prep_reading.make_piece

    def wait_in_others(work, task):
        if task.number:
            time.sleep(60)
        return make_piece(work, task)

    monkeypatch.setattr(prep_reading, "make_piece", wait_in_others)
    sample_files[0].write_text(">a\nM1\n")
    started = time.monotonic()
    assert "illegal character '1'" in failure("prep", *sample_files, "--out", tmp_path / "out", "--workers", "2")
    assert time.monotonic() < started + 30


def test_an_interrupt_of_much_work_says_how_to_go_on(sample_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prep_folder.PrepFolder, "worth_keeping_bytes", 1)
    monkeypatch.setattr(
        "protlm.workflows.prep.prepare.build_dataset", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["prep", *map(str, sample_files), "--out", str(tmp_path / "out"), "--on-bad-record", "skip"]) == 130
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"warning: what is finished is kept in {tmp_path / 'out.partial'}; go on with the same command and --resume",
        "interrupted",
    ]
