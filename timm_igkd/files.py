"""Files that are whole or not there, and locks that end with their process."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import weakref
import zlib
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from zipfile import BadZipFile

import xxhash
import yaml

from timm_igkd.errors import InputError, MissingFileError, UserError, check_path, first_line

MARKERS = ".stages"
"""The folder of the markers of a run's stages, by which a run's folder is known."""
_EXPONENT_FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as `_locked_temporary` names them
_DEEPEST, _MOST_PARTS = 20, 100_000  # of what YAML holds
# What numpy and zipfile raise for a file that is no archive of arrays, or holds one that is damaged or encrypted.
_DAMAGED = (OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError, BadZipFile, zlib.error)
_LOCKS: "weakref.WeakSet[TextIO]" = weakref.WeakSet()


def given_path(name: str, value: Any) -> Path:
    """Return a path that the user gave, `~` as the home folder; InputTypeError, which calls it `name`, for none."""
    check_path(name, value)
    return Path(os.path.expanduser(value))


def output_file(path: str | Path) -> Path:
    """Return where an output goes: through a link to the file it names, and never in the place of anything but a file.

    Raises:
        InputError: no name, a folder, a device, a pipe or a socket. InputTypeError: no path.
    """
    given = given_path("an output", path)
    if not os.fspath(path) or os.fspath(path) in (".", ".."):
        raise InputError(f"an output needs a file name, got {os.fspath(path)!r}")
    found = Path(os.path.realpath(given)) if given.is_symlink() else given
    if found.exists() and not found.is_file():
        kind = "a folder" if found.is_dir() else "a device, pipe or socket"
        raise InputError(f"{str(path)!r} is {kind}, an output replaces a regular file or nothing; give another name")
    return found


def refuse_special(path: Path) -> None:
    """Raise InputError for a device, pipe or socket in the place of a file: opening one can wait for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{str(path)!r} is a device, pipe or socket, expected a regular file; restore it")


def hash_files(paths: Iterable[Path]) -> str:
    """Return a hash of the contents of files in their order, 32 hex digits; empty where none of them is there."""
    digest, found = xxhash.xxh3_128(), False
    for path in paths:
        if path.is_file():
            found = True
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, xxhash.xxh3_128).digest())
        else:
            digest.update(b"-")
    return digest.hexdigest() if found else ""


@contextlib.contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a file under a temporary name of its own and rename it at the end: it is either whole or not there.

    The temporary file is locked for as long as its process lives, see `remove_abandoned`.

    Args:
        path: of the file.
        replace: put it in the place of a file that is there; otherwise the first of several writers wins.

    Raises:
        InputError: the name is that of something else than a regular file; see `output_file`.
        FileExistsError: not to be replaced, and another was first.
    """
    path = output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked_temporary(path)
    temporary = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            (os.replace if replace else _link)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _locked_temporary(path: Path) -> BinaryIO:
    """Create a file beside `path` and lock it."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), "xb")  # noqa: SIM115 - the caller closes
        with contextlib.suppress(OSError):  # a file system without locks: nobody will take it for abandoned there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # `remove_abandoned` came between the two


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless that is taken, in one step."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, where two that come within a moment cannot be told apart
        os.replace(temporary, path)


def remove_abandoned(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove the temporary files below a folder that killed processes left; one whose process may live stays."""
    for path in (path for path in folder.glob(pattern) if _TEMPORARY.fullmatch(path.name)):  # none of others
        with contextlib.suppress(OSError), open(path, "r+b") as file:  # renamed by now, or not ours to open
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process holds it
            path.unlink()


def write_atomic(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a whole file or none; see `atomic_file`."""
    with atomic_file(path, replace) as file:
        file.write(data)


def json_bytes(content: dict[str, Any]) -> bytes:
    """Return strict JSON."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON atomically."""
    write_atomic(path, json_bytes(content))


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The writing side of `_Loader`: a text that it would read as a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+0123456789"))


def load_yaml(text: str) -> Any:
    """Return what YAML holds: 1e-3 is a number, a key given twice an error.

    Raises:
        ValueError: whatever is wrong with it, nesting without end and aliases that make billions of a few lines too.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, AttributeError, KeyError, IndexError, TypeError) as error:  # of values unlike their tag
        raise ValueError(" ".join(str(error).split())) from error
    parts = [content]
    for _ in range(_DEEPEST):
        wholes = [part.values() if isinstance(part, dict) else part for part in parts if isinstance(part, dict | list)]
        parts = [part for whole in wholes for part in whole]
        if len(parts) > _MOST_PARTS:
            raise ValueError("it holds too many values")
    if parts:
        raise ValueError("nested too deeply")
    return content


def dump_yaml(content: Any) -> str:
    """Return YAML that `load_yaml` reads back to the same."""
    is_safe = "\\x85" not in ascii(content)  # this character PyYAML writes as it is, and reads as the end of a line
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=is_safe, width=120)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a file of names with values, YAML where its suffix says so, else JSON.

    Raises:
        InputError: the file is damaged, whatever is wrong with it. MissingFileError: there is none.
    """
    kind, remedy = "YAML" if path.suffix == ".yaml" else "JSON", "restore it or build it again"
    refuse_special(path)
    try:
        content = (load_yaml if kind == "YAML" else json.loads)(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # text that is no UTF-8, numbers or nesting without end
        raise InputError(f"{str(path)!r} is not {kind} ({first_line(error)}); {remedy}") from error
    except FileNotFoundError as error:
        missing = f"{path} is missing, expected a finished run or store; run the same command again"
        raise MissingFileError(missing) from error
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}); {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} must hold names with values, found {type(content).__name__}; {remedy}")
    return content


@contextlib.contextmanager
def open_arrays(path: Path, remedy: str) -> Iterator[Any]:
    """Open an .npz file as numpy does; what is wrong with it, or with an array read meanwhile, is one line.

    Raises:
        InputError: with the remedy; it cannot be read.
    """
    import numpy as np  # only here: what answers --help imports this module

    refuse_special(path)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            yield archive
    except UserError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{str(path)!r} cannot be read as arrays ({first_line(error)}); {remedy}") from error


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with the process, however it ends; without `wait`, yield whether it was free.

    Workers forked meanwhile have no part in it, and may outlive the process. On a file system without locks it is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:  # an earlier one stays as it is
        _LOCKS.add(lock)
        is_mine = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            is_mine = not isinstance(error, BlockingIOError)
            if is_mine and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield is_mine


os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(_LOCKS)])
