import os
import stat

import pytest

from tappa import files
from tappa.errors import OutputError
from tappa.files import check_writable_folder, ensure_folder, write_atomic


@pytest.mark.parametrize(
    ("data", "written"), [("naïve\n", b"na\xc3\xafve\n"), (b"\x00\xff", b"\x00\xff"), ("", b"")]
)
def test_write_atomic_writes_exactly_the_data(tmp_path, data, written):
    path = write_atomic(tmp_path / "out.json", data)
    assert path.read_bytes() == written
    assert os.listdir(tmp_path) == ["out.json"]


def test_write_atomic_replaces_and_has_ordinary_permissions(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old and longer")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch, step):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os if step == "fsync" else files.Path, step, full)
    with pytest.raises(OutputError, match=r"cannot write .*out\.json: no space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize(
    "where", ["missing/out.json", "file/out.json", "folder", "nul\0", "n" * 300]
)
def test_write_atomic_says_why_it_cannot_write(tmp_path, where):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_atomic(tmp_path / where, "data")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_ensure_folder_creates_the_folder_and_leaves_it_empty(tmp_path):
    folder = ensure_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    assert os.listdir(folder) == []
    assert ensure_folder(folder) == folder


@pytest.mark.parametrize("where", ["file", "file/below", "nul\0"])
def test_ensure_folder_refuses(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to the folder"):
        ensure_folder(tmp_path / where)


def test_a_check_leaves_nothing_behind(tmp_path):
    assert check_writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to the folder"):
        check_writable_folder(tmp_path / "file" / "below")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "data", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["data"]


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        write_atomic(tmp_path / "pipe", "data")
    assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(OutputError, match="cannot write"):
        write_atomic("", "data")
