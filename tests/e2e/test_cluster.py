"""prep and embed on the workers of a Dask cluster: the bytes of one machine, whatever is lost meanwhile."""

import contextlib
import functools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset
from protlm.runtime import dask_workers
from protlm.runtime.workers import Scheduler, open_workers
from tests.e2e import cluster_faults
from tests.e2e.prep_tools import SAMPLE_WORDS, digests, ids
from tests.forked import TIMEOUT_SECONDS, Forked
from tests.numbered_tasks import Numbered

distributed = pytest.importorskip("distributed")

WORDS = (*SAMPLE_WORDS, "--on-bad-record", "skip", "--min-length", "2")
WRITE_PIECE = "protlm.workflows.prep.reading:write_piece"
WRITE_SHARD = "protlm.data.building.assembly:write_shard"
DECIDE = "protlm.data.building.selection:_first_codes"
MAKE_PIECE = "protlm.data.parsing.reader:parse_piece"
CONTAINED = "protlm.data.building.kmer_search:search"
COMPUTE = "protlm.workflows.embed.cluster:_compute"
EMBED_ROW = "protlm.workflows.embed.portions:merge_windows"


class Clusters:
    """A cluster that tests share: two worker processes of one thread each, on this machine."""

    def __init__(self):
        self._current = None

    def complete(self):
        """Returns it with both workers there: a new one where Dask does not bring back a worker that was killed."""
        if self._current is not None:
            try:
                self._current.wait_for_workers(2, timeout=TIMEOUT_SECONDS / 5)
            except (TimeoutError, OSError):
                # Closing may fail for the same reason; no process outlives the tests.
                with contextlib.suppress(Exception):
                    self.close()
        if self._current is None:
            self._current = distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
            )
            self._current.wait_for_workers(2, timeout=TIMEOUT_SECONDS / 2)
        return self._current

    def close(self):
        # One that failed to close waits for ever when it is closed again.
        current, self._current = self._current, None
        if current is not None:
            current.close(timeout=TIMEOUT_SECONDS / 5)


@pytest.fixture(scope="module")
def clusters():
    clusters = Clusters()
    yield clusters
    clusters.close()


@pytest.fixture
def cluster(clusters):
    return clusters.complete()


@pytest.fixture
def client(cluster):
    """A client of the test's own, whose workers are without faults before and after."""
    with distributed.Client(cluster, set_as_default=False) as client:
        yield client
        for name in (WRITE_PIECE, WRITE_SHARD, DECIDE, MAKE_PIECE, CONTAINED, COMPUTE, EMBED_ROW):
            # A worker that was killed a moment ago, or began since, has no fault.
            client.run(cluster_faults.mend, name, on_error="ignore")
        client.run(cluster_faults.show, on_error="ignore")


@pytest.fixture
def address(cluster):
    return ["--scheduler", cluster.scheduler_address]


def run(*words):
    assert main([str(word) for word in words]) == 0


@pytest.fixture
def failure_on_cluster(capsys):
    """Runs a command that must tell of the cluster in one line and fail in the next; returns that one."""

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 1
        first, line = capsys.readouterr().err.splitlines()
        assert first.startswith("Dask at ")
        assert line.startswith("error: ")
        return line

    return run


def test_prep_makes_the_bytes_of_one_worker(client, address, sample_files, sample_digests, tmp_path, capsys):
    run("prep", *sample_files, "--out", tmp_path / "out", *WORDS, *address)
    assert digests(tmp_path / "out") == sample_digests
    assert not (tmp_path / "out.partial").exists()
    assert f"Dask at {address[1]}, 2 workers" in capsys.readouterr().err


def test_clusters_labels_and_leaks_are_those_of_one_worker(client, address, sample_files, tmp_path):
    run("prep", *sample_files, "--out", tmp_path / "all", *WORDS)
    names = [name for split in ("train", "valid", "test") for name in ids(tmp_path / "all", split)]
    draw = random.Random(3)
    rows = [f"{draw.randrange(150)}\t{name}\n" for name in names[:-4]]
    (tmp_path / "clusters.tsv").write_text("".join(rows))
    options = (*WORDS, "--split", "cluster", "--clusters", tmp_path / "clusters.tsv", "--unclustered", "train")
    run("prep", *sample_files, "--out", tmp_path / "one", *options)
    run("prep", *sample_files, "--out", tmp_path / "many", *options, *address)
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    leakage = open_dataset(tmp_path / "many").manifest.leakage
    assert leakage.substrings
    assert leakage.clusters


def test_the_standard_input_is_read_by_the_command(client, address, sample_files, tmp_path, monkeypatch):
    run("prep", sample_files[0], "--out", tmp_path / "one", *WORDS)
    with sample_files[0].open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        run("prep", "-", "--out", tmp_path / "many", *WORDS, *address)
    assert ids(tmp_path / "many", "train") == ids(tmp_path / "one", "train")


def test_a_large_plain_file_is_read_by_pieces(client, address, sample_files, tmp_path, small_pieces):
    run("prep", sample_files[0], "--out", tmp_path / "one", *WORDS)
    client.run(cluster_faults.before, MAKE_PIECE, functools.partial(cluster_faults.note, tmp_path / "made"))
    run("prep", sample_files[0], "--out", tmp_path / "many", *WORDS, *address)
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    # By the workers, and each only once.
    assert len((tmp_path / "made").read_text()) > 5


def test_a_relative_path_is_that_of_the_command(client, address, sample_files, sample_digests, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("prep", *[path.name for path in sample_files], "--out", "out", *WORDS, *address)
    assert digests(tmp_path / "out") == sample_digests


@pytest.mark.parametrize("place", [WRITE_PIECE, DECIDE, WRITE_SHARD, CONTAINED])
def test_a_killed_worker_loses_its_task_only(client, address, sample_files, sample_digests, tmp_path, place):
    client.run(cluster_faults.before, place, functools.partial(cluster_faults.die_once, tmp_path / "killed"))
    run("prep", *sample_files, "--out", tmp_path / "out", *WORDS, *address)
    assert digests(tmp_path / "out") == sample_digests
    assert (tmp_path / "killed").exists()


def test_a_task_that_fails_three_times_names_its_file_and_keeps_the_rest(
    client, address, sample_files, sample_digests, tmp_path, failure_on_cluster
):
    client.run(cluster_faults.before, WRITE_SHARD, cluster_faults.fill_disk)
    command = ("prep", *sample_files, "--out", tmp_path / "out", *WORDS)
    line = failure_on_cluster(*command, *address)
    assert "train-00000.h5: failed 3 times on the workers, last with OSError" in line
    assert "No space left on device" in line
    assert f"what is finished is kept in {tmp_path / 'out'}.partial: go on" in line
    client.run(cluster_faults.mend, WRITE_SHARD)
    client.run(cluster_faults.before, WRITE_PIECE, cluster_faults.fill_disk)
    # No piece is made again.
    run(*command, "--resume", *address)
    assert digests(tmp_path / "out") == sample_digests


def test_a_bad_record_is_the_error_of_one_worker(client, address, sample_files, tmp_path, failure, failure_on_cluster):
    command = ("prep", *sample_files, "--out", tmp_path / "out", *SAMPLE_WORDS)
    assert failure_on_cluster(*command, *address) == failure(*command)


def test_embed_makes_the_bytes_of_one_process_also_where_a_worker_is_killed(
    client, address, run_dir, fasta, tmp_path, monkeypatch
):
    options = ["--tokens-per-batch", 100, "--include", "per-residue", "--include", "mean"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run("embed", run_dir, fasta, "--out", tmp_path / "one.h5", *options)
    client.run(cluster_faults.before, EMBED_ROW, functools.partial(cluster_faults.die_once, tmp_path / "killed"), 30)
    run("embed", run_dir, fasta, "--out", tmp_path / "many.h5", *options, *address)
    assert (tmp_path / "many.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    assert (tmp_path / "killed").exists()


@pytest.fixture
def wide_cluster():
    """Two worker processes of several threads each."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=4, processes=True, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster


def test_all_processes_compute_however_many_threads_they_have(wide_cluster, run_dir, fasta, sample_files, tmp_path):
    address = ("--scheduler", wide_cluster.scheduler_address)
    with distributed.Client(wide_cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=TIMEOUT_SECONDS)
        for name in (EMBED_ROW, WRITE_SHARD):
            client.run(cluster_faults.before, name, functools.partial(cluster_faults.note_process, tmp_path / name))
        run("embed", run_dir, fasta, "--out", tmp_path / "e.h5", "--tokens-per-batch", 100, *address)
        run("prep", *sample_files, "--out", tmp_path / "out", *WORDS, *address)
    for name in (EMBED_ROW, WRITE_SHARD):
        assert len(set((tmp_path / name).read_text().split())) == 2


def test_a_portion_that_fails_keeps_those_that_are_finished(
    client, address, run_dir, fasta, tmp_path, failure_on_cluster
):
    command = ("embed", run_dir, fasta, "--out", tmp_path / "e.h5", "--tokens-per-batch", 100)
    run(*command[:3], "--out", tmp_path / "one.h5", *command[5:])
    fail = functools.partial(cluster_faults.fail_first_portion, tmp_path / "e.h5.partial")
    client.run(cluster_faults.before, COMPUTE, fail, takes_arguments=True)
    line = failure_on_cluster(*command, *address)
    assert "proteins 1 to " in line
    assert "failed 3 times on the workers, last with OSError" in line
    assert "what is finished is kept in " in line
    client.run(cluster_faults.mend, COMPUTE)
    run(*command, *address, "--resume")
    assert (tmp_path / "e.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()


@pytest.mark.parametrize("ahead", [0, 5, 100])
def test_more_tasks_than_wait_come_back_in_their_order_while_others_are_handed_out(client, cluster, tmp_path, ahead):
    handed_out, end = [], time.monotonic() + 60

    def tasks():
        for number in range(60):
            handed_out.append(number)
            yield Numbered(number)

    def look():
        assert time.monotonic() < end, "nothing comes back"

    results, handed_out_before = [], []
    with (
        dask_workers.DaskCluster(Scheduler(address=cluster.scheduler_address)) as connection,
        open_workers(1, connection, "shared", tmp_path) as workers,
    ):
        for result in workers.in_order(cluster_faults.hand_in, tasks(), ahead=ahead, meanwhile=look):
            results.append(result)
            handed_out_before.append(len(handed_out))
    assert results == [("shared", number) for number in range(60)]
    assert handed_out_before[0] < 60


def test_a_task_that_ends_its_workers_is_named(
    cluster, client, address, sample_files, tmp_path, failure_on_cluster, monkeypatch
):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    client.run(cluster_faults.before, WRITE_SHARD, cluster_faults.kill_own)
    line = failure_on_cluster("prep", *sample_files, "--out", tmp_path / "out", *WORDS, *address)
    assert "train-00000.h5: lost several workers that were at it, perhaps for want of memory" in line
    assert "what is finished is kept in " in line


def test_a_killed_command_goes_on_from_what_its_workers_had_finished(
    client, address, sample_files, sample_digests, tmp_path, monkeypatch
):
    command = ("prep", *sample_files, "--out", tmp_path / "out", *WORDS, *address)
    process = Forked(*command)
    client.run(cluster_faults.before, WRITE_SHARD, functools.partial(cluster_faults.kill, process.pid))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    client.run(cluster_faults.mend, WRITE_SHARD)
    client.run(cluster_faults.before, WRITE_PIECE, cluster_faults.fill_disk)
    run(*command, "--resume")
    assert digests(tmp_path / "out") == sample_digests


def test_an_address_where_nobody_answers_is_one_line(sample_files, tmp_path, failure, monkeypatch):
    monkeypatch.setattr(dask_workers, "_CONNECT_SECONDS", 1)
    command = ("prep", *sample_files, "--out", tmp_path / "out")
    assert "tcp://127.0.0.1:9: no Dask scheduler answers" in failure(*command, "--scheduler", "tcp://127.0.0.1:9")
    assert ": no Dask scheduler answers" in failure(*command, "--scheduler", "")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Another service, which waits for a request as the client does.
        busy = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        assert f"{busy}: no Dask scheduler answers" in failure(*command, "--scheduler", busy)
    assert "nonsense://x: no Dask scheduler answers" in failure(*command, "--scheduler", "nonsense://x")
    (tmp_path / "s.json").write_text('{"address": 3}')
    assert "s.json: no scheduler file" in failure(*command, "--scheduler-file", tmp_path / "s.json")
    assert "is the scheduler running?" in failure(*command, "--scheduler-file", tmp_path / "none.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.fasta", "1.fasta", "2.fasta", "s.json"]


def test_a_worker_of_another_version_is_refused_with_its_host(
    client, address, sample_files, tmp_path, failure, monkeypatch
):
    monkeypatch.setattr(dask_workers, "__version__", "9.9")
    line = failure("prep", *sample_files, "--out", tmp_path / "out", *address)
    assert "the worker on " in line
    assert "and this process protlm 9.9; start the workers" in line
    monkeypatch.undo()
    monkeypatch.setattr(dask_workers, "_installed", lambda: {"torch": "1.0", "numpy": np.__version__, "h5py": "9"})
    line = failure("prep", *sample_files, "--out", tmp_path / "out", *address)
    assert re.search(r"has torch 2\S+ and h5py \S+, and this process torch 1\.0 and h5py 9; start", line)


def test_a_worker_that_does_not_see_the_folder_is_refused_with_its_host(
    client, address, sample_files, run_dir, fasta, tmp_path, failure_on_cluster
):
    client.run(cluster_faults.hide, tmp_path)
    for command in (("prep", *sample_files), ("embed", run_dir, fasta)):
        line = failure_on_cluster(*command, "--out", tmp_path / "out", *address)
        assert "the worker on " in line
        assert f"does not see {tmp_path}" in line
    assert not (tmp_path / "out.partial").exists()


def test_without_dask_the_extra_is_named(sample_files, tmp_path, failure, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    line = failure("prep", *sample_files, "--out", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
    assert "pip install 'protlm[cluster]'" in line


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("prep", ("--part", "1/2"), "part and scheduler: only one of them"),
        ("prep", ("--workers", "2"), "workers and scheduler: only one of them"),
        ("embed", ("--devices", "2"), "only without --scheduler"),
        ("prep", ("--scheduler-file", "f"), "give one of them"),
        ("embed", ("--scheduler-file", "f"), "give one of them"),
    ],
)
def test_options_that_contradict_a_scheduler_are_refused(run_dir, fasta, tmp_path, capsys, command, options, message):
    inputs = (run_dir, fasta) if command == "embed" else (fasta,)
    words = (command, *inputs, "--out", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9", *options)
    assert main([str(word) for word in words]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


KILLER = """
import os, signal
from tests.e2e import cluster_faults

def kill_scheduler():
    os.kill({pid}, signal.SIGKILL)

cluster_faults.before({place!r}, kill_scheduler, 2)
"""


def test_the_loss_of_the_scheduler_is_one_line_and_the_work_goes_on(
    sample_files, sample_digests, tmp_path, failure_on_cluster
):
    # As a user starts them, each a process of its own.
    file, preload = tmp_path / "scheduler.json", tmp_path / "kill.py"
    program = [sys.executable, "-m", "dask"]
    options = ["--no-dashboard", "--scheduler-file", str(file)]
    with subprocess.Popen(
        [*program, "scheduler", "--port", "0", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as scheduler:
        end = time.monotonic() + 60
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.1)
        preload.write_text(KILLER.format(pid=scheduler.pid, place=WRITE_PIECE))
        with subprocess.Popen(
            [*program, "worker", *options, "--nthreads", "1", "--no-nanny", "--preload", str(preload)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as worker:  # fmt: skip
            try:
                command = ("prep", *sample_files, "--out", tmp_path / "out", *WORDS)
                line = failure_on_cluster(*command, "--scheduler-file", file)
                assert "lost the connection to the Dask scheduler; what is finished is kept in " in line
                assert scheduler.poll() is not None
            finally:
                worker.kill()
                scheduler.kill()
    kept = json.loads(next((tmp_path / "out.partial").glob("sources-*/*.json")).read_text())
    assert kept["num_records"]
    run(*command, "--resume")
    assert digests(tmp_path / "out") == sample_digests
