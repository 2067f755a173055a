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


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_is_published_whole(tmp_path, is_there):
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


def test_publishing_that_fails_leaves_the_old_folder(tmp_path):
    target = write_folder(tmp_path / "out", old="1")
    with pytest.raises(FileNotFoundError):
        files.publish(tmp_path / "missing", target)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_publishing_removes_what_a_kill_left_of_the_same_folder_and_nothing_else(tmp_path):
    target = write_folder(tmp_path / "out", old="1")
    left_over = write_folder(files.partial_path(target), older="0")
    other = write_folder(files.partial_path(tmp_path / "other"), older="0")
    assert files.left_overs(target) == [left_over]
    files.publish(write_folder(tmp_path / "new", fresh="2"), target)
    assert names(tmp_path) == sorted(["out", other.name])


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
