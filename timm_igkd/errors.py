"""Errors that end a command with one line: what was expected, what was found, what to do.

Every error that a DataLoader's worker may raise takes a single string, from which it is rebuilt.
"""

import difflib
import operator
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

MOST_WORKERS = 1024
"""Processes that a loader may have; far more than any machine has cores."""
_USER = re.compile(r"(\w+://)[^/\s]*@")  # up to the last @ before the path
# No such @, but what would be a port is none: a password with a slash in it, up to the last @ of the address.
_SLASHED_PASSWORD = re.compile(r"\b((?!file:)\w+://)[^/\s@:\[]*:(?!//|\d{1,5}[/,])[^/\s@]*/(?:(?!://)\S)*@")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal


class UserError(Exception):
    """An error whose message is all the user needs; commands print it as one line and exit with `exit_code`."""

    exit_code = 2


class InputError(UserError, ValueError):
    """A value the user gave, or data they named, cannot be used (exit code 2)."""


class MissingColumnError(InputError):
    """Rows lack a column that was named (exit code 2)."""


class InputTypeError(UserError, TypeError):
    """An object of the wrong kind was given (exit code 2)."""


class MissingFileError(UserError, FileNotFoundError):
    """A named file, folder or store does not exist (exit code 2)."""


class RunError(UserError, RuntimeError):
    """Valid input, but the run could not go on: disk, network, access, non-finite numbers (exit code 1)."""

    exit_code = 1


class DivergedError(RunError):
    """The loss of a training is no longer finite, or its gradients are at no scale of fp16 (exit code 1).

    Attributes:
        epoch: the first such epoch.
    """

    def __init__(self, message: str, epoch: int):
        super().__init__(message)
        self.epoch = epoch


def message_of(error: UserError) -> str:
    """Return an error's own message; one of a DataLoader worker carries the worker's traceback before it."""
    text = str(error)
    raised = list(re.finditer(r"^timm_igkd\.errors\.\w+: ", text, re.MULTILINE))
    return text[raised[-1].end() :].strip() if text.startswith("Caught ") and raised else text


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_kind(name: str, value: object, kind: Any, expected: str, remedy: str) -> None:
    """Raise InputTypeError unless a value is of a type; `expected` says that in words."""
    if not isinstance(value, kind):
        raise InputTypeError(f"{name} must be {expected}, got {type(value).__name__}; {remedy}")


def check_path(name: str, value: object) -> None:
    """Raise InputTypeError unless a value is a path."""
    check_kind(name, value, (str, os.PathLike), "a path", "give a text or a pathlib.Path")


def check_number(name: str, value: object) -> None:
    """Raise InputTypeError unless a value is a number, be it numpy's or a tensor of one."""
    if not hasattr(value, "__float__"):
        raise InputTypeError(f"{name} must be a number, got {type(value).__name__}; give one")


def check_indices(name: str, values: Any) -> list[int]:
    """Return whole numbers as a list of ints; errors as of `check_whole`, with InputTypeError where it is no list."""
    return [check_whole(f"each of {name}", value) for value in listed(name, values, "numbers")]


def listed(name: str, values: Any, of: str) -> list[Any]:
    """Return values as a list; InputTypeError for a text, whose letters nobody means, and for what holds none."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputTypeError(f"{name} must be a list of {of}, got {type(values).__name__}; give a list")
    return list(values)


def check_images(name: str, dataset: object) -> None:
    """Raise InputTypeError unless something has items by index, as a map-style data set does; a name has letters."""
    from torch.utils.data import IterableDataset  # here: the command line answers --help without torch

    is_indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, str | bytes | os.PathLike | Mapping | IterableDataset) or not is_indexed:
        raise InputTypeError(
            f"{name} must be a map-style data set of (PIL image, label), got {type(dataset).__name__}; open it with "
            "timm_igkd.load_labeled_images"
        )


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise InputError unless low <= value <= high (NaN fails); InputTypeError unless it is a number."""
    check_number(name, value)
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        is_shown = not isinstance(value, int) or abs(value) < 1 << 1000  # no float holds a larger int
        got = f"{value:g}" if is_shown else "one of hundreds of digits"
        raise InputError(f"{name} must be {allowed}, got {got}")


def check_whole(name: str, value: Any) -> int:
    """Return a whole number, be it numpy's or a tensor of one, as an int.

    Raises:
        InputTypeError: no number, or a truth value. InputError: a number with a fraction, or of a type for those.
    """
    check_number(name, value)
    if isinstance(value, bool):
        raise InputTypeError(f"{name} must be a whole number, got bool; give a number")
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {value}; give one without a point") from None


def check_count(name: str, count: Any, low: int = 1, most: int = 2**31 - 1) -> int:
    """Return a whole number of low to most, as an int; no machine has more of anything that is counted.

    Raises:
        as `check_whole` does, and InputError outside of that range.
    """
    number = check_whole(name, count)
    check_range(name, number, low)
    check_range(name, number, low, most)
    return number


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return lines[0][:limit] if lines else type(error).__name__


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Return `value`; an InputError that offers the nearest unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")
    return value


def without_credentials(text: str) -> str:
    """Return a name or address without the user and password it may hold before its host, whatever signs they hold."""
    return _SLASHED_PASSWORD.sub(r"\1", _USER.sub(r"\1", text))
