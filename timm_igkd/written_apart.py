"""Folders that are written beside their place and moved there whole, or not at all."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from timm_igkd.files import given_path


@contextlib.contextmanager
def folder_written_apart(folder: Path, last: str, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yield a folder to write into, on the disk of `folder` even through a link; at the end see `move_into_place`.

    What killed processes left of the same folder is removed first.
    """
    folder = Path(os.path.realpath(given_path("an output", folder)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    disk = folder if folder.is_dir() else folder.parent  # a folder that is there can be a mount of its own
    remove_written_apart(disk, folder.name)
    with _locked_temporary(disk, folder.name) as temporary:
        written = temporary / folder.name
        written.mkdir()
        yield written
        move_into_place(written, folder, last, stale)


@contextlib.contextmanager
def _locked_temporary(disk: Path, name: str) -> Iterator[Path]:
    """Create a folder, lock it for as long as its process lives, and remove it at the end."""
    with contextlib.ExitStack() as stack:
        while True:
            path = Path(tempfile.mkdtemp(dir=disk, prefix=f".{name}-", suffix=".tmp"))
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_lock(path))
            if path.is_dir():
                break
            stack.close()  # `remove_written_apart` came between the two
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


@contextlib.contextmanager
def _lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on a folder itself; yield whether it is held: maybe not without `wait`, or where there are none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_held = False
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        yield is_held
    finally:
        os.close(descriptor)


def remove_written_apart(disk: Path, name: str) -> None:
    """Remove what killed processes left in `disk` of a folder of that name; one whose process may live stays."""
    pattern = re.compile(rf"\.{re.escape(name)}-[a-z0-9_]{{8}}\.tmp")  # as `_locked_temporary` names them
    for path in [path for path in disk.iterdir() if pattern.fullmatch(path.name)] if disk.is_dir() else ():
        with contextlib.suppress(OSError), _lock(path, wait=False) as is_abandoned:  # gone by now, or not ours to open
            if is_abandoned and {inner.name for inner in path.iterdir()} <= {name}:
                shutil.rmtree(path, ignore_errors=True)


def move_into_place(written: Path, folder: Path, last: str, stale: Collection[str] = ()) -> None:
    """Make a folder of what was written beside it; killed meanwhile, it is absent or lacks its last file.

    Of two processes that move into one folder, the second waits for the first.

    Args:
        written: folder of files on the same disk.
        folder: may be there; files of it that were written anew are replaced, others stay.
        last: the file without which the folder is not complete: it goes first and comes last.
        stale: files of an earlier output that go with it, unless they were written anew.
    """
    if not folder.exists():
        try:
            os.rename(written, folder)
            return
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    with _lock(folder):
        names = sorted({path.name for path in written.iterdir()} - {last})
        (folder / last).unlink(missing_ok=True)
        for name in names:
            os.replace(written / name, folder / name)
        for name in sorted(set(stale) - {*names, last}):
            (folder / name).unlink(missing_ok=True)
        os.replace(written / last, folder / last)
