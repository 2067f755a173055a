import errno
import os

import pytest

from protlm import files


def write_folder(path, **content):
    path.mkdir()
    for name, text in content.items():
        (path / name).write_text(text)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(TypeError), files.written_whole(path) as temporary:
        temporary.write_text("half") + None
    assert path.read_text() == "before"
    with files.written_whole(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert names(tmp_path) == ["a"]


@pytest.fixture(params=["exchange", "two renames"])
def kind(request, monkeypatch):
    """Both ways in which a folder takes the place of another, on whatever file system the tests run."""
    if request.param == "exchange":
        if files._exchanging_rename() is None:
            pytest.skip("this system has no exchange of names")
    else:
        monkeypatch.setattr(files, "_exchanging_rename", lambda: None)
    return request.param


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_no_folder_that_was_made_for_it_and_is_empty(tmp_path, error):
    inner = tmp_path / "old" / "new" / "inner"

    @files.made_folder(inner)
    def fail(*file_names):
        for name in file_names:
            (inner / name).write_text("")
        raise error

    (tmp_path / "old").mkdir()
    with pytest.raises(error):
        fail()
    assert names(tmp_path / "old") == []
    with pytest.raises(error):
        fail("result")
    assert names(inner) == ["result"]
    (inner / "result").unlink()
    with pytest.raises(error):
        fail()
    # It was there before.
    assert names(tmp_path / "old" / "new") == ["inner"]


def test_a_folder_that_is_made_stays(tmp_path):
    for _ in range(2):
        with files.made_folder(tmp_path / "new" / "inner"):
            pass
    assert names(tmp_path / "new") == ["inner"]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_is_published_whole(tmp_path, is_there, kind):
    target = tmp_path / "out"
    if is_there:
        write_folder(target, old="1", shared="1")
    files.publish(write_folder(tmp_path / "new", shared="2"), target)
    assert names(target) == ["shared"]
    assert (target / "shared").read_text() == "2"
    assert names(tmp_path) == ["out"]


def test_a_file_is_published_in_place_of_another(tmp_path):
    (tmp_path / "new").write_text("2")
    (tmp_path / "out").write_text("1")
    files.publish(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "2"
    assert names(tmp_path) == ["out"]


def test_publishing_that_fails_leaves_the_old_folder(tmp_path, kind):
    target = write_folder(tmp_path / "out", old="1")
    with pytest.raises(FileNotFoundError):
        files.publish(tmp_path / "missing", target)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_an_exchange_swaps_two_names_and_needs_both(tmp_path):
    first, second = write_folder(tmp_path / "first", a="1"), tmp_path / "second"
    with pytest.raises(FileNotFoundError, match="second"):
        files.exchange(first, second)
    second.write_text("2")
    assert files.exchange(first, second)
    assert (first.read_text(), names(second)) == ("2", ["a"])


def test_a_file_system_without_exchange_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchanging_rename", lambda: lambda *_: -1)
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: errno.EINVAL)
    assert not files.exchange(tmp_path, tmp_path)
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: errno.EACCES)
    with pytest.raises(PermissionError):
        files.exchange(tmp_path, tmp_path)


@pytest.mark.parametrize("is_new_there", [False, True])
def test_a_replacement_that_was_killed_is_undone_or_completed(tmp_path, is_new_there):
    target = tmp_path / "out"
    write_folder(files.replaced_path(target), old="1")
    if is_new_there:
        write_folder(target, new="2")
    files.restore(target)
    assert names(target) == ["new" if is_new_there else "old"]
    files.restore(target)
    assert names(tmp_path) == ["out"]


def test_what_is_held_open_on_a_network_stays_as_a_left_over(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "out", held="1", other="2")
    unlink = os.unlink

    def busy(path, **options):
        if os.fspath(path).endswith("held"):
            raise OSError(errno.EBUSY, "busy")
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        files.remove_at_once(folder)
    (left_over,) = files.left_overs(folder)
    assert names(left_over) == ["held"]
    files.discard(left_over)
    assert names(tmp_path) == []


def test_left_overs_are_those_of_the_same_path(tmp_path):
    target = tmp_path / "out"
    left_over = write_folder(files.partial_path(target), older="0")
    write_folder(files.partial_path(tmp_path / "other"), older="0")
    assert files.left_overs(target) == [left_over]
    assert files.left_overs(tmp_path / "no such folder" / "out") == []


def test_removing_takes_files_links_and_folders_but_follows_no_link(tmp_path):
    folder = write_folder(tmp_path / "folder", kept="1")
    link = tmp_path / "link"
    os.symlink(folder, link)
    files.remove(link)
    files.remove(tmp_path / "missing")
    assert names(folder) == ["kept"]
    files.remove(folder / "kept")
    assert names(folder) == []
    files.remove_at_once(folder)
    assert names(tmp_path) == []


def test_a_regular_file_is_opened_through_links_up_to_its_bound(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path / "a", str(tmp_path / "link")):
        with files.open_regular(path, max_bytes=5) as file:
            assert file.read() == b"12345"
    with files.open_regular(tmp_path / "a") as file:
        assert not os.get_inheritable(file.fileno())


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    reasons = {
        "pipe": "expected a regular file, got a pipe, socket or device",
        "zeros": "expected a regular file, got a pipe, socket or device",
        "loop": os.strerror(errno.ELOOP),
        "missing": os.strerror(errno.ENOENT),
        ".": os.strerror(errno.EISDIR),
    }
    num_open = len(os.listdir("/dev/fd"))
    for name, reason in reasons.items():
        with pytest.raises(OSError, match=f"{reason}: ") as raised:
            files.open_regular(tmp_path / name)
        assert raised.value.strerror == reason
    assert len(os.listdir("/dev/fd")) == num_open


def test_a_larger_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="expected at most 1,024 bytes, got 1,099,511,627,776"):
        files.open_regular(tmp_path / "sparse", max_bytes=1024)


def test_no_more_is_read_than_the_bound_even_where_the_system_tells_no_size(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read_regular(tmp_path / "a", max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="expected at most 4 bytes, got 5"):
        files.read_regular(tmp_path / "a", max_bytes=4)
    without_size = "/proc/self/status"
    if not os.path.exists(without_size):
        pytest.skip("only Linux has such files")
    with pytest.raises(OSError, match="expected at most 4 bytes, got more"):
        files.read_regular(without_size, max_bytes=4)
