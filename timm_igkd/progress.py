"""Progress of long work: a bar on a terminal, and off one a line now and then, so that a log shows that it lives."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import std
from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30.0


class LineProgress(std.tqdm):
    """tqdm's bar off a terminal: lines that stay, SECONDS_BETWEEN_LINES apart; short work prints nothing at all.

    Args:
        items: what is iterated over, or None where `update` counts.
        options: of tqdm.
    """

    monitor_interval = 0  # no thread that makes lines more frequent
    last_print_t: float

    def __init__(self, items: Iterable[Any] | None = None, **options: Any):
        wait = dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS_BETWEEN_LINES)
        # no work (`update(0)`) is told too; the time left is by the mean speed
        super().__init__(items, **options | wait | {"miniters": 0, "smoothing": 0, "ncols": 0, "leave": False})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line where the last one is long ago; tqdm asks after `set_postfix` and others' lines too."""
        now = self._time()
        if now - self.last_print_t >= SECONDS_BETWEEN_LINES:
            self.last_print_t = now
            print(self, file=self.fp, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Leave lines that were printed."""

    def close(self) -> None:
        """Draw nothing at the end."""
        self.disable = True


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str,
    unit: str,
    show: bool = True,
    **options: Any,
) -> Any:
    """Return tqdm's bar where stderr is a terminal, else a `LineProgress`; both are used alike.

    Args:
        items: to iterate over; None: count with `update`.
        total: of what is counted; default: the length of `items`.
        desc: what is done.
        unit: of what is counted.
        show: False: nothing is shown.
        options: of tqdm, such as `initial`: how many were there before; the time left is of the rest.
    """
    kind = tqdm if not show or sys.stderr.isatty() else LineProgress
    return kind(items, total=total, desc=desc, unit=unit, disable=not show, **options)
