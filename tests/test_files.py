"""Files are whole or not there; an output replaces a regular file or nothing."""

import errno
import fcntl
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.files import (
    atomic_file,
    exclusive,
    read_mapping,
    remove_abandoned,
    write_atomic,
    write_json,
)


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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_worker_that_outlives_its_process_does_not_hold_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    is_forked = context.Event()

    def work():
        is_forked.set()
        time.sleep(60)

    with exclusive(tmp_path / "lock"):
        worker = context.Process(target=work)
        worker.start()
        is_forked.wait()
    try:
        with exclusive(tmp_path / "lock", wait=False) as is_mine:
            assert is_mine
    finally:
        worker.kill()
        worker.join()


HOLD = """
import sys, time
from pathlib import Path
from timm_igkd.files import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("open", flush=True)
    time.sleep(300)
"""


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def test_file_appears_whole_or_not_at_all(tmp_path):
    with atomic_file(tmp_path / "a" / "file") as file:
        file.write(b"1")
        assert not (tmp_path / "a" / "file").exists()
    assert (tmp_path / "a" / "file").read_bytes() == b"1"
    with pytest.raises(TypeError), atomic_file(tmp_path / "a" / "file") as file:
        file.write("no bytes")
    assert (tmp_path / "a" / "file").read_bytes() == b"1"
    assert not temporaries(tmp_path)


def test_first_of_two_writers_wins_where_nothing_is_replaced(tmp_path):
    write_atomic(tmp_path / "file", b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "file", b"second", replace=False)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert not temporaries(tmp_path)


def test_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "file", b"1")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_temporary_file_goes_when_its_process_is_dead_and_not_before(tmp_path):
    words = [sys.executable, "-c", HOLD, str(tmp_path / "below" / "file")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "open\n"
            (held,) = temporaries(tmp_path)
            remove_abandoned(tmp_path)
            assert held.read_bytes() == b"half"
        finally:
            process.kill()
    remove_abandoned(tmp_path)
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("name", [".draft.tmp", ".a.b.tmp", ".file.0123ABCD.tmp", ".0123abcd.tmp"])
def test_temporary_file_of_somebody_else_stays(name, tmp_path):
    (tmp_path / name).write_bytes(b"mine")
    remove_abandoned(tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_two_writers_of_one_file_in_one_process_do_not_meet(tmp_path):
    with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
        first.write(b"first")
        second.write(b"second")
        remove_abandoned(tmp_path)
        assert len(temporaries(tmp_path)) == 2
    assert (tmp_path / "file").read_bytes() == b"first"  # the outer block ends last


def test_file_system_without_locks_or_links_is_written_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("os.link", refuse)
    with atomic_file(tmp_path / "file", replace=False) as file:
        file.write(b"1")
        remove_abandoned(tmp_path)  # nobody knows whose it is
        assert len(temporaries(tmp_path)) == 1
    assert (tmp_path / "file").read_bytes() == b"1"


def test_temporary_file_taken_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    real, taken = fcntl.flock, []

    def flock(file, operation):
        if not taken:  # another process cleans up in between
            taken.extend(temporaries(tmp_path))
            taken[0].unlink()
        real(file, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    write_atomic(tmp_path / "file", b"1")
    assert (tmp_path / "file").read_bytes() == b"1"
    assert taken


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *[("it.yaml", data) for data in (b"", b"- a", b"a: [", b"a: \xff", b"a: !!bool x", b"[" * 50_000)],
        *[("it.json", data) for data in (b"", b"[]", b"{", b"\xff", b"[" * 100_000)],
    ],
)
def test_damaged_file_of_names_and_values_is_named_in_one_line(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}' (is not|must hold)") as caught:
        read_mapping(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_link_to_itself_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "it.json").symlink_to("it.json")
    with pytest.raises(InputError, match=r"it\.json' cannot be read \(Too many levels"):
        read_mapping(tmp_path / "it.json")


def test_missing_file_of_names_and_values_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"it\.yaml is missing"):
        read_mapping(tmp_path / "it.yaml")


def test_pipe_in_the_place_of_a_file_is_refused_instead_of_waited_for(tmp_path):
    special("fifo", tmp_path / "it.json")
    with pytest.raises(InputError, match="is a device, pipe or socket, expected a regular file"):
        read_mapping(tmp_path / "it.json")
