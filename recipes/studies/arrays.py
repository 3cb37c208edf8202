"""Arrays beside a study's rows: one compressed file, whole or not there, whose entries are added to."""

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from timm_igkd.errors import InputError, MissingFileError, UserError, first_line
from timm_igkd.files import write_atomic

_DAMAGED = (OSError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for a file that is no archive of arrays."""


class ArrayFile:
    """A compressed file of named arrays; writers hold the lock of the rows beside it.

    Args:
        path: of the file, .npz; written by the first `add`.
        rows: the rows that need it, named in errors.
    """

    def __init__(self, path: Path, rows: Path):
        self.path, self._rows = path, rows

    def names(self) -> set[str]:
        """Return the names of all entries; none where there is no file.

        Raises:
            InputError: it cannot be read.
        """
        if not self.path.exists():
            return set()
        with self._open() as archive:
            return set(archive.files)

    def read(self, name: str) -> np.ndarray:
        """Return one entry.

        Raises:
            MissingFileError: no file, or none of that name. InputError: it cannot be read.
        """
        with self._open() as archive:
            if name not in archive.files:
                raise MissingFileError(
                    f"{str(self.path)!r} lacks the entry {name!r}, which {self._rows.name} needs; restore "
                    "the file, or delete the run's row and repeat it"
                )
            return archive[name]

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add entries, atomically; one that is there already is replaced."""
        if not arrays:
            return
        kept: dict[str, np.ndarray] = {}
        if self.path.exists():
            with self._open() as archive:
                kept = dict(archive)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **(kept | dict(arrays)))
        write_atomic(self.path, buffer.getvalue())

    @contextmanager
    def _open(self) -> Iterator[Any]:
        path = str(self.path)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                yield archive
        except UserError:
            raise
        except FileNotFoundError as error:
            raise MissingFileError(f"{path!r} does not exist; {self._rows} needs it: restore it") from error
        except _DAMAGED as error:
            raise InputError(
                f"{path!r} cannot be read ({first_line(error)}); "
                f"restore it, or delete it and {self._rows.name} and repeat the runs"
            ) from error
