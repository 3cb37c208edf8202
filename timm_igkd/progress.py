"""Progress of long work: a bar on a terminal, and off one a line now and then, so that a log shows that it lives."""

import operator
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30.0
_T = TypeVar("_T")


class LineProgress(Generic[_T]):
    """What `progress_bar` gives off a terminal; the part of tqdm's interface that is used here.

    Args:
        items: what is iterated over, or None where `update` counts.
        total: of what is counted, or None where it is not known.
        desc: what is done.
        unit: of what is counted.
        initial: how many were there before: counted as done, not as work of this time.
    """

    def __init__(self, items: Iterable[_T] | None, total: int | None, desc: str, unit: str, initial: int = 0):
        self._items, self.total, self.desc, self.unit = items, total, desc, unit
        self.n = self._initial = initial
        self._postfix = ""
        self._started = self._told = time.monotonic()

    def __enter__(self) -> "LineProgress[_T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[_T]:
        assert self._items is not None
        for item in self._items:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """Count on, and print a line where the last one is long ago."""
        self.n += n
        now = time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        text = f"{self.desc}: {self.n}"
        if self.total:
            text += f" of {self.total} {self.unit} ({100 * self.n / self.total:.0f} %)"
        else:
            text += f" {self.unit}"
        text += f", {_clock(seconds)} gone"
        if self.total and (done := self.n - self._initial):
            text += f", about {_clock(seconds * (self.total - self.n) / done)} left"
        return text + self._postfix

    def set_postfix(self, values: dict[str, Any] | None = None, **more: Any) -> None:
        """Tell more in the next line."""
        found = {**(values or {}), **more}
        self._postfix = "".join(f", {name} {value}" for name, value in found.items())

    def set_postfix_str(self, text: str) -> None:
        """Tell more in the next line."""
        self._postfix = f", {text}" if text else ""

    def close(self) -> None:
        """Nothing is left to do; short work prints nothing at all."""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_bar(
    items: Iterable[_T] | None = None,
    *,
    total: int | None = None,
    desc: str,
    unit: str,
    show: bool = True,
    initial: int = 0,
    **options: Any,
) -> Any:
    """Return tqdm's bar where stderr is a terminal, else a `LineProgress`; both are used alike.

    Args:
        items: to iterate over; None: count with `update`.
        total: of what is counted; default: the length of `items`.
        desc: what is done.
        unit: of what is counted.
        show: False: nothing is shown.
        initial: how many of the total are there already, as after a resumption; the time left is of the rest.
        options: of tqdm.
    """
    if not show or sys.stderr.isatty():
        return tqdm(items, total=total, desc=desc, unit=unit, disable=not show, initial=initial, **options)
    if total is None and items is not None:
        total = operator.length_hint(items) or None
    return LineProgress(items, total, desc, unit, initial)
