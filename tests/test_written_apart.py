"""A folder is whole in its place or lacks its last file; what a killed process left beside it goes away."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from timm_igkd.records import folder_written_apart, move_into_place, remove_written_apart


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("before", [None, {}, {"a": "old", "b": "old", "mark": "old", "own": "kept", "c": "kept"}])
def test_folder_is_replaced_by_what_was_written_beside_it(before, tmp_path):
    if before is not None:
        folder_of(tmp_path / "out", **before)
    written = folder_of(tmp_path / "new", a="new", mark="new")
    move_into_place(written, tmp_path / "out", "mark", stale=("b", "a", "mark"))
    kept = {"own": "kept", "c": "kept"} if before else {}
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a": "new", "mark": "new"} | kept


@pytest.mark.parametrize("before", [True, False])
def test_folder_on_another_disk_is_replaced_through_a_link(before, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if before:
        folder_of(disk / "real", a="old", mark="old", own="kept")
    (tmp_path / "out").symlink_to(disk / "real")
    across_disks_fail(disk, monkeypatch)
    with folder_written_apart(tmp_path / "out", "mark") as written:
        folder_of(written, a="new", mark="new")
    kept = {"own": "kept"} if before else {}
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a": "new", "mark": "new"} | kept
    assert (tmp_path / "out").is_symlink()


def test_folder_that_is_a_mount_is_written_within(tmp_path, monkeypatch):
    mount = folder_of(tmp_path / "mount", a="old", mark="old")
    across_disks_fail(mount, monkeypatch)
    with folder_written_apart(mount, "mark") as written:
        folder_of(written, a="new", mark="new")
    assert {path.name: path.read_text() for path in mount.iterdir()} == {"a": "new", "mark": "new"}


def across_disks_fail(disk, monkeypatch):
    """Let renaming fail from a folder to another disk, as if `disk` were one of its own."""

    def within(real):
        def rename(source, target):
            if Path(source).resolve().is_relative_to(disk) != Path(target).resolve().is_relative_to(disk):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            real(source, target)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, within(getattr(os, name)))


@pytest.mark.parametrize("step", range(5))
def test_folder_that_was_half_replaced_lacks_its_last_file(step, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "out", a="old", b="old", c="old", d="old", mark="old")
    written, steps = folder_of(tmp_path / "new", a="new", b="new", c="new", mark="new"), []

    def killed(real):
        def call(*args, **options):
            steps.append(args)
            if len(steps) > step + 1:
                raise KeyboardInterrupt
            return real(*args, **options)

        return call

    monkeypatch.setattr("os.unlink", killed(os.unlink))
    monkeypatch.setattr("os.replace", killed(os.replace))
    with pytest.raises(KeyboardInterrupt):
        move_into_place(written, folder, "mark", stale=("d",))
    assert not (folder / "mark").exists()
    assert all((folder / name).exists() for name in "abc")  # old or new, never neither


def test_what_a_killed_process_left_goes_away_with_the_next_and_of_a_living_one_stays(tmp_path):
    """Names are taken as they are: [ab] is no pattern."""
    script = (
        "import sys, time; from pathlib import Path; from timm_igkd.records import folder_written_apart\n"
        "with folder_written_apart(Path(sys.argv[1]), 'mark') as written:\n"
        "    (written / 'a').write_text('half'); print(written, flush=True); time.sleep(60)"
    )
    out = tmp_path / "edge[ab]"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        killed, living = (Path(process.stdout.readline().strip()) for process in processes)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert killed.exists()
        with folder_written_apart(out, "mark") as written:
            folder_of(written, a="new", mark="new")
        assert not killed.parent.exists()
        assert (living / "a").read_text() == "half"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, living.parent.name])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        (".out-settings", "out"),
        (".out-abcd1234.tmp", "another"),
        (".another-abcd1234.tmp", "out"),
        (".out-abcd.tmp", "out"),
    ],
)
def test_a_folder_of_somebody_else_beside_it_stays(name, inner, tmp_path):
    (tmp_path / name / inner).mkdir(parents=True)
    remove_written_apart(tmp_path, "out")
    assert (tmp_path / name / inner).is_dir()


def test_two_that_move_into_one_folder_come_one_after_the_other(tmp_path, monkeypatch):
    """The files of one are never beside the last file of the other."""
    folder = folder_of(tmp_path / "out", a="old", mark="old")
    real, begun, second = os.replace, threading.Event(), []

    def replace(source, target):
        real(source, target)
        if not begun.is_set():
            begun.set()
            second.append(threading.Thread(target=move_into_place, args=(written["second"], folder, "mark")))
            second[0].start()
            second[0].join(0.3)
            assert second[0].is_alive()

    written = {name: folder_of(tmp_path / name, a=name, mark=name) for name in ("first", "second")}
    monkeypatch.setattr(os, "replace", replace)
    move_into_place(written["first"], folder, "mark")
    second[0].join(10)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "second", "mark": "second"}


def test_of_two_that_make_a_folder_the_second_moves_into_it(tmp_path, monkeypatch):
    real = os.rename

    def rename(source, target):
        folder_of(tmp_path / "out", a="first", b="first", mark="first")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    move_into_place(folder_of(tmp_path / "new", a="second", mark="second"), tmp_path / "out", "mark")
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "mark").read_text() == "second"
