"""What our own requests need of huggingface_hub's client, which all threads of a process share.

No client is closed or replaced: hooks are added to the one that is there and to those that follow it after a failure,
and taken away at the end. Requests of threads that were there before and are not ours pass untouched.
"""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

Hook = Callable[[Any], None]


class _Shared:
    """A state of the whole process that lasts from the first of its holders to the last.

    Args:
        begin: brings it about, and returns what ends it.
    """

    def __init__(self, begin: Callable[[], Callable[[], None]]):
        self._begin, self._end, self._holders, self._lock = begin, lambda: None, 0, threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for a block."""
        with self._lock:
            if self._holders == 0:
                self._end = self._begin()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._end()


# ---- hooks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Watch:
    """Two hooks, and the threads whose requests are not theirs; threads that the Hub's client starts are not known."""

    asked: Hook
    answered: Hook | None
    others: frozenset[threading.Thread]


_WATCHES: list[_Watch] = []


def _own_watches() -> list[_Watch]:
    return [watch for watch in tuple(_WATCHES) if threading.current_thread() not in watch.others]


def _on_request(request: Any) -> None:
    for watch in _own_watches():
        watch.asked(request)


def _on_response(response: Any) -> None:
    for watch in _own_watches():
        if watch.answered is not None:
            watch.answered(response)


_HOOKS = {"request": _on_request, "response": _on_response}


def _hooked(client: Any, ours: dict[str, Hook]) -> Any:
    """Give a client these hooks of ours, once, behind those of others."""
    theirs = {kind: [hook for hook in each if hook not in _HOOKS.values()] for kind, each in client.event_hooks.items()}
    client.event_hooks = {kind: [*theirs.get(kind, ()), *([ours[kind]] if kind in ours else [])] for kind in _HOOKS}
    return client


def _add_hooks() -> Callable[[], None]:
    """Hook the client and the factory of those to come; `set_client_factory` would close it under other threads."""
    factory = hub_http._GLOBAL_CLIENT_FACTORY

    def hooked_factory() -> Any:
        return _hooked(factory(), _HOOKS)

    hub_http._GLOBAL_CLIENT_FACTORY = hooked_factory
    if hub_http._GLOBAL_CLIENT is not None:
        _hooked(hub_http._GLOBAL_CLIENT, _HOOKS)

    def remove() -> None:
        if hub_http._GLOBAL_CLIENT_FACTORY is hooked_factory:  # else the host has set one of its own meanwhile
            hub_http._GLOBAL_CLIENT_FACTORY = factory
        if hub_http._GLOBAL_CLIENT is not None:
            _hooked(hub_http._GLOBAL_CLIENT, {})

    return remove


_HOOKED = _Shared(_add_hooks)


@contextmanager
def watched_requests(asked: Hook, answered: Hook | None = None) -> Iterator[None]:
    """Have hooks see the requests to the Hub that this thread makes, and the threads that start meanwhile.

    Args:
        asked: gets every request before it is sent, and may change its extensions.
        answered: gets every response.
    """
    watch = _Watch(asked, answered, frozenset(threading.enumerate()) - {threading.current_thread()})
    with _HOOKED.held():
        _WATCHES.append(watch)
        try:
            yield
        finally:
            _WATCHES.remove(watch)


# ---- quiet ---------------------------------------------------------------------------------------------------------


def _quieten(name: str) -> Callable[[], None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    return lambda: logger.setLevel(level)


def _hide_bars() -> Callable[[], None]:
    if sys.stderr.isatty() or are_progress_bars_disabled():
        return lambda: None
    disable_progress_bars()
    return enable_progress_bars


_QUIET = {name: _Shared(partial(_quieten, name)) for name in ("huggingface_hub", "datasets")}
_BARS = _Shared(_hide_bars)


@contextmanager
def quiet(*loggers: str, bars: bool = True) -> Iterator[None]:
    """Let these loggers tell errors alone, and show progress on a terminal alone unless `bars`; we report ourselves."""
    with ExitStack() as stack:
        for name in loggers:
            stack.enter_context(_QUIET[name].held())
        if not bars:
            stack.enter_context(_BARS.held())
        yield
