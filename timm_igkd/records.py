"""Frozen dataclasses as JSON files: one reader, which holds every value against its field's type, and one writer.

And the folders that such a file completes: written beside their place and moved there whole, or not at all.
"""

import contextlib
import fcntl
import math
import os
import re
import shutil
import tempfile
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from timm_igkd.errors import InputError, nearest
from timm_igkd.files import given_path, json_bytes, read_mapping, write_atomic

Record = TypeVar("Record")
_SCALARS: dict[Any, str] = {
    int: "a whole number of 64 bits",
    float: "a finite number",
    str: "text",
    bool: "true or false",
}


def record_bytes(record: Any) -> bytes:
    """Return a dataclass as strict JSON; the fields' names and order are the keys'."""
    return json_bytes(asdict(record))


def write_record(path: Path, record: Any, replace: bool = True) -> None:
    """Write a dataclass as strict JSON, atomically; errors as of `files.atomic_file`."""
    write_atomic(path, record_bytes(record), replace)


def read_record(kind: type[Record], path: Path) -> Record:
    """Return what `write_record` wrote; errors as of `files.read_mapping` and `parse_record`."""
    return parse_record(kind, read_mapping(path), repr(str(path)))


def parse_record(kind: type[Record], content: Any, where: str) -> Record:
    """Return the dataclass `kind` of what JSON gave; a field with a default may be absent.

    Args:
        kind: its fields are of int, float, str, bool, Literal, tuple, Mapping, dataclasses, unions of those, and Any.
        content: as `json.loads` returns it, whatever it is.
        where: what errors begin with, such as the file's name.

    Raises:
        InputError: the first value that is missing, unknown or not what its field takes.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where} must be names with values, found {_shown(content)}")
    known, hints = {field.name: field for field in fields(kind)}, get_type_hints(kind)  # type: ignore[arg-type]
    for name in content:
        if name not in known:
            raise InputError(f"{where} has an unknown key {_shown(name)}{nearest(name, known)}; is timm-igkd too old?")
    for name, field in known.items():
        if name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{where} lacks {name!r}")
    values = {name: _parse(hints[name], value, f"{where}: {name}") for name, value in content.items()}
    try:
        return kind(**values)
    except InputError as error:  # of the dataclass's own checks, across its fields
        raise InputError(f"{where}: {error}") from error


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `kind`."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _parse_union(args, value, where)
    if is_dataclass(kind):
        return parse_record(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_parse(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping and isinstance(value, dict):
        return {name: _parse(args[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if kind is float and _is_number(value) and math.isfinite(value):
        return float(value)
    if (kind in (str, bool) and type(value) is kind) or (kind is int and _is_number(value) and isinstance(value, int)):
        return value
    raise InputError(f"{where} must be {_words(kind)}, found {_shown(value)}")


def _parse_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return `value` as the first of several types that takes it; where only one is not None, its error is told."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others[:-1]:
        try:
            return _parse(kind, value, where)
        except InputError:
            continue
    try:
        return _parse(others[-1], value, where)
    except InputError as error:
        if len(others) == 1:
            raise
        words = " or ".join(_words(kind) for kind in others)
        raise InputError(f"{where} must be {words}, found {_shown(value)}") from error


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, of 64 bits: `float` and `range` do not bear JSON's endless integers."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def _words(kind: Any) -> str:
    """Return what a type takes, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if origin is tuple:
        return f"a list of {_words(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)}"
    return _SCALARS.get(kind, "names with values")


def _shown(value: Any) -> str:
    """Return a value as a message shows it, on one line and not long."""
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return f"{'names with values' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 63 else "a larger one"
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- folders that are complete with their last file ----


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
