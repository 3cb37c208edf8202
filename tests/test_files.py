"""Files are whole or not there; an output replaces a regular file or nothing."""

import os
import socket
import stat

import pytest

from timm_igkd.errors import InputError
from timm_igkd.files import exclusive, write_atomic, write_json


def test_file_is_whole_and_no_temporary_stays(tmp_path):
    write_atomic(tmp_path / "new" / "a.txt", b"one")
    write_atomic(tmp_path / "new" / "a.txt", b"two")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"two"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file(failing, tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.txt", b"one")

    def fail(*args):
        raise OSError("No space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a.txt", b"two")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"one")]


def special(kind, path):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making a device needs root")


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_only_a_regular_file_is_replaced(kind, linked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    special(kind, tmp_path / "special")
    before = os.lstat(tmp_path / "special").st_mode
    target = tmp_path / "special"
    if linked:
        target = tmp_path / "link"
        target.symlink_to("special")
    with pytest.raises(InputError, match="an output replaces a regular file or nothing"):
        write_json(target, {})
    assert os.lstat(tmp_path / "special").st_mode == before
    assert len(list(tmp_path.iterdir())) == 1 + linked


def test_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real.txt").write_bytes(b"one")
    for name, target in (("link", "there/real.txt"), ("dangling", "there/new.txt")):
        (tmp_path / name).symlink_to(target)
        write_atomic(tmp_path / name, b"two")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_bytes() == b"two"


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_output_needs_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="an output needs a file name"):
        write_atomic(name, b"")
    assert not list(tmp_path.iterdir())


def test_lock_is_held_once_and_freed(tmp_path):
    with exclusive(tmp_path / "lock") as mine:
        assert mine
        with exclusive(tmp_path / "lock", wait=False) as other:
            assert not other
    with exclusive(tmp_path / "lock", wait=False) as again:
        assert again
