"""Files that are whole or not there, and locks that end with their process."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm_igkd.errors import InputError, first_line


def output_file(path: str | Path) -> Path:
    """Return where an output goes: through a link to the file it names, and never in the place of anything but a file.

    Raises:
        InputError: no name, a folder, a device, a pipe or a socket.
    """
    if not os.fspath(path) or os.fspath(path) in (".", ".."):
        raise InputError(f"an output needs a file name, got {os.fspath(path)!r}")
    found = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if found.exists() and not found.is_file():
        kind = "a folder" if found.is_dir() else "a device, pipe or socket"
        raise InputError(f"{str(path)!r} is {kind}, an output replaces a regular file or nothing; give another name")
    return found


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it: it is either whole or not there.

    Raises:
        InputError: the name is that of something else than a regular file; see `output_file`.
    """
    path = output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_bytes(content: dict[str, Any]) -> bytes:
    """Return strict JSON."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON atomically."""
    write_atomic(path, json_bytes(content))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of names with values.

    Raises:
        InputError: the file is damaged, whatever is wrong with it. FileNotFoundError: there is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # text that is no UTF-8 or no JSON, numbers or nesting without end
        raise InputError(f"{str(path)!r} is not JSON ({first_line(error)}); restore it or build it again") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}); restore it or build it again") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{str(path)!r} must hold names with values, found {type(content).__name__}; restore it or build it again"
        )
    return content


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with the process, however it ends; without `wait`, yield whether it was free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
