"""Files of the Hub that come from the cache because the Hub refused or did not answer: said, never silent."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

from timm_igkd.hub.client import quiet, watched_requests

_ABSENT_FILE = "EntryNotFound"  # an answer to a question whether a file is there, not a refusal
_NO_ANSWER = "no answer"


@contextmanager
def cache_use_is_told(what: str) -> Iterator[None]:
    """Print one line on stderr where a request failed meanwhile and the work went on: with the copy in the cache.

    Args:
        what: how the line calls what is read.
    """
    answers: dict[tuple[str, str], str | None] = {}  # the last one counts: the client asks again after some failures
    host = urlsplit(constants.ENDPOINT).hostname  # storage and the viewer of data sets, which may fail, are elsewhere

    def note(request: Any, answer: str | None) -> None:
        if request.url.host == host:
            answers[request.method, request.url.path] = answer

    def asked(request: Any) -> None:
        note(request, _NO_ANSWER)

    def answered(response: Any) -> None:
        note(response.request, _failure(response))

    with watched_requests(asked, answered), quiet("huggingface_hub", "datasets"):  # each would say it in its own way
        yield
    failure = next((failure for failure in answers.values() if failure), None)
    if failure is not None:
        print(f"warning: {what} was asked for at the Hub, {failure}; the copy in the cache is used", file=sys.stderr)


def _failure(response: Any) -> str | None:
    """Return what the Hub said where it gave nothing; None for an answer."""
    status, code = response.status_code, response.headers.get("X-Error-Code")
    if status < 400 or code == _ABSENT_FILE:
        return None
    return f"status {status}" + (f" ({code})" if code and code.isalnum() else "")
